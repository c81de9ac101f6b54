"""A run that goes on with other workers gets the batches of an uninterrupted one, in their order.

One process stops, two go on and stop, one goes on to the end; or the language model moves into a
thread and out of it. What a trainer is given is compared: normalised inputs and targets, from every
kind of source. States go through checkpoints. (`test_parallel.py` compares what is learned.)
"""

import dataclasses
import functools
import json
from datetime import timedelta

import cached
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kronsae.cache import CacheActivations, reader
from kronsae.data import LanguageModel, LanguageModelActivations, open_text
from kronsae.data.text import IndexedText
from kronsae.system import parallel
from kronsae.system.checkpoint import load_state, save_state
from kronsae.system.parallel import ALONE
from kronsae.training import stream
from kronsae.training.stream import Stream

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
BATCH, BATCHES, STOPS = 48, 52, (7, 20)
"""The text is read twice: a bit more than 31 batches each time."""
TARGET = "gpt_neox.layers.2"
LIVE = ["live", "live, streamed", "live, two hookpoints"]
CACHE = [
    f"cache, {order}{pair}" for order in ("global", "stream") for pair in ("", ", two hookpoints")
]

load = functools.cache(LanguageModel.load)


def source_of(name, folder, overlap="off"):
    target = TARGET if "two hookpoints" in name else None
    if name in CACHE:
        order = name.split(", ")[1]
        settings = {"order": order, "epochs": 2, "batch_size": BATCH, "buffer_tokens": 400}
        return CacheActivations(folder / "cache", layer=1, target_hookpoint=target, **settings)
    config = dataclasses.replace(cached.DATA, buffer_tokens=400, epochs=2, overlap=overlap)
    if "streamed" in name:
        file = {"dataset": str(folder / "text.jsonl"), "streaming": True}
        text = open_text(dataclasses.replace(config, **file), 0)
    else:
        text = IndexedText(cached.TEXTS, None, seed=0, epochs=2, fingerprint="", name="given")
    model = load("embedded", layer=1, target_hookpoint=target)
    return LanguageModelActivations(model, text, config, BATCH, 0)


def batches(name, folder, since=None, until=None, count=BATCHES, overlap="off", mesh=ALONE):
    """[B, d_model + d_target] of so many batches (or all that are left), between two states."""
    source = source_of(name, folder, overlap)
    source.language_model.ranks = mesh.reading
    given = Stream(source, BATCHES * BATCH, CPU)
    if since is not None:
        given.load_state_dict(load_state(since))
    found = []
    while len(found) < count and not given.done:
        x, target = given.next()
        found.append(x if target is None else torch.cat([x, target], 1))
    if until is not None and mesh.first:
        save_state(until, given.state_dict())
    given.close()
    return found


def few_rows_for_the_scale(patch):
    """So that the checkpoints are of what comes after that, too."""
    patch.setattr(stream, "SAMPLE_TOKENS", 2 * BATCH)


def of_rank(rank, folder):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=100)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    mesh = parallel.arrange(torch.tensor([[0], [1]]), CPU, timeout)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        few_rows_for_the_scale(patch)
        patch.setattr(reader, "READERS", 1)
        for name in LIVE + CACHE:
            here, there = folder / name / "one", folder / name / "two"
            found[name] = batches(name, folder, here, there, STOPS[1], mesh=mesh)
            assert all(mesh.batch(mesh.part(x)).equal(x) for x in found[name])
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.barrier()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with what all need; the batches of an uninterrupted run; those of three parts."""
    folder = tmp_path_factory.mktemp("workers")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in cached.TEXTS)
    )
    whole, parts = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        few_rows_for_the_scale(patch)
        cached.make(patch, folder / "cache")
        for name in LIVE + CACHE:
            whole[name] = batches(name, folder)
            parts[name] = [batches(name, folder, until=folder / name / "one", count=STOPS[0])]
        mp.spawn(of_rank, (folder,), nprocs=2)
        ranks = [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]
        for name in LIVE + CACHE:
            assert all(map(torch.equal, *(found[name] for found in ranks)))
            parts[name] += [ranks[0][name], batches(name, folder, folder / name / "two")]
    return folder, whole, parts


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", LIVE + CACHE)
def test_with_another_number_of_processes(name, chain):
    _, whole, parts = chain
    assert [len(part) for part in parts[name]] == [*STOPS, BATCHES - sum(STOPS)]
    pairs = zip(sum(parts[name], []), whole[name], strict=True)
    # Half of the contexts in a forward pass: the model's matrix products round otherwise.
    tolerance = 0 if name in CACHE else 1e-4
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("first, then", [("off", "on"), ("on", "off")])
def test_with_the_language_model_in_a_thread_or_not(
    name, first, then, chain, monkeypatch, tmp_path
):
    """Bit for bit."""
    folder, whole, _ = chain
    few_rows_for_the_scale(monkeypatch)
    found = batches(name, folder, until=tmp_path / "one", count=STOPS[0], overlap=first)
    found += batches(name, folder, tmp_path / "one", tmp_path / "two", STOPS[1], then)
    found += batches(name, folder, tmp_path / "two", overlap=first)
    assert len(found) == BATCHES and all(map(torch.equal, found, whole[name]))
    assert not found[0].equal(found[31])  # the text comes in another order the second time


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CACHE)
@pytest.mark.parametrize("readers", [1, 3])
def test_with_more_files_read_at_a_time(name, readers, chain, monkeypatch, tmp_path):
    folder, whole, _ = chain
    few_rows_for_the_scale(monkeypatch)
    found = batches(name, folder, until=tmp_path / "one", count=STOPS[0])
    monkeypatch.setattr(reader, "READERS", readers)
    found += batches(name, folder, tmp_path / "one")
    assert len(found) == BATCHES and all(map(torch.equal, found, whole[name]))
