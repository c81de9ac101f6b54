"""A whole training step (forward, backward, optimizer): ours, plain PyTorch, other libraries."""

from itertools import cycle

import pytest

from benchmarks import floors
from benchmarks.measure import check_gradients, check_losses, check_peer, synchronize
from benchmarks.peers import PEERS
from benchmarks.steps import CONTENDERS


@pytest.fixture(scope="module")
def losses(shape, x):
    """The losses of the first steps of each contender, once our gradients are known to be right."""
    check_gradients(shape, x)
    return {}


@pytest.mark.parametrize("name", CONTENDERS)
def test_step(benchmark, report, losses, flush, ceilings, shape, xs, device, name):
    contender = CONTENDERS[name]
    if reason := contender.why_not(device):
        pytest.skip(reason)
    if name in PEERS:
        check_peer(name, shape, xs[0])
    step, order = contender.make(shape, device), cycle(xs)
    losses[name] = [float(step(next(order))) for _ in range(2)]
    check_losses(shape, losses, device)

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
