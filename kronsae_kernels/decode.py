"""`sparse_decode`: checks, choice of the implementation, and the operators with their rules.

With fixed indices, T = sum_b d_out[b] . sum_s values[b, s] w_dec[indices[b, s]] is linear in d_out,
values and w_dec each. `Decode` is its derivative by d_out, `DecodeBackward` those by values and
w_dec, so that all derivatives of both, of any order, are calls of these two.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    SparseCodes,
    check_floating,
    check_integers,
    check_matrix,
    check_same,
    check_shape,
    check_tensors,
    require,
    shape_of,
    without_autocast,
)
from kronsae_kernels.rules import Rules, has_values, operator, total


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
    values: [..., k] floating.  indices: [..., k] integers in [0, F).  w_dec: [F, d].  b_dec: [d].

    Returns [..., d] in w_dec's dtype, accumulated in float32 (float64 for float64). Gradients of
    values, w_dec and b_dec; no [B, F] tensor either way. Under autocast w_dec keeps its dtype: this
    is a gather, not a matrix product.

    Raises ValueError for wrong shapes, dtypes or devices, and (where tensors are on a CPU) for
    indices out of range; RuntimeError if `impl` cannot run here.
    """
    if isinstance(codes_or_values, (tuple, list)):
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
    indices = check_decode(values, indices, w_dec, b_dec)
    name = backends.choose(impl, w_dec.device, w_dec.dtype)
    if name == "reference":
        if has_values(indices):
            check_range(indices, w_dec.shape[0])
        return reference.sparse_decode(values, indices, w_dec=w_dec, b_dec=b_dec)
    shape = math.prod(values.shape[:-1]), values.shape[-1]  # not -1: k may be 0
    out = torch.ops.kronsae.decode(
        values.reshape(shape), indices.reshape(shape), w_dec, b_dec, None, name
    )
    return out.view(*values.shape[:-1], w_dec.shape[1])


def check_decode(values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """The indices as int64. Raises ValueError unless codes, decoder and bias belong together."""
    check_tensors(values=values, indices=indices, w_dec=w_dec)
    check_floating(values=values, w_dec=w_dec, b_dec=b_dec)
    check_matrix("w_dec", w_dec, 2, "[F, d]")
    require(values.ndim >= 1, lambda: f"values: expected [..., k], got {shape_of(values)}")
    check_integers(indices=indices)
    check_shape("indices", indices, tuple(values.shape), "the shape of values")
    check_shape("b_dec", b_dec, (w_dec.shape[1],), "[d]")
    check_same("device", values=values, indices=indices, w_dec=w_dec, b_dec=b_dec)
    check_same("dtype", w_dec=w_dec, b_dec=b_dec)
    return indices.long()


def check_range(indices: Tensor, size: int) -> None:
    """Raise ValueError for indices outside [0, F), F = size, where they are on a CPU."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(bound) for bound in torch.aminmax(indices))
        require(
            low >= 0 and high < size,
            f"indices: expected latents in [0, {size}), got [{low}, {high}]",
        )


# Operators


@operator("decode")
class Decode(Rules):
    @staticmethod
    def compute(
        values: Tensor,
        indices: Tensor,
        w_dec: Tensor,
        b_dec: Tensor | None,
        bounds: Sequence[int] | None,
        impl: str,
    ) -> Tensor:
        check_range(indices, len(w_dec))
        with without_autocast(w_dec):
            return backends.module(impl).decode(values, indices, w_dec, b_dec, bounds)

    @staticmethod
    def fake(values, indices, w_dec, b_dec, bounds, impl):
        prefixes = () if bounds is None else (len(bounds),)
        return w_dec.new_empty(values.shape[0], *prefixes, w_dec.shape[1])

    @staticmethod
    def flops(values, indices, w_dec, *_):
        return 2 * values.numel() * w_dec.shape[1]

    @staticmethod
    def rows(*args):
        return 0, 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, ctx.bounds, ctx.impl = inputs
        ctx.shape = output.shape
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, d_out):
        need_values, _, need_w, need_b = ctx.needs_input_grad[:4]
        d_values, d_w = torch.ops.kronsae.decode_backward(
            d_out, *ctx.saved_tensors, ctx.bounds, need_values, need_w, ctx.impl
        )
        return (
            d_values if need_values else None,
            None,
            d_w if need_w else None,
            d_out.sum(tuple(range(d_out.ndim - 1))) if need_b else None,
            None,
            None,
        )

    @staticmethod
    def tangents(ctx, saved, t_values, _, t_w, t_b, *__):
        values, indices, w_dec = saved
        rest = None, ctx.bounds, ctx.impl
        return total(
            None if t_values is None else torch.ops.kronsae.decode(t_values, indices, w_dec, *rest),
            None if t_w is None else torch.ops.kronsae.decode(values, indices, t_w, *rest),
            None if t_b is None else t_b.expand(ctx.shape),
        )


@operator("decode_backward")
class DecodeBackward(Rules):
    """What is not needed is an empty tensor."""

    @staticmethod
    def compute(
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

    @staticmethod
    def fake(d_out, values, indices, w_dec, bounds, need_values, need_w, impl):
        return (
            values.new_empty(values.shape) if need_values else values.new_empty(0),
            w_dec.new_empty(w_dec.shape) if need_w else w_dec.new_empty(0),
        )

    @staticmethod
    def flops(d_out, values, indices, w_dec, bounds, need_values, need_w, impl):
        return (need_values + need_w) * 2 * values.numel() * w_dec.shape[1]

    @staticmethod
    def rows(d_out, values, indices, w_dec, bounds, need_values, need_w, impl):
        return () if need_w else (0, 1, 2)  # a gradient of w_dec is a sum over rows

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.bounds, ctx.need_values, ctx.need_w, ctx.impl = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, dd_values, dd_w):
        """Derivatives of T(d_out, dd_values, w_dec) + T(d_out, values, dd_w)."""
        d_out, values, indices, w_dec = ctx.saved_tensors
        need_out, need_values, _, need_w = ctx.needs_input_grad[:4]
        rest = None, ctx.bounds, ctx.impl
        first = need_out and ctx.need_values
        second = need_out and ctx.need_w
        d_d_out = total(
            torch.ops.kronsae.decode(dd_values, indices, w_dec, *rest) if first else None,
            torch.ops.kronsae.decode(values, indices, dd_w, *rest) if second else None,
        )
        need_values, need_w = need_values and ctx.need_w, need_w and ctx.need_values
        d_values, d_w = torch.ops.kronsae.decode_backward(
            d_out,
            dd_values if ctx.need_values else values,
            indices,
            dd_w if ctx.need_w else w_dec,
            ctx.bounds,
            need_values,
            need_w,
            ctx.impl,
        )
        return (
            None if d_d_out is None else d_d_out.to(d_out.dtype),
            d_values if need_values else None,
            None,
            d_w if need_w else None,
            *4 * [None],
        )

    @staticmethod
    def tangents(ctx, saved, t_out, t_values, _, t_w, *__):
        d_out, values, indices, w_dec = saved

        def derived(d_out, values, w_dec, need_values, need_w):
            needs = ctx.need_values and need_values, ctx.need_w and need_w
            return torch.ops.kronsae.decode_backward(
                d_out, values, indices, w_dec, ctx.bounds, *needs, ctx.impl
            )

        by_out = by_values = by_w = (None, None)
        if t_out is not None:
            by_out = derived(t_out, values, w_dec, True, True)
        if t_values is not None:
            by_values = None, derived(d_out, t_values, w_dec, False, True)[1]
        if t_w is not None:
            by_w = derived(d_out, values, t_w, True, False)[0], None
        return tuple(total(*terms) for terms in zip(by_out, by_values, by_w, strict=True))
