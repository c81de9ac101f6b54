"""Memory of a training step, counted storage by storage on meta tensors."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

FUSED, AUTOGRAD = ("kron fused", "dense fused"), ("kron", "dense")


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))


@pytest.fixture
def p3():
    """d 2304, F 2^17, k 50, B 8192."""
    from benchmarks.shapes import SHAPES

    return SHAPES["P3"]


STEPS = {
    "kron fused": {1: 1071.6, 4: 1198.4, 8: 1367.4},
    "dense fused": {1: 1067.6, 4: 1189.7, 8: 1352.4},
    "kron": {1: 2016.3, 4: 2101.0, 8: 2657.6},
    "dense": {1: 2880.5, 4: 2880.5, 8: 2942.8},
}
"""MiB that a step adds to its state, at so many times the tokens of P3. A change is to be meant."""


@pytest.mark.parametrize("factor", [1, 4, 8])
@pytest.mark.parametrize("contender", FUSED + AUTOGRAD)
def test_a_step_holds_no_more_than_it_did(p3, contender, factor):
    """Between steps weights, moments, batch, copies of weights; in a step within 2 % of `STEPS`."""
    from benchmarks.memory import count

    shape, (encoder, *fused) = p3._replace(tokens=factor * p3.tokens), contender.split()
    found = count(shape, contender)
    state = 12 * shape.parameters(encoder) + 4 * shape.tokens * shape.d
    if fused:
        state += 2 * (shape.rows(encoder) + shape.dict_size) * shape.d
    assert found.state_bytes == pytest.approx(state, abs=1024)
    on_top = (found.peak_bytes - found.state_bytes) / 2**20
    assert on_top == pytest.approx(STEPS[contender][factor], rel=0.02)


@pytest.mark.parametrize("contender", FUSED)
def test_no_tensor_of_the_fused_step_has_tokens_times_latents(p3, contender):
    """Not even of one byte an element: the largest is one chunk of pre-latents of 1 GiB."""
    from benchmarks.memory import count

    for factor in (2, 8):
        shape = p3._replace(tokens=factor * p3.tokens)
        largest = count(shape, contender).largest[0]
        assert largest.size_bytes <= 2**30 < shape.tokens * shape.dict_size


def test_more_tokens_cost_what_is_of_tokens(p3):
    """Once a chunk is full, B more tokens add batch, residual, codes, partial sums: no B F."""
    from benchmarks.memory import count

    small, large = (count(p3._replace(tokens=f * p3.tokens), "kron fused") for f in (16, 32))
    more = 16 * p3.tokens
    added = (large.peak_bytes - small.peak_bytes) / more
    # Batch (float32, bfloat16) and residual; codes and entries; segments of bases' runs.
    expected = (4 + 2 + 2) * p3.d + (40 + 8) * p3.k
    expected += p3.k / 512 * (1 + p3.n) * 4 * p3.d
    assert added == pytest.approx(expected, rel=0.01)
    assert added < p3.dict_size / 2


def test_counting_follows_storages():
    """Views count once, what is released counts no more, and saved tensors count until backward."""
    from benchmarks.memory import Live

    with Live() as live:
        x = torch.empty(1000, requires_grad=True)
        view = x[10:].view(-1, 10)
        assert live.live_bytes == 4000
        y = (view * 2).sin()  # keeps its input
        assert live.live_bytes == 4000 + 2 * 3960
        loss = y.sum()
        del y
        loss.backward()
        assert live.live_bytes == 4000 + 4000 + 4  # x, its gradient, the loss
        del x, view, loss
        assert live.live_bytes == 0
        assert live.peak_bytes > 8000


def test_command(capsys, tmp_path):
    from benchmarks import memory, report

    file = tmp_path / "memory.json"
    memory.main(["--shape", "toy", "--contender", "kron fused", "--device", "cpu"]
                + ["--json", str(file)])  # fmt: skip
    printed = capsys.readouterr().out
    row = "| toy | KronSAE, kronsae_kernels, fused step | 0 | 0 |  | 0 | 0 |"
    assert row in printed
    (found,) = json.loads(file.read_text())["memory"]
    assert found["counted_bytes"] > found["state_bytes"] > 0
    text = report.write(tmp_path)
    assert row in text
