"""`nested_decode`: each prefix against a decode of its own, values and gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kronsae_kernels import SparseCodes, nested_decode, sparse_decode, torch_impl

B, K, F, D = 9, 5, 24, 7
BOUNDS = [4, 8, 24]


def codes(dtype=torch.float64):
    indices = torch.stack([torch.randperm(F)[:K] for _ in range(B)])
    return torch.randn(B, K, dtype=dtype, requires_grad=True), indices


def parameters(dtype=torch.float64):
    return (
        torch.randn(F, D, dtype=dtype, requires_grad=True),
        torch.randn(D, dtype=dtype, requires_grad=True),
    )


def one_by_one(values, indices, bounds, w_dec, b_dec):
    """Every prefix by a call of `sparse_decode`."""
    kept = [values * (indices < bound) for bound in bounds]
    return torch.stack([sparse_decode(z, indices, w_dec, b_dec) for z in kept], 1)


@pytest.mark.parametrize("bounds", [BOUNDS, [F], [1, 2, 3, 23]], ids=str)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_equals_separate_decodes(bounds, impl, chunk_tokens, monkeypatch):
    monkeypatch.setattr(torch_impl, "chunk_tokens", lambda *_: chunk_tokens)
    (values, indices), (w_dec, b_dec) = codes(), parameters()
    d_out = torch.randn(B, len(bounds), D, dtype=torch.float64)
    leaves = values, w_dec, b_dec
    expected = one_by_one(values, indices, bounds, w_dec, b_dec)
    got = nested_decode(SparseCodes(values, indices), bounds, w_dec, b_dec, impl=impl)
    torch.testing.assert_close(got, expected)
    truth = torch.autograd.grad(expected, leaves, d_out)
    for name, a, b in zip(
        "values w_dec b_dec".split(), torch.autograd.grad(got, leaves, d_out), truth, strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype):
    (values, indices), (w_dec, b_dec) = codes(torch.float32), parameters(dtype)
    got = nested_decode(SparseCodes(values, indices), BOUNDS, w_dec, b_dec)
    expected = one_by_one(values.double(), indices, BOUNDS, w_dec.double(), b_dec.double())
    assert got.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=2 * unit, atol=1e-5)
    got.float().sum().backward()
    assert torch.isfinite(values.grad).all() and torch.isfinite(w_dec.grad).all()


def test_leading_dimensions_and_no_tokens():
    (values, indices), (w_dec, _) = codes(), parameters()
    flat = nested_decode(SparseCodes(values, indices), BOUNDS, w_dec)
    cube = SparseCodes(values.view(3, 3, K), indices.view(3, 3, K))
    assert torch.equal(nested_decode(cube, BOUNDS, w_dec), flat.view(3, 3, 3, D))
    none = nested_decode(SparseCodes(values[:0], indices[:0]), BOUNDS, w_dec)
    assert none.shape == (0, 3, D)
    none.sum().backward()
    assert not w_dec.grad.any()


class Largest(TorchDispatchMode):
    """Bytes of the largest floating tensor that a gather makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index.Tensor and out.is_floating_point():
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


def test_wide_codes_gather_no_rows():
    """As BatchTopK makes them, where a single token may have hundreds of latents."""
    size, bounds = 512, [128, 512]
    values, indices = torch.randn(300, 64), torch.randint(0, size, (300, 64))
    w_dec, d_out = torch.randn(size, 16), torch.randn(300, 2, 16)
    with Largest() as found:
        torch_impl.decode(values, indices, w_dec, None, bounds)
        torch_impl.decode_backward(d_out, values, indices, w_dec, bounds, True, False)
    assert found.bytes <= values.numel() * 4


WRONG = [
    [],
    [0, 24],
    [8, 4],
    [4, 4],
    [25],
    [1.5],
    [True, 24],
    24,
    torch.tensor([4, 4]),
    torch.tensor([1.5]),
]


@pytest.mark.parametrize("bounds", WRONG, ids=str)
def test_bounds_are_checked(bounds):
    (values, indices), (w_dec, _) = codes(), parameters()
    with pytest.raises(ValueError, match="bounds: .* ascending integers in .1, F. = .1, 24."):
        nested_decode(SparseCodes(values, indices), bounds, w_dec)


def test_codes_and_implementation_are_checked():
    (values, indices), (w_dec, _) = codes(), parameters()
    with pytest.raises(ValueError, match="indices"):
        nested_decode(SparseCodes(values, indices[:2]), BOUNDS, w_dec)
    with pytest.raises(ValueError, match="impl"):
        nested_decode(SparseCodes(values, indices), BOUNDS, w_dec, impl="cuda")
