"""`sparse_decode`: checks, choice of the implementation, and the operator with its rules."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    SparseCodes,
    check_floating,
    check_matrix,
    check_same,
    check_shape,
    check_tensors,
    require,
    shape_of,
    without_autocast,
)


def sparse_decode(
    codes_or_values: SparseCodes | Tensor,
    indices: Tensor | None = None,
    w_dec: Tensor | None = None,
    b_dec: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Sum of the selected decoder rows times their values, plus b_dec. [KronSAE, section 3]

    Equals `reference.sparse_decode`. Call it as sparse_decode(codes, w_dec=W) or as
    sparse_decode(values, indices, w_dec=W).
    values: [..., k] floating.  indices: [..., k] int64 in [0, F).  w_dec: [F, d].  b_dec: [d].

    Returns [..., d] in w_dec's dtype, accumulated in float32 (float64 for float64). Gradients of
    values, w_dec and b_dec; no [B, F] tensor either way. Under autocast w_dec keeps its dtype: this
    is a gather, not a matrix product.

    Raises ValueError for wrong shapes, dtypes or devices, and (where tensors are on a CPU) for
    indices out of range; RuntimeError if `impl` cannot run here.
    """
    if isinstance(codes_or_values, tuple):
        require(indices is None, "indices: give SparseCodes alone, or values and indices")
        require(
            len(codes_or_values) == 2,
            f"codes_or_values: expected (values, indices), got {len(codes_or_values)} items",
        )
        values, indices = codes_or_values
    else:
        values = codes_or_values
    if indices is None:
        raise ValueError("indices: expected beside values, got None")
    if w_dec is None:
        raise ValueError("w_dec: expected [F, d], got None")
    check_decode(values, indices, w_dec, b_dec)
    name = backends.choose(impl, w_dec.device, w_dec.dtype)
    if name == "reference":
        return reference.sparse_decode(values, indices, w_dec=w_dec, b_dec=b_dec)
    shape = math.prod(values.shape[:-1]), values.shape[-1]  # not -1: k may be 0
    out = torch.ops.kronsae.decode(
        values.reshape(shape), indices.reshape(shape), w_dec, b_dec, None, name
    )
    return out.view(*values.shape[:-1], w_dec.shape[1])


def check_decode(values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None) -> None:
    """Raise ValueError unless these are codes, decoder and bias that belong together."""
    check_tensors(values=values, indices=indices, w_dec=w_dec)
    check_floating(values=values, w_dec=w_dec, b_dec=b_dec)
    check_matrix("w_dec", w_dec, 2, "[F, d]")
    require(values.ndim >= 1, lambda: f"values: expected [..., k], got {shape_of(values)}")
    require(indices.dtype == torch.int64, f"indices: expected int64, got {indices.dtype}")
    check_shape("indices", indices, tuple(values.shape), "the shape of values")
    check_shape("b_dec", b_dec, (w_dec.shape[1],), "[d]")
    check_same("device", values=values, indices=indices, w_dec=w_dec, b_dec=b_dec)
    check_same("dtype", w_dec=w_dec, b_dec=b_dec)
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        require(
            low >= 0 and high < w_dec.shape[0],
            f"indices: expected latents in [0, {w_dec.shape[0]}), got [{low}, {high}]",
        )


@torch.library.custom_op("kronsae::decode", mutates_args=())
def _decode(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None,
    bounds: Sequence[int] | None,
    impl: str,
) -> Tensor:
    with without_autocast(w_dec):
        return backends.module(impl).decode(values, indices, w_dec, b_dec, bounds)


@_decode.register_fake
def _(values, indices, w_dec, b_dec, bounds, impl):
    prefixes = () if bounds is None else (len(bounds),)
    return w_dec.new_empty(values.shape[0], *prefixes, w_dec.shape[1])


@torch.library.custom_op("kronsae::decode_backward", mutates_args=())
def _decode_backward(
    d_out: Tensor,
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    bounds: Sequence[int] | None,
    need_values: bool,
    need_w: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    with without_autocast(w_dec):
        return backends.module(impl).decode_backward(
            d_out, values, indices, w_dec, bounds, need_values, need_w
        )


@_decode_backward.register_fake
def _(d_out, values, indices, w_dec, bounds, need_values, need_w, impl):
    return (
        values.new_empty(values.shape) if need_values else values.new_empty(0),
        w_dec.new_empty(w_dec.shape) if need_w else w_dec.new_empty(0),
    )


def _setup(ctx, inputs, output):
    values, indices, w_dec, _, ctx.bounds, ctx.impl = inputs
    ctx.save_for_backward(values, indices, w_dec)


def _autograd(ctx, d_out):
    values, indices, w_dec = ctx.saved_tensors
    need_values, _, need_w, need_b = ctx.needs_input_grad[:4]
    d_values, d_w = torch.ops.kronsae.decode_backward(
        d_out, values, indices, w_dec, ctx.bounds, need_values, need_w, ctx.impl
    )
    return (
        d_values if need_values else None,
        None,
        d_w if need_w else None,
        d_out.flatten(0, -2).sum(0) if need_b else None,
        None,
        None,
    )


_decode.register_autograd(_autograd, setup_context=_setup)
