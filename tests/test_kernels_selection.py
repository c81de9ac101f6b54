"""Selection, by hand: what is selected, in which order, and what a selected latent is worth."""

import math

import implementations
import pytest
import torch

from kronsae_kernels import dense_encode, fused_encode, reference, sparse_decode, torch_impl
from kronsae_kernels.common import COMPOSITIONS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
both = pytest.mark.parametrize("impl", ["torch", "reference"])
every = pytest.mark.parametrize("impl", implementations.ALL)


def encode(pre_latents, m, k, **options):
    """fused_encode of one token whose pre-latents are given, head by head: x = 1, w_enc = them."""
    w_enc = torch.tensor(pre_latents)[:, :, None]
    codes = fused_encode(torch.ones(1), w_enc, m=m, k=k, **options)
    return codes.values.tolist(), codes.indices.tolist()


@every
def test_values_of_each_composition(impl):
    # Head 0: base 4, -1 and extension 9, 1, -2. Head 1: base 2, 0 and extension 3, 8, 5.
    heads = [[4.0, -1.0, 9.0, 1.0, -2.0], [2.0, 0.0, 3.0, 8.0, 5.0]]
    values, indices = encode(heads, m=2, k=5, impl=impl)
    assert indices == [0, 7, 8, 6, 1]  # products 36, 16, 10, 6, 4
    assert values == pytest.approx([6, 4, math.sqrt(10), math.sqrt(6), 2], rel=1e-6)
    values, indices = encode(heads, m=2, k=6, eps=0.25, impl=impl)
    assert indices == [0, 7, 8, 6, 1, 2]  # the last: the first latent without a product
    assert values == pytest.approx([math.sqrt(v + 0.25) for v in (36, 16, 10, 6, 4, 0)], rel=1e-6)
    assert encode(heads, m=2, k=5, composition="relu_mul", impl=impl) == (
        [36, 16, 10, 6, 4],
        [0, 7, 8, 6, 1],
    )
    assert encode(heads, m=2, k=12, composition="mul", impl=impl) == (
        [36, 16, 10, 6, 4, 2, 0, 0, 0, -1, -8, -9],
        [0, 7, 8, 6, 1, 5, 9, 10, 11, 4, 2, 3],
    )


@every
def test_ties_go_to_the_lowest_index(impl):
    heads = [[1.0, 1.0, 2.0, 2.0]] * 5
    assert encode(heads, m=2, k=3, impl=impl)[1] == [0, 1, 2]
    heads[3] = [1.0, 2.0, 2.0, 2.0]
    assert encode(heads, m=2, k=4, impl=impl)[1] == [14, 15, 0, 1]
    assert encode([[0.0, 0.0]] * 5, m=1, k=3, impl=impl) == ([0.0] * 3, [0, 1, 2])
    assert encode([[-1.0, 3.0]] * 5, m=1, k=3, impl=impl) == ([0.0] * 3, [0, 1, 2])


@every
def test_product_decides_not_its_root(impl):
    """sqrt is not one to one in float32: 1 and the next number have the same root."""
    above = 1 + torch.finfo(torch.float32).eps
    values, indices = encode([[1.0, 1.0], [above, 1.0]], m=1, k=2, impl=impl)
    assert values == [1.0, 1.0]
    assert indices == [1, 0]


@every
def test_bfloat16_latents_compete_in_float32(impl):
    """1.0078125 and 1 are neighbours in bfloat16, where these three products would all be 1."""
    w_enc = torch.tensor([[1.0, 1.0], [1.0078125, 0.9921875], [0.9921875, 1.0]]).bfloat16()
    codes = fused_encode(
        torch.ones(1).bfloat16(), w_enc[:, :, None], m=1, k=3, composition="relu_mul", impl=impl
    )
    assert codes.indices.tolist() == [0, 1, 2]
    assert codes.values.tolist() == [1.0, 1.0078125 * 0.9921875, 0.9921875]
    assert codes.values.dtype == torch.float32


@every
def test_mask_selects_among_its_latents_alone(impl):
    heads = [[4.0, 2.0, 9.0, 1.0], [2.0, 1.0, 3.0, 8.0]]  # products 36 4 18 2, 6 16 3 8
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1]).bool()
    assert encode(heads, m=2, k=4, composition="relu_mul", mask=mask, impl=impl) == (
        [8, 6, 4, 2],
        [7, 4, 1, 3],
    )
    # A latent outside the mask loses even against one without a product.
    mask = torch.tensor([0, 0, 0, 1]).bool()
    heads = [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [-1.0, 1.0]]
    assert encode(heads, m=1, k=1, mask=mask, impl=impl) == ([0.0], [3])


@every
def test_dense(impl):
    w_enc = torch.tensor([[3.0], [-1.0], [5.0], [5.0], [0.0], [2.0]])
    codes = dense_encode(torch.ones(1), w_enc, k=6, impl=impl)
    assert codes.values.tolist() == [5, 5, 3, 2, 0, 0]
    assert codes.indices.tolist() == [2, 3, 0, 5, 1, 4]


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_heads_that_decide_by_a_low_product(composition):
    """k is larger than the number of latents above 0, so low products decide which heads stay."""
    generator = torch.Generator().manual_seed(1)
    w_enc = torch.randn(40, 5, 3, generator=generator, dtype=torch.float64)
    b_enc = torch.full((40, 5), -1.5, dtype=torch.float64)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    for k in (1, 5, 20, 39):
        options = {"m": 2, "k": k, "composition": composition}
        got = fused_encode(x, w_enc, b_enc, **options)
        expected = fused_encode(x, w_enc, b_enc, **options, impl="reference")
        assert torch.equal(got.indices, expected.indices)


def test_mul_where_all_products_are_negative():
    """The largest product of a head may be that of its largest base and smallest extension."""
    x = torch.ones(1, 1, dtype=torch.float64)
    w = torch.tensor([[-3.0, -1.0, 2.0, 5.0], [-2.0, -2.0, 2.0, 2.0]], dtype=torch.float64)
    codes = fused_encode(x, w[:, :, None], m=2, k=1, composition="mul")
    assert codes.values.item() == -2.0  # of head 0; head 1 holds -4 four times
    assert codes.indices.item() == 2
    codes = fused_encode(x, -w[:, :, None], m=2, k=1, composition="mul")
    assert (codes.values.item(), codes.indices.item()) == (-2.0, 2)


def tied_pre_latents(tokens, rows, heads, dtype):
    """[tokens, rows, heads]: of all kinds that decide by the index, a few tokens of each."""
    pre = torch.randn(tokens, rows, heads).to(dtype)
    few = torch.arange(tokens) % 8
    pre[few == 1] = torch.randint(-2, 3, pre[few == 1].shape).to(dtype)  # equal factors
    pre[few == 2] = 0.0
    pre[few == 3] = -1.0
    pre[few == 4] = 2.0 ** torch.randint(-3, 4, pre[few == 4].shape).to(dtype)  # equal products
    pre[few == 5] *= torch.rand_like(pre[few == 5]) < 0.1  # fewer than k above 0
    pre[few == 6] *= torch.finfo(dtype).tiny ** 0.5  # denormal products, some of them 0
    return pre


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "m", "n", "k"),
    [
        (64, 32, 32, 32),
        (9, 32, 32, 32),
        (3, 17, 40, 64),
        (50, 3, 5, 9),
        (200, 1, 7, 5),
        (2, 2, 2, 8),
    ],
)
def test_heads_and_rows_that_are_left_out(heads, m, n, k, dtype, composition):
    """The k largest lie in k rows of k heads, whatever ties: as if all products were sorted."""
    pre = tied_pre_latents(40, m + n, heads, dtype)
    by_head = pre.transpose(1, 2)
    product = reference.products(by_head[..., :m], by_head[..., m:], composition).flatten(1)
    expected = reference.largest(product, k)
    indices, base, extension = torch_impl.select_kron(pre, None, m, n, k, composition)
    assert torch.equal(indices, expected)
    assert torch.equal(base * extension, product.gather(1, expected))


# Rows that are not finite


@both
@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_row_stays_in_its_row(bad, composition, impl):
    """Weights are integers, so that the other rows are the same to the bit."""
    x = torch.randint(-2, 3, (6, 4)).float().requires_grad_()
    w_enc, b_enc = torch.randint(-2, 3, (9, 5, 4)).float(), torch.randint(-2, 3, (9, 5)).float()
    w_dec = torch.randint(-2, 3, (54, 4)).float()
    spoiled = x.detach().clone()
    spoiled[2, 1] = bad
    spoiled.requires_grad_()
    others = [0, 1, 3, 4, 5]

    def run(x):
        codes = fused_encode(x, w_enc, b_enc, m=2, k=12, composition=composition, impl=impl)
        out = sparse_decode(codes, w_dec=w_dec, impl=impl)
        return [codes.values, codes.indices, out, torch.autograd.grad(out.sum(), x)[0]]

    found = run(spoiled)
    for got, expected in zip(found, run(x), strict=True):
        assert torch.equal(got[others], expected[others])
    values, indices, out, _ = (row[2] for row in found)
    assert not values.isfinite().any()
    assert ((indices >= 0) & (indices < 54)).all()
    assert len(set(indices.tolist())) == 12
    assert not out.isfinite().any()
    if math.isnan(bad):
        assert values.isnan().all()
        assert out.isnan().all()


@every
def test_bad_row_of_a_dense_encoder(impl):
    x, w_enc = torch.randint(-2, 3, (6, 4)).float(), torch.randint(-2, 3, (64, 4)).float()
    spoiled = x.clone()
    spoiled[2, 1] = math.nan
    got, expected = (dense_encode(rows, w_enc, k=3, impl=impl) for rows in (spoiled, x))
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got.values[others], expected.values[others])
    assert torch.equal(got.indices[others], expected.indices[others])
    assert got.values[2].isnan().all()


# Chunks of tokens


@pytest.mark.parametrize("composition", ["mand", "relu_mul", "mul"])
@pytest.mark.parametrize("allowed", [5, 29, 30, 31, 60, 61, 119])
def test_few_or_many_latents_in_a_mask(allowed, composition):
    """Up to k m n = 30 are scored one and all, more by heads first; ties fall alike."""
    x, w_enc = integers(40, 6, dtype=torch.float32), integers(20, 5, 6, dtype=torch.float32)
    mask = torch.zeros(120, dtype=torch.bool)
    mask[torch.randperm(120)[:allowed]] = True
    options = {"k": 5, "mask": mask}
    kron = [
        fused_encode(x, w_enc, m=2, composition=composition, impl=impl, **options)
        for impl in ("torch", "reference")
    ]
    assert_same(*kron)
    dense = integers(120, 6, dtype=torch.float32)
    assert_same(*(dense_encode(x, dense, impl=i, **options) for i in ("torch", "reference")))


def integers(*shape, dtype):
    """Sums of their products are exact, so that chunks of any size agree to the bit."""
    return torch.randint(-2, 3, shape).to(dtype)


@pytest.fixture
def small_chunks(monkeypatch):
    """A function that makes every chunk of tokens the given size."""

    def make(tokens):
        monkeypatch.setitem(torch_impl.CHUNK_BYTES, "cpu", 1)
        monkeypatch.setattr(torch_impl, "MIN_CHUNK_TOKENS", tokens)

    return make


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_chunks_change_nothing(chunk, dtype, small_chunks, monkeypatch):
    x, g = integers(11, 6, dtype=dtype), integers(11, 6, dtype=dtype)
    w_enc, b_enc = integers(20, 5, 6, dtype=dtype), integers(20, 5, dtype=dtype)
    w_dense, b_dense = integers(120, 6, dtype=dtype), integers(120, dtype=dtype)
    w_dec = integers(120, 6, dtype=dtype)
    mask = torch.arange(120) % 3 > 0
    leaves = [t.requires_grad_() for t in (x, w_enc, b_enc, w_dense, b_dense, w_dec)]
    seen = []
    spans = torch_impl.spans

    def counted(*arguments):
        found = spans(*arguments)
        seen.append((len(found), *arguments[3:]))  # and how many tokens a chunk has at least
        return found

    monkeypatch.setattr(torch_impl, "spans", counted)

    def run():
        codes = [
            fused_encode(x, w_enc, b_enc, m=2, k=7),
            fused_encode(x, w_enc, b_enc, m=2, k=7, mask=mask),
            dense_encode(x, w_dense, b_dense, k=5),
        ]
        outs = [sparse_decode(one, w_dec=w_dec) for one in codes]
        gradients = torch.autograd.grad(sum(outs), leaves, g)
        return [*(part for one in codes for part in one), *outs, *gradients]

    expected = run()
    assert all(count == 1 for count, *_ in seen)
    seen.clear()
    small_chunks(chunk)
    assert_same(run(), expected)
    assert all(count == math.ceil(11 / (least[0] if least else chunk)) for count, *least in seen)
    assert seen


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_of_sums_in_bfloat16(chunk, monkeypatch):
    """`combine` and `pair_dots` of a bfloat16 table gather float32 rows, a chunk at a time."""
    table, y = torch.randn(50, 9).bfloat16(), torch.randn(10, 9)
    columns, coefficients = torch.randint(50, (10, 4)), torch.randn(10, 4)
    expected = [
        torch_impl.combine(coefficients, columns, table),
        torch_impl.pair_dots(y, columns, table),
    ]
    monkeypatch.setitem(torch_impl.CHUNK_BYTES, "cpu", chunk * 4 * 9 * 4)
    got = [
        torch_impl.combine(coefficients, columns, table),
        torch_impl.pair_dots(y, columns, table),
    ]
    assert_same(got, expected)
    rows = table[columns].double()
    truth = [
        torch.einsum("bk,bkd->bd", coefficients.double(), rows),
        torch.einsum("bd,bkd->bk", y.double(), rows),
    ]
    for one, of_truth in zip(got, truth, strict=True):
        # A float32 sum of 9 terms at most, each below 4 * 4.
        assert (one - of_truth).abs().max() < 10 * 2**-24 * 9 * 16


@pytest.mark.parametrize("used", [0.0, 0.1, 0.9])
def test_slots_of_value_0_are_left_out(used):
    """Sums over codes of which most slots are unused: bit for bit those over all slots."""
    table, y, columns = torch.randn(50, 9), torch.randn(10, 9), torch.randint(50, (10, 40))
    coefficients = torch.randn(10, 40) * (torch.rand(10, 40) < used)
    got = torch_impl.combine(coefficients, columns, table)
    rows = table[columns] * coefficients[..., None]
    torch.testing.assert_close(got, rows.sum(1))
    every = torch.nn.functional.embedding_bag(
        columns, table, mode="sum", per_sample_weights=coefficients
    )
    assert torch.equal(got, every)
    grouped = torch_impl.group(coefficients, columns, 50)
    assert len(grouped[0]) == coefficients.count_nonzero()
    expected = torch.zeros(50, 9, dtype=torch.float64)
    products = coefficients.double()[..., None] * y.double()[:, None]
    expected.index_add_(0, columns.view(-1), products.flatten(0, 1))
    got = torch_impl.scatter(coefficients, *grouped, y)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


# Blocks of heads


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 heads, of chunks of 5 tokens."""
    monkeypatch.setitem(torch_impl.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(torch_impl, "MIN_CHUNK_TOKENS", 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("composition", [*COMPOSITIONS, None])
@pytest.mark.parametrize(("heads", "k"), [(64, 2), (65, 2), (300, 3), (641, 4), (200, 11)])
def test_blocks_of_heads_change_nothing(heads, k, composition, dtype, small_blocks):
    """Where later heads tie with earlier ones, exceed them all, or are not numbers; None: dense."""
    rows = (heads, 5) if composition else (heads,)
    x, w_enc, b_enc = (integers(*shape, dtype=dtype) for shape in ((23, 6), (*rows, 6), rows))
    x[3], b_enc[-3:] = 0, 9  # ties of all heads but the last
    x[7, 2] = torch.nan
    if composition:
        encode, options = fused_encode, {"m": 2, "composition": composition}
    else:
        encode, options = dense_encode, {}
    got, expected = (
        encode(x, w_enc, b_enc, k=k, impl=impl, **options) for impl in ("torch", "reference")
    )
    numbers = torch.arange(23) != 7
    assert_same([part[numbers] for part in got], [part[numbers] for part in expected])
    assert got.values[7].isnan().all()
    assert len(set(got.indices[7].tolist())) == k
    # Heads that hold nothing come first, then some that are not numbers.
    w_enc[: heads // 2], b_enc[: heads // 2], w_enc[-2] = 0, -1, torch.nan
    got, expected = (
        encode(x[numbers], w_enc, b_enc, k=k, impl=impl, **options)
        for impl in ("torch", "reference")
    )
    assert torch.equal(got.values.isnan(), expected.values.isnan())
    settled = ~expected.values.isnan()
    assert torch.equal(got.values[settled], expected.values[settled])
    assert torch.equal(got.indices[settled], expected.indices[settled])


def test_blocks_are_made_of_wide_encoders_alone(monkeypatch):
    """Each chunk of S1 and S2 is one product; at F = 2^18 it is made of blocks in the cache."""
    for heads, count in ((512, 1), (2048, 1), (4096, 4), (2**14, 16)):
        x, w_enc = torch.empty(256, 1), torch.empty(heads, 8, 1)
        (chunk, *_) = torch_impl.blocks(x, w_enc, None, 64)
        assert len(list(chunk)) == count
