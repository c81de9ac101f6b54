"""Each operation: forward, backward, both; and the bare product that its encoder begins with."""

from itertools import cycle
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.floors import Work, compute_bytes, stages
from benchmarks.measure import CHECKED_TOKENS, products, require_close
from benchmarks.steps import EPS, autocast, dense_parameters, kron_parameters
from kronsae_kernels import backends, dense_encode, fused_encode, sparse_decode

IMPLEMENTATIONS = [name for name in backends.NAMES if name != "reference"]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request, device):
    if request.param == "triton" and device.type == "cpu":
        pytest.skip("Triton's kernels are timed on a GPU: interpreted, they would be no measure")
    try:
        return backends.choose(request.param, device)
    except RuntimeError as reason:
        pytest.skip(str(reason))


class Pass(NamedTuple):
    """A forward pass, ready to be differentiated."""

    out: Tensor
    inputs: tuple[Tensor, ...]


def encode_kron(shape, xs):
    w_enc, b_enc, *_ = kron_parameters(shape, xs[0].device)
    w_enc = w_enc.transpose(0, 1)

    def call(x, impl):
        codes = fused_encode(x, w_enc, b_enc, m=shape.m, k=shape.k, eps=EPS, impl=impl)
        return Pass(codes.values, (w_enc, b_enc))

    return call, xs


def encode_dense(shape, xs):
    w_enc, b_enc, *_ = dense_parameters(shape, xs[0].device)

    def call(x, impl):
        return Pass(dense_encode(x, w_enc, b_enc, k=shape.k, impl=impl).values, (w_enc, b_enc))

    return call, xs


def decode(shape, xs):
    w_enc, b_enc, w_dec, b_dec = kron_parameters(shape, xs[0].device)
    w_enc = w_enc.transpose(0, 1)
    with torch.no_grad():
        codes = [fused_encode(x, w_enc, b_enc, m=shape.m, k=shape.k) for x in xs]
    for values, _ in codes:
        values.requires_grad_()

    def call(code, impl):
        values, indices = code
        out = sparse_decode(values, indices, w_dec, b_dec, impl=impl)
        return Pass(out, (values, w_dec, b_dec))

    return call, codes


OPERATIONS = {"KronSAE encoder": encode_kron, "TopK encoder": encode_dense, "Decoder": decode}
ENCODERS = {"KronSAE encoder": "kron", "TopK encoder": "dense"}
DIRECTIONS = ["forward", "backward", "forward + backward"]


def work_of(shape, name, direction, width):
    """Least work of an operation alone; `width`: bytes of a number in its products.

    Forward: as in `floors.stages` (an encoder is encode + select, and reads its float32 weights).
    Backward: the products of the update stages, and each gradient written in float32 (4 bytes).
    """
    encoder = ENCODERS.get(name, "kron")
    of = stages(shape, encoder, width)
    gathered = width * shape.tokens * shape.k * shape.d
    values_in_and_out = 2 * 4 * shape.tokens * shape.k
    if name == "Decoder":
        forward = of["decode"]._replace(multiply_adds=shape.tokens * shape.k * shape.d)
        rows, products_back = shape.dict_size, 2 * shape.tokens * shape.k * shape.d
    else:
        forward = Work(*map(sum, zip(of["encode"], of["select"], strict=True)))
        rows, products_back = shape.rows(encoder), of["encoder update"].multiply_adds
    batch = width * shape.tokens * shape.d
    backward = Work(products_back, 4 * rows * shape.d + batch + values_in_and_out, gathered)
    both = Work(*map(sum, zip(forward, backward, strict=True)))
    return dict(zip(DIRECTIONS, (forward, backward, both), strict=True))[direction]


def flops(shape, name, direction):
    """Multiply-adds [KronSAE, eq. 7]; the backward pass has two products for each forward."""
    of_decoder = shape.k * shape.d
    once = shape.flops_per_token(ENCODERS[name]) - of_decoder if name in ENCODERS else of_decoder
    return (1 + DIRECTIONS.index(direction)) * shape.tokens * once


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(timed, device, shape, xs, impl, name, direction):
    call, batches = OPERATIONS[name](shape, xs)
    order = cycle(batches)

    def forward(batch, impl=impl):
        with torch.set_grad_enabled(direction != "forward"):
            return call(batch, impl)

    def backward(done):
        return torch.autograd.grad(done.out, done.inputs, torch.ones_like(done.out))

    def both(batch, impl=impl):
        done = forward(batch, impl)
        return [done.out] + ([] if direction == "forward" else [*backward(done)])

    # In float32, so that the bound of `check_gradients` holds, whose sums are the same.
    first = batches[0]
    few = slice(CHECKED_TOKENS)
    few = first[few] if isinstance(first, Tensor) else tuple(part[few] for part in first)
    for number, (got, expected) in enumerate(zip(both(few), both(few, "reference"), strict=True)):
        require_close(f"{name} output or gradient {number}", got, expected, 1e-4)

    def prepare():
        with autocast(device):
            return (forward(next(order)) if direction == "backward" else next(order),)

    def run(argument):
        with autocast(device):
            (backward if direction == "backward" else both)(argument)

    work = work_of(shape, name, direction, compute_bytes(device))
    label = direction if device.type == "cpu" else f"{direction}, {impl}"
    timed(name, label, flops(shape, name, direction), work, run, prepare)


@pytest.mark.parametrize("name", ENCODERS)
def test_product(timed, device, shape, xs, name):
    """x w^T, which no encoder can do without: the floor of `encode` forward."""
    product = products(shape, xs[0])[f"{ENCODERS[name]} product"]
    work = stages(shape, ENCODERS[name], compute_bytes(device))["encode"]
    timed(name, "matrix product alone", flops(shape, name, "forward"), work, product)
