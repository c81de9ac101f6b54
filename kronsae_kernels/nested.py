"""`nested_decode`: the reconstructions from nested prefixes of the dictionary, in one pass."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import SparseCodes, is_integer, require, shown, without_autocast
from kronsae_kernels.decode import check_decode


def nested_decode(
    codes: SparseCodes,
    bounds: Sequence[int],
    w_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Reconstruction from the latents below each bound: [..., G, d] for G bounds.

    Equals `reference.nested_decode`: out[..., g, :] is `sparse_decode` of the latents in
    [0, bounds[g]). [Bussmann et al. 2025: Matryoshka SAEs] Each decoder row of a token is gathered
    once, for all G prefixes, forward and backward.

    codes: values [..., k] and indices [..., k] in [0, F).  bounds: ascending, in [1, F]; latents
    from the last bound on take no part.  w_dec: [F, d].  b_dec: [d] or None.
    impl, results, gradients and errors: as of `sparse_decode`.
    """
    values, indices = codes
    check_decode(values, indices, w_dec, b_dec)
    bounds = check_bounds(bounds, w_dec.shape[0])
    name = backends.choose(impl, w_dec.device, w_dec.dtype)
    if name == "reference":
        return reference.nested_decode(values, indices, bounds, w_dec=w_dec, b_dec=b_dec)
    shape = math.prod(values.shape[:-1]), values.shape[-1]
    out = torch.ops.kronsae.nested_decode(
        values.reshape(shape), indices.reshape(shape), w_dec, b_dec, bounds, name
    )
    return out.view(*values.shape[:-1], *out.shape[1:])


def check_bounds(bounds: Sequence[int], size: int) -> list[int]:
    """The bounds of nested prefixes of F = size latents. Raises ValueError if they are none."""
    require(
        isinstance(bounds, Sequence)
        and len(bounds) > 0
        and all(is_integer(bound) and 1 <= bound <= size for bound in bounds)
        and all(a < b for a, b in zip(bounds, bounds[1:], strict=False)),
        lambda: (
            f"bounds: expected a list of ascending integers in [1, F] = [1, {size}], "
            f"got {shown(bounds)}"
        ),
    )
    return list(bounds)


@torch.library.custom_op("kronsae::nested_decode", mutates_args=())
def _nested_decode(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    b_dec: Tensor | None,
    bounds: Sequence[int],
    impl: str,
) -> Tensor:
    with without_autocast(w_dec):
        return backends.module(impl).nested_decode(values, indices, w_dec, b_dec, bounds)


@_nested_decode.register_fake
def _(values, indices, w_dec, b_dec, bounds, impl):
    return w_dec.new_empty(values.shape[0], len(bounds), w_dec.shape[1])


@torch.library.custom_op("kronsae::nested_decode_backward", mutates_args=())
def _nested_decode_backward(
    d_out: Tensor,
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    bounds: Sequence[int],
    need_values: bool,
    need_w: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    with without_autocast(w_dec):
        return backends.module(impl).nested_decode_backward(
            d_out, values, indices, w_dec, bounds, need_values, need_w
        )


@_nested_decode_backward.register_fake
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
    d_values, d_w = torch.ops.kronsae.nested_decode_backward(
        d_out, values, indices, w_dec, ctx.bounds, need_values, need_w, ctx.impl
    )
    return (
        d_values if need_values else None,
        None,
        d_w if need_w else None,
        d_out.sum((0, 1)) if need_b else None,
        None,
        None,
    )


_nested_decode.register_autograd(_autograd, setup_context=_setup)
