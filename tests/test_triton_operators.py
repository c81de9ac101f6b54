"""The kernels as torch's operators: opcheck, torch.compile, autocast, layouts."""

import pytest
import torch
from torch.utils._pytree import tree_map

pytest.importorskip("triton")

from test_kernels_operators import (
    INPUTS,
    D,
    F,
    M,
    assert_same,
    autoencoder,
    dense_autoencoder,
    parameters,
    randn,
    step,
)

from kronsae_kernels import backends, dense_encode, fused_encode, sparse_decode

pytestmark = pytest.mark.long


def on(device):
    """To a device, as a leaf with or without a gradient as before."""

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to(device).requires_grad_(value.requires_grad)

    return move


def has_kernels(name):
    """Whether the operator takes an implementation: others are torch calls everywhere."""
    schema = getattr(torch.ops.kronsae, name).default._schema
    return "impl" in [argument.name for argument in schema.arguments]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("encode", "encode_backward")))
        for name in filter(has_kernels, INPUTS)
    ],
)
def test_opcheck(name, device):
    """The same inputs as of the torch implementation, but for float64."""
    pytest.importorskip("expecttest", reason="opcheck needs it")
    operator = getattr(torch.ops.kronsae, name).default
    cases = [
        tree_map(
            on(device), tuple("triton" if type(a) is str and a == "torch" else a for a in case)
        )
        for case in INPUTS[name]()
        if not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in case)
    ]
    assert len(cases) >= 4
    for case in cases:
        torch.library.opcheck(operator, case)


@pytest.fixture
def triton_by_default(monkeypatch):
    """Operations that name no implementation take the kernels, on a CPU too."""
    backend = backends._BACKENDS["triton"]._replace(device_types=("cuda", "cpu"))
    monkeypatch.setitem(backends._BACKENDS, "triton", backend)
    assert backends.choose(None, torch.device("cpu")) == "triton"


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler", "triton_by_default")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "function", [autoencoder, pytest.param(dense_autoencoder, marks=pytest.mark.slow)]
)
def test_compiled_equals_eager(function, dynamic, device):
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    weights = [on(device)(weight) for weight in parameters()]
    for tokens in (5, 3) if dynamic else (4,):
        x = randn(tokens, D).to(device)
        assert_same(step(compiled, x, weights), step(function, x, weights))


@pytest.mark.usefixtures("fresh_compiler", "triton_by_default")
def test_autocast(device):
    """The encoder in bfloat16, the decoder as it is; compiled, the same to the bit."""
    weights = [on(device)(weight) for weight in parameters()]
    x = randn(4, D).to(device)
    compiled = torch.compile(autoencoder, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = step(autoencoder, x, weights)
        assert_same(step(compiled, x, weights), found)
    low = [t.bfloat16() for t in (x, *weights[:2])]
    codes = fused_encode(*low, m=M, k=4, eps=1e-5)
    assert_same([found[0]], [sparse_decode(codes, w_dec=weights[2], b_dec=weights[3])])
    for tensor, leaf in zip(found[1:], (x, *weights), strict=True):
        assert tensor.dtype == leaf.dtype == torch.float32
        assert tensor.isfinite().all()
        assert tensor.abs().sum() > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, device):
    x, (w_enc, b_enc, w_dec, b_dec) = randn(3, D).to(device), map(on(device), parameters())

    def run():
        codes = fused_encode(x, w_enc, b_enc, m=M, k=4, impl="triton")
        return *codes, sparse_decode(codes, w_dec=w_dec, b_dec=b_dec, impl="triton")

    expected = run()
    with context():
        found = run()
    assert not any(tensor.requires_grad for tensor in found)
    assert_same(found, expected)


def test_nothing_selected_and_no_tokens(device):
    """k = 0 for the decoder, B = 0 for all: b_dec, zeros and empty tensors."""
    w_dec, b_dec = (randn(*shape, grad=True) for shape in ((F, D), (D,)))
    w_dec, b_dec = on(device)(w_dec), on(device)(b_dec)
    values = torch.zeros(2, 0, device=device, requires_grad=True)
    indices = torch.zeros(2, 0, dtype=torch.int64, device=device)
    out = sparse_decode(values, indices, w_dec, b_dec, impl="triton")
    assert torch.equal(out, b_dec.expand(2, D))
    d_values, d_w, d_b = torch.autograd.grad(out.sum(), (values, w_dec, b_dec))
    assert d_values.shape == (2, 0)
    assert not d_w.any()
    assert torch.equal(d_b, torch.full_like(d_b, 2.0))
    x = torch.zeros(2, 0, D, device=device, requires_grad=True)
    w_enc = on(device)(parameters()[0])
    codes = fused_encode(x, w_enc, m=M, k=3, impl="triton")
    dense = dense_encode(x, w_enc.flatten(0, 1), k=3, impl="triton")
    out = sparse_decode(codes, w_dec=w_dec, impl="triton")
    d_x, d_w = torch.autograd.grad(out.sum() + dense.values.sum(), (x, w_enc))
    assert codes.values.shape == dense.indices.shape == (2, 0, 3)
    assert out.shape == d_x.shape == (2, 0, D)
    assert not d_w.any()
