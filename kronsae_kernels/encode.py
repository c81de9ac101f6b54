"""Encoders that return only the k active latents: `fused_encode` (Kron) and `dense_encode` (TopK).

Each is: checks, choice of the implementation, and an operator of `torch.library` with fake and
autograd rules, opaque to torch.compile. The operator selects; what a selected latent is worth, and
the derivative of that, are differentiable torch operations on [B, k] here (`reference.compose`).
"""

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    COMPOSITIONS,
    SparseCodes,
    accumulate_dtype,
    cast_for_autocast,
    check_choice,
    check_count,
    check_floating,
    check_mask,
    check_matrix,
    check_number,
    check_same,
    check_shape,
    check_tensors,
    dict_size,
    require,
    shape_of,
    without_autocast,
)


def fused_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    m: int,
    k: int,
    composition: str = "mand",
    eps: float = 0.0,
    impl: str | None = None,
    mask: Tensor | None = None,
) -> SparseCodes:
    """The k largest post-latents of a Kron encoder, without writing the [B, F] scores.

    Equals `reference.fused_encode`: topk(mAND(ReLU(base), ReLU(extension)), k) of each token, with
    base, extension the m + n projections of each head. [KronSAE, arXiv:2505.22255v3, eq. 2-4]

    x: [..., d] float64, float32, bfloat16 or float16.   b_enc: [h, m + n] or None.
    w_enc: [h, m + n, d], for each head m base rows, then n extension rows. Fastest when stored
        row-major over heads: `torch.empty(m + n, h, d).transpose(0, 1)`.
    composition: "mand" sqrt(p q + eps) for p q > 0, else sqrt(eps); "relu_mul" p q; "mul" u v
        (u, v the projections, p, q their ReLU).
    impl: None (by the device), "triton", "torch" or "reference".
    mask: [F] bool or None; only latents where it is True are selected. At least k must be.

    Returns values [..., k], largest first (ties: lowest index), float32 (float64 for float64), and
    indices int64; latent (head, i, j) has index head m n + i n + j. Latents compete by the product
    before the root, in float32 (float64 for float64). The derivative of a latent whose product is
    0 is 0. NaN in a row of x gives NaN values in that row alone.
    Memory: O(B k) and one chunk of pre-latents. Deterministic on a CPU.
    Autocast: x, w_enc and b_enc are cast as for a matrix product.

    Raises ValueError for wrong shapes, dtypes, devices, m, k, composition or eps; RuntimeError if
    `impl` cannot run here.
    """
    x, w_enc, b_enc = check_encoder(x, w_enc, b_enc, mask, rank=3)
    heads, rows, _ = w_enc.shape
    size = dict_size(w_enc, m)
    _check_k(k, size, f"F = {heads} * {m} * {rows - m} = {size}", mask)
    check_choice("composition", composition, COMPOSITIONS)
    check_number("eps", eps, 0)
    name = backends.choose(impl, x.device, x.dtype)
    if name == "reference":
        return reference.fused_encode(
            x, w_enc, b_enc, m=m, k=k, composition=composition, eps=eps, mask=mask
        )
    base, extension, indices = torch.ops.kronsae.encode(
        x.reshape(-1, x.shape[-1]), w_enc, b_enc, mask, m, k, composition, name
    )
    return _codes(x, reference.compose(base * extension, composition, eps), indices)


def dense_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    k: int,
    impl: str | None = None,
    mask: Tensor | None = None,
) -> SparseCodes:
    """The k largest of ReLU(w_enc x + b_enc), a TopK SAE's encoder, without keeping [B, F].

    Equals `reference.dense_encode`. [Gao et al. 2024]
    x: [..., d].  w_enc: [F, d].  b_enc: [F] or None.  impl, mask, results, ties, errors: as in
    `fused_encode`.
    """
    x, w_enc, b_enc = check_encoder(x, w_enc, b_enc, mask, rank=2)
    size = w_enc.shape[0]
    _check_k(k, size, f"F = {size}", mask)
    name = backends.choose(impl, x.device, x.dtype)
    if name == "reference":
        return reference.dense_encode(x, w_enc, b_enc, k=k, mask=mask)
    flat = x.reshape(-1, x.shape[-1])
    values, _, indices = torch.ops.kronsae.encode(flat, w_enc, b_enc, mask, None, k, "", name)
    return _codes(x, values, indices)


def _codes(x: Tensor, values: Tensor, indices: Tensor) -> SparseCodes:
    """Values and indices [B, k] in the shape of x."""
    shape = (*x.shape[:-1], values.shape[1])
    return SparseCodes(values.view(shape), indices.view(shape))


# Checks


def check_encoder(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, mask: Tensor | None, rank: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check all but m, k and the options; return the tensors as autocast wants them."""
    check_tensors(x=x, w_enc=w_enc)
    check_floating(x=x, w_enc=w_enc, b_enc=b_enc)
    if mask is not None:
        check_tensors(mask=mask)
    layout = {3: "[h, m + n, d]", 2: "[F, d]"}[rank]
    require(x.ndim >= 1, lambda: f"x: expected [..., d], got {shape_of(x)}")
    check_matrix("w_enc", w_enc, rank, layout)
    require(
        x.shape[-1] == w_enc.shape[-1],
        lambda: (
            f"x: expected [..., d] with d = {w_enc.shape[-1]} as in w_enc {layout}, "
            f"got {shape_of(x)}"
        ),
    )
    check_shape("b_enc", b_enc, tuple(w_enc.shape[:-1]), layout.replace(", d", ""))
    check_same("device", x=x, w_enc=w_enc, b_enc=b_enc, mask=mask)
    x, w_enc = cast_for_autocast(x), cast_for_autocast(w_enc)
    b_enc = None if b_enc is None else cast_for_autocast(b_enc)
    check_same("dtype", x=x, w_enc=w_enc, b_enc=b_enc)
    return x, w_enc, b_enc


def _check_k(k: int, size: int, of_size: str, mask: Tensor | None) -> None:
    """Check that k of F = size latents, and of those in the mask, can be selected."""
    check_count("k", k, 1, size, f"1 <= k <= {of_size}")
    check_mask(mask, size)
    if mask is not None and not torch.compiler.is_compiling() and not mask.is_meta:
        allowed = int(mask.sum())
        require(k <= allowed, f"k: expected at most the {allowed} latents in mask, got {k}")


# Operators. The outputs of one call share no memory with each other, nor with its inputs.


@torch.library.custom_op("kronsae::encode", mutates_args=())
def _encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    mask: Tensor | None,
    m: int | None,
    k: int,
    composition: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x):
        indices, base, extension = backends.module(impl).encode(
            x, w_enc, b_enc, mask, m, k, composition
        )
    return base, extension, indices


@_encode.register_fake
def _(x, w_enc, b_enc, mask, m, k, composition, impl):
    base = x.new_empty(x.shape[0], k, dtype=accumulate_dtype(x.dtype))
    extension = base.new_empty(0) if m is None else torch.empty_like(base)
    return base, extension, torch.empty_like(base, dtype=torch.int64)


@torch.library.custom_op("kronsae::encode_backward", mutates_args=())
def _encode_backward(
    d_base: Tensor,
    d_extension: Tensor,
    indices: Tensor,
    x: Tensor,
    w_enc: Tensor,
    m: int | None,
    need_x: bool,
    need_w: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x):
        return backends.module(impl).encode_backward(
            d_base, d_extension, indices, x, w_enc, m, need_x, need_w
        )


@_encode_backward.register_fake
def _(d_base, d_extension, indices, x, w_enc, m, need_x, need_w, impl):
    i_major = x.new_empty(w_enc.transpose(0, -2).shape).transpose(0, -2)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        i_major if need_w else x.new_empty(0),
        x.new_empty(w_enc.shape[:-1]) if need_w else x.new_empty(0),
    )


def encode_setup(ctx, inputs, output):
    """Save what `encode_autograd` needs. `threshold_encode` has its arguments in the same order."""
    x, w_enc, _, _, ctx.m, _, ctx.composition, ctx.impl = inputs
    base, extension, indices, *counts = output
    ctx.mark_non_differentiable(indices, *counts)
    ctx.save_for_backward(x, w_enc, indices, base, extension)


def encode_autograd(ctx, d_base, d_extension, *_):
    """Gradients of x, w_enc and b_enc from those of the two factors."""
    x, w_enc, indices, base, extension = ctx.saved_tensors
    if ctx.composition != "mul":
        d_base, d_extension = d_base * (base > 0), d_extension * (extension > 0)
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    gradients = torch.ops.kronsae.encode_backward(
        d_base, d_extension, indices, x, w_enc, ctx.m, need_x, need_w or need_b, ctx.impl
    )
    needed = zip((need_x, need_w, need_b), gradients, strict=True)
    return (*(gradient if need else None for need, gradient in needed), *5 * [None])


_encode.register_autograd(encode_autograd, setup_context=encode_setup)
