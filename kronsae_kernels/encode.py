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
    check_count,
    check_floating,
    check_number,
    check_same,
    check_shape,
    check_tensors,
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
    check_count("m", m, 1, rows - 1, f"w_enc has m + n = {rows} rows a head")
    size = heads * m * (rows - m)
    check_count("k", k, 1, size, f"1 <= k <= F = {heads} * {m} * {rows - m} = {size}")
    _check_mask(mask, size, k)
    require(
        composition in COMPOSITIONS,
        f"composition: expected one of {COMPOSITIONS}, got {composition!r}",
    )
    check_number("eps", eps, 0)
    name = backends.choose(impl, x.device, x.dtype)
    if name == "reference":
        return reference.fused_encode(
            x, w_enc, b_enc, m=m, k=k, composition=composition, eps=eps, mask=mask
        )
    flat = x.reshape(-1, x.shape[-1])
    base, extension, indices = torch.ops.kronsae.encode(
        flat, w_enc, b_enc, mask, m, k, composition, name
    )
    values = reference.compose(base * extension, composition, eps)
    shape = (*x.shape[:-1], k)
    return SparseCodes(values.view(shape), indices.view(shape))


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
    check_count("k", k, 1, size, f"1 <= k <= F = {size}")
    _check_mask(mask, size, k)
    name = backends.choose(impl, x.device, x.dtype)
    if name == "reference":
        return reference.dense_encode(x, w_enc, b_enc, k=k, mask=mask)
    flat = x.reshape(-1, x.shape[-1])
    values, indices = torch.ops.kronsae.dense_encode(flat, w_enc, b_enc, mask, k, name)
    shape = (*x.shape[:-1], k)
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
    require(
        w_enc.ndim == rank and w_enc.numel() > 0,
        lambda: f"w_enc: expected {layout} with no empty dimension, got {shape_of(w_enc)}",
    )
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


def _check_mask(mask: Tensor | None, size: int, k: int) -> None:
    if mask is None:
        return
    check_shape("mask", mask, (size,), "[F]")
    require(mask.dtype == torch.bool, f"mask: expected bool, got {mask.dtype}")
    if not torch.compiler.is_compiling() and not mask.is_meta:
        allowed = int(mask.sum())
        require(k <= allowed, f"k: expected at most the {allowed} latents in mask, got {k}")


# Operators. The outputs of one call share no memory with its inputs.


@torch.library.custom_op("kronsae::encode", mutates_args=())
def _encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    mask: Tensor | None,
    m: int,
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
    factor = x.new_empty(x.shape[0], k, dtype=accumulate_dtype(x.dtype))
    return factor, torch.empty_like(factor), torch.empty_like(factor, dtype=torch.int64)


@torch.library.custom_op("kronsae::encode_backward", mutates_args=())
def _encode_backward(
    d_base: Tensor,
    d_extension: Tensor,
    indices: Tensor,
    x: Tensor,
    w_enc: Tensor,
    m: int,
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
    heads, rows, d = w_enc.shape
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        x.new_empty(rows, heads, d).transpose(0, 1) if need_w else x.new_empty(0),
        x.new_empty(heads, rows) if need_w else x.new_empty(0),
    )


def _encode_setup(ctx, inputs, output):
    x, w_enc, b_enc, _, ctx.m, _, ctx.composition, ctx.impl = inputs
    base, extension, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, w_enc, indices, base, extension)


def _encode_autograd(ctx, d_base, d_extension, _):
    x, w_enc, indices, base, extension = ctx.saved_tensors
    if ctx.composition != "mul":
        d_base, d_extension = d_base * (base > 0), d_extension * (extension > 0)
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    d_x, d_w, d_b = torch.ops.kronsae.encode_backward(
        d_base, d_extension, indices, x, w_enc, ctx.m, need_x, need_w or need_b, ctx.impl
    )
    return (
        d_x if need_x else None,
        d_w if need_w else None,
        d_b if need_b else None,
        *5 * [None],
    )


_encode.register_autograd(_encode_autograd, setup_context=_encode_setup)


@torch.library.custom_op("kronsae::dense_encode", mutates_args=())
def _dense_encode(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, mask: Tensor | None, k: int, impl: str
) -> tuple[Tensor, Tensor]:
    with without_autocast(x):
        indices, values = backends.module(impl).dense_encode(x, w_enc, b_enc, mask, k)
    return values, indices


@_dense_encode.register_fake
def _(x, w_enc, b_enc, mask, k, impl):
    values = x.new_empty(x.shape[0], k, dtype=accumulate_dtype(x.dtype))
    return values, torch.empty_like(values, dtype=torch.int64)


@torch.library.custom_op("kronsae::dense_encode_backward", mutates_args=())
def _dense_encode_backward(
    d_values: Tensor,
    indices: Tensor,
    x: Tensor,
    w_enc: Tensor,
    need_x: bool,
    need_w: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(x):
        return backends.module(impl).dense_encode_backward(
            d_values, indices, x, w_enc, need_x, need_w
        )


@_dense_encode_backward.register_fake
def _(d_values, indices, x, w_enc, need_x, need_w, impl):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        x.new_empty(w_enc.shape) if need_w else x.new_empty(0),
        x.new_empty(w_enc.shape[0]) if need_w else x.new_empty(0),
    )


def _dense_setup(ctx, inputs, output):
    x, w_enc, _, _, _, ctx.impl = inputs
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, w_enc, indices, values)


def _dense_autograd(ctx, d_values, _):
    x, w_enc, indices, values = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    d_x, d_w, d_b = torch.ops.kronsae.dense_encode_backward(
        d_values * (values > 0), indices, x, w_enc, need_x, need_w or need_b, ctx.impl
    )
    return (
        d_x if need_x else None,
        d_w if need_w else None,
        d_b if need_b else None,
        *3 * [None],
    )


_dense_encode.register_autograd(_dense_autograd, setup_context=_dense_setup)
