"""Shapes, device and what is reported beside each time: `pytest benchmarks/ --benchmark-only`."""

import pytest
import torch

from benchmarks.floors import measure_ceilings
from benchmarks.measure import Flush, Memory, describe
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


@pytest.fixture(scope="module")
def x(xs):
    return xs[0]


@pytest.fixture
def report(benchmark, shape, device, ceilings):
    """report(group, flops, moved_bytes, floor_ms), before the run: what the time is of.

    Rates, the floor's share and peak memory (on a GPU, above the batches) follow when it is over.
    """
    work = {}
    memory = Memory(device)

    def fill(group: str, flops: int, moved_bytes: int, floor_ms: float, **more: str) -> None:
        work.update(flops=flops, moved_bytes=moved_bytes, floor_ms=floor_ms)
        benchmark.group = f"{group}, {shape}"
        benchmark.extra_info.update(
            describe(device), shape=shape._asdict(), ceilings=ceilings._asdict(), **work, **more
        )

    yield fill
    if benchmark.stats is not None and work:  # None under --benchmark-disable, or after a red check
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update(
            tokens_per_s=shape.tokens / seconds,
            gflop_per_s=work["flops"] / seconds / 1e9,
            gb_per_s=work["moved_bytes"] / seconds / 1e9,
            share_of_ceiling=work["floor_ms"] / seconds / 1e3,
            peak_bytes=memory.peak_bytes,
        )
