"""`nested_decode` in Triton kernels, against the reference: drawn cases, edges, order of programs.

Integers in [-2, 2] have exact sums, in any order: every output and gradient is then the
reference's to the bit. Of normal numbers the sums of magnitudes bound the error.
"""

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kronsae_kernels import SparseCodes, nested_decode
from kronsae_kernels.triton_impl import configs, operations

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]
NAMES = ("out", "d values", "d w_dec", "d b_dec")
CASES = 240


@pytest.fixture(autouse=True)
def small_blocks():
    """Several blocks of everything, and segments of frequent rows."""
    with (
        configs.override("nested_sums", ROWS=4, WIDTH=16),
        configs.override("nested_dots", ROWS=4, WIDTH=16),
        configs.override("suffix_sums", PREFIXES=3, WIDTH=16),
        configs.override("group_codes", PLACES=4),
        configs.override("segments", ROW_LENGTH=4),
    ):
        yield


def drawn(seed: int) -> tuple[list[Tensor], Tensor, list[int], bool]:
    """values, w_dec, b_dec of a random case; indices; bounds; whether all numbers are integers."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    size, d = draw.choice([1, 2, 9, 14]), draw.choice([1, 3, 16, 21])
    tokens, k = draw.choice([0, 1, 2, 3]), draw.choice([1, 2, 7, size])
    edges = draw.sample(range(1, size + 1), min(size, draw.choice([1, 1, 2, 4, 9])))
    bounds = sorted({1: set(edges) | {size}, 2: {1, size}, 3: {size}}.get(draw.randrange(6), edges))
    exact, dtype = draw.random() < 0.7, draw.choice([torch.float32, torch.bfloat16, torch.float16])
    indices = torch.rand(tokens, size).argsort(1)[:, :k]
    if k > size or draw.random() < 0.5:
        indices = torch.randint(size, (tokens, k))  # some latents several times

    def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
        found = torch.randint(-2, 3, shape).float() if exact else torch.randn(shape)
        return found.to(dtype)

    values = numbers(tokens, k, dtype=torch.float32)
    values = torch.where(torch.rand(values.shape) < 0.2, -0.0, values)
    w_dec = numbers(size, d, dtype=dtype)
    b_dec = numbers(d, dtype=dtype) if draw.random() < 0.7 else None
    return [values, w_dec, b_dec], indices, bounds, exact


def results(
    leaves: list[Tensor | None], indices: Tensor, bounds: list[int], d_out: Tensor, impl: str
) -> dict[str, Tensor]:
    """Reconstructions and all gradients."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    out = nested_decode(SparseCodes(leaves[0], indices), bounds, *leaves[1:], impl=impl)
    there = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(out, there, d_out.to(out.dtype))
    return dict(zip(NAMES, (out.detach(), *gradients), strict=False))


def gradient_for(leaves: list[Tensor], bounds: list[int], exact: bool) -> Tensor:
    shape = len(leaves[0]), len(bounds), leaves[1].shape[1]
    drawn = torch.randint(-2, 3, shape).float() if exact else torch.randn(shape)
    return drawn.to(leaves[1].dtype)


def as_double(leaves: list[Tensor | None]) -> list[Tensor | None]:
    return [None if leaf is None else leaf.double() for leaf in leaves]


@pytest.mark.one_in(8)
@pytest.mark.parametrize("part", range(8))
def test_drawn_cases(part, device):
    for seed in range(part, CASES, 8):
        leaves, indices, bounds, exact = drawn(seed)
        leaves = [None if leaf is None else leaf.to(device) for leaf in leaves]
        indices, d_out = indices.to(device), gradient_for(leaves, bounds, exact).to(device)
        got = results(leaves, indices, bounds, d_out, "triton")
        double = as_double(leaves)
        truth = results(double, indices, bounds, d_out.double(), "reference")
        # A sum's error is at most its terms' number times half a unit of their magnitudes.
        sizes = results(
            [None if leaf is None else leaf.abs() for leaf in double], indices, bounds,
            d_out.double().abs(), "reference",
        )  # fmt: skip
        terms = indices.numel() + len(bounds) * len(leaves[0]) + 8
        for name, found in got.items():
            where = f"seed {seed}: {name}"
            of_leaf = leaves[0] if name == "d values" else leaves[1]
            assert found.dtype == of_leaf.dtype, where
            assert found.shape == truth[name].shape, where
            error = 0.0 if exact else terms * 2**-24 * sizes[name]
            unit = torch.finfo(found.dtype).eps / 2
            allowed = error + unit * (truth[name].abs() + error) + 1e-7 * (not exact)
            assert ((found.double() - truth[name]).abs() <= allowed).all(), where


def test_many_codes(device):
    """More than a program of any kernel takes at once; more prefixes than are on their way."""
    k, size = 300, 40
    shapes = (1, k), (size, 5), (5,)
    leaves = [torch.randint(-2, 3, shape).float().to(device) for shape in shapes]
    indices = torch.randint(size, (1, k), device=device)
    bounds = [1, 2, 5, 11, 12, 20, 30, 35, 38, 39]
    d_out = torch.randint(-2, 3, (1, len(bounds), 5)).float().to(device)
    with (
        configs.override("group_codes", PLACES=128),
        configs.override("nested_sums", ROWS=8),
        configs.override("nested_dots", ROWS=16),
    ):
        got, expected = (
            results(leaves, indices, bounds, d_out, impl) for impl in ("triton", "reference")
        )
    for name in NAMES:
        assert torch.equal(got[name], expected[name]), name


def test_no_prefix_holds_any(device):
    """All latents lie beyond the last bound: b_dec is left, and no gradient but its own."""
    leaves = [torch.randn(shape, device=device) for shape in ((3, 4), (20, 6), (6,))]
    indices = torch.randint(10, 20, (3, 4), device=device)
    found = results(leaves, indices, [2, 10], torch.randn(3, 2, 6, device=device), "triton")
    assert torch.equal(found["out"], leaves[2].expand(3, 2, 6))
    assert not found["d values"].any() and not found["d w_dec"].any()
    assert found["d b_dec"].any()


def test_nan_stays_in_its_token_and_its_prefixes(device):
    values = torch.ones(3, 2, device=device)
    values[1, 0] = torch.nan  # of latent 5: prefixes 1 and 2, not 0
    indices = torch.tensor([[5, 1], [5, 1], [7, 5]], device=device)
    w_dec = torch.randn(9, 4, device=device)
    out = nested_decode(SparseCodes(values, indices), [2, 6, 9], w_dec, impl="triton")
    there = torch.zeros(3, 3, dtype=torch.bool, device=device)
    there[1, 1:] = True
    assert torch.equal(out.isnan(), there[:, :, None].expand(3, 3, 4))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_any_subset_of_gradients(wanted, device):
    leaves = [torch.randn(shape, device=device) for shape in ((3, 4), (20, 6), (6,))]
    indices, d_out = torch.randint(20, (3, 4), device=device), torch.randn(3, 2, 6, device=device)
    whole = results(leaves, indices, [7, 20], d_out, "triton")
    some = [leaf.clone().requires_grad_(at in wanted) for at, leaf in enumerate(leaves)]
    out = nested_decode(SparseCodes(some[0], indices), [7, 20], *some[1:], impl="triton")
    out.backward(d_out)
    for at, (leaf, name) in enumerate(zip(some, NAMES[1:], strict=True)):
        assert (leaf.grad is not None) == (at in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, whole[name]), name


def test_inputs_are_any_stride(device):
    values, w_dec = torch.randn(4, 3, device=device), torch.randn(6, 20, device=device)
    indices = torch.randint(20, (4, 3), device=device)
    codes = SparseCodes(values.t(), indices.t())
    got = nested_decode(codes, [4, 20], w_dec.t(), impl="triton")
    copies = SparseCodes(*(tensor.t().contiguous() for tensor in (values, indices)))
    assert torch.equal(got, nested_decode(copies, [4, 20], w_dec.t().contiguous(), impl="triton"))


def test_groups_are_stable(device):
    """Codes of a group stay in their order; what no prefix holds comes last."""
    indices = torch.tensor([[9, 0, 4, 1, 9, 3, 5]], device=device)
    values = torch.arange(7.0, device=device)[None]
    codes = operations.Grouped.of(indices, (2, 5), values)
    assert codes.starts.tolist() == [[0, 2, 4]]
    assert codes.by_group.tolist() == [[0, 1, 4, 3, 9, 9, 5]]
    assert codes.slots.tolist() == [[1, 3, 2, 5, 0, 4, 6]]
    assert codes.weights.tolist() == [[1, 3, 2, 5, 0, 4, 6]]
    rows = operations.Grouped.of(indices.repeat(2, 1), (2, 5), rows=True).of_slot
    assert rows.tolist() == [[1, 0, 1, 0, 1, 1, 1], [3, 2, 3, 2, 3, 3, 3]]


def test_as_many_sums_as_int32_counts():
    indices = torch.empty(2**30, 1, device="meta", dtype=torch.int64)
    with pytest.raises(RuntimeError, match="fewer than 2"):
        operations.Grouped.of(indices, (1, 2))
