"""Gradients: by finite differences, where a product is 0, and whatever subset of them is asked."""

import itertools

import implementations
import pytest
import torch
from torch.autograd import gradcheck

from kronsae_kernels import SparseCodes, dense_encode, fused_encode, sparse_decode
from kronsae_kernels.common import COMPOSITIONS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

M, K = 2, 5


def away_from_kinks(shape, composition="mand"):
    """x, w_enc, b_enc whose selection and ReLUs do not change within a finite difference of 1e-6.

    Pre-latents are sums of 5 terms of about 1, so 1e-6 moves them by some 1e-6 and products by
    1e-5 or so: 1e-3 is a hundred times as far.
    """
    for seed in range(1000):
        torch.manual_seed(seed)
        x, w_enc, b_enc = (
            torch.randn(size, dtype=torch.float64) for size in ((3, 4), shape, shape[:-1])
        )
        pre = torch.nn.functional.linear(x, w_enc.flatten(0, -2), b_enc.flatten())
        scores = pre.relu()
        if len(shape) == 3:
            base, extension = pre.unflatten(1, shape[:2]).split([M, shape[1] - M], dim=2)
            product = base[..., :, None] * extension[..., None, :]
            both = (base > 0)[..., :, None] & (extension > 0)[..., None, :]
            scores = (product if composition == "mul" else product * both).flatten(1)
        first = scores.sort(dim=1, descending=True).values[:, : K + 1]
        if (first[:, :-1] - first[:, 1:]).min() > 1e-3 and pre.abs().min() > 1e-3:
            if composition == "mul" or first.min() > 1e-3:
                return [t.requires_grad_() for t in (x, w_enc, b_enc)]
    raise AssertionError("no such numbers")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_gradcheck_encode(composition, eps):
    def values(*tensors):
        return fused_encode(*tensors, m=M, k=K, composition=composition, eps=eps).values

    leaves = away_from_kinks((6, 5, 4), composition)
    assert gradcheck(values, leaves)
    assert gradcheck(values, [leaves[0], leaves[1]])


def test_gradcheck_dense_encode():
    assert gradcheck(lambda *t: dense_encode(*t, k=K).values, away_from_kinks((30, 4)))


def test_gradcheck_decode():
    values, w_dec, b_dec = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, K), (12, 4), (4,))
    )
    indices = torch.randint(12, (3, K))
    assert gradcheck(lambda v, w, b: sparse_decode(v, indices, w, b), (values, w_dec, b_dec))


def test_gradcheck_autoencoder():
    def reconstruct(x, w_enc, b_enc, w_dec):
        return sparse_decode(fused_encode(x, w_enc, b_enc, m=M, k=K), w_dec=w_dec)

    w_dec = torch.randn(36, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(reconstruct, [*away_from_kinks((6, 5, 4)), w_dec])


# Where a product is 0


@pytest.mark.parametrize("impl", implementations.ALL)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_derivative_of_no_product_is_0(composition, eps, impl):
    """u = 0 against v = 3 ("mul" would have 3), both 0, one negative, and an underflow to 0."""
    tiny = 1e-30
    pairs = [[0.0, 3.0], [0.0, 0.0], [tiny, tiny]]
    if composition != "mul":
        pairs += [[-1.0, 3.0], [-1.0, -3.0], [0.0, -3.0]]
    w_enc = torch.tensor(pairs)[:, :, None].requires_grad_()
    x = torch.ones(2, 1, requires_grad=True)
    b_enc = torch.zeros(len(pairs), 2, requires_grad=True)
    codes = fused_encode(
        x, w_enc, b_enc, m=1, k=len(pairs), composition=composition, eps=eps, impl=impl
    )
    expected = torch.tensor(eps).sqrt() if composition == "mand" else torch.tensor(0.0)
    assert torch.equal(codes.values, expected.expand(2, len(pairs)))
    for gradient in torch.autograd.grad(codes.values.sum(), (x, w_enc, b_enc)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", implementations.ALL)
def test_eps_bounds_the_gradient(impl):
    """dz/dp = q / (2 sqrt(p q + eps)) <= q / (2 sqrt(eps)); without eps it grows without bound."""
    eps, extension = 1e-5, 2.0
    for base in (1.0, 1e-4, 1e-12, 1e-30):
        w_enc = torch.tensor([[[base], [extension]]], requires_grad=True)
        for root_eps in (eps, 0.0):
            z = fused_encode(torch.ones(1), w_enc, m=1, k=1, eps=root_eps, impl=impl).values
            d_base, d_extension = torch.autograd.grad(z.sum(), w_enc)[0].flatten().tolist()
            root = (base * extension + root_eps) ** 0.5
            # A few float32 roundings.
            assert d_base == pytest.approx(extension / (2 * root), rel=1e-6)
            assert d_extension == pytest.approx(base / (2 * root), rel=1e-6)
            if root_eps:
                assert d_base <= extension / (2 * eps**0.5) * (1 + 1e-6)


def test_dense_derivative_where_relu_is_0():
    w_enc = torch.tensor([[2.0], [0.0], [-1.0]], requires_grad=True)
    (d_w,) = torch.autograd.grad(dense_encode(torch.ones(1), w_enc, k=3).values.sum(), w_enc)
    assert d_w.flatten().tolist() == [1.0, 0.0, 0.0]


# What is differentiated


def test_indices_carry_no_gradient():
    x, w_enc, b_enc = away_from_kinks((6, 5, 4))
    for codes in (
        fused_encode(x, w_enc, b_enc, m=M, k=K),
        dense_encode(x, w_enc.flatten(0, 1), k=K),
    ):
        assert codes.values.requires_grad
        assert not codes.indices.requires_grad
        assert codes.indices.dtype == torch.int64


def operations():
    """Name: (function of its differentiable arguments, the arguments)."""
    x, w_enc, b_enc = (t.detach() for t in away_from_kinks((6, 5, 4)))
    values, w_dec, b_dec = (torch.randn(*shape).double() for shape in ((3, K), (36, 4), (4,)))
    indices = torch.randint(36, (3, K))
    return {
        "encode": (lambda *t: fused_encode(*t, m=M, k=K).values, (x, w_enc, b_enc)),
        "dense": (
            lambda x, w, b: dense_encode(x, w, b, k=K).values,
            (x, w_enc.flatten(0, 1), b_enc.flatten()),
        ),
        "decode": (lambda v, w, b: sparse_decode(v, indices, w, b), (values, w_dec, b_dec)),
    }


@pytest.mark.parametrize("name", ["encode", "dense", "decode"])
def test_any_subset_of_gradients(name):
    function, tensors = operations()[name]

    def gradients(subset):
        leaves = [t.clone().requires_grad_(i in subset) for i, t in enumerate(tensors)]
        out = function(*leaves)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
        return [leaf.grad for leaf in leaves]

    complete = gradients({0, 1, 2})
    assert all(gradient.abs().sum() > 0 for gradient in complete)
    for size in (1, 2):
        for subset in itertools.combinations(range(3), size):
            for i, (got, expected) in enumerate(zip(gradients(subset), complete, strict=True)):
                if i in subset:
                    assert torch.equal(got, expected)
                else:
                    assert got is None


@pytest.mark.parametrize("name", ["encode", "dense", "decode"])
def test_without_gradients(name):
    function, tensors = operations()[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = function(*leaves)
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = function(*leaves)
        assert not got.requires_grad
        assert torch.equal(got, expected)
    assert not function(*tensors).requires_grad


@pytest.mark.parametrize("name", ["encode", "dense", "decode"])
def test_inputs_are_left_alone_and_backward_repeats(name):
    function, tensors = operations()[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    g = torch.randn_like(out)
    kept = g.clone()
    first = torch.autograd.grad(out, leaves, g, retain_graph=True)
    second = torch.autograd.grad(out, leaves, g)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(g, kept)
    assert all(torch.equal(leaf, t) for leaf, t in zip(leaves, tensors, strict=True))
    out.detach().zero_()  # shares no memory with an input
    assert all(torch.equal(leaf, t) for leaf, t in zip(leaves, tensors, strict=True))


def test_nothing_selected_and_no_tokens():
    """k = 0 for the decoder, B = 0 for all: b_dec, zeros and empty tensors."""
    w_dec, b_dec = torch.randn(6, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    values = torch.zeros(2, 0, requires_grad=True)
    out = sparse_decode(values, torch.zeros(2, 0, dtype=torch.int64), w_dec, b_dec)
    assert torch.equal(out, b_dec.expand(2, 3))
    d_values, d_w, d_b = torch.autograd.grad(out.sum(), (values, w_dec, b_dec))
    assert d_values.shape == (2, 0)
    assert torch.equal(d_w, torch.zeros(6, 3))
    assert torch.equal(d_b, torch.full((3,), 2.0))
    x, w_enc = torch.zeros(0, 3, requires_grad=True), torch.randn(2, 3, 3, requires_grad=True)
    out = sparse_decode(fused_encode(x, w_enc, m=1, k=2), w_dec=w_dec[:4])
    d_x, d_w = torch.autograd.grad(out.sum(), (x, w_enc))
    assert out.shape == d_x.shape == (0, 3)
    assert torch.equal(d_w, torch.zeros(2, 3, 3))


# Against plain torch, at a middle size


@pytest.mark.one_in(3)
@pytest.mark.parametrize("ours", ["torch", implementations.TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errs_no_more_than_plain_torch(dtype, ours):
    """Loss and gradients of an autoencoder: distance from float64, as torch's in the same dtype.

    Each implementation is compared with the truth for the latents that it selected. Ours rounds
    less often, but adds a row's r terms one after the other where torch adds in pairs, which errs
    by about sqrt(r) u in float32: that much more, and 10 %, is allowed. The interpreter's shape is
    smaller: 60 roundings of a bias have a norm that chance moves by 9 %, so 25 % there.
    """
    tokens, d, heads, n, k = (128, 64, 32, 4, 16) if ours == "torch" else (24, 33, 12, 3, 4)
    chance = 0.1 if ours == "torch" else 0.25
    generator = torch.Generator().manual_seed(0)
    x, w_enc, b_enc, w_dec = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, d), (heads, M + n, d), (heads, M + n), (heads * M * n, d))
    )
    names = ("values", "out", "x", "w_enc", "b_enc", "w_dec")

    def truth(indices, leaves):
        x, w_enc, b_enc, w_dec = (leaf.detach().double().requires_grad_() for leaf in leaves)
        pre = torch.nn.functional.linear(x, w_enc.flatten(0, 1), b_enc.flatten())
        base, extension = pre.unflatten(1, (heads, M + n)).relu().split([M, n], dim=2)
        product = (base[..., :, None] * extension[..., None, :]).flatten(1).gather(1, indices)
        assert product.min() > 1e-2  # far from the kink, in 16 bits too
        values = product.sqrt()
        return differentiate(values, indices, (x, w_enc, b_enc, w_dec), None)

    def differentiate(values, indices, leaves, impl):
        if impl is None:
            out = (values[..., None] * leaves[-1][indices]).sum(1)
        else:
            out = sparse_decode(SparseCodes(values, indices), w_dec=leaves[-1], impl=impl)
        gradients = torch.autograd.grad(out.square().sum() / tokens, leaves)
        return dict(zip(names, (values, out, *gradients), strict=True))

    terms = tokens * k / (heads * M)  # of a base row, on average
    allowance = terms**0.5 * torch.finfo(torch.float32).eps / 2
    errors = {}
    for impl in (ours, "reference"):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w_enc, b_enc, w_dec)]
        codes = fused_encode(*leaves[:3], m=M, k=k, impl=impl)
        found = differentiate(codes.values, codes.indices, leaves, impl)
        expected = truth(codes.indices, leaves)
        errors[impl] = {
            name: ((found[name] - expected[name]).norm() / expected[name].norm()).item()
            for name in names
        }
    for name in names:
        error, theirs = errors[ours][name], errors["reference"][name]
        assert error <= (1 + chance) * theirs + allowance, (
            f"{name}: {error:.2e}, torch {theirs:.2e}"
        )
