"""Kernels that sum the entries of rows and update weights: drawn cases, held to float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from kronsae_kernels.reference import hashed, rounded_by_chance, rounded_moments
from kronsae_kernels.step_arguments import SEEDS
from kronsae_kernels.triton_impl import configs, operations
from kronsae_kernels.triton_impl.device import hashed as hashed_by_kernel
from kronsae_kernels.triton_impl.device import rounded_by_chance as rounded_by_kernel

CASES = 200
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Drawn:
    """Numbers of one case, from its own generator."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))

    def one_of(self, choices: tuple[Any, ...]) -> Any:
        return choices[self.integer(0, len(choices) - 1)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def indices(self, size: int, tokens: int, k: int) -> Tensor:
        """[tokens, k]: some latents have most codes, some none."""
        live = torch.randperm(size, generator=self.generator)[: self.integer(1, size)]
        skew = self.integer(1, 6)
        at = torch.rand(tokens, k, generator=self.generator) ** skew * len(live)
        return live[at.long()].to(self.device)

    def hyper(self) -> Tensor:
        """[2, 10], as of a step with weight decay, from the middle of a run."""
        row = [0.99, 0.1, 0.999, 1e-3, 1e-2, 1.3, 1e-8, self.one_of((1.0, 0.5)), 1.0, 7.0]
        return torch.tensor([row, [1.0, *row[1:]]], device=self.device)

    def weight(self, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        """A weight and its moments."""
        return self.normal(*shape), 0.1 * self.normal(*shape), 0.01 * self.normal(*shape).square()


def adamw(weight: tuple[Tensor, ...], gradient: Tensor, hyper: Tensor) -> tuple[Tensor, ...]:
    """Weight and moments after a step, float64."""
    w, first, second = (tensor.double() for tensor in weight)
    decay, beta1_rest, beta2, beta2_rest, step_size, root_scale, eps, *_ = hyper.double()
    first = first + (gradient - first) * beta1_rest
    second = second * beta2 + gradient.square() * beta2_rest
    return w * decay - step_size * first / (second.sqrt() * root_scale + eps), first, second


def assert_close(what: str, got: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Distance relative to the larger norm of the two."""
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape, what
    error = float((got - expected).norm() / max(float(expected.norm()), 1e-3))
    assert error <= rtol, f"{what}: relative error {error:.1e}"


def copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor).copy_(tensor) for tensor in tensors)


def sums(rows: Tensor, size: int, coefficients: Tensor, y: Tensor) -> Tensor:
    """out[r] = sum of coefficient * y[token] over the codes [B, k] with rows == r, float64."""
    terms = coefficients.double()[..., None] * y.double()[:, None]
    out = torch.zeros(size, y.shape[1], dtype=torch.float64, device=y.device)
    return out.index_add_(0, rows.flatten(), terms.flatten(0, 1))


def bias_sums(rows: Tensor, size: int, coefficients: Tensor) -> Tensor:
    ones = torch.ones(len(coefficients), 1, device=coefficients.device)
    return sums(rows, size, coefficients, ones)[:, 0]


def check_rows(drawn: Drawn, what: str, size: int, d: int, tokens: int, k: int) -> None:
    dtype, unit_norm = drawn.one_of(DTYPES), drawn.one_of((True, False))
    mode, hyper = drawn.one_of(("update", "update", "measure")), drawn.hyper()
    indices = drawn.indices(size, tokens, k)
    coefficients, along = drawn.normal(tokens, k), drawn.normal(tokens, k)
    y, weight = drawn.normal(tokens, d).to(dtype), drawn.weight(size, d)
    bias = None if unit_norm else drawn.weight(size)
    row = hyper[1 if bias is None else 0]
    gradient = sums(indices, size, coefficients, y) * row[7]
    if unit_norm:
        gradient -= weight[0] * (bias_sums(indices, size, along) * row[7])[:, None]
    of_bias = bias_sums(indices, size, coefficients) * row[7]
    square = gradient.square().sum() + (0 if bias is None else of_bias.square().sum())

    entries = operations.Entries.of(indices, size, (coefficients, along))
    got, got_bias = copies(weight), None if bias is None else copies(bias)
    copy = None if dtype == torch.float32 else torch.full_like(weight[0], 7, dtype=dtype)
    squares = operations.update_rows(
        entries, *entries.coefficients, y, hyper, mode, unit_norm, got, copy, got_bias
    )
    assert_close(f"{what}: squares", squares.sum(), square)
    expected = weight if mode == "measure" else adamw(weight, gradient, row)
    if unit_norm and mode == "update":
        expected = (expected[0] / expected[0].norm(dim=1, keepdim=True), *expected[1:])
    for name, one, other in zip(("weight", "first", "second"), got, expected, strict=True):
        assert_close(f"{what}: {name}", one, other)
    if copy is not None:
        assert torch.equal(copy, got[0].to(dtype) if mode == "update" else torch.full_like(copy, 7))
    if bias is not None:
        expected = bias if mode == "measure" else adamw(bias, of_bias, hyper[1])
        for name, one, other in zip(("bias", "first", "second"), got_bias, expected, strict=True):
            assert_close(f"{what}: {name} of bias", one, other)

    out = torch.empty(size, d, dtype=dtype, device=y.device)
    out_bias = torch.empty(size, dtype=dtype, device=y.device)
    operations.row_gradients(entries, entries.coefficients[0], y, out, out_bias)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    assert_close(f"{what}: gradient", out, sums(indices, size, coefficients, y), rtol)
    assert_close(
        f"{what}: gradient of bias", out_bias, bias_sums(indices, size, coefficients), rtol
    )


ODD = (1, 2, 3, 5, 8, 16, 17, 33, 37, 40, 48)
"""Widths: with and without whole pieces of 8 and 16."""


@pytest.mark.one_in(8)
@pytest.mark.parametrize("part", range(8))
def test_rows(part, device):
    """Pieces that are whole and not, segments, empty rows, one token, each mode and dtype."""
    for case in range(part, CASES, 8):
        drawn = Drawn(case, device)
        with (
            configs.override("segments", ROW_LENGTH=drawn.one_of((1, 3, 4, 8, 100))),
            configs.override("update_rows", PER_LOAD=8, PER_WARP=drawn.one_of((8, 24, 1000))),
            configs.override("row_gradients", WIDTH=drawn.one_of((8, 16, 32))),
            configs.override("sum_row_segments", WIDTH=drawn.one_of((8, 32))),
        ):
            check_rows(
                drawn, f"case {case}", drawn.integer(1, 5), drawn.one_of(ODD),
                drawn.one_of((1, 2, 7, 12)), drawn.integer(1, 4),
            )  # fmt: skip


@pytest.mark.slow
def test_a_row_of_thousands_of_entries(device):
    """With the segments' own length: 2,001 tokens, of which one latent has nearly all."""
    length = configs.config_of("segments", "sm_90").blocks["ROW_LENGTH"]
    with configs.override("segments", ROW_LENGTH=length):
        check_rows(Drawn(1000, device), "thousands", 3, 5, 2001, 1)


def test_a_token_that_is_not_finite_stays_in_its_rows(device):
    y = torch.ones(3, 5, device=device)
    y[1, 2] = torch.nan
    indices = torch.tensor([[0, 1], [2, 3], [4, 0]], device=device)
    entries = operations.Entries.of(indices, 6, (torch.ones(3, 2, device=device),))
    out = torch.empty(6, 5, device=device)
    operations.row_gradients(entries, *entries.coefficients, y, out, None)
    assert out.isnan().nonzero().tolist() == [[2, 2], [3, 2]]
    assert out[5].eq(0).all() and out[0].eq(2).all()


def check_heads(drawn: Drawn, what: str, h: int, m: int, n: int, d: int, tokens: int, k: int):
    dtype, mode = drawn.one_of(DTYPES), drawn.one_of(("update", "update", "measure"))
    indices, hyper = drawn.indices(h * m * n, tokens, k), drawn.hyper()
    d_base, d_extension = drawn.normal(tokens, k), drawn.normal(tokens, k)
    x, weight = drawn.normal(tokens, d).to(dtype), drawn.weight(m + n, h, d)
    bias = drawn.weight(h, m + n)
    head, i, j = indices // (m * n), indices // n % m, indices % n
    rows = (i * h + head, (m + j) * h + head)
    gradient = sum(
        sums(row, (m + n) * h, coefficient, x)
        for row, coefficient in zip(rows, (d_base, d_extension), strict=True)
    ).view(m + n, h, d)
    of_bias = sum(
        bias_sums(row, (m + n) * h, coefficient)
        for row, coefficient in zip(rows, (d_base, d_extension), strict=True)
    ).view(m + n, h)
    scale = hyper[0, 7]

    entries = operations.Entries.of(indices, h * m * n, (d_base, d_extension))
    got, got_bias = copies(weight), copies(bias)
    copy = None if dtype == torch.float32 else torch.full_like(weight[0], 7, dtype=dtype)
    squares = operations.update_heads(
        entries, *entries.coefficients, x, m, hyper, mode, got, copy, got_bias
    )
    square = (gradient * scale).square().sum() + (of_bias * scale).square().sum()
    assert_close(f"{what}: squares", squares.sum(), square)
    update = mode == "update"
    expected = adamw(weight, gradient * scale, hyper[0]) if update else weight
    for name, one, other in zip(("weight", "first", "second"), got, expected, strict=True):
        assert_close(f"{what}: {name}", one, other)
    expected = adamw(bias, of_bias.t() * scale, hyper[1]) if update else bias
    for name, one, other in zip(("bias", "first", "second"), got_bias, expected, strict=True):
        assert_close(f"{what}: {name} of bias", one, other)
    if copy is not None:
        assert torch.equal(copy, got[0].to(dtype) if update else torch.full_like(copy, 7))

    out = torch.empty(m + n, h, d, dtype=dtype, device=x.device)
    out_bias = torch.empty(m + n, h, dtype=dtype, device=x.device)
    operations.head_gradients(entries, *entries.coefficients, x, m, out, out_bias)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    assert_close(f"{what}: gradient", out, gradient, rtol)
    assert_close(f"{what}: gradient of bias", out_bias, of_bias, rtol)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("part", range(8))
def test_heads(part, device, monkeypatch):
    """Extension rows of one program and of several, segments, empty runs, each mode and dtype."""
    for case in range(part, CASES, 8):
        drawn = Drawn(case, device)
        monkeypatch.setattr(operations.gradients, "MAX_EXTENSIONS", drawn.one_of((1, 2, 3, 16)))
        pieces = {"PIECES": drawn.one_of((1, 2)), "WIDTH": 8}
        with (
            configs.override("segments", HEAD_LENGTH=drawn.one_of((2, 3, 100))),
            configs.override("head_gradients", **pieces),
            configs.override("sum_head_segments", WIDTH=drawn.one_of((8, 16))),
        ):
            check_heads(
                drawn, f"case {case}", drawn.integer(1, 2), drawn.integer(1, 3),
                drawn.integer(1, 4), drawn.one_of((1, 3, 8, 9, 17)), drawn.one_of((1, 2, 5)),
                drawn.integer(1, 3),
            )  # fmt: skip


@pytest.mark.slow
def test_a_head_of_thousands_of_entries(device):
    """With the segments' own length."""
    length = configs.config_of("segments", "sm_90").blocks["HEAD_LENGTH"]
    with configs.override("segments", HEAD_LENGTH=length):
        check_heads(Drawn(1000, device), "thousands", 2, 1, 2, 3, 1501, 1)


def test_a_head_with_more_extension_rows_than_a_program_sums(device):
    assert operations.gradients.MAX_EXTENSIONS < 37
    check_heads(Drawn(0, device), "37 extension rows", 1, 1, 37, 3, 5, 5)


# Moments in bfloat16


@triton.jit
def _round(value, noise, out, size, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real = at < size
    drawn = hashed_by_kernel(tl.load(noise + at, mask=real, other=0).to(tl.uint32))
    rounded = rounded_by_kernel(tl.load(value + at, mask=real, other=0.0), drawn)
    tl.store(out + at, rounded, mask=real)


def round_by_chance(value: Tensor, noise: Tensor) -> Tensor:
    out = torch.empty(value.shape, dtype=torch.bfloat16, device=value.device)
    _round[(triton.cdiv(value.numel(), 4096),)](value, noise, out, value.numel(), WIDTH=4096)
    return out


def test_rounding_by_chance_is_that_of_the_emulation(device):
    """Numbers of all sizes, both signs and zeros; infinity and NaN stay what they are."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(20000, generator=generator) * 10.0 ** torch.randint(
        -38, 38, (20000,), generator=generator
    )
    value[:4] = torch.tensor([0.0, -0.0, 1.0, 3.0e38])
    noise = torch.randint(0, 2**31, (20000,), generator=generator)
    got = round_by_chance(value.to(device), noise.int().to(device)).cpu()
    assert torch.equal(got, rounded_by_chance(value, hashed(noise)))
    assert torch.equal(got[:3], value[:3].bfloat16())
    special = torch.tensor([torch.inf, -torch.inf, torch.nan], device=device)
    got = round_by_chance(special, torch.full((3,), -1, dtype=torch.int32, device=device))
    torch.testing.assert_close(got.float(), special, rtol=0, atol=0, equal_nan=True)


def test_rounding_by_chance_has_the_right_mean(device):
    """2^16 draws of a number between two bfloat16s: the mean is within 5 standard deviations."""
    count = 2**16
    for value in (1.0 + 2**-10, 1.0 + 2**-8, -0.7, 3.3e-20, 1.0):
        numbers = torch.full((count,), value, device=device)
        got = round_by_chance(numbers, torch.arange(count, dtype=torch.int32, device=device))
        low, high = got.min().double(), got.max().double()
        exact = float(numbers[0].double())
        assert low <= exact <= high and got.unique().numel() == (1 if value == 1.0 else 2)
        deviation = float(((high - exact) * (exact - low)).clamp(min=0)) ** 0.5 / count**0.5
        assert abs(float(got.double().mean()) - exact) <= 5 * deviation


@pytest.mark.parametrize("kron", [False, True], ids=["rows", "heads"])
def test_bfloat16_moments_are_those_of_float32_rounded_by_chance(kron, device):
    """To the bit, whatever the blocks; the weight is what it is with float32 moments."""
    for case in range(4):
        drawn = Drawn(case, device)
        h, m, n, d = 2, 2, 3, drawn.one_of((5, 17, 24))
        size, hyper = h * m * n, drawn.hyper()
        hyper[:, 9] = step = 3 + case
        codes = (drawn.normal(6, 3), drawn.normal(6, 3))
        entries = operations.Entries.of(drawn.indices(size, 6, 3), size, codes)
        y, bias = drawn.normal(6, d), drawn.weight(h, m + n)
        shape = (m + n, h, d) if kron else (size, d)
        w, *moments = drawn.weight(*shape)
        low = [moment.bfloat16() for moment in moments]
        exact = (w.clone(), *(moment.float() for moment in low))
        found = (w.clone(), *low)
        for weight in (exact, found):
            if kron:
                blocks = {"PIECES": 2, "WIDTH": 8} if weight is found else {}
                with configs.override("head_gradients", **blocks):
                    operations.update_heads(
                        entries, *entries.coefficients, y, m, hyper, "update", weight, None,
                        copies(bias),
                    )  # fmt: skip
            else:
                blocks = {"PER_LOAD": 8} if weight is found else {}
                with configs.override("update_rows", **blocks):
                    operations.update_rows(
                        entries, *entries.coefficients, y, hyper, "update", True, weight, None
                    )
        torch.testing.assert_close(found[0], exact[0], rtol=1e-6, atol=1e-7)
        seed = SEEDS["w_enc" if kron else "w_dec"]
        expected = rounded_moments(*(e.cpu().flatten(0, -2) for e in exact[1:]), seed, step)
        for got, other, before in zip(found[1:], expected, moments, strict=True):
            assert got.dtype == torch.bfloat16
            assert torch.equal(got.cpu().flatten(0, -2), other)
            assert not torch.equal(got, before.bfloat16())
