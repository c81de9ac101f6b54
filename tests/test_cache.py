"""Caches of activations: what is in them, in which order it comes out, and what damage does."""

import errno
import hashlib
import io
import json
import os
import shutil
import threading

import cached
import pytest
import torch
from safetensors.torch import load_file

from kronsae.cache import CacheActivations, CacheIndex, Damaged, index, reader, writer
from kronsae.cache.index import damaged
from kronsae.data import LanguageModel, LanguageModelActivations
from kronsae.data.many_hookpoints import ManyHookpoints
from kronsae.errors import InputError
from kronsae.system import checkpoint, parallel
from kronsae.system.files import read_checksummed, write_checksummed

BATCH = 24


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A float32 cache of two layers, in several shards. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("caches") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        cached.make(patch, folder)
    return folder


@pytest.fixture
def copy(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "copy")


@pytest.fixture(scope="module")
def model():
    return LanguageModel.load("embedded")


@pytest.fixture
def harvester(monkeypatch):
    """Harvests into a folder, with a shared model and text."""
    cached.give_text(monkeypatch)
    cached.give_model(monkeypatch)
    return lambda folder, config=cached.CONFIG: writer.harvest(config, folder)


def live(model, seed=0, batch_size=BATCH, **settings):
    data = cached.dataclasses.replace(cached.DATA, buffer_tokens=128, **settings)
    return LanguageModelActivations(model, cached.text(data, seed), data, batch_size, seed)


def opened(folder, **settings):
    return CacheActivations(folder, **({"layer": 2, "batch_size": BATCH} | settings))


def same(found, expected):
    return len(found) == len(expected) and all(
        a.equal(b) for a, b in zip(found, expected, strict=True)
    )


def same_rows(found, expected):
    """Whether the rows are the same, each as often, in any order."""
    pairs = zip(*(x.unique(dim=0, return_counts=True) for x in (found, expected)), strict=True)
    return all(a.equal(b) for a, b in pairs)


def train_rows(folder, place=1):
    shards = CacheIndex.open(folder).train
    return [load_file(folder / s.activations[place].file)["activations"] for s in shards]


# What is in a cache


def test_rows_are_hidden_states_of_the_masked_tokens(cache, model):
    """Of both layers, for each context in the files; and a context is in one section alone."""
    held = CacheIndex.open(cache)
    assert len(held.train) > 5 and len(held.heldout) == 1
    contexts = {}
    for section in ("heldout", "train"):
        for shard in getattr(held, section):
            tokens = load_file(cache / shard.tokens.file)
            ids, mask = tokens["contexts"], tokens["mask"]
            assert ids.dtype == torch.int32 and ids.shape == mask.shape
            assert mask.sum() == shard.rows and not mask[:, 0].any()
            assert not mask[ids == model.tokenizer.eos_token_id].any()
            for part in ids.split(cached.PASS):
                contexts.setdefault(section, []).append(part)
            states = model.model(input_ids=ids.long(), output_hidden_states=True).hidden_states
            for layer, mark in zip(cached.LAYERS, shard.activations, strict=True):
                rows = load_file(cache / mark.file)["activations"]
                torch.testing.assert_close(rows, states[layer + 1][mask], rtol=1e-4, atol=1e-4)
    source = live(model)
    assert torch.cat(contexts["heldout"]).equal(source.heldout_contexts().int())
    assert same(contexts["train"], [c.int() for c in iter(source.next_contexts, None)])


def test_one_forward_pass_reads_all_and_ends_after_the_last(model):
    """Blocks behind the last hookpoint do not run, and those before it once."""
    ran = []
    blocks = model.model.gpt_neox.layers
    hooks = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    names = ["gpt_neox.layers.2", "gpt_neox.layers.0.mlp"]
    try:
        after, mlp = model.activations_at(names, torch.arange(1, 9).view(2, 4))
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [0, 1, 2]
    assert after.shape == mlp.shape == (2, 4, model.d_model) and not after.equal(mlp)
    with pytest.raises(InputError, match="no such module"):
        model.activations_at(["gpt_neox.layers.9"], torch.ones(1, 2, dtype=torch.int64))


def test_index_says_what_is_there(cache, model):
    held = CacheIndex.open(cache)
    assert [each.name for each in held.hookpoints] == ["gpt_neox.layers.1", "gpt_neox.layers.2"]
    assert [each.layer for each in held.hookpoints] == [1, 2]
    assert held.model["parameters"] == sum(p.numel() for p in model.model.parameters())
    assert (held.data.model, held.data.dataset, held.dtype) == ("embedded", "given", "float32")
    files = {path.name for path in cache.iterdir()} - {
        "index.json",
        "harvest.json",
        ".lock",
        "progress",
    }
    marks = held.all_files()
    assert {mark.file for mark in marks} == files
    for mark in marks:
        data = (cache / mark.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (mark.bytes, mark.sha256)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_dtype_rounds_and_nothing_else(dtype, cache, monkeypatch, tmp_path):
    held = cached.make(monkeypatch, tmp_path / "cache", dtype=dtype)
    assert held.dtype == dtype and held.bytes < 0.52 * CacheIndex.open(cache).bytes
    exact = torch.cat(train_rows(cache))
    assert torch.cat(train_rows(tmp_path / "cache")).equal(exact.to(getattr(torch, dtype)))
    source = opened(tmp_path / "cache", order="stream")
    batch = next(iter(source))
    assert (batch.dtype, source.buffer.rows[0].dtype) == (torch.float32, held.dtype_in_memory)


def test_int8_is_each_row_times_its_scale(cache, monkeypatch, tmp_path):
    """Off by half a scale at most; the rest is the rounding of bfloat16 when it is read."""
    held = cached.make(monkeypatch, tmp_path / "cache", dtype="int8")
    assert held.dtype == "int8" and held.bytes < 0.28 * CacheIndex.open(cache).bytes
    exact = torch.cat(train_rows(cache))
    files = [load_file(tmp_path / "cache" / s.activations[1].file) for s in held.train]
    scales, rows = (torch.cat([file[name] for file in files]) for name in ("scales", "activations"))
    assert scales.equal(exact.abs().amax(1) / 127) and rows.abs().amax(1).eq(127).all()
    expected = rows * scales[:, None]
    assert ((expected - exact).abs() <= 0.501 * scales[:, None]).all()
    common = {"order": "stream", "buffer_tokens": 128}
    batches, truth = (list(opened(f, **common)) for f in (tmp_path / "cache", cache))
    for batch, exact in zip(batches, truth, strict=True):
        scale = exact.abs().amax(1, keepdim=True) / 127
        off = (batch - exact).abs()
        assert batch.dtype == torch.float32 and (off <= 0.51 * scale + 2**-8 * exact.abs()).all()
    permuted = torch.cat(list(opened(tmp_path / "cache", buffer_tokens=400)))
    assert same_rows(permuted, torch.cat(batches))
    source = opened(tmp_path / "cache")
    variance = exact_heldout(cache).var(0).sum()
    error = (source.heldout_activations() - exact_heldout(cache)).square().sum(1).mean()
    assert error < 5e-4 * variance


def exact_heldout(folder):
    return opened(folder).heldout_activations()


def test_int8_of_rows_that_are_zero_or_tiny():
    x = torch.tensor([[0.0, 0.0], [1e-43, -1e-43], [3e38, -1e-10], [2.0, -4.0]])
    into = {"scales": torch.empty(4), "activations": torch.empty(4, 2, dtype=torch.int8)}
    writer._store(x, into, None)
    read = reader._scaled(**into, into=None).float()
    assert read[0].tolist() == [0, 0]
    assert read[3].tolist() == [2.015625, -4.0]  # 64 / 127 of 4, in bfloat16
    assert read.isfinite().all() and (read[1].abs() < 1e-42).all()
    assert read[2, 0] == pytest.approx(3e38, rel=2**-8) and read[2, 1] == 0


def test_an_int8_cache_is_made_good_and_longer(monkeypatch, tmp_path):
    folder, whole = tmp_path / "cache", tmp_path / "whole"
    cached.make(monkeypatch, whole, dtype="int8")
    tokens = cached.make(monkeypatch, folder, dtype="int8", tokens=251).train_rows
    flip(folder / "train-00001.0.safetensors")
    expected = list(opened(whole, tokens=tokens))
    running = opened(folder, buffer_tokens=131_072)
    cached.make(monkeypatch, folder, dtype="int8")
    assert cached.contents(folder) == cached.contents(whole)
    assert same(list(running), expected)


def test_what_float16_cannot_hold_is_refused(harvester, monkeypatch, tmp_path):
    read = LanguageModelActivations.read
    monkeypatch.setattr(LanguageModelActivations, "read", lambda *a: [1e6 * x for x in read(*a)])
    config = cached.dataclasses.replace(cached.CONFIG, dtype="float16")
    with pytest.raises(InputError, match=r"gpt_neox.layers.1 has activations.*--dtype bfloat16"):
        harvester(tmp_path / "cache", config)


def test_tokens_are_at_least_as_many_as_asked_for(monkeypatch, tmp_path):
    held = cached.make(monkeypatch, tmp_path / "cache", tokens=250)
    assert 250 <= held.train_rows < 250 + cached.PASS * cached.LENGTH
    assert all(shard.rows >= 100 for shard in held.train[:-1])


# In which order it comes out


@pytest.mark.parametrize("seed", [0, 3])
def test_stream_order_gives_the_batches_of_live_training(seed, model, monkeypatch, tmp_path):
    """Bit for bit, with any size of shards, also from the middle on."""
    cached.make(monkeypatch, tmp_path / "cache", seed=seed, shard_tokens=70)
    settings = {"order": "stream", "seed": seed, "buffer_tokens": 128}
    source = opened(tmp_path / "cache", **settings)
    expected = list(live(model, seed))
    assert same(list(source), expected) and len(expected) > 10
    first = opened(tmp_path / "cache", **settings)
    batches = iter(first)
    for _ in range(7):
        next(batches)
    again = opened(tmp_path / "cache", **settings)
    again.load_state_dict(first.state_dict())
    assert same(list(again), expected[7:])


def test_stream_order_gives_pairs_of_live_training(cache):
    both = LanguageModel.load("embedded", layer=1, target_hookpoint="gpt_neox.layers.2")
    source = opened(
        cache,
        layer=1,
        target_hookpoint="gpt_neox.layers.2",
        order="stream",
        buffer_tokens=128,
    )
    assert (source.d_model, source.d_target) == (both.d_model, both.d_target)
    expected = live(both)
    assert same(list(source), list(expected))
    assert source.heldout_activations().equal(expected.heldout_activations())


def test_held_out_part_is_that_of_live_training(cache, model):
    source, expected = opened(cache), live(model)
    assert source.heldout_activations().equal(expected.heldout_activations())
    assert source.heldout_contexts().equal(expected.heldout_contexts())
    assert source.heldout_mask().equal(expected.heldout_mask())


def test_every_epoch_gives_each_row_once_in_another_order(cache):
    everything = torch.cat(train_rows(cache))
    rows = torch.cat(list(opened(cache, epochs=2, buffer_tokens=400)))
    count = len(everything)
    epochs = rows[:count], rows[count:]
    assert all(same_rows(epoch, everything) for epoch in epochs)
    assert not epochs[0].equal(epochs[1])
    other = torch.cat(list(opened(cache, seed=1, buffer_tokens=400)))
    assert same_rows(other, everything) and not other.equal(epochs[0])


def test_a_batch_goes_on_into_the_next_group_and_epoch(cache):
    sizes = [len(batch) for batch in opened(cache, epochs=3, buffer_tokens=400)]
    total = 3 * CacheIndex.open(cache).train_rows
    assert set(sizes[:-1]) == {BATCH} and sum(sizes) == total and 0 < sizes[-1] <= BATCH


def test_rows_mix_within_a_group_of_shards_and_groups_over_the_cache(cache):
    """Consecutive rows come from several shards; which shards are together changes by epoch."""
    shards = train_rows(cache)
    assert all(100 <= len(rows) <= 133 for rows in shards[:-1])  # 3 of them in a group of 400
    owners = {}
    for number, rows in enumerate(shards):
        for row in rows.tolist():
            owners.setdefault(tuple(row), set()).add(number)
    groups = []
    for epoch in torch.cat(list(opened(cache, epochs=2, buffer_tokens=400))).chunk(2):
        found = [owners[tuple(row)] for row in epoch[:200].tolist()]
        alone = [next(iter(each)) for each in found if len(each) == 1]
        groups.append(set(alone))
        assert 2 <= len(groups[-1]) <= 3 and len(set(alone[:BATCH])) >= 2
    assert groups[0] != groups[1]


def test_a_shard_is_read_once_an_epoch_and_one_group_ahead(cache, monkeypatch):
    read, names, ahead = reader.read_tensors, [], threading.Event()

    def watched(folder, mark, *arguments, **settings):
        names.append(mark.file)
        if len(names) == 2:
            ahead.set()
        return read(folder, mark, *arguments, **settings)

    monkeypatch.setattr(reader, "read_tensors", watched)
    source = opened(cache, epochs=2, buffer_tokens=1)  # a group is one shard
    batches = iter(source)
    next(batches)
    assert ahead.wait(20)  # while nobody asked for more
    rest = list(batches)
    shards = CacheIndex.open(cache).train
    assert sorted(names) == sorted(2 * [shard.activations[1].file for shard in shards]) and rest


def test_resumes_at_any_batch_from_two_numbers(cache, monkeypatch):
    """Batches go on as if nothing had happened; what lies before is not read."""
    settings = {"epochs": 2, "buffer_tokens": 400}
    expected = list(opened(cache, **settings))
    read, names = reader.read_tensors, []

    def watched(folder, mark, *arguments, **keywords):
        names.append(mark.file)
        return read(folder, mark, *arguments, **keywords)

    monkeypatch.setattr(reader, "read_tensors", watched)
    source = opened(cache, **settings)
    states = [source.state_dict()] + [source.state_dict() for _ in source]
    assert json.loads(json.dumps(states)) == states
    for position in (*range(0, len(expected), 5), len(expected) - 1):  # before smaller groups, too
        again = opened(cache, **settings)
        again.load_state_dict(states[position])
        names.clear()
        assert same(list(again), expected[position:])
    assert len(names) <= 3  # for the last batch of all


def test_a_batch_is_made_ahead_and_left_where_it_ends(cache):
    """A batch that waits is not given out; who stops in the middle leaves no thread behind."""
    before = set(threading.enumerate())  # another test's iterator may not be collected yet
    source = opened(cache, buffer_tokens=400)
    batches = iter(source)
    next(batches), next(batches)
    assert source.state_dict() == {"given": 2 * BATCH}
    made = set(threading.enumerate()) - before
    assert any(thread.name.startswith("kronsae-batch") for thread in made)
    batches.close()
    assert source.state_dict() == {"given": 2 * BATCH}
    assert not made & set(threading.enumerate())
    expected = list(opened(cache, buffer_tokens=400))
    assert same(list(source), expected[2:])


@pytest.mark.parametrize("order", ["global", "stream"])
def test_batches_are_float32_on_the_device(order, monkeypatch, tmp_path):
    """On one that is not the CPU they arrive as they are stored."""
    cached.make(monkeypatch, tmp_path / "cache", tokens=250, dtype="bfloat16")
    settings = {"order": order, "buffer_tokens": 200}
    expected = list(opened(tmp_path / "cache", **settings))
    there = list(opened(tmp_path / "cache", **settings, device="meta"))
    assert len(there) == len(expected) > 5
    for a, b in zip(there, expected, strict=True):
        assert (a.device.type, a.dtype, a.shape) == ("meta", torch.float32, b.shape)


def test_memory_is_two_groups_whatever_the_cache(cache, monkeypatch, tmp_path):
    small = cached.make(monkeypatch, tmp_path / "small", tokens=500)
    sizes = []
    for folder in (cache, tmp_path / "small"):
        source = opened(folder, buffer_tokens=256)
        made, new = [], source._new_slot
        monkeypatch.setattr(
            source, "_new_slot", lambda new=new, made=made: made.append(new()) or made[-1]
        )
        list(source)
        sizes.append(sum(part.shape[0] for slot in made for part in slot))
        assert len(made) == 2
    assert CacheIndex.open(cache).train_rows > 2 * small.train_rows
    assert max(sizes) <= 2 * 256


# Damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size - 5)


def retype(path):
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))


DAMAGES = [flip, truncate, retype, os.remove]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_is_named_and_made_good(damage, cache, copy, harvester):
    name = "train-00003.1.safetensors"
    damage(copy / name)
    with pytest.raises(Damaged, match=f"{name}.*kronsae harvest --resume") as error:
        list(opened(copy))
    assert str(copy) in str(error.value)
    [(section, number, _)] = damaged(copy, CacheIndex.open(copy))
    assert (section, number) == ("train", 3)
    harvester(copy)
    assert cached.contents(copy) == cached.contents(cache)


@pytest.mark.parametrize("section", ["train", "heldout"])
def test_token_ids_are_made_good_from_the_text(section, cache, copy, harvester):
    for path in copy.glob(f"{section}-*.tokens.safetensors"):
        flip(path)
    harvester(copy)
    assert cached.contents(copy) == cached.contents(cache)


def test_damage_is_not_made_good_with_another_text(copy, monkeypatch, harvester):
    flip(copy / "train-00000.0.safetensors")
    cached.give_text(monkeypatch, cached.TEXTS[1:])
    with pytest.raises(InputError, match="text has changed"):
        harvester(copy)


def test_checksums_can_be_left_unread(copy):
    flip(copy / "train-00003.1.safetensors")
    assert list(opened(copy, verify=False))


TAMPERED = {
    "file name": lambda d: d["train"][0]["tokens"].update(file="../index.json"),
    "file name of another section": lambda d: d["train"][0]["tokens"].update(
        file="heldout-00000.tokens.safetensors"
    ),
    "absolute name": lambda d: d["train"][0]["activations"][0].update(file="/etc/passwd"),
    "twice": lambda d: d["train"].append(d["train"][0]),
    "dtype": lambda d: d.update(dtype="object"),
    "width": lambda d: d["hookpoints"][0].update(width=2**40),
    "float width": lambda d: d["hookpoints"][0].update(width=256.0),
    "rows": lambda d: d["train"][0].update(rows=2**50),
    "negative rows": lambda d: d["train"][0].update(rows=-1),
    "bytes": lambda d: d["train"][0]["tokens"].update(bytes=10),
    "sha256": lambda d: d["train"][0]["tokens"].update(sha256="0"),
    "a file less": lambda d: d["train"][0]["activations"].pop(),
    "no shard": lambda d: d.update(train=[]),
    "no key": lambda d: d.pop("seed"),
    "model": lambda d: d.update(model=None),
    "code to trust": lambda d: d["data"].update(trust_remote_code=True),
    "unknown": lambda d: d["train"][0].update(code="x"),
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_an_index_is_not_trusted(tamper, copy):
    document = read_checksummed(copy / "index.json")
    tamper(document)
    write_checksummed(copy / "index.json", document)
    with pytest.raises(InputError, match="index.json is damaged"):
        CacheIndex.open(copy)


def test_sizes_are_checked_before_memory_is_asked_for(copy, monkeypatch):
    """An index that agrees with itself, but not with its files, asks for half a petabyte."""
    document = read_checksummed(copy / "index.json")
    rows = document["context_length"] * 2**35
    for shard in document["train"]:
        header = shard["activations"][0]["bytes"] - 4 * 256 * shard["rows"]
        shard.update(rows=rows, contexts=2**35)
        shard["tokens"]["bytes"] = 200 + 5 * rows
        for mark in shard["activations"]:
            mark["bytes"] = header + 4 * 256 * rows
    write_checksummed(copy / "index.json", document)
    CacheIndex.open(copy)
    monkeypatch.setattr(torch, "empty", None)
    with pytest.raises(Damaged, match="bytes, expected"):
        opened(copy)


def test_other_folders_are_refused(tmp_path, copy):
    with pytest.raises(InputError, match="is not a cache of activations"):
        CacheIndex.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a cache of activations: it is a file"):
        CacheIndex.open(tmp_path / "file")
    (copy / "index.json").write_text('{"format": "kronsae-activations", "format_version": 9}')
    with pytest.raises(InputError, match="expected format version 1, got 9"):
        CacheIndex.open(copy)
    (copy / "index.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        CacheIndex.open(copy)
    (copy / "index.json").unlink()
    shutil.rmtree(copy / "progress")
    with pytest.raises(InputError, match=r"the harvest is incomplete, without a shard.*--resume"):
        CacheIndex.open(copy)


def test_choices_that_the_cache_does_not_hold_are_refused(cache):
    with pytest.raises(InputError, match="which one.*gpt_neox.layers.1 .layer 1."):
        opened(cache, layer=None)
    with pytest.raises(InputError, match="layer 0: the cache has"):
        opened(cache, layer=0)
    with pytest.raises(InputError, match="is the hookpoint"):
        opened(cache, target_hookpoint="gpt_neox.layers.2")
    with pytest.raises(InputError, match="order: one of"):
        opened(cache, order="random")


# Interruptions


class PowerCut(BaseException):
    """The process is gone: nothing is cleared away."""


class Disk:
    """Lets the n-th change of the disk fail: the process dies, or there is no space."""

    def __init__(self, monkeypatch, at, error):
        self.changes, self.at, self.error = 0, at, error
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, self.watched(getattr(module, name), always=True))
        monkeypatch.setattr(index.Path, "unlink", self.watched(index.Path.unlink))
        monkeypatch.setattr(index, "open", self.opened, raising=False)

    def opened(self, path, mode, **settings):
        if mode == "rb":
            return open(path, mode, **settings)
        file = io.FileIO(path, "w")
        half = self.watched(file.write, always=True, at_the_cut=lambda data: file.write(data[:9]))
        file.write = half
        return file

    def watched(self, change, always=False, at_the_cut=None):
        def changed(*arguments, **settings):
            if self.changes > self.at and isinstance(self.error, PowerCut):
                return None  # the process that would have done this is dead
            if always:
                self.changes += 1
                if self.changes - 1 == self.at:
                    if at_the_cut is not None:
                        at_the_cut(*arguments)
                    raise self.error
            return change(*arguments, **settings)

        return changed


def check_what_is_there(folder):
    """All shards of an index that can be opened are whole; returns their number."""
    try:
        held = CacheIndex.open(folder)
    except InputError:
        return 0
    assert damaged(folder, held) == []
    return len(held.train)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "error", [PowerCut(), OSError(errno.ENOSPC, "no space")], ids=["kill", "full"]
)
def test_interrupted_anywhere_it_ends_in_the_same_bytes(error, harvester, tmp_path):
    """At each change of the disk in turn: the files are then those of an uninterrupted harvest."""
    config = cached.dataclasses.replace(cached.CONFIG, tokens=250, layers=(2,))
    harvester(tmp_path / "whole", config)
    whole = cached.contents(tmp_path / "whole")
    folder, at = tmp_path / "cache", 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, error)
            try:
                harvester(folder, config)
            except (PowerCut, InputError, OSError) as caught:
                assert isinstance(caught, PowerCut) or "no space" in str(caught)
        for path in folder.glob("*.safetensors"):  # nothing half-written under its final name
            assert path.read_bytes() == whole[path.name]
        check_what_is_there(folder)
        harvester(folder, config)
        assert cached.contents(folder) == whole
        shutil.rmtree(folder)
        if disk.changes <= at:  # it was not interrupted any more
            break
        at += 1 if at < 12 else 5
    assert at > 50


def test_another_harvest_is_not_mixed_in(copy, harvester, monkeypatch):
    other = cached.dataclasses.replace(cached.CONFIG, seed=1, layers=(2,))
    with pytest.raises(InputError, match=r"other settings.*\n.*layers: was \[1, 2\], is \[2\]"):
        harvester(copy, other)
    (copy / "index.json").unlink()
    (copy / "harvest.json").unlink()
    with pytest.raises(InputError, match="is not empty"):
        harvester(copy)


def test_a_changed_text_is_seen_when_a_harvest_goes_on(harvester, monkeypatch, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, 40, PowerCut())
        with pytest.raises(PowerCut):
            harvester(tmp_path / "cache")
    cached.give_text(monkeypatch, cached.TEXTS[1:])
    with pytest.raises(InputError, match="text has changed since the harvest began"):
        harvester(tmp_path / "cache")


# Part of a harvest, and more of it


def with_tokens(tokens, **settings):
    return cached.dataclasses.replace(cached.CONFIG, tokens=tokens, **settings)


def test_a_killed_harvest_is_read_as_far_as_it_got(cache, harvester, tmp_path):
    folder, whole = tmp_path / "cache", CacheIndex.open(cache)
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, 100, PowerCut())
        with pytest.raises(PowerCut):
            harvester(folder)
    assert not (folder / "index.json").exists()
    held = CacheIndex.open(folder)
    assert held.planned == 0 and 1 <= len(held.train) < len(whole.train)
    assert held.heldout == whole.heldout and held.train == whole.train[: len(held.train)]
    rows = torch.cat(list(opened(folder, order="stream", buffer_tokens=1)))
    assert same_rows(rows, torch.cat(train_rows(cache)[: len(held.train)]))
    with pytest.raises(InputError, match=r"so far \(of all of the text: the harvest is incomplete"):
        opened(folder).check_budget(10**6)
    harvester(folder)
    assert cached.contents(folder) == cached.contents(cache)
    assert CacheIndex.open(folder).planned is None


def test_a_newest_state_that_is_damaged_is_passed_over(copy):
    (copy / "index.json").unlink()
    newest = max((copy / "progress").iterdir())
    (newest / "state.json").write_text("{")
    shards = CacheIndex.open(copy).train
    shutil.rmtree(newest)
    assert CacheIndex.open(copy).train == shards and len(shards) > 4


def test_a_longer_harvest_ends_in_the_same_bytes(cache, harvester, tmp_path, monkeypatch):
    """In steps: into the last shard, over its end, with nothing to do, and to the text's end."""
    folder, written = tmp_path / "cache", []
    write = writer.write_tensors
    monkeypatch.setattr(writer, "write_tensors", lambda p, t: written.append(p.name) or write(p, t))
    for tokens in (230, 251, 252, 470, 10**6, 0):
        harvester(tmp_path / str(tokens), with_tokens(tokens))
        full = {
            file.file
            for shard in (CacheIndex.open(folder).train if folder.exists() else ())
            for file in shard.files
            if shard.rows >= cached.CONFIG.shard_tokens
        }
        written.clear()
        harvester(folder, with_tokens(tokens))
        assert not full & set(written)
        assert cached.contents(folder) == cached.contents(tmp_path / str(tokens))
    assert written == []  # all of the text was there
    assert cached.contents(folder) == cached.contents(cache)
    with pytest.raises(InputError, match="only --tokens may change, to more.*\n.*tokens: was 0"):
        harvester(folder, with_tokens(10**6))


@pytest.mark.parametrize("planned", [0, 10**6])
@pytest.mark.parametrize("further", [0, 1, 60])
def test_an_incomplete_harvest_may_end_with_fewer_tokens(planned, further, harvester, tmp_path):
    folder = tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, 100, PowerCut())
        with pytest.raises(PowerCut):
            harvester(folder, with_tokens(planned))
    so_far = CacheIndex.open(folder).train_rows
    with pytest.raises(InputError, match=f"may change, to {so_far} or more, as there are so many"):
        harvester(folder, with_tokens(so_far - 1))
    for path in (folder, tmp_path / "whole"):
        harvester(path, with_tokens(so_far + further))
    assert cached.contents(folder) == cached.contents(tmp_path / "whole")
    assert CacheIndex.open(folder).planned is None


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [230, 251])
def test_made_longer_and_interrupted_anywhere_it_ends_in_the_same_bytes(
    tokens, harvester, tmp_path
):
    """A kill costs the shard that is being made, and leaves an index of what is there."""
    longer = with_tokens(430, layers=(2,))
    harvester(tmp_path / "whole", longer)
    whole = cached.contents(tmp_path / "whole")
    harvester(tmp_path / "begun", with_tokens(tokens, layers=(2,)))
    shards = [s for s in CacheIndex.open(tmp_path / "begun").train if s.rows >= 100]
    folder, at = tmp_path / "cache", 0
    while True:
        shutil.copytree(tmp_path / "begun", folder)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, PowerCut())
            try:
                harvester(folder, longer)
            except PowerCut:
                pass
        assert check_what_is_there(folder) >= len(shards)
        harvester(folder, longer)
        assert cached.contents(folder) == whole
        shutil.rmtree(folder)
        if disk.changes <= at:
            break
        at += 1 if at < 30 else 5
    assert at > 40


def test_without_its_states_a_cache_is_made_longer_from_the_text(cache, harvester, tmp_path):
    folder = tmp_path / "cache"
    harvester(folder, with_tokens(251))
    shutil.rmtree(folder / "progress")
    harvester(folder, with_tokens(0))
    assert cached.contents(folder) == cached.contents(cache)


def test_states_of_an_earlier_version_are_gone_on_with(cache, harvester, tmp_path):
    folder = tmp_path / "cache"
    harvester(folder, with_tokens(251))
    for place in (folder / "progress").iterdir():
        state = checkpoint.load_state(place)
        document = state.pop("index")
        model = document["model"] | {"hookpoint": "x", "d_model": 512}
        names = ("tokenizer", "text", "dtype")
        state["facts"] = {"model": model, **{name: document[name] for name in names}}
        state["shards"] = {section: document[section] for section in ("heldout", "train")}
        copies = {"harvest.json": read_checksummed(place / "harvest.json")}
        checkpoint.save_state(place, state, copies=copies)
    harvester(folder, with_tokens(0))
    assert cached.contents(folder) == cached.contents(cache)


@pytest.mark.parametrize("order", ["global", "stream"])
def test_the_first_tokens_of_a_cache_are_those_of_a_smaller_one(order, cache, harvester, tmp_path):
    """Their fingerprint, batches and resumed batches, though the cache has grown."""
    small, grown = tmp_path / "small", tmp_path / "grown"
    tokens = harvester(small, with_tokens(251)).train_rows
    shutil.copytree(small, grown)
    settings = {"epochs": 3, "buffer_tokens": 250, "order": order}
    expected = list(opened(small, **settings))
    running = opened(grown, **settings)
    batches = iter(running)
    begun = [next(batches).clone() for _ in range(2)]
    harvester(grown, with_tokens(0))
    last, same_one = CacheIndex.open(small).train[-1], CacheIndex.open(grown).train[2]
    assert last.tokens.file == same_one.tokens.file and last.rows < same_one.rows
    assert same(begun + list(batches), expected)
    source = opened(grown, **settings, tokens=tokens)
    assert source.describe() == opened(small, **settings).describe()
    assert same(list(source), expected)
    whole = opened(grown, **settings, tokens=CacheIndex.open(grown).train_rows)
    assert whole.index == CacheIndex.open(cache)
    with pytest.raises(InputError, match="tokens to train on, not 1,000,000"):
        opened(grown, tokens=10**6)


def test_any_number_of_tokens_can_be_read(cache):
    everything = torch.cat(train_rows(cache))
    for tokens in (1, 57, 201):
        rows = torch.cat(list(opened(cache, tokens=tokens)))
        assert same_rows(rows, everything[:tokens])


def test_damage_is_found_in_a_shard_that_has_grown(cache, harvester, tmp_path):
    folder = tmp_path / "cache"
    tokens = harvester(folder, with_tokens(251)).train_rows
    source = opened(folder)
    harvester(folder, with_tokens(0))
    name = source.index.train[-1].activations[1].file
    content = bytearray((folder / name).read_bytes())
    content[400] ^= 1  # among the old rows
    (folder / name).write_bytes(content)
    with pytest.raises(Damaged, match=f"{name}.*SHA-256"):
        list(source)
    with pytest.raises(Damaged, match=name):
        opened(folder, tokens=tokens)


# Several processes


class Process(parallel.Group):
    """One of several ranks, which are threads here."""

    def __init__(self, rank, values, barrier):
        super().__init__()
        self.rank, self.size = rank, len(values)
        self.values, self.barrier = values, barrier

    def exchange(self, value):
        self.values[self.rank] = json.dumps(value)
        self.barrier.wait(60)
        values = [json.loads(each) for each in self.values]
        self.barrier.wait(60)
        return values


def share(count, work):
    """work(mesh) on each of so many ranks; returns what each gave or raised."""
    values, barrier, results = [None] * count, threading.Barrier(count), [None] * count
    activations, one_at_a_time = ManyHookpoints.activations_of_points, threading.Lock()

    def locked(*arguments):  # they share a model, and its hooks
        with one_at_a_time:
            return activations(*arguments)

    def run(rank):
        try:
            results[rank] = work(parallel.Mesh(world=Process(rank, values, barrier)))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, InputError):
                barrier.abort()  # the others notice that it is gone

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ManyHookpoints, "activations_of_points", locked)
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    return results


@pytest.fixture
def shared_by(harvester):
    """Harvests into a folder, shared by so many ranks."""
    return lambda count, folder, config=cached.CONFIG: share(
        count, lambda mesh: writer.harvest(config, folder, mesh=mesh)
    )


@pytest.mark.parametrize("count", [2, 3, 20])
def test_ranks_write_the_bytes_of_one_process(count, cache, shared_by, tmp_path):
    results = shared_by(count, tmp_path / "cache")
    assert results == [CacheIndex.open(cache)] * count
    assert cached.contents(tmp_path / "cache") == cached.contents(cache)


def test_each_rank_runs_its_own_passes(harvester, shared_by, tmp_path, monkeypatch):
    passes, read = {}, LanguageModelActivations.read

    def counted(source, ids, where):
        passes.setdefault(id(source), []).append(ids)
        return read(source, ids, where)

    monkeypatch.setattr(LanguageModelActivations, "read", counted)
    shared_by(2, tmp_path / "cache", with_tokens(470))  # 4 shards of 2 passes, and 2 held out
    assert sorted(map(len, passes.values())) == [4, 6]


def test_ranks_go_on_after_any_of_them_is_killed(cache, harvester, shared_by, tmp_path):
    """With other numbers of ranks, too; at most a shard of each rank is made again."""
    before = 0
    for number, (count, killed) in enumerate([(2, 1), (3, 0), (2, 0)]):
        with pytest.MonkeyPatch.context() as patch:
            write, calls = writer.write_tensors, []

            def dying(path, tensors, write=write, calls=calls, killed=killed, at=8 + number):
                calls.append(path)
                if len(calls) == at:
                    raise PowerCut
                return write(path, tensors)

            patch.setattr(writer, "write_tensors", dying)
            results = shared_by(count, tmp_path / "cache")
        assert any(isinstance(each, PowerCut) for each in results)
        shards = check_what_is_there(tmp_path / "cache")
        assert shards >= before
        before = shards
    assert before >= 2
    shared_by(4, tmp_path / "cache")
    assert cached.contents(tmp_path / "cache") == cached.contents(cache)


def test_ranks_make_damage_good_and_a_harvest_longer(cache, shared_by, tmp_path):
    folder = tmp_path / "cache"
    shared_by(2, folder, with_tokens(251))
    for name in ("train-00000.1.safetensors", "train-00001.tokens.safetensors"):
        flip(folder / name)
    shared_by(3, folder, with_tokens(251))
    assert damaged(folder, CacheIndex.open(folder)) == []
    shared_by(3, folder)
    assert cached.contents(folder) == cached.contents(cache)


def test_an_error_of_one_rank_is_that_of_all(shared_by, tmp_path, monkeypatch):
    write = writer.write_tensors

    def full(path, tensors):
        if path.name.startswith("train-00003"):
            raise InputError("no space")
        return write(path, tensors)

    monkeypatch.setattr(writer, "write_tensors", full)
    results = shared_by(2, tmp_path / "cache")
    assert len({str(each) for each in results}) == 1 and "rank 1: no space" in str(results[0])
    assert "resume by kronsae harvest --resume" in str(results[0])
    assert check_what_is_there(tmp_path / "cache") == 2


def test_ranks_need_one_folder(harvester, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SECONDS_TO_APPEAR", 0.0)
    results = share(
        2,
        lambda mesh: writer.harvest(
            cached.CONFIG, tmp_path / f"of-machine-{mesh.world.rank}", mesh=mesh
        ),
    )
    for error in results:
        assert "several processes need a folder that all of them see" in str(error)
