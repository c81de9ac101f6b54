"""Shapes, device and what is reported beside each time: `pytest benchmarks/ --benchmark-only`."""

import os
import shutil

# Threads sleep where they wait long, as those of `kronsae train` (kronsae.system.threads.BRIEFLY):
# torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# ruff: noqa: E402
import pytest
import torch

from benchmarks import isoflop
from benchmarks.flags import positive
from benchmarks.floors import measure_ceilings
from benchmarks.measure import Flush, describe, synchronize, thousands
from benchmarks.shapes import SHAPES, batches

ROUNDS = 7
WIDE = 100
"""Columns of a terminal from which on the table has quartiles, too."""
LEGEND = f"""
How to read the tables (IQR: from first to third quartile; 4x4: m = n = 4)
  forward, backward
            {ROUNDS} calls of an operation of kronsae_kernels, each on a batch.
  equal FLOPs
            Each row trains an SAE from scratch, with {isoflop.SEEDS} seeds, on the same
            activations of the embedded model. The time is that of a whole
            training. FLOPs are those of forward passes (KronSAE, eq. 7): a
            cheaper encoder sees more tokens for them.
  explains  Share of the variance of held-out activations that is
            reconstructed, on average.
  refined   Ours, with a gradient step on the values of the active latents.
  mixed     Ours: a third of the latents dense, the others in heads of 8x8.
  F / 2     Half of the latents, which see as many tokens as those of 4x4.
  listing   Plain PyTorch, the code in the paper's appendix H.
"""


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config):
    if getattr(config.option, "benchmark_columns", ()) is None:
        wide = shutil.get_terminal_size((WIDE, 0)).columns >= WIDE
        config.option.benchmark_columns = ["median", "iqr"] if wide else ["median"]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    if getattr(terminalreporter.config.option, "benchmark_only", False):
        terminalreporter.write(LEGEND)


def pytest_addoption(parser):
    default = "P1,P3" if torch.cuda.is_available() else "S1"
    parser.addoption(
        "--shapes",
        default=default,
        help=f"comma-separated shapes to run at, of {', '.join(SHAPES)} (default: %(default)s)",
    )
    parser.addoption(
        "--iso-tokens",
        type=positive,
        help="budget of the trainings with equal FLOPs: the tokens that TopK sees "
        "(default: 65,536; on a GPU 500,000 at a larger F)",
    )


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        names = metafunc.config.getoption("--shapes").split(",")
        shapes = [SHAPES[name] for name in names]
        metafunc.parametrize(
            "shape", shapes, ids=[f"{size(s)}, {s.m}x{s.n}" for s in shapes], scope="module"
        )


def size(shape):
    """What a shape is, in few words."""
    return f"d {shape.d}, F {shape.dict_size:,}, k {shape.k}"


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
    """timed(operation, label, flops, work, run, prepare): times run(*prepare()), the cache flushed.

    In the table the label has tokens a second beside it; extra_info has the shape, the work (FLOPs
    and bytes), and the floor's share.
    """

    def time(operation, label, flops, work, run, prepare=tuple):
        floor_ms = ceilings.floor_ms(work)
        form = f" {shape.m}x{shape.n}" if "Kron" in operation else ""
        benchmark.group = f"{operation}{form}, {size(shape)}, {shape.tokens:,} tokens a call"

        def setup():
            arguments = prepare()
            flush()
            synchronize(device)
            return arguments, {}

        def call(*arguments):
            run(*arguments)
            synchronize(device)

        benchmark.pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=2)
        if benchmark.stats is not None:  # None under --benchmark-disable
            seconds = benchmark.stats.stats.median
            benchmark.stats.name = f"{label}: {thousands(shape.tokens / seconds)} tokens/s"
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
