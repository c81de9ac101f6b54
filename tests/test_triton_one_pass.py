"""The encoder in one pass selects what the reference selects, index by index, for any numbers.

Pre-latents are exact whatever the matrix product does: all are integers, or x is a row of the
identity, so that the weight holds each token's pre-latents. Lists have room for little more than k
heads, so that they are cut.
"""

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from test_triton_order import shuffled  # noqa: F401
from test_triton_selection import SPECIAL, key_of, special
from truth import projection

from kronsae_kernels import fused_encode, reference, torch_impl
from kronsae_kernels.triton_impl import configs, launch, operations

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]
SMALL = {"TOKENS": 16, "COLUMNS": 32, "WIDTH": 16, "ROOM": 1, "CUT_ENTRIES": 512, "num_warps": 4}


@pytest.fixture(autouse=True)
def one_pass():
    """In tiles and lists that are as small as they can be."""
    with (
        configs.override("encode", ONE_PASS=1),
        configs.override("encode_heads", **SMALL, SPLITS=2, PROGRAMS=1, TMA=0, FLATTEN=0),
    ):
        yield


@pytest.fixture
def kernels(monkeypatch) -> list[str]:
    """Names of the kernels that were launched."""
    names, original = [], launch.start

    def noting(one):
        names.append(one.kernel.fn.__name__)
        original(one)

    monkeypatch.setattr(launch, "start", noting)
    return names


def gathered(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, m: int, k: int, composition: str):
    """The k first heads of each token [B, k] by the kernels, and their pre-latents."""
    heads, rows, _ = w_enc.shape
    selection = operations.Selection(heads, m, rows - m, k, composition == "mul")
    lists = operations.one_pass.lists_of(x, selection)
    assert lists is not None
    bias = None if b_enc is None else b_enc.t().reshape(-1)
    found, pre = operations.one_pass._select_in_one_pass(
        x, torch_impl.i_major(w_enc), bias, selection, lists
    )
    return found, pre.view(len(x), rows, k)


def expected_heads(pre: Tensor, m: int, k: int, composition: str) -> Tensor:
    """From pre-latents [B, h, m + n]: by the largest product of each head, then by its index."""
    products = reference.products(pre[..., :m], pre[..., m:], composition)
    best = products.flatten(2).amax(2)
    key = torch.where(best.isnan(), 2**31 - 2, key_of(best.float()))
    return key.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def check_heads(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, m: int, k: int, composition: str, pre: Tensor
) -> None:
    """Heads and their pre-latents, to the bit, against pre-latents [B, h, m + n] of all."""
    found, values = gathered(x, w_enc, b_enc, m, k, composition)
    assert torch.equal(found.long(), expected_heads(pre, m, k, composition))
    of_heads = pre.gather(1, found.long()[..., None].expand(-1, -1, pre.shape[2])).transpose(1, 2)
    torch.testing.assert_close(values, of_heads, rtol=0, atol=0, equal_nan=True)


def of_tokens(pre: Tensor) -> tuple[Tensor, Tensor]:
    """(x, w_enc) whose pre-latents are `pre` [B, h, m + n], which must be finite."""
    tokens, heads, rows = pre.shape
    d = -(-tokens // 8) * 8
    w_enc = torch.zeros(heads, rows, d, dtype=pre.dtype, device=pre.device)
    w_enc[..., :tokens] = pre.permute(1, 2, 0)
    return torch.eye(tokens, d, dtype=pre.dtype, device=pre.device), w_enc


# Drawn cases

COMPOSITIONS = ("mand", "relu_mul", "mul")
KINDS = tuple(name for name in SPECIAL if not name.endswith(("nan", "infinite", "overflow")))
DRAWN = 8
"""Tokens of a case, each with numbers of its own kind: cases in all = DRAWN times the shapes."""


def drawn(number: int):
    """(m, n, heads, k, composition, dtype) of a case."""
    generator = torch.Generator().manual_seed(number)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    m, n, heads = draw(1, 4), draw(1, 5), draw(2, 70)
    k = min(heads - 1, (1, draw(1, 12), heads - 1)[number % 3])
    return m, n, heads, k, COMPOSITIONS[draw(0, 2)], (torch.bfloat16, torch.float16)[number % 2]


@pytest.mark.one_in(8)
@pytest.mark.parametrize("number", range(32))
def test_drawn_heads(number, device):
    """Each token has another kind of numbers; every second case is ordered by its heads' keys."""
    m, n, heads, k, composition, dtype = drawn(number)
    kinds = itertools.islice(itertools.cycle(KINDS), number, number + DRAWN)
    pre = torch.cat([special(kind, 1, heads, m + n) for kind in kinds]).to(device, dtype)
    if number % 4 > 1:  # ascending, or descending: the former fill the lists as fast as they can
        products = reference.products(pre[..., :m], pre[..., m:], composition)
        order = products.flatten(2).amax(2).sort(dim=1, descending=number % 4 == 3).indices
        pre = pre.gather(1, order[..., None].expand_as(pre))
    x, w_enc = of_tokens(pre)
    with configs.override("encode_heads", TMA=number // 4 % 2):
        check_heads(x, w_enc, None, m, k, composition, pre)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("m", "n", "heads", "d", "tokens", "k", "bias", "composition", "dtype", "tma"),
    [
        pytest.param(2, 4, 37, 37, 18, 5, True, "mand", torch.bfloat16, 0, id="odd d"),
        pytest.param(2, 4, 37, 40, 18, 5, True, "mand", torch.float16, 1, id="descriptors"),
        pytest.param(1, 1, 80, 8, 33, 1, False, "mul", torch.bfloat16, 0, id="1 x 1, k = 1"),
        pytest.param(3, 5, 19, 24, 5, 18, True, "mul", torch.float16, 1, id="3 x 5, k = h - 1"),
        pytest.param(4, 1, 41, 65, 1, 7, True, "relu_mul", torch.bfloat16, 0, id="one token"),
        pytest.param(2, 2, 2, 16, 3, 1, False, "mand", torch.bfloat16, 1, id="two heads"),
    ],
)
def test_integers(m, n, heads, d, tokens, k, bias, composition, dtype, tma, device):
    """Products of matrices: many ties, sizes that fill no tile, with a bias and without."""
    x = torch.randint(-2, 3, (tokens, d)).to(device, dtype)
    w_enc = (torch.randint(-1, 2, (heads, m + n, d)) * (torch.rand(heads, 1, d) < 0.4)).to(x)
    b_enc = torch.randint(-2, 3, (heads, m + n)).to(x) if bias else None
    pre = torch.einsum("bd,hrd->bhr", x.double(), w_enc.double())
    pre = pre if b_enc is None else pre + b_enc.double()
    assert torch.equal(pre, pre.to(dtype).double())
    with configs.override("encode_heads", TMA=tma):
        check_heads(x, w_enc, b_enc, m, k, composition, pre.to(dtype))


@pytest.mark.parametrize("composition", ["mand", "mul"])
def test_nan_and_infinite_rows(composition, device):
    """A token with NaN has the first heads, NaN all; its neighbours have their own."""
    pre = special("ties", 6, 30, 5).to(device, torch.bfloat16)
    x, w_enc = of_tokens(pre)
    x[1] = torch.nan
    x[4] = torch.inf
    pre[1] = torch.nan
    pre[4] = (x[4].double() * w_enc.double()).sum(2).to(pre.dtype)
    check_heads(x, w_enc, None, 2, 4, composition, pre)


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "last ones"])
def test_order_of_heads(order, device):
    """Lists are filled as fast as can be, once, or at the end; equal keys have the first heads."""
    heads, k = 200, 5
    value = {
        "ascending": torch.arange(heads) + 1,
        "descending": heads - torch.arange(heads),
        "equal": torch.ones(heads),
        "last ones": (torch.arange(heads) >= heads - 40) + 1,
    }[order]
    pre = value[None, :, None].expand(2, heads, 3).to(device, torch.bfloat16)
    x, w_enc = of_tokens(pre)
    selection = operations.Selection(heads, 1, 2, k, False)
    lists = operations.one_pass.lists_of(x, selection)
    assert lists.capacity < heads // lists.splits  # not all have room
    check_heads(x, w_enc, None, 1, k, "mand", pre)


@pytest.mark.parametrize(
    "blocks",
    [
        {"SPLITS": 1},
        {"SPLITS": 5},
        {"PROGRAMS": 8},
        {"ROOM": 16},
        {"COLUMNS": 128},
        {"WIDTH": 32},
        {"FLATTEN": 1},
        {"CUT_ENTRIES": 64},
    ],
    ids=str,
)
def test_blocks_change_nothing(blocks, device):
    pre = special("ties", 3, 90, 6).to(device, torch.bfloat16)
    pre[1:] = special("normal", 2, 90, 6).to(pre)
    x, w_enc = of_tokens(pre)
    with configs.override("encode_heads", **blocks):
        check_heads(x, w_enc, None, 2, 6, "mand", pre)


# The operation


def test_lengths_of_products(device):
    """Sums that are not exact: within their bounds."""
    m, heads, d = 2, 24, 72
    x = torch.randn(3, d).to(device, torch.bfloat16)
    w_enc = torch.randn(heads, 5, d).to(x)
    b_enc = torch.randn(heads, 5).to(x)
    found, pre = gathered(x, w_enc, b_enc, m, heads - 1, "mand")
    bias = b_enc.t().reshape(-1)
    truth = projection(
        x.cpu(), torch_impl.i_major(w_enc).cpu(), bias.cpu(), torch.bfloat16, "triton"
    )
    at = found.long()[:, None, :].expand(-1, 5, -1).cpu()
    value = truth.value.view(3, 5, heads).gather(2, at)
    error = truth.error.view(3, 5, heads).gather(2, at)
    assert ((pre.cpu().double() - value).abs() <= error).all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize(("m", "n", "k"), [(2, 4, 7), (3, 1, 20)])
def test_encode_equals_the_reference(composition, m, n, k, device, kernels):
    """Index by index, and nothing of the other way runs."""
    heads, d, tokens = 31, 24, 19
    x = torch.randint(-2, 3, (tokens, d)).to(device, torch.bfloat16)
    w_enc = (torch.randint(-1, 2, (heads, m + n, d)) * (torch.rand(heads, 1, d) < 0.4)).to(x)
    b_enc = torch.randint(-2, 3, (heads, m + n)).to(x)
    options = {"m": m, "k": k, "composition": composition}
    expected = fused_encode(x, w_enc, b_enc, **options, impl="reference")
    got = fused_encode(x, w_enc, b_enc, **options, impl="triton")
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.values, expected.values)
    assert kernels[:2] == ["encode_heads", "gather_heads"]
    assert kernels[-1] == "name_latents"
    assert "select_heads" not in kernels


def test_chunks_of_tokens(device, kernels, monkeypatch):
    monkeypatch.setattr(torch_impl, "chunk_tokens", lambda *_: 5)
    x = torch.randint(-2, 3, (11, 16)).to(device, torch.bfloat16)
    w_enc = torch.randint(-2, 3, (20, 3, 16)).to(x)
    expected = fused_encode(x, w_enc, m=1, k=3, impl="reference")
    got = fused_encode(x, w_enc, m=1, k=3, impl="triton")
    assert torch.equal(got.indices, expected.indices)
    assert kernels.count("encode_heads") == 3


def test_where_it_is_not_used(device, kernels):
    """Masks, 32 bits, no head to leave out, lists too long, rows that no descriptor can have."""
    x = torch.randint(-2, 3, (2, 16)).to(device, torch.bfloat16)
    w_enc = torch.randint(-2, 3, (20, 3, 16)).to(x)
    mask = (torch.arange(40) % 3 > 0).to(device)
    fused_encode(x, w_enc, m=1, k=3, mask=mask, impl="triton")
    fused_encode(x.float(), w_enc.float(), m=1, k=3, impl="triton")
    fused_encode(x, w_enc, m=1, k=20, impl="triton")
    with configs.override("encode_heads", ROOM=16384):
        fused_encode(x, w_enc, m=1, k=3, impl="triton")
    with configs.override("encode", ONE_PASS=0):
        fused_encode(x, w_enc, m=1, k=3, impl="triton")
    with configs.override("encode_heads", TMA=1):
        fused_encode(x[:, :15], w_enc[..., :15], m=1, k=3, impl="triton")
    assert fused_encode(x[:0], w_enc, m=1, k=3, impl="triton").indices.shape == (0, 3)
    assert kernels.count("select_latents") == 6 and "encode_heads" not in kernels
    assert "encode_heads" not in kernels


@pytest.mark.slow
def test_order_of_programs_changes_no_bit(device, shuffled):  # noqa: F811
    """Of lists that are cut, and of the codes that are made of them."""
    x = torch.randn(20, 24).to(device, torch.bfloat16)
    w_enc = torch.randn(60, 6, 24).to(x)
    expected = fused_encode(x, w_enc, m=2, k=5, impl="triton")
    shuffled()
    for _ in range(2):
        got = fused_encode(x, w_enc, m=2, k=5, impl="triton")
        assert torch.equal(got.indices, expected.indices)
        assert torch.equal(got.values, expected.values)


def test_tensors_that_no_descriptor_can_have(device):
    """They begin where a descriptor cannot: pointers are used."""
    x = torch.randint(-2, 3, (3 * 16 + 1,)).to(device, torch.bfloat16)[1:].view(3, 16)
    w_enc = torch.randint(-2, 3, (20, 3, 16)).to(x)
    assert x.data_ptr() % 16
    expected = fused_encode(x, w_enc, m=1, k=3, impl="reference")
    with configs.override("encode_heads", TMA=1):
        got = fused_encode(x, w_enc, m=1, k=3, impl="triton")
    assert torch.equal(got.indices, expected.indices)
