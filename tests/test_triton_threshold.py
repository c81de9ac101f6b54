"""`threshold_encode` in Triton kernels, against the reference: drawn cases, edges, limits.

Pre-latents are exact whatever the matrix product does: all numbers are integers, or x has one 1 and
no other number. Then there is one right answer, also for values that equal their threshold.
"""

import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from test_triton_selection import SPECIAL, special

from kronsae_kernels import reference, threshold_encode, torch_impl
from kronsae_kernels.triton_impl import configs, operations

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]
KINDS = [
    {"composition": "mand"},
    {"composition": "mand", "eps": 1e-3},
    {"composition": "mand", "eps": 2.0},
    {"composition": "relu_mul"},
    {"composition": "mul"},
    None,  # a dense encoder
]
CASES = 240


@pytest.fixture(autouse=True)
def small_blocks():
    """Several splits of the heads."""
    with configs.override("count_above", HEADS=4):
        yield


def shape_of(heads: int, m: int, n: int, kind: dict | None) -> tuple[int, ...]:
    return (heads * m * n,) if kind is None else (heads, m + n)


def options_of(m: int, kind: dict | None) -> dict:
    return {} if kind is None else {"m": m, **kind}


def threshold_for(name: str, values: Tensor) -> Tensor:
    """Thresholds [F] of latents that have `values` [F] on some token."""
    size = values.shape
    some = torch.rand(size) < 0.3
    one = torch.ones(size, dtype=torch.float64)
    return {
        "zero": torch.zeros(size),
        "minus zero": torch.full(size, -0.0),
        "negative": -torch.rand(size),
        "integers": torch.randint(-1, 5, size).float(),
        "bfloat16": torch.randint(-1, 5, size).bfloat16(),
        "high": torch.full(size, 1e30),
        "the values": values,
        "the value of another": values[torch.randperm(len(values))],
        "just above": values.double() * (one + 1e-12),
        "just below": values.double() * (one - 1e-12),
        "infinite": torch.where(some, torch.inf, torch.where(some.flip(0), -torch.inf, 1.0)),
        "nan": torch.where(some, torch.nan, 0.5),
    }[name]


THRESHOLDS = (
    "zero", "minus zero", "negative", "integers", "bfloat16", "high", "the values",
    "the value of another", "just above", "just below", "infinite", "nan",
)  # fmt: skip


def values_of(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, options: dict) -> Tensor:
    """All latents' values [B, F]."""
    m, composition = options.get("m"), options.get("composition", "")
    product = reference.latents(x, w_enc, b_enc, m, composition)
    if m is None:
        return product
    return reference.compose(product, composition, options.get("eps", 0.0))


def assert_as_reference(where: str, leaves: list[Tensor], options: dict) -> None:
    """Codes to the bit; what is unused has value 0 at some latent."""
    with torch.no_grad():
        got = threshold_encode(*leaves, **options, impl="triton")
        expected = threshold_encode(*leaves, **options, impl="reference")
    assert got.values.shape == expected.values.shape, where
    torch.testing.assert_close(got.values, expected.values, rtol=0, atol=0, msg=where)
    used = expected.values != 0
    assert torch.equal(got.indices[used], expected.indices[used]), where
    size = options["threshold"].numel()
    assert ((got.indices >= 0) & (got.indices < size)).all(), where


def gradients(leaves: list[Tensor], options: dict, weight: Tensor, impl: str) -> list[Tensor]:
    """Of a weighted sum of the values, each by its latent."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    values, indices = threshold_encode(*leaves, **options, impl=impl)
    of_code = weight.gather(1, indices)
    return list(torch.autograd.grad((values * of_code).sum(), leaves))


@pytest.mark.one_in(8)
@pytest.mark.parametrize("part", range(8))
def test_drawn_cases(part, device, monkeypatch):
    """Of integers; gradients without a root are integers, too, and equal to the bit."""
    for seed in range(part, CASES, 8):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        kind = KINDS[seed % len(KINDS)]
        heads, m, n = draw.choice([1, 3, 9]), draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
        tokens, d = draw.choice([0, 1, 2, 3]), draw.choice([1, 2, 5])
        dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
        shape = shape_of(heads, m, n, kind)
        leaves = [torch.randint(-2, 3, s).to(dtype) for s in ((tokens, d), (*shape, d), shape)]
        if draw.random() < 0.3:
            leaves.pop()
        options = options_of(m, kind)
        bias = leaves[2] if len(leaves) == 3 else None
        first = torch.randint(-2, 3, (1, d)).to(dtype) if tokens == 0 else leaves[0][:1]
        values = values_of(first, leaves[1], bias, options)[0]
        name = THRESHOLDS[draw.randrange(len(THRESHOLDS))]
        options["threshold"] = threshold_for(name, values).to(device)
        leaves = [leaf.to(device) for leaf in leaves]
        chunk = draw.choice([1, 2, 100])
        monkeypatch.setattr(torch_impl, "chunk_tokens", lambda *_, size=chunk: size)
        where = f"seed {seed}: {kind}, threshold {name}, {tokens} tokens in chunks of {chunk}"
        assert_as_reference(where, leaves, options)
        weight = torch.randint(-2, 3, (tokens, heads * m * n), device=device).float()
        found, expected = (gradients(leaves, options, weight, i) for i in ("triton", "torch"))
        exact = kind is None or kind["composition"] != "mand"
        rounding = 0 if exact else max(1e-5, 2 * torch.finfo(dtype).eps)
        for a, b in zip(found, expected, strict=True):
            scale = 1 + b.abs().max().item() if b.numel() else 1
            torch.testing.assert_close(a, b, rtol=0, atol=rounding * scale, msg=where)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_numbers(name, kind, device):
    """Ties, signed zeros, underflow, overflow, infinities, NaN in some factors and in all."""
    heads, m, n = 7, 2, 3
    shape = shape_of(heads, m, n, kind)
    x, w_enc = torch.ones(1, 1), special(name, *shape)[..., None]
    options = options_of(m, kind)
    values = values_of(x, w_enc, None, options)[0].nan_to_num(1.0, posinf=1e38)
    for of_threshold in ("zero", "negative", "the value of another", "infinite"):
        options["threshold"] = threshold_for(of_threshold, values).to(device)
        assert_as_reference(f"{name}, {of_threshold}", [x.to(device), w_enc.to(device)], options)


def test_nan_is_of_its_token_alone(device):
    x = torch.randint(-2, 3, (3, 4), device=device).float()
    x[1, 2] = torch.nan
    leaves = [x, torch.randint(-2, 3, (9, 5, 4), device=device).float()]
    assert_as_reference("nan", leaves, {"m": 2, "threshold": torch.full((54,), 0.5, device=device)})
    values, _ = threshold_encode(
        *leaves, m=2, threshold=torch.full((54,), 0.5, device=device), impl="triton"
    )
    assert not values[1].any() and values[0].any() and values[2].any()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("most", [8, 256])
def test_more_latents_than_a_program_sorts(most, device, monkeypatch):
    """All 300 of a token, with ties, sorted by torch and ranked in several blocks; and few."""
    monkeypatch.setattr(operations.threshold, "MAX_SORTED", most)
    x = torch.tensor([[1.0], [0.0], [2.0]], device=device)
    w_enc = torch.randint(1, 4, (25, 7, 1), device=device).float()
    for low in (0.0, 5.0, 8.5):
        options = {"m": 3, "composition": "relu_mul", "threshold": torch.full((300,), low)}
        options["threshold"] = options["threshold"].to(device)
        assert_as_reference(f"above {low}", [x, w_enc], options)


@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-5, 3.0])
@pytest.mark.parametrize("root", [True, False])
def test_limits_of_products(root, eps, device):
    """A value is above its threshold if and only if its product is above its limit."""
    normal = torch.randn(300, dtype=torch.float64).exp().mul(10.0 ** torch.randint(-40, 20, (300,)))
    special = [0.0, -0.0, -1.0, 1e-45, 3e38, torch.inf, -torch.inf, eps**0.5, 2.0]
    threshold = torch.cat([normal, normal.float().double(), torch.tensor(special).double()])
    how = ("mand" if root else "relu_mul"), eps
    limits = operations.threshold.Limits.of(
        threshold.to(device), 1, torch.Size((len(threshold), 2, 1)), *how
    )
    limit = limits.of_latent.flatten().cpu()
    assert (limit >= 0).all()
    following = torch.nextafter(limit, torch.tensor(torch.inf))
    for product, above in ((limit, False), (following, True)):
        there = (product > 0) & (product > limit) if above else product > 0
        value = reference.compose(product, *how).double()
        assert ((value > threshold) == above)[there].all()
    assert (limit[threshold == -1.0] == 0).all()


def test_threshold_that_is_no_number(device):
    nan = torch.full((6,), torch.nan, device=device)
    limits = operations.threshold.Limits.of(nan, None, torch.Size((6, 1)), "mand", 0.0)
    assert limits.of_latent.isposinf().all()


def test_order_of_places_is_that_of_no_program(device):
    """Counts of splits give places; latents that are written there are sorted afterwards."""
    with configs.override("count_above", HEADS=16):
        x = torch.randint(-2, 3, (2, 3), device=device).float()
        w_enc = torch.randint(-2, 3, (20, 5, 3), device=device).float()
        options = {"m": 2, "threshold": torch.zeros(120, device=device)}
        whole = threshold_encode(x, w_enc, **options, impl="triton")
    with configs.override("count_above", HEADS=1):
        split = threshold_encode(x, w_enc, **options, impl="triton")
    assert torch.equal(whole.values, split.values)
    assert torch.equal(whole.indices, split.indices)
