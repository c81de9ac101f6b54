"""`threshold_encode`: every latent above a threshold of its own, as JumpReLU needs them."""

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    COMPOSITIONS,
    SparseCodes,
    accumulate_dtype,
    check_count,
    check_number,
    check_same,
    check_shape,
    check_tensors,
    require,
    without_autocast,
)
from kronsae_kernels.encode import check_encoder


def threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    threshold: Tensor,
    m: int | None = None,
    composition: str = "mand",
    eps: float = 0.0,
    impl: str | None = None,
) -> SparseCodes:
    """Every latent whose value exceeds its threshold, and is not silent; padded to [..., w].

    Equals `reference.threshold_encode`. A latent is silent if its product is 0 (dense: if it is 0),
    or for composition "mul" not positive. [Rajamanoharan et al. 2024: JumpReLU]
    w is the largest number of such latents on one token (at least 1). Tokens with fewer fill up at
    the end: value 0, at the index of some latent, without gradient. So does a row with NaN.

    x: [..., d].  w_enc: [h, m + n, d] with m given (Kron), or [F, d] without (dense).
    b_enc: [h, m + n] or [F], or None.  threshold: [F], of the latents' values; no gradient.
    composition, eps, impl, order of the latents, gradients and errors: as in `fused_encode`.
    Memory: O(B w) and one chunk of tokens' scores [b, F], forward alone.
    """
    x, w_enc, b_enc = check_encoder(x, w_enc, b_enc, None, rank=2 if m is None else 3)
    size = w_enc.shape[0]
    if m is not None:
        heads, rows, _ = w_enc.shape
        check_count("m", m, 1, rows - 1, f"w_enc has m + n = {rows} rows a head")
        size = heads * m * (rows - m)
    check_tensors(threshold=threshold)
    check_shape("threshold", threshold, (size,), "[F]")
    check_same("device", x=x, threshold=threshold)
    require(
        composition in COMPOSITIONS,
        f"composition: expected one of {COMPOSITIONS}, got {composition!r}",
    )
    check_number("eps", eps, 0)
    name = backends.choose(impl, x.device, x.dtype)
    if name == "reference":
        return reference.threshold_encode(
            x, w_enc, b_enc, threshold=threshold, m=m, composition=composition, eps=eps
        )
    flat = x.reshape(-1, x.shape[-1])
    base, extension, indices, counts = torch.ops.kronsae.threshold_encode(
        flat, w_enc, b_enc, threshold.detach(), m, composition, eps, name
    )
    values = base if m is None else reference.compose(base * extension, composition, eps)
    values = values.where(torch.arange(values.shape[1], device=x.device) < counts[:, None], 0)
    shape = (*x.shape[:-1], values.shape[1])
    return SparseCodes(values.view(shape), indices.view(shape))


@torch.library.custom_op("kronsae::threshold_encode", mutates_args=())
def _threshold_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    m: int | None,
    composition: str,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(x):
        return backends.module(impl).threshold_encode(
            x, w_enc, b_enc, threshold, m, composition, eps
        )


@_threshold_encode.register_fake
def _(x, w_enc, b_enc, threshold, m, composition, eps, impl):
    width = torch.library.get_ctx().new_dynamic_size()
    factor = x.new_empty(x.shape[0], width, dtype=accumulate_dtype(x.dtype))
    indices = torch.empty_like(factor, dtype=torch.int64)
    return factor, torch.empty_like(factor), indices, indices.new_empty(x.shape[0])


def _setup(ctx, inputs, output):
    x, w_enc, _, _, ctx.m, ctx.composition, _, ctx.impl = inputs
    base, extension, indices, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(x, w_enc, indices, base, extension)


def _autograd(ctx, d_base, d_extension, *_):
    x, w_enc, indices, base, extension = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    if ctx.composition != "mul":
        d_base, d_extension = d_base * (base > 0), d_extension * (extension > 0)
    options = need_x, need_w or need_b, ctx.impl
    if ctx.m is None:
        gradients = torch.ops.kronsae.dense_encode_backward(d_base, indices, x, w_enc, *options)
    else:
        gradients = torch.ops.kronsae.encode_backward(
            d_base, d_extension, indices, x, w_enc, ctx.m, *options
        )
    needed = zip((need_x, need_w, need_b), gradients, strict=True)
    return (*(gradient if need else None for need, gradient in needed), *5 * [None])


_threshold_encode.register_autograd(_autograd, setup_context=_setup)
