"""Each operation, forward alone and with its backward pass, beside the bare encoder product."""

import pytest
import torch

from benchmarks.measure import CHECKED_TOKENS, products, require_close, synchronize
from benchmarks.steps import dense_parameters, kron_parameters
from kronsae_kernels import backends, dense_encode, fused_encode, sparse_decode

IMPLEMENTATIONS = [name for name in backends.NAMES if name != "reference"]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request, device):
    try:
        return backends.choose(request.param, device)
    except RuntimeError as reason:
        pytest.skip(str(reason))


def encode_kron(shape, x):
    w_enc, b_enc, *_ = kron_parameters(shape, x.device)
    w_enc = w_enc.transpose(0, 1)

    def call(tokens, impl):
        codes = fused_encode(x[:tokens], w_enc, b_enc, m=shape.m, k=shape.k, eps=1e-5, impl=impl)
        return codes.values, (w_enc, b_enc)

    return call


def encode_dense(shape, x):
    w_enc, b_enc, *_ = dense_parameters(shape, x.device)

    def call(tokens, impl):
        codes = dense_encode(x[:tokens], w_enc, b_enc, k=shape.k, impl=impl)
        return codes.values, (w_enc, b_enc)

    return call


def decode(shape, x):
    w_enc, b_enc, w_dec, b_dec = kron_parameters(shape, x.device)
    w_enc = w_enc.transpose(0, 1)
    with torch.no_grad():
        values, indices = fused_encode(x, w_enc, b_enc, m=shape.m, k=shape.k)
    values.requires_grad_()

    def call(tokens, impl):
        out = sparse_decode(values[:tokens], indices[:tokens], w_dec, b_dec, impl=impl)
        return out, (values, w_dec, b_dec)

    return call


def encode_bytes(shape, columns):
    """Float32 traffic: x and weights read, pre-latents written and read, codes (12 bytes)."""
    weights = columns * (shape.d + 1)
    return 4 * (shape.tokens * (shape.d + 2 * columns) + weights) + 12 * shape.tokens * shape.k


def decode_bytes(shape):
    """Float32 traffic: k rows gathered and one written a token, codes (12 bytes) read."""
    return 4 * shape.tokens * shape.d * (shape.k + 1) + 12 * shape.tokens * shape.k


def flops(shape, name):
    """Multiply-adds of a forward pass. [KronSAE, eq. 7]"""
    of_decoder = shape.k * shape.d
    if name == "decode":
        return shape.tokens * of_decoder
    return shape.tokens * (shape.flops_per_token(name.removeprefix("encode_")) - of_decoder)


OPERATIONS = {
    "encode_kron": (encode_kron, lambda shape: encode_bytes(shape, shape.columns)),
    "encode_dense": (encode_dense, lambda shape: encode_bytes(shape, shape.dict_size)),
    "decode": (decode, decode_bytes),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(benchmark, report, shape, x, impl, name, backward):
    make, moved_bytes = OPERATIONS[name]
    call = make(shape, x)

    def run(tokens=None, impl=impl):
        with torch.set_grad_enabled(backward):
            out, inputs = call(tokens, impl)
        found = [out]
        if backward:
            found += torch.autograd.grad(out, inputs, torch.ones_like(out))
        synchronize(x.device)
        return found

    pairs = zip(run(CHECKED_TOKENS), run(CHECKED_TOKENS, "reference"), strict=True)
    for place, (got, expected) in enumerate(pairs):
        # The bound of `check_gradients`, whose sums are the same.
        require_close(f"{name} output or gradient {place}", got, expected, 1e-4)
    # The backward pass has two products for each of the forward pass.
    passes = 3 if backward else 1
    report(
        f"{name} {'forward and backward' if backward else 'forward'}",
        passes * flops(shape, name),
        passes * moved_bytes(shape),
    )
    benchmark.pedantic(run, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("encoder", ["kron", "dense"])
def test_product(benchmark, report, shape, x, encoder):
    """x w^T, which no encoder can do without: the floor of `encode` forward."""
    product = products(shape, x)[f"{encoder} product"]

    def run():
        product()
        synchronize(x.device)

    name = f"encode_{encoder}"
    report(f"{name} forward", flops(shape, name), OPERATIONS[name][1](shape))
    benchmark.pedantic(run, rounds=7, warmup_rounds=2)
