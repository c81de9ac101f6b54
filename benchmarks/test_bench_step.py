"""A whole training step (forward, backward, optimizer): ours, plain PyTorch, other libraries."""

from itertools import cycle

import pytest

from benchmarks import floors
from benchmarks.measure import (
    check_gradients,
    check_losses,
    check_peer,
    reference_loss,
    synchronize,
)
from benchmarks.peers import PEERS
from benchmarks.steps import CONTENDERS, LOSSES


@pytest.fixture(scope="module")
def expected(shape, x):
    """The first loss of each model, once our gradients are known to be right."""
    for encoder in LOSSES:
        check_gradients(shape, x, encoder)
    return {encoder: reference_loss(shape, x, encoder) for encoder in LOSSES}


@pytest.fixture(scope="module")
def losses():
    """The losses of the first steps of each contender."""
    return {}


@pytest.mark.parametrize("name", CONTENDERS)
def test_step(benchmark, report, expected, losses, flush, ceilings, shape, xs, device, name):
    contender = CONTENDERS[name]
    if reason := contender.why_not(device):
        pytest.skip(reason)
    if name in PEERS:
        check_peer(name, shape, xs[0])
    step, order = contender.make(shape, device), cycle(xs)
    losses[name] = [float(step(next(order))) for _ in range(2)]
    check_losses(shape, name, losses, expected[contender.encoder], device)

    def setup():
        flush()
        synchronize(device)
        return (next(order),), {}

    def run(x):
        step(x)
        synchronize(device)

    encoder = contender.encoder
    works = floors.stages(shape, encoder, floors.compute_bytes(device))
    report(
        "step",
        shape.step_flops(encoder),
        floors.total(works).moved_bytes,
        floors.step_floor_ms(shape, encoder, ceilings, device),
    )
    benchmark.pedantic(run, setup=setup, rounds=5)  # its first two steps have warmed it up
