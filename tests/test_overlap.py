"""The language model beside the autoencoder: the same batches and states, and nothing left over."""

import dataclasses
import os
import signal
import threading
import time
from itertools import islice

import pytest
import torch

from kronsae import InputError, SAEConfig, TrainConfig
from kronsae.config import DataConfig
from kronsae.data import LanguageModel, LanguageModelActivations
from kronsae.data.common import Interrupted
from kronsae.data.prefetch import ForwardPass, Prefetcher
from kronsae.data.text import IndexedText
from kronsae.metrics.splicing import spliced
from kronsae.train import fit
from kronsae.training import stream

LENGTH, BATCH = 16, 48
TEXTS = [f"def f{i}(x):\n    return x + {i * i}  # number {i}\n" * (1 + i % 4) for i in range(32)]
SETTINGS = DataConfig(
    dataset="given",
    context_length=LENGTH,
    contexts_per_batch=4,
    buffer_tokens=200,
    heldout_tokens=2 * LENGTH,
)
KRON = SAEConfig(heads=16, m=2, n=2, k=4)
TRAIN = TrainConfig(tokens=14 * BATCH, batch_size=BATCH, log_every=1, checkpoint_every=4)


@pytest.fixture(scope="module")
def model():
    return LanguageModel.load("embedded")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t for t in threading.enumerate() if t.name == "kronsae-prefetch"]


def make(model, overlap, texts=TEXTS, **settings):
    config = dataclasses.replace(SETTINGS, overlap=overlap, **settings)
    text = IndexedText(texts, None, seed=0, epochs=1, fingerprint="mark", name="given")
    return LanguageModelActivations(model, text, config, BATCH, 0)


def flat(state, prefix=""):
    """(name, value) of everything in a state; tensors are copied."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value.clone() if isinstance(value, torch.Tensor) else value


def equal(a, b):
    a, b = dict(a), dict(b)
    return a.keys() == b.keys() and all(
        x.equal(b[name]) if isinstance(x, torch.Tensor) else x == b[name] for name, x in a.items()
    )


def test_batches_and_states_are_the_same(model):
    """After every batch, also while the thread is far ahead of it, and to the end of the text."""
    alone, ahead = make(model, "off"), make(model, "on")
    count = 0
    for a, b in zip(alone, ahead, strict=True):
        if count in (2, 9):  # the thread has made what it may
            _until(
                lambda: ahead.prefetcher.ended or ahead.prefetcher.rows >= ahead.prefetcher.limit
            )
        assert a.equal(b)
        assert equal(flat(alone.state_dict()), flat(ahead.state_dict()))
        count += 1
    assert count > 10 and alone.model_waited is None and ahead.model_waited > 0
    ahead.close()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ["cuda", "cpu"])
def test_batches_are_the_same_on_a_gpu(rows):
    """With streams of its own, and rows that wait on the card or on the host."""
    model = LanguageModel.load("embedded", device="cuda", dtype=torch.bfloat16)
    found = []
    for overlap in ("off", "on"):
        config = dataclasses.replace(SETTINGS, overlap=overlap, buffer_tokens=4096)
        text = IndexedText(TEXTS, None, seed=0, epochs=40, fingerprint="mark", name="given")
        device = torch.device(rows)
        source = LanguageModelActivations(model, text, config, 512, 0, device)
        found.append([x.cpu() for x in source])
        source.close()
    assert len(found[0]) > 20
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_a_thread_that_is_stuck_is_left_behind(monkeypatch):
    """In a read that does not return: closing waits once, and not for ever."""
    monkeypatch.setattr("kronsae.data.prefetch.CLOSE_TIMEOUT", 0.2)
    stuck = threading.Event()

    def passes():
        yield ForwardPass([torch.zeros(1, 1)], {})
        stuck.wait(60)

    prefetcher = Prefetcher(passes(), limit=9, devices=(torch.device("cpu"),))
    next(prefetcher)
    began = time.monotonic()
    assert not prefetcher.close() and not prefetcher.close()
    assert time.monotonic() - began < 10
    stuck.set()
    prefetcher.thread.join()
    assert prefetcher.close()


def test_it_is_ahead_and_no_further_than_a_fill(model):
    source = make(model, "on")
    next(iter(source))
    prefetcher = source.prefetcher
    _until(lambda: prefetcher.rows >= prefetcher.limit)
    time.sleep(0.05)
    largest = SETTINGS.contexts_per_batch * LENGTH
    ahead = prefetcher.rows - source.buffer.rows_per_refill
    assert 0 <= ahead < largest
    source.close()


@pytest.mark.parametrize(("first", "then"), [("on", "off"), ("off", "on"), ("on", "on")])
def test_it_goes_on_from_any_batch(first, then, model):
    expected = list(make(model, "off"))
    source, states = make(model, first), []
    for _ in islice(source, 9):
        states.append(dict(flat(source.state_dict())))
    source.close()
    for given, state in enumerate(states, 1):
        if given % 3:
            continue
        later = make(model, then)
        later.load_state_dict(_nested(state))
        rest = list(later)
        later.close()
        assert len(rest) == len(expected) - given
        assert all(a.equal(b) for a, b in zip(rest, expected[given:], strict=True))


def _nested(state):
    nested = {}
    for name, value in state.items():
        *path, last = name.split(".")
        part = nested
        for step in path:
            part = part.setdefault(step, {})
        part[last] = value
    return nested


def test_closed_it_stands_behind_the_last_batch(model):
    """What was made ahead and not taken is made again."""
    expected = list(make(model, "off"))
    source = make(model, "on")
    found = list(islice(source, 3))
    source.close()
    found += list(source)
    source.close()
    assert len(found) == len(expected)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_an_exception_comes_where_it_would_come(model):
    """After the batches that were made before it, and with its message."""

    def batches(overlap):
        texts = _Throws(TEXTS, after=30)
        source, found = make(model, overlap, texts), []
        with pytest.raises(InputError, match="the line is cut"):
            for x in source:
                found.append(x)
        source.close()
        return found

    alone, ahead = batches("off"), batches("on")
    assert len(alone) == len(ahead) > 3
    assert all(a.equal(b) for a, b in zip(alone, ahead, strict=True))


class _Throws(list):
    """Documents of which only some can be read."""

    def __init__(self, texts, after):
        super().__init__(texts)
        self.left = after

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise InputError("the line is cut")
        return super().__getitem__(index)


def test_not_finite_is_said_as_ever(model, monkeypatch):
    whole = model.activations
    monkeypatch.setattr(model, "activations", lambda ids: whole(ids) * float("nan"))
    source = make(model, "on")
    with pytest.raises(InputError, match="forward pass 0"):
        next(iter(source))
    source.close()


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_signal_does_not_wait_for_the_next_batch(overlap, model, monkeypatch, tmp_path):
    """It arrives while a batch is being waited for, in a forward pass that takes for ever."""
    monkeypatch.setattr(stream, "SAMPLE_TOKENS", BATCH)
    train = dataclasses.replace(TRAIN, tokens=20 * BATCH)
    whole = fit(KRON, make(model, "off"), train)
    source = make(model, overlap)
    stuck, block = threading.Event(), model.model.gpt_neox.layers[0]
    forward, calls = block.forward, []

    def slow(*args, **kwargs):
        calls.append(1)
        if len(calls) == 12:
            stuck.set()
            for _ in range(1000):  # 20 s of it, but for the interruption
                if model.interrupted.is_set():
                    break
                time.sleep(0.02)
        return forward(*args, **kwargs)

    def interrupt():
        stuck.wait(60)
        time.sleep(0.3)  # the consumer has used up what was there
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(block, "forward", slow)
    sender = threading.Thread(target=interrupt)
    sender.start()
    began = time.monotonic()
    result = fit(KRON, source, train, out=tmp_path / "run")
    sender.join()
    assert result.stopped_by == signal.SIGTERM and 0 < result.tokens < train.tokens
    assert time.monotonic() - began < 15
    monkeypatch.setattr(block, "forward", forward)
    resumed = fit(KRON, make(model, "on"), train, out=tmp_path / "run", resume=True)
    assert resumed.tokens == train.tokens
    for a, b in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True):
        assert a.equal(b)


def test_the_log_tells_who_waited(model):
    records = {}
    for overlap in ("on", "off"):
        result = fit(KRON, make(model, overlap), TRAIN)
        records[overlap] = [r for r in result.history if r["kind"] == "train"]
    for record in records["on"]:
        assert 0 <= record["wait_share"] <= 1 and 0 <= record["model_wait_share"] <= 1
    assert all("model_wait_share" not in record for record in records["off"])
    # Alone, the language model's time is waiting time; here most of it is.
    assert sum(r["wait_share"] for r in records["off"]) > 0


def test_evaluation_and_forward_passes_take_turns(model):
    """Hooks of one never meet the other's forward pass: the losses are those of a quiet model."""
    source = make(model, "on")
    ids = source.heldout_contexts()
    mask = torch.ones_like(ids, dtype=torch.bool)
    with spliced(model, lambda _, y: torch.zeros_like(y), mask):
        expected = model.token_losses(ids)
    plain = list(make(model, "off"))
    found = []
    for x in source:
        found.append(x)
        with spliced(model, lambda _, y: torch.zeros_like(y), mask):
            assert model.token_losses(ids).equal(expected)
    source.close()
    assert all(a.equal(b) for a, b in zip(found, plain, strict=True))


def test_waiting_times_are_counted():
    """A consumer that takes its time: the thread waits for it, and it never waits."""
    passes = (ForwardPass([torch.zeros(4, 2)], {"n": n}) for n in range(6))
    prefetcher = Prefetcher(passes, limit=8, devices=(torch.device("cpu"),))
    began, taken = time.monotonic(), []
    for forward_pass in prefetcher:
        taken.append(forward_pass.position["n"])
        time.sleep(0.05)
    assert taken == list(range(6))
    assert 0.1 < prefetcher.waited < time.monotonic() - began
    assert prefetcher.close()


def test_interrupted_it_raises_although_there_is_more():
    passes = iter([ForwardPass([torch.zeros(1, 1)], {})] * 3)
    prefetcher = Prefetcher(passes, limit=9, devices=(torch.device("cpu"),))
    next(prefetcher)
    prefetcher.interrupt()
    with pytest.raises(Interrupted):
        next(prefetcher)
    assert prefetcher.close()


def _until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
