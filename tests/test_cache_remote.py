"""Caches in an object store: what is fetched, checked, kept and removed."""

import json
import shutil

import cached
import fsspec
import pytest
import torch

from kronsae.cache import CacheActivations, CacheIndex, Damaged
from kronsae.cache.remote import Remote, is_url
from kronsae.errors import InputError
from kronsae.train import main

URL = "memory://bucket/cache"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        cached.make(patch, folder)
    return folder


@pytest.fixture
def store(cache, tmp_path, monkeypatch):
    """The cache in fsspec's memory; returns its file system."""
    monkeypatch.setenv("KRONSAE_CACHE", str(tmp_path / "fetched"))
    system = fsspec.filesystem("memory")
    put(system, cache)
    yield system
    system.rm("/", recursive=True)


def put(system, folder):
    for path in folder.glob("*.*"):
        if path.is_file():
            system.pipe(f"/bucket/cache/{path.name}", path.read_bytes())


def opened(folder, **settings):
    return CacheActivations(
        folder, **({"layer": 2, "batch_size": 24, "buffer_tokens": 400} | settings)
    )


def fetched(tmp_path):
    return {path.name for path in (tmp_path / "fetched").glob("*/*")}


def same(found, expected):
    return all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("order", ["global", "stream"])
def test_batches_are_those_of_the_folder(order, store, cache, tmp_path):
    """Files are fetched when they are first read, and once."""
    source, truth = opened(URL, order=order), opened(cache, order=order)
    assert source.describe() == truth.describe() and not fetched(tmp_path)
    assert source.heldout_activations().equal(truth.heldout_activations())
    expected = list(truth)
    assert same(list(source), expected)
    used = [shard.activations[1].file for shard in truth.index.train + truth.index.heldout]
    assert fetched(tmp_path) == set(used)
    for name in used:
        store.rm(f"/bucket/cache/{name}")
    assert same(list(opened(URL, order=order)), expected)


def test_a_run_trains_from_a_url(store, cache, tmp_path):
    """With the weights of one from the folder; the URL is recorded."""
    flags = ["--layer", "2", "--tokens", "500", "--batch-size", "64", "--dict-size", "64"]
    flags += ["--k", "4", "--eval-every", "0", "--device", "cpu"]
    for place, out in ((URL, "a"), (str(cache), "b")):
        assert main(["--activations", place, *flags, "--out", str(tmp_path / out)]) == 0
    weights = [(tmp_path / run / "sae" / "sae.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]
    assert (
        json.loads((tmp_path / "a" / "config.json").read_text())["config"]["data"]["activations"]
        == URL
    )


def test_the_files_not_read_for_longest_are_removed(store, cache, tmp_path, monkeypatch):
    sizes = [shard.activations[1].bytes for shard in CacheIndex.open(cache).train]
    monkeypatch.setenv("KRONSAE_CACHE_GB", str(3.5 * max(sizes) / 1e9))
    truth = list(opened(cache, order="stream", epochs=2))
    assert same(list(opened(URL, order="stream", epochs=2)), truth)
    names = [shard.activations[1].file for shard in CacheIndex.open(cache).train]
    assert names[-1] in fetched(tmp_path) and 3 <= len(fetched(tmp_path)) <= 4
    assert names[0] not in fetched(tmp_path)
    monkeypatch.setenv("KRONSAE_CACHE_GB", "much")
    with pytest.raises(InputError, match="KRONSAE_CACHE_GB: expected a number, got 'much'"):
        list(opened(URL))


@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "remove"])
def test_what_is_not_in_the_index_is_refused(damage, store, cache, tmp_path):
    name = "/bucket/cache/train-00003.1.safetensors"
    content = store.cat(name)
    if damage == "remove":
        store.rm(name)
    else:
        flipped = content[:500] + bytes([content[500] ^ 1]) + content[501:]
        changed = {"flip": flipped, "truncate": content[:-1], "grow": content + b"x"}
        store.pipe(name, changed[damage])
    with pytest.raises(Damaged, match="bucket/cache/train-00003.1.safetensors cannot be used"):
        list(opened(URL))
    assert not {n for n in fetched(tmp_path) if "00003.1" in n}
    store.pipe(name, content)
    assert same(list(opened(URL)), list(opened(cache)))


def test_a_fetched_file_that_was_damaged_is_fetched_again(store, cache, tmp_path):
    truth = list(opened(cache))
    list(opened(URL))
    [path] = (tmp_path / "fetched").glob("*/train-00002.1.*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Damaged, match="SHA-256"):
        list(opened(URL))
    assert same(list(opened(URL)), truth)


def test_a_run_keeps_to_its_tokens_when_the_store_has_more(store, cache, tmp_path, monkeypatch):
    small = tmp_path / "small"
    tokens = cached.make(monkeypatch, small, tokens=251).train_rows
    source, truth = opened(URL, tokens=tokens), opened(small)
    assert source.describe() == truth.describe()
    assert same(list(source), list(truth))


def test_what_cannot_be_read_is_said(store, tmp_path):
    assert not is_url("C:/cache") and not is_url("runs/x") and is_url("s3://a/b")
    with pytest.raises(InputError, match="there is no memory://nowhere/index.json"):
        CacheIndex.open("memory://nowhere")
    with pytest.raises(InputError, match="activations 'nosuch://a' cannot be read"):
        Remote("nosuch://a")
    store.pipe("/bucket/cache/index.json", b"{")
    with pytest.raises(InputError, match="index.json cannot be read.*upload it again"):
        CacheIndex.open(URL)


def test_other_places_that_fsspec_reads(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("KRONSAE_CACHE", str(tmp_path / "fetched"))
    moved = shutil.copytree(cache, tmp_path / "moved")
    rows = torch.cat(list(opened(f"file://{moved}/")))
    assert rows.equal(torch.cat(list(opened(cache))))
