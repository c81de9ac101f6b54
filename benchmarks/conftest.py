"""Shapes, device and what is reported beside each time: `pytest benchmarks/ --benchmark-only`."""

import pytest
import torch

from benchmarks.floors import measure_ceilings
from benchmarks.measure import Flush, describe, synchronize
from benchmarks.shapes import SHAPES, batches


def pytest_addoption(parser):
    default = "P1,P3" if torch.cuda.is_available() else "S1"
    parser.addoption(
        "--shapes",
        default=default,
        help=f"comma-separated shapes to run at, of {', '.join(SHAPES)} (default: %(default)s)",
    )


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        names = metafunc.config.getoption("--shapes").split(",")
        metafunc.parametrize("shape", [SHAPES[name] for name in names], ids=names, scope="module")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ceilings(device):
    """Matrix rate and bandwidths of this device, measured in this run."""
    return measure_ceilings(device)


@pytest.fixture(scope="session")
def flush(device):
    return Flush(device)


@pytest.fixture(scope="module")
def xs(shape, device):
    """Batches [B, d] to rotate."""
    return batches(shape, device)


@pytest.fixture
def timed(benchmark, shape, device, ceilings, flush):
    """timed(group, flops, work, run, prepare): times run(*prepare()), the cache flushed before.

    Beside the time stand the shape, the work (FLOPs and bytes), and the floor's share.
    """

    def time(group, flops, work, run, prepare=tuple):
        floor_ms = ceilings.floor_ms(work)
        benchmark.group = f"{group}, {shape}; floor {floor_ms:.3f} ms"

        def setup():
            arguments = prepare()
            flush()
            synchronize(device)
            return arguments, {}

        def call(*arguments):
            run(*arguments)
            synchronize(device)

        benchmark.pedantic(call, setup=setup, rounds=7, warmup_rounds=2)
        if benchmark.stats is not None:  # None under --benchmark-disable
            seconds = benchmark.stats.stats.median
            benchmark.extra_info.update(
                describe(device),
                shape=shape._asdict(),
                ceilings=ceilings._asdict(),
                flops=flops,
                moved_bytes=work.moved_bytes,
                floor_ms=floor_ms,
                tokens_per_s=shape.tokens / seconds,
                share_of_ceiling=floor_ms / seconds / 1e3,
            )

    return time
