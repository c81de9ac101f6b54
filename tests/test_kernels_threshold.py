"""`threshold_encode` against its reference, and its gradients against autograd's."""

import pytest
import torch

from kronsae_kernels import dense_encode, fused_encode, threshold_encode, torch_impl

B, D, H, M, N = 9, 5, 6, 2, 3
F = H * M * N
KINDS = {
    "mand": {"m": M},
    "eps": {"m": M, "eps": 1e-2},
    "relu_mul": {"m": M, "composition": "relu_mul"},
    "mul": {"m": M, "composition": "mul"},
    "dense": {},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def tensors(kind, dtype=torch.float64):
    rows = (H, M + N) if "m" in kind else (F,)
    shapes = (B, D), (*rows, D), rows
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def written_out(codes):
    dense = torch.zeros(*codes.values.shape[:-1], F, dtype=codes.values.dtype)
    return dense.scatter_add(-1, codes.indices, codes.values)


@pytest.mark.parametrize("low", [-1.0, 0.0, 1.0, 50.0])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_equals_the_reference(kind, low, chunk_tokens, monkeypatch):
    monkeypatch.setattr(torch_impl, "chunk_tokens", lambda *_: chunk_tokens)
    leaves = tensors(kind)
    threshold = low + torch.rand(F, dtype=torch.float64)
    got = threshold_encode(*leaves, threshold=threshold, **kind)
    expected = threshold_encode(*leaves, threshold=threshold, **kind, impl="reference")
    torch.testing.assert_close(got.values, expected.values)
    used = expected.values > 0
    assert torch.equal(got.indices[used], expected.indices[used])
    assert got.indices.min() >= 0 and got.indices.max() < F
    weight = torch.randn(B, F, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((written_out(codes) * weight).sum(), leaves)
        for codes in (got, expected)
    ]
    for name, a, b in zip(("x", "w_enc", "b_enc"), *gradients, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_below_all_it_is_all_that_is_active(kind):
    """With a threshold that nothing meets it has the latents of the TopK encoders, in order."""
    leaves = tensors(kind)
    codes = threshold_encode(*leaves, threshold=torch.full((F,), -100.0), **kind)
    width = codes.values.shape[1]
    encode = fused_encode if "m" in kind else dense_encode
    top = encode(*leaves, k=width, **kind)
    used = codes.values > 0
    assert torch.equal(codes.values[used], top.values[used])
    assert torch.equal(codes.indices[used], top.indices[used])


def integers(*shape, dtype):
    return torch.randint(-2, 3, shape).to(dtype)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "m", "n"), [(1, 1, 1), (7, 3, 5), (40, 1, 9), (3, 17, 20), (200, 1, 2)]
)
def test_heads_and_rows_that_are_left_out(kind, heads, m, n, dtype, monkeypatch):
    """Bit for bit the reference's, where values equal thresholds, each other and 0."""
    monkeypatch.setitem(torch_impl.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(torch_impl, "MIN_CHUNK_TOKENS", 11)  # also of heads that are looked into
    size = heads * m * n
    kind = {**kind, "m": m} if "m" in kind else kind
    rows = (heads, m + n) if "m" in kind else (size,)
    x, w_enc, b_enc = (integers(*shape, dtype=dtype) for shape in ((23, 4), (*rows, 4), rows))
    x[5], x[6, 2], w_enc.view(-1, 4)[0, 1] = 0, torch.nan, torch.nan
    odd = torch.tensor([-1.0, 0.0, 2.0**0.5, 2.0, 6.0, torch.nan, torch.inf, -torch.inf])
    for threshold in (
        odd[torch.randint(len(odd), (size,))],
        odd[torch.randint(2, 5, (size,))].double().exp2().sqrt(),
        torch.full((size,), -torch.inf),
        torch.full((size,), 1e30),
        (2 * torch.rand(heads, 1) + torch.rand(heads, m * n)).flatten().to(dtype)[:size],
    ):
        got, expected = (
            threshold_encode(x, w_enc, b_enc, threshold=threshold, **kind, impl=impl)
            for impl in ("torch", "reference")
        )
        used = expected.values > 0
        assert torch.equal(got.values, expected.values)
        assert torch.equal(got.indices[used], expected.indices[used])


def test_leading_dimensions_and_no_tokens(kind):
    x, *weights = tensors(kind, torch.float32)
    threshold = torch.full((F,), 0.5)
    flat = threshold_encode(x, *weights, threshold=threshold, **kind)
    cube = threshold_encode(x.view(3, 3, D), *weights, threshold=threshold, **kind)
    assert torch.equal(cube.values.view(flat.values.shape), flat.values)
    none = threshold_encode(x[:0], *weights, threshold=threshold, **kind)
    assert none.values.shape == (0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": torch.zeros(F - 1)}, "threshold: expected .F., or a single number = .36."),
        ({"threshold": [0.0] * F}, "threshold: expected a finite number, got .0.0"),
        ({"m": 5}, "m: expected an integer in .1, 4."),
        ({"m": None}, "w_enc: expected .F, d."),
        ({"composition": "max"}, "composition"),
        ({"eps": -1.0}, "eps"),
        ({"eps": "0"}, "eps: expected a finite number >= 0, got '0' .str."),
        ({"impl": "cuda"}, "impl: expected None or one of"),
    ],
)
def test_arguments_are_checked(change, words):
    options = {"threshold": torch.zeros(F), "m": M, **change}
    with pytest.raises(ValueError, match=words):
        threshold_encode(*tensors(KINDS["mand"]), **options)
