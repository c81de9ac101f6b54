"""A whole training step (forward, backward, AdamW): ours, the paper's listing, plain TopK."""

import pytest

from benchmarks.measure import check_gradients, check_losses, synchronize
from benchmarks.steps import ENCODERS, STEPS


@pytest.fixture(scope="module")
def losses(shape, x):
    """The losses of the first steps of each step, once our gradients are known to be right."""
    check_gradients(shape, x)
    return {}


@pytest.mark.parametrize("name", STEPS)
def test_step(benchmark, report, losses, shape, x, name):
    step = STEPS[name](shape, x)
    losses[name] = [float(step()) for _ in range(2)]
    check_losses(shape, losses)

    def run():
        step()
        synchronize(x.device)

    encoder = ENCODERS[name]
    # Forward once; the backward pass has two products for each of the forward pass.
    report("step", 3 * shape.tokens * shape.flops_per_token(encoder), shape.step_bytes(encoder))
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
