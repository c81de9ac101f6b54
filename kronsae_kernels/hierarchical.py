"""`hierarchical_loss`: the errors of reconstructions from the first codes of a token, in one pass.

The gradients are computed with the loss, while the decoder's rows are at hand: the backward pass
only scales them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    SparseCodes,
    accumulate_dtype,
    check_floating,
    check_same,
    check_shape,
    require,
    shown,
    without_autocast,
)
from kronsae_kernels.decode import check_decode, check_range
from kronsae_kernels.nested import check_bounds
from kronsae_kernels.rules import Rules, derived_again, has_values, operator

ONCE = (
    "hierarchical_loss has first derivatives in reverse mode alone, without create_graph and "
    "torch.func: take impl='reference' for others"
)


class HierarchicalLoss(NamedTuple):
    """Results of `hierarchical_loss`, at least float32.

    loss: squared error, summed over tokens and dimensions, mean over the prefixes (scalar).
    residual: [..., d] reconstruction from all codes, minus the target; without a gradient.
    """

    loss: Tensor
    residual: Tensor


def hierarchical_loss(
    codes: SparseCodes,
    prefixes: Iterable[int],
    w_dec: Tensor,
    target: Tensor,
    b_dec: Tensor | None = None,
    *,
    impl: str | None = None,
) -> HierarchicalLoss:
    """Squared error of the reconstruction from the first j codes, mean over the prefixes j.

    It is summed over tokens and dimensions: divide by `target.numel()` for a mean squared error.
    Equals `reference.hierarchical_loss`: with codes that are sorted, as encoders give them, the
    first j are the j largest latents. [Balagansky et al. 2025: HierarchicalTopK,
    arXiv:2505.24473] Each decoder row of a token is gathered once, for all prefixes, forward and
    backward together.

    codes: values [..., k] and indices [..., k] in [0, F).  prefixes: ascending, the last of them k.
    w_dec: [F, d].  target: [..., d].  b_dec: [d] or None.  impl, errors: as of `sparse_decode`.
    Gradients of values, w_dec, b_dec and target: first derivatives in reverse mode alone, but for
    impl="reference". On a CPU no tensor has B k d numbers.
    """
    require(
        isinstance(codes, (tuple, list)) and len(codes) == 2,
        lambda: f"codes: expected (values, indices), got {shown(codes)}",
    )
    values, indices = codes
    indices = check_decode(values, indices, w_dec, b_dec)
    check_floating(target=target)
    shape = *values.shape[:-1], w_dec.shape[1]
    check_shape("target", target, shape, "[..., d] as of codes and w_dec")
    check_same("device", target=target, w_dec=w_dec)
    prefixes = check_ranks_of_codes(prefixes, values.shape[-1])
    name = backends.choose(impl, w_dec.device, w_dec.dtype)
    if has_values(indices):
        check_range(indices, w_dec.shape[0])
    if name == "reference":
        found = reference.hierarchical_loss(
            values, indices, prefixes, w_dec=w_dec, b_dec=b_dec, target=target
        )
        return HierarchicalLoss(*found)
    wanted = target.to(accumulate_dtype(w_dec.dtype))
    wanted = wanted if b_dec is None else wanted - b_dec
    gradients = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (values, w_dec, wanted)
    )
    flat = math.prod(shape[:-1]), values.shape[-1]
    loss, residual, *_ = torch.ops.kronsae.hierarchical(
        *(values.reshape(flat), indices.reshape(flat), w_dec, wanted.reshape(flat[0], shape[-1])),
        *(prefixes, gradients, name),
    )
    return HierarchicalLoss(loss / len(prefixes), residual.view(shape))


def check_ranks_of_codes(prefixes: Iterable[int], k: int) -> list[int]:
    """The prefixes of k codes. Raises ValueError unless they ascend, and the last has all."""
    checked = check_bounds(prefixes, k, "prefixes", "k")
    require(checked[-1] == k, lambda: f"prefixes: expected k = {k} as the last, got {checked}")
    return checked


@operator("hierarchical")
class Hierarchical(Rules):
    """The sum over tokens and prefixes, the residual, and (with `gradients`) derivatives of the sum
    by values, w_dec and target; otherwise these are empty."""

    @staticmethod
    def compute(
        values: Tensor,
        indices: Tensor,
        w_dec: Tensor,
        target: Tensor,
        prefixes: Sequence[int],
        gradients: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with without_autocast(w_dec):
            return backends.module(impl).hierarchical(
                values, indices, w_dec, target, prefixes, gradients
            )

    @staticmethod
    def fake(values, indices, w_dec, target, prefixes, gradients, impl):
        shapes = [values.shape, w_dec.shape, target.shape] if gradients else [(0,)] * 3
        return target.new_empty(()), *map(target.new_empty, (target.shape, *shapes))

    @staticmethod
    def flops(values, indices, w_dec, target, prefixes, gradients, impl):
        return (3 if gradients else 1) * 2 * values.numel() * w_dec.shape[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, _, w_dec, *_ = inputs
        ctx.dtypes = values.dtype, w_dec.dtype
        ctx.save_for_backward(*output[2:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, d_loss, *_):
        if derived_again():
            raise NotImplementedError(ONCE)
        d_values, d_w, d_target = (d_loss * gradient for gradient in ctx.saved_tensors)
        of_values, of_w = ctx.dtypes
        return d_values.to(of_values), None, d_w.to(of_w), d_target, None, None, None

    @staticmethod
    def tangents(ctx, saved, t_values, _, t_w, t_target, *__):
        raise NotImplementedError(ONCE)
