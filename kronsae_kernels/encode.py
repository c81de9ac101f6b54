"""Encoders that return only the k active latents: `fused_encode` (Kron) and `dense_encode` (TopK).

Each is: checks, choice of the implementation, and an operator that selects and gives the factors
of what it selected. What a latent is worth, and the derivative of that, are differentiable torch
operations on [B, k] here (`reference.compose`).

For fixed indices a factor is relu(x . w_enc[row] + b_enc[row]), the row a known one, so that the
derivatives of all encoders, of any order, are those of `decode` with w_enc as the table.
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
from kronsae_kernels.operator import Rules, forward_rule, has_values, operator, total
from kronsae_kernels.torch_impl import i_major, i_major_bias, live_pre_latents, rows_of


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
    if mask is not None and has_values(mask):
        allowed = int(mask.sum())
        require(k <= allowed, f"k: expected at most the {allowed} latents in mask, got {k}")


# Operators


@operator("encode_backward")
class EncodeBackward(Rules):
    """Gradients of x, w_enc and b_enc from those of the factors; has no derivatives itself."""

    @staticmethod
    def compute(
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

    @staticmethod
    def fake(d_base, d_extension, indices, x, w_enc, m, need_x, need_w, impl):
        contiguous = torch.contiguous_format
        i_major = x.new_empty(w_enc.transpose(0, -2).shape).transpose(0, -2)
        return (
            torch.empty_like(x, memory_format=contiguous) if need_x else x.new_empty(0),
            i_major if need_w else x.new_empty(0),
            x.new_empty(w_enc.shape[:-1]) if need_w else x.new_empty(0),
        )

    @staticmethod
    def rows(*args):
        need_w = args[7]  # a sum over rows
        return () if need_w else (0, 1, 2, 3)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)


def encode_backward(
    d_base: Tensor,
    d_extension: Tensor,
    indices: Tensor,
    x: Tensor,
    w_enc: Tensor,
    m: int | None,
    need_x: bool,
    need_w: bool,
    impl: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`EncodeBackward`, made of operators that have derivatives."""
    coefficients, columns = live_pre_latents(d_base, d_extension, indices, w_enc, m)
    table, d_x, d_w, d_b = i_major(w_enc), None, None, None
    if need_x:
        d_x = torch.ops.kronsae.decode(coefficients, columns, table, None, None, impl)
    if need_w:
        ones, column = x.new_ones(len(x), 1), x.new_empty(len(table), 1)
        rest = None, False, True, impl
        _, d_w = torch.ops.kronsae.decode_backward(x, coefficients, columns, table, *rest)
        _, d_b = torch.ops.kronsae.decode_backward(ones, coefficients, columns, column, *rest)
        d_b = d_b.squeeze(1)
        if m is not None:
            heads, rows, d = w_enc.shape
            d_w, d_b = d_w.view(rows, heads, d).transpose(0, 1), d_b.view(rows, heads).t()
    return d_x, d_w, d_b


class Selected(Rules):
    """Derivatives of the factors of selected latents, by x, w_enc and b_enc.

    The operator's arguments are x, w_enc, b_enc, one of its own, m, one of its own, composition and
    impl; its results begin with base, extension and indices.
    """

    @staticmethod
    def rows(*args):
        return (0,)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w_enc, _, _, ctx.m, _, ctx.composition, ctx.impl = inputs
        base, extension, *others = output
        indices, ctx.others = others[0], len(others)
        ctx.mark_non_differentiable(*others)
        ctx.save_for_backward(x, w_enc, indices, base, extension)
        ctx.save_for_forward(x, w_enc, indices, base, extension)

    @staticmethod
    def backward(ctx, d_base, d_extension, *_):
        x, w_enc, indices, base, extension = ctx.saved_tensors
        if ctx.composition != "mul":
            d_base, d_extension = d_base * (base > 0), d_extension * (extension > 0)
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        arguments = d_base, d_extension, indices, x, w_enc, ctx.m, need_x, need_w or need_b
        if torch.is_grad_enabled():  # these derivatives are differentiated, too
            gradients = encode_backward(*arguments, ctx.impl)
        else:
            gradients = torch.ops.kronsae.encode_backward(*arguments, ctx.impl)
        needed = zip((need_x, need_w, need_b), gradients, strict=True)
        return (*(gradient if need else None for need, gradient in needed), *5 * [None])

    @forward_rule
    def jvp(ctx, saved, t_x, t_w, t_b, *_):
        x, w_enc, indices, *factors = saved
        table, tangents = i_major(w_enc), []
        for factor, rows in zip(factors, rows_of(indices, w_enc, ctx.m), strict=False):

            def dots(x: Tensor, table: Tensor, factor=factor, rows=rows) -> Tensor:
                return torch.ops.kronsae.decode_backward(
                    x, factor, rows, table, None, True, False, ctx.impl
                )[0]

            tangent = total(
                None if t_x is None else dots(t_x, table),
                None if t_w is None else dots(x, i_major(t_w)),
                None if t_b is None else i_major_bias(t_b)[rows].to(factor.dtype),
            )
            tangents.append(tangent if ctx.composition == "mul" else tangent * (factor > 0))
        if ctx.m is None:
            tangents.append(torch.zeros_like(factors[1]))
        return *tangents, *ctx.others * [None]


@operator("encode")
class Encode(Selected):
    @staticmethod
    def compute(
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

    @staticmethod
    def fake(x, w_enc, b_enc, mask, m, k, composition, impl):
        base = x.new_empty(x.shape[0], k, dtype=accumulate_dtype(x.dtype))
        extension = base.new_empty(0) if m is None else torch.empty_like(base)
        return base, extension, torch.empty_like(base, dtype=torch.int64)
