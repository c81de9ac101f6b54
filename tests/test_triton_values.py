"""The kernels against the truth (see `truth`), in memory that starts as NaN, at odd shapes."""

import pytest
import torch

pytest.importorskip("triton")

from truth import CHECKS, Case

from kronsae_kernels.triton_impl import configs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAYOUTS = ("contiguous", "contiguous", "contiguous")
CASES = {
    # lead, h, m, n, d, k, composition, eps, bias, mask, layouts of x, weights and gradients, seed
    "odd": Case((5,), 11, 3, 2, 33, 7, "mand", 1e-5, True, False, *LAYOUTS, 0),
    "all ones": Case((), 1, 1, 1, 1, 1, "mand", 0.0, True, False, *LAYOUTS, 2),
    "no tokens": Case((0,), 5, 2, 3, 4, 6, "mand", 0.0, True, False, *LAYOUTS, 3),
    "one token, k 1": Case((1,), 7, 1, 4, 5, 1, "relu_mul", 0.0, True, False, *LAYOUTS, 4),
    "k = F": Case((3,), 3, 2, 5, 4, 30, "mul", 0.0, False, False, *LAYOUTS, 5),
    "k > h": Case((4,), 5, 3, 3, 7, 11, "mand", 0.0, True, False, *LAYOUTS, 6),
    "mask": Case((3,), 9, 2, 3, 8, 6, "mul", 0.0, True, True, "strided", "i-major", "reversed", 7),
    "mask, k > h": Case((2,), 3, 3, 2, 5, 7, "mand", 1e-5, True, True, *LAYOUTS, 8),
    "3-D": Case(
        (2, 3), 6, 4, 1, 9, 5, "relu_mul", 0.0, True, False, "reversed", "reversed", "expanded", 9
    ),
    "many heads": Case((2,), 70, 1, 2, 40, 2, "mand", 1e-5, True, False, *LAYOUTS, 10),
    "mul": Case((4,), 23, 2, 2, 6, 9, "mul", 0.0, True, False, *LAYOUTS, 11),
    "frequent": Case((7,), 2, 2, 3, 5, 11, "mand", 1e-5, True, False, *LAYOUTS, 12),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OTHER = {
    "dense_encode": ("odd", "all ones", "no tokens", "k = F", "mask", "3-D", "many heads"),
    "sparse_decode": ("odd", "no tokens", "k = F", "mask", "3-D"),
}
"""Cases that tell something more of another operation than `fused_encode`."""


def chosen():
    for operation in CHECKS:
        for name in OTHER.get(operation, CASES):
            for exact in (False, True):
                yield operation, name, "float32", exact
        for name in ("odd", "mask", "frequent"):
            for dtype in ("bfloat16", "float16"):
                yield operation, name, dtype, False
        yield operation, "odd", "bfloat16", True


@pytest.fixture(autouse=True)
def small_blocks():
    """Several programs, and segments of frequent rows, at these sizes, on a card too."""
    with (
        configs.override("select_heads", PER_PROGRAM=64, LANES=16),
        configs.override("segments", ROW_LENGTH=4, HEAD_LENGTH=16),
    ):
        yield


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("operation", "name", "dtype", "exact"),
    chosen(),
    ids=lambda value: {True: "integers", False: "normal"}.get(value, value),
)
def test_values_and_gradients(operation, name, dtype, exact, device):
    CHECKS[operation](CASES[name], DTYPES[dtype], exact, "triton", device)
