"""Shapes, device and what is reported beside each time: `pytest benchmarks/ --benchmark-only`."""

import pytest
import torch

from benchmarks.measure import describe
from benchmarks.shapes import SHAPES, activations


def pytest_addoption(parser):
    parser.addoption(
        "--shapes",
        default="S1,S2",
        help=f"comma-separated shapes to run at, of {', '.join(SHAPES)} (default: %(default)s)",
    )


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        names = metafunc.config.getoption("--shapes").split(",")
        metafunc.parametrize("shape", [SHAPES[name] for name in names], ids=names, scope="module")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def x(shape, device):
    return activations(shape, device)


@pytest.fixture
def report(benchmark, shape, device):
    """report(group, flops, moved_bytes), before the run: group by shape, say what the time is of.

    Rates follow when the run is over.
    """
    work = {}

    def fill(group: str, flops: int, moved_bytes: int) -> None:
        work.update(flops=flops, moved_bytes=moved_bytes)
        benchmark.group = f"{group}, {shape}"
        benchmark.extra_info.update(describe(device), shape=shape._asdict(), **work)

    yield fill
    if benchmark.stats is not None:  # None under --benchmark-disable, or if the check was red
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update(
            tokens_per_s=shape.tokens / seconds,
            gflop_per_s=work["flops"] / seconds / 1e9,
            gb_per_s=work["moved_bytes"] / seconds / 1e9,
        )
