"""The kernels select what a stable sort of all products selects, index by index.

Pre-latents are given, or are exact whatever the matrix product does: x is a row of the identity,
or all are integers. Then there is one right answer, also among ties.
"""

import math
import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kronsae_kernels import dense_encode, fused_encode, reference, sparse_decode, torch_impl
from kronsae_kernels.common import COMPOSITIONS
from kronsae_kernels.triton_impl import configs, launch
from kronsae_kernels.triton_impl.operations import select as selection

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]
of_composition = pytest.mark.parametrize("composition", COMPOSITIONS)
of_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1]
)


@pytest.fixture(autouse=True)
def small_programs():
    """64 heads a program: more take several, and another that merges."""
    with configs.override("select_heads", PER_PROGRAM=64, LANES=16):
        yield


@pytest.fixture
def kernels(monkeypatch) -> list[str]:
    """Names of the kernels that were launched; of `select_latents`, whether it sorts."""
    names, original = [], launch.start

    def noting(one):
        names.append(one.kernel.fn.__name__ + (" and sort" if one.arguments.get("RANK") else ""))
        original(one)

    monkeypatch.setattr(launch, "start", noting)
    return names


def assert_same(got, expected) -> None:
    """To the bit; NaN equals NaN, -0 equals 0."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def expected_of(pre: Tensor, m: int, k: int, composition: str, mask: Tensor | None = None):
    """indices, base, extension [B, k] of pre-latents [B, m + n, h], from all products."""
    heads_last = pre.transpose(1, 2)
    product = reference.products(heads_last[..., :m], heads_last[..., m:], composition).flatten(1)
    if mask is not None:
        product = product.masked_fill(~mask, -torch.inf)
    indices = reference.largest(product, k)
    factors = pre.float() if composition == "mul" else pre.float().relu()
    n, tokens = pre.shape[1] - m, torch.arange(len(pre), device=pre.device)[:, None]
    head, i, j = indices // (m * n), indices // n % m, indices % n
    return indices, factors[tokens, i, head], factors[tokens, m + j, head]


def select(pre: Tensor, m: int, k: int, composition: str, mask: Tensor | None = None):
    """indices, base, extension [B, k] by the kernels."""
    _, rows, heads = pre.shape
    sizes = selection.Selection(heads, m, rows - m, k, composition == "mul")
    mask = None if mask is None else mask.view(torch.uint8)
    return selection.select_kron(pre.flatten(1), mask, sizes)


def without_masked(found, mask: Tensor | None):
    """`expected_of` where the mask allows fewer than k: index -1 and factors 0."""
    if mask is None:
        return found
    gone = ~mask[found[0]]
    return found[0].masked_fill(gone, -1), *(part.masked_fill(gone, 0) for part in found[1:])


# Numbers


def special(name: str, *shape: int) -> Tensor:
    """Pre-latents, or numbers to make them of."""
    ties = torch.randint(-2, 3, shape).float()
    normal = torch.randn(shape)
    sometimes = torch.rand(shape) < 0.15
    return {
        "normal": normal,
        "ties": ties,
        "one value": torch.ones(shape),
        "zero": torch.zeros(shape),
        "negative": -normal.abs() - 0.1,
        "negative ties": ties.abs().neg() - 1,
        "signed zeros": torch.where(torch.rand(shape) < 0.5, -0.0, 0.0 * ties.abs()),
        "zeros and signs": torch.where(sometimes, normal, -0.0),
        "underflow": normal * 1e-25,
        "subnormal": ties * 1e-42,
        "overflow": (normal.abs() + 0.5) * 1e25,
        "infinite": torch.where(sometimes, torch.inf, normal.abs() + 0.1),
        "nan": torch.where(sometimes, torch.nan, normal),
        "negative nan": torch.where(
            sometimes, torch.full(shape, torch.nan).copysign(-normal.abs()), normal
        ),
        "all nan": torch.full(shape, torch.nan),
    }[name]


SPECIAL = (
    "normal", "ties", "one value", "zero", "negative", "negative ties", "signed zeros",
    "zeros and signs", "underflow", "subnormal", "overflow", "infinite", "nan", "negative nan",
    "all nan",
)  # fmt: skip


@pytest.mark.one_in(4)
@of_composition
@pytest.mark.parametrize("name", SPECIAL)
def test_special_numbers(name, composition, device):
    """k below and above the number of heads, and of rows; without a mask and with one."""
    m, n, heads = 2, 3, 9
    pre = special(name, 1, m + n, heads).to(device)
    mask = (torch.arange(m * n * heads) % 5 > 1).to(device)
    for k, of_mask in ((4, None), (13, None), (4, mask), (20, mask)):
        got = select(pre, m, k, composition, of_mask)
        assert_same(got, expected_of(pre, m, k, composition, of_mask))


@pytest.mark.parametrize("name", ["ties", "normal"])
def test_mul_where_all_products_are_negative(name, device):
    """A head's largest product is then that of its smallest number and its largest negative one."""
    pre = special(name, 1, 5, 23).abs() + 0.5
    pre[:, 2:] *= -1
    for one in (pre, -pre):
        one = one.to(device)
        for k in (3, 30):
            assert_same(select(one, 2, k, "mul"), expected_of(one, 2, k, "mul"))


@pytest.mark.parametrize("name", ["ties", "normal"])
@pytest.mark.parametrize("composition", ["mand", "mul"])
def test_mask_decides_which_heads_and_rows_stay(composition, name, device):
    """One latent in eight is allowed, so that most of the largest are not."""
    pre = special(name, 2, 7, 21).to(device)
    mask = (torch.rand(252) < 0.125).to(device)
    for k in (3, 6):
        got = select(pre, 4, k, composition, mask)
        assert_same(got, expected_of(pre, 4, k, composition, mask))


@pytest.mark.parametrize("name", SPECIAL)
def test_special_numbers_of_a_dense_encoder(name, device):
    """F is no multiple of a group of 4 (k = 6) nor of one of 8 (k = 2)."""
    pre = special(name, 1, 45).to(device)
    mask = (torch.arange(45) % 5 > 1).to(device)
    for k, of_mask in ((2, None), (6, None), (11, mask)):
        scores = pre.relu()
        if of_mask is not None:
            scores = scores.masked_fill(~of_mask, -torch.inf)
        indices = reference.largest(scores, k)
        as_bytes = None if of_mask is None else of_mask.view(torch.uint8)
        got = selection.select_dense(pre.clone(), as_bytes, k)
        assert_same(got, (indices, pre.relu().gather(1, indices)))


@of_dtype
@of_composition
def test_encode_any_numbers(composition, dtype, device):
    """x = 1 at one place, so that pre-latents are weights: all bits of a mantissa matter."""
    x = torch.eye(3, device=device, dtype=dtype)
    w_enc = torch.randn(13, 5, 3).to(device, dtype)
    w_enc[:, :, 1] = (w_enc[:, :, 1] * 4).round() / 4  # a token of many ties
    w_enc[:, :, 2] = -w_enc[:, :, 2].abs()
    for k in (6, 20):
        options = {"m": 2, "k": k, "composition": composition, "eps": 1e-5}
        got = fused_encode(x, w_enc, **options, impl="triton")
        assert_same(got, fused_encode(x, w_enc, **options, impl="reference"))


@of_dtype
def test_dense_encode_any_numbers(dtype, device):
    x = torch.eye(3, device=device, dtype=dtype)
    w_enc = torch.randn(101, 3).to(device, dtype)
    w_enc[:, 1] = w_enc[:, 1].round()
    w_enc[:, 2] = -w_enc[:, 2].abs()
    for k in (5, 40):
        got = dense_encode(x, w_enc, k=k, impl="triton")
        assert_same(got, dense_encode(x, w_enc, k=k, impl="reference"))


@pytest.mark.parametrize(
    ("bad", "composition"), [(math.nan, "mand"), (math.nan, "mul"), (math.inf, "mul")]
)
def test_bad_row_stays_in_its_row(bad, composition, device):
    x = torch.randint(-2, 3, (4, 4)).float()
    spoiled = x.clone()
    spoiled[2, 1] = bad
    w_enc, w_dec = torch.randint(-2, 3, (9, 5, 4)).float(), torch.randint(-2, 3, (54, 4)).float()
    w_enc, w_dec = w_enc.to(device), w_dec.to(device)

    def run(x):
        x = x.to(device).requires_grad_()
        codes = fused_encode(x, w_enc, m=2, k=12, composition=composition, impl="triton")
        out = sparse_decode(codes, w_dec=w_dec, impl="triton")
        return *codes, out, *torch.autograd.grad(out.sum(), x)

    found, others = run(spoiled), [0, 1, 3]
    assert_same((part[others] for part in found), (part[others] for part in run(x)))
    values, indices, out, _ = (part[2] for part in found)
    assert not values.isfinite().any()
    assert not out.isfinite().any()
    assert ((indices >= 0) & (indices < 54)).all()
    assert len(set(indices.tolist())) == 12
    assert values.isnan().all() or not math.isnan(bad)


# Sizes that take other ways


@pytest.mark.parametrize("per_program", [16, 32, 128])
@pytest.mark.parametrize("name", ["ties", "normal"])
@pytest.mark.parametrize("composition", ["mand", "mul"])
def test_any_number_of_splits(composition, name, per_program, device, kernels):
    pre = special(name, 1, 3, 101).to(device)
    with configs.override("select_heads", PER_PROGRAM=per_program):
        got = select(pre, 1, 5, composition)
    assert_same(got, expected_of(pre, 1, 5, composition))
    assert ("merge_lists" in kernels) == (per_program < 101)


@pytest.mark.parametrize("name", ["ties", "normal", "zero"])
def test_splits_of_groups_and_masks(name, device, kernels):
    """A dense encoder with a mask, and a Kron encoder with one, in several splits."""
    pre = special(name, 1, 805).to(device)
    mask = (torch.arange(805) % 3 > 0).to(device)
    indices = reference.largest(pre.relu().masked_fill(~mask, -torch.inf), 3)
    got = selection.select_dense(pre, mask.view(torch.uint8), 3)
    assert_same(got, (indices, pre.relu().gather(1, indices)))
    pre = special(name, 1, 3, 267).to(device)
    mask = (torch.arange(534) % 3 > 0).to(device)
    got = select(pre, 1, 4, "mul", mask)
    assert_same(got, expected_of(pre, 1, 4, "mul", mask))
    assert kernels.count("merge_lists") == 2


@pytest.mark.parametrize("most", [16, 64])
def test_what_does_not_fit_is_selected_by_torch(most, device, kernels, monkeypatch):
    """Lists of k = 5 heads or rows need 8 m or 8 n places, 7 splits 56."""
    monkeypatch.setattr(selection, "MAX_CANDIDATES", most)
    pre = special("ties", 1, 5, 401).to(device)
    mask = (torch.arange(2406) % 3 > 0).to(device)
    for of_mask in (None, mask):
        got = select(pre, 2, 5, "mand", of_mask)
        assert_same(got, expected_of(pre, 2, 5, "mand", of_mask))
    assert bool(kernels) == (most >= 56)
    kernels.clear()
    pre = special("ties", 1, 1201).to(device)
    indices = reference.largest(pre.relu(), 5)
    got = selection.select_dense(pre.clone(), None, 5)
    assert_same(got, (indices, pre.relu().gather(1, indices)))
    assert bool(kernels) == (most >= 64)


@pytest.mark.parametrize("name", ["ties", "normal"])
def test_long_lists_are_sorted_by_torch(name, device, kernels, monkeypatch):
    monkeypatch.setattr(selection, "MAX_SORTED", 8)
    pre = special(name, 1, 4, 11).to(device)
    for k in (8, 9, 44):
        kernels.clear()
        assert_same(select(pre, 2, k, "mul"), expected_of(pre, 2, k, "mul"))
        assert kernels[-1] == ("select_latents and sort" if k == 8 else "rank_latents")


def test_lists_as_long_as_a_program_sorts(device):
    k = selection.MAX_SORTED
    for more in (0, 1):
        pre = special("ties", 1, 4, 131).to(device)
        assert_same(select(pre, 2, k + more, "mand"), expected_of(pre, 2, k + more, "mand"))


def test_chunks_of_tokens_change_nothing(device, monkeypatch):
    x = torch.randint(-2, 3, (4, 4), device=device).float()
    w_enc = torch.randint(-2, 3, (9, 5, 4), device=device).float()

    def run():
        return (
            *fused_encode(x, w_enc, m=2, k=4, impl="triton"),
            *dense_encode(x, w_enc.flatten(0, 1), k=4, impl="triton"),
        )

    expected = run()
    monkeypatch.setitem(torch_impl.CHUNK_BYTES, device.type, 1)
    monkeypatch.setattr(torch_impl, "MIN_CHUNK_TOKENS", 3)  # the last chunk is shorter
    assert_same(run(), expected)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("allowed", [0, 1, 5, 12])
@pytest.mark.parametrize("composition", ["mand", "mul"])
@pytest.mark.parametrize("fits", [True, False], ids=["kernels", "torch"])
def test_masks_of_fewer_than_k(fits, composition, allowed, device, monkeypatch):
    """The places left over are marked, and no count is made on the host."""
    if not fits:
        monkeypatch.setattr(selection, "MAX_CANDIDATES", 1)
    monkeypatch.setattr(torch_impl, "_few", None)
    pre = special("ties", 2, 5, 23).to(device)
    mask = torch.zeros(138, dtype=torch.bool)
    mask[torch.randperm(138)[:allowed]] = True
    mask = mask.to(device)
    for k in (5, 12, 40):
        got = select(pre, 2, k, composition, mask)
        assert_same(got, without_masked(expected_of(pre, 2, k, composition, mask), mask))
        assert int((got[0] >= 0).sum(1).max()) == min(k, allowed)
        of_dense, of_mask = pre.flatten(1)[:, :83].contiguous(), mask[:83]
        indices = reference.largest(of_dense.relu().masked_fill(~of_mask, -torch.inf), k)
        expected = without_masked((indices, of_dense.relu().gather(1, indices)), of_mask)
        assert_same(selection.select_dense(of_dense, of_mask.view(torch.uint8), k), expected)


# Drawn cases


class Drawn(NamedTuple):
    """A case of the selection kernels, all of it drawn from its number."""

    m: int
    n: int
    heads: int
    k: int
    tokens: int
    name: str
    composition: str
    share: float | None
    per_program: int
    group: int
    direct: int
    held: int
    dense: bool


def draw(number: int) -> Drawn:
    chance = random.Random(number)
    m, n = chance.choice([(1, 1), (2, 3), (2, 4), (3, 1), (4, 4), (5, 2)])
    heads = chance.choice([1, 2, 5, 9, 23, 41, 70])
    size = m * n * heads
    return Drawn(
        m, n, heads,
        min(chance.choice([1, 2, 3, 7, 20, 60, 300, size]), size),
        chance.choice([0, 1, 1, 1, 2]),
        chance.choice(SPECIAL),
        chance.choice(COMPOSITIONS),
        chance.choice([None, None, 0.0, 0.03, 0.5, 1.0]),
        chance.choice([32, 64, 256]),
        chance.choice([1, 2, 8]),
        chance.choice([1, 64, 4096]),
        chance.choice([1, 32, 4096]),
        chance.random() < 0.25,
    )  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.parametrize("block", range(10))
def test_drawn_cases(block, device, monkeypatch):
    """25 each: ties, signed zeros, NaN, masks of any number of latents, k from 1 to F, splits,
    lists of heads or of rows, in one kernel or several, no tokens."""
    for number in range(25 * block, 25 * block + 25):
        case = draw(number)
        torch.manual_seed(number)
        size = case.m * case.n * case.heads
        mask = None if case.share is None else (torch.rand(size) < case.share).to(device)
        monkeypatch.setattr(selection, "MAX_HELD", case.held)
        with (
            configs.override("select_heads", PER_PROGRAM=case.per_program, GROUP=case.group),
            configs.override("select_latents", DIRECT=case.direct),
        ):
            if case.dense:
                pre = special(case.name, case.tokens, size).to(device)
                scores = pre.relu()
                if mask is not None:
                    scores = scores.masked_fill(~mask, -torch.inf)
                indices = reference.largest(scores, case.k)
                expected = indices, pre.relu().gather(1, indices)
                of_mask = None if mask is None else mask.view(torch.uint8)
                got = selection.select_dense(pre.clone(), of_mask, case.k)
            else:
                pre = special(case.name, case.tokens, case.m + case.n, case.heads).to(device)
                expected = expected_of(pre, case.m, case.k, case.composition, mask)
                got = select(pre, case.m, case.k, case.composition, mask)
        for a, b in zip(got, without_masked(expected, mask), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), (number, case)


# The matrix product with head maxima in its epilogue


def key_of(score: Tensor) -> Tensor:
    """int32 that order as scores do (`device.key_of`)."""
    bits = torch.where(score == 0, 0.0, score).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
