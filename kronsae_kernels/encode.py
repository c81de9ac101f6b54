"""Encoders that return only the k active latents: `fused_encode` (Kron) and `dense_encode` (TopK).

Each is: checks, choice of the implementation, and an operator that selects and gives the factors
of what it selected. What a latent is worth, and the derivative of that, are differentiable torch
operations on [B, k] here (`reference.compose`).

For fixed indices a factor is relu(x . w_enc[row] + b_enc[row]), the row a known one, so that the
derivatives of all encoders, of any order, are those of `decode` with w_enc as the table.
"""

from typing import Any

import torch
from torch import Tensor

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    COMPOSITIONS,
    LAYOUTS,
    SparseCodes,
    accumulate_dtype,
    as_integer,
    as_number,
    cast_for_autocast,
    check_choice,
    check_count,
    check_floating,
    check_integers,
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
from kronsae_kernels.rules import Rules, derived_again, has_values, operator, total
from kronsae_kernels.torch_impl import i_major, live_pre_latents, rows_of

WITHOUT_RELU = ("mul", "linear")
"""Compositions of factors that may be negative; "linear": of a dense encoder, whose values are."""
SCALE_EXPECTED = "scale: expected finite numbers >= 0, got others"


def fused_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    m: int,
    k: int | Tensor,
    composition: str = "mand",
    eps: float = 0.0,
    impl: str | None = None,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    layout: str = "head-major",
) -> SparseCodes:
    """The k largest post-latents of a Kron encoder, without writing the [B, F] scores.

    Equals `reference.fused_encode`: topk(mAND(ReLU(base), ReLU(extension)), k) of each token, with
    base, extension the m + n projections of each head. [KronSAE, arXiv:2505.22255v3, eq. 2-4]

    x: [..., d] float64, float32, bfloat16 or float16.
    layout: that of w_enc and b_enc. "head-major": [h, m + n, d] and [h, m + n], for each head m
        base rows, then n extension rows. "row-major": [m + n, h, d] and [m + n, h], the first base
        row of all heads, then the second one: this is fastest.
    composition: "mand" sqrt(p q + eps) for p q > 0, else sqrt(eps); "relu_mul" p q; "mul" u v
        (u, v the projections, p, q their ReLU).
    impl: None (by the device), "triton", "torch" or "reference".
    k: the same for all tokens, or int64 [...] >= 0, one a token. Then codes are as wide as the
        largest, and a token's other slots have value 0.
    mask: [F] bool, of which at least k are True, or [..., F], one a token. Only latents where it is
        True are selected. A token that has fewer fills up with value 0; so does every token if [F]
        has fewer, where torch.compile or vmap keep this call from counting them.
    scale: [F] >= 0. Latents compete by scale times value ("mand": its square times the product,
        for eps = 0 the same), and are in that order; values are not scaled. It gets no gradient.

    Returns values [..., k], largest first (ties: lowest index), float32 (float64 for float64), and
    indices int64; latent (head, i, j) has index head m n + i n + j. Latents compete by the product
    before the root, in float32 (float64 for float64). The derivative of a latent whose product is
    0 is 0. NaN in a row of x gives NaN values in that row alone.
    Memory: O(B k) and one chunk of pre-latents. Deterministic on a CPU.
    Autocast: x, w_enc and b_enc are cast as for a matrix product.

    Raises ValueError for wrong shapes, dtypes, devices, m, k, composition or eps; RuntimeError if
    `impl` cannot run here.
    """
    x, w_enc, b_enc = check_encoder(x, w_enc, b_enc, mask, rank=3, layout=layout)
    heads, rows, _ = w_enc.shape
    m, eps = as_integer(m), as_number(eps)
    require(m is not None, "m: expected an integer, got None")
    size = dict_size(w_enc, m)
    k, counts = _check_k(k, x, size, f"F = {heads} * {m} * {rows - m} = {size}", mask)
    check_choice("composition", composition, COMPOSITIONS)
    check_number("eps", eps, 0)
    scale = _check_scale(scale, x, size, 2 if composition == "mand" else 1)
    gate: dict[str, Any] = {"m": m, "composition": composition, "eps": eps}
    name = backends.choose(impl, x.device, x.dtype)
    if name == "reference":
        codes = reference.fused_encode(x, w_enc, b_enc, k=k, mask=mask, scale=scale, **gate)
        return _allowed(codes, mask, counts)
    flat, of_tokens = x.reshape(-1, x.shape[-1]), _flat_mask(mask, size)
    results = torch.ops.kronsae.encode(
        flat, w_enc, b_enc, m, composition, name, k, of_tokens, scale
    )
    codes = codes_of(x, *results, **gate)
    return _allowed(codes, mask, counts)


def dense_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    k: int | Tensor,
    impl: str | None = None,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
) -> SparseCodes:
    """The k largest of ReLU(w_enc x + b_enc), a TopK SAE's encoder, without keeping [B, F].

    Equals `reference.dense_encode`. [Gao et al. 2024]
    x: [..., d].  w_enc: [F, d].  b_enc: [F] or None.
    relu: False leaves the ReLU out: the k largest pre-activations, which may be negative.
    k, mask, scale, impl, results, ties, errors: as in `fused_encode`.
    """
    x, w_enc, b_enc = check_encoder(x, w_enc, b_enc, mask, rank=2)
    size = w_enc.shape[0]
    k, counts = _check_k(k, x, size, f"F = {size}", mask)
    scale = _check_scale(scale, x, size, 1)
    require(isinstance(relu, bool), f"relu: expected True or False, got {relu!r}")
    name = backends.choose(impl, x.device, x.dtype)
    if name == "reference":
        codes = reference.dense_encode(x, w_enc, b_enc, k=k, mask=mask, scale=scale, relu=relu)
        return _allowed(codes, mask, counts)
    flat, of_tokens = x.reshape(-1, x.shape[-1]), _flat_mask(mask, size)
    results = torch.ops.kronsae.encode(
        flat, w_enc, b_enc, None, "" if relu else "linear", name, k, of_tokens, scale
    )
    return _allowed(codes_of(x, *results, m=None), mask, counts)


def codes_of(
    x: Tensor,
    base: Tensor,
    extension: Tensor,
    indices: Tensor,
    *,
    m: int | None,
    composition: str = "",
    eps: float = 0.0,
    counts: Tensor | None = None,
) -> SparseCodes:
    """Codes in the shape of x, from the results [B, w] of an operator.

    m None: of a dense encoder, whose values are the base.
    counts: [B], from which on a token's slots are unused: value 0.
    """
    values = base if m is None else reference.compose(base * extension, composition, eps)
    if counts is not None:
        values = values.where(torch.arange(values.shape[1], device=x.device) < counts[:, None], 0)
    shape = (*x.shape[:-1], values.shape[1])
    return SparseCodes(values.view(shape), indices.view(shape))


def _flat_mask(mask: Tensor | None, size: int) -> Tensor | None:
    """[F] as it is, [..., F] as [B, F]."""
    return mask if mask is None or mask.ndim == 1 else mask.reshape(-1, size)


def _allowed(codes: SparseCodes, mask: Tensor | None, counts: Tensor | None) -> SparseCodes:
    """Codes with value 0 from a token's count [...] on, and where its mask is False."""
    values, indices = codes
    if mask is not None and mask.ndim > 1:
        values = values.where(mask.gather(-1, indices), 0)
    elif mask is not None and not has_values(mask):  # it may have fewer than k
        values = values.where(mask[indices], 0)
    if counts is not None:
        places = torch.arange(values.shape[-1], device=values.device)
        values = values.where(places < counts[..., None], 0)
    return SparseCodes(values, indices)


# Checks


def check_encoder(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    mask: Tensor | None,
    rank: int,
    layout: str = LAYOUTS[0],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check all but m, k and the options; return the tensors as autocast wants them, head-major."""
    check_tensors(x=x, w_enc=w_enc)
    check_floating(x=x, w_enc=w_enc, b_enc=b_enc)
    if mask is not None:
        check_tensors(mask=mask)
    check_choice("layout", layout, LAYOUTS)
    require(
        rank == 3 or layout == LAYOUTS[0],
        f"layout: expected {LAYOUTS[0]!r} without m, as {LAYOUTS[1]!r} is one of heads",
    )
    shape = {2: "[F, d]", 3: "[h, m + n, d]"}[rank] if layout == LAYOUTS[0] else "[m + n, h, d]"
    require(x.ndim >= 1, lambda: f"x: expected [..., d], got {shape_of(x)}")
    check_matrix("w_enc", w_enc, rank, shape)
    require(
        x.shape[-1] == w_enc.shape[-1],
        lambda: (
            f"x: expected [..., d] with d = {w_enc.shape[-1]} as in w_enc {shape}, "
            f"got {shape_of(x)}"
        ),
    )
    check_shape("b_enc", b_enc, tuple(w_enc.shape[:-1]), shape.replace(", d", ""))
    check_same("device", x=x, w_enc=w_enc, b_enc=b_enc, mask=mask)
    x, w_enc = cast_for_autocast(x), cast_for_autocast(w_enc)
    b_enc = None if b_enc is None else cast_for_autocast(b_enc)
    check_same("dtype", x=x, w_enc=w_enc, b_enc=b_enc)
    if layout != LAYOUTS[0]:
        w_enc, b_enc = w_enc.transpose(0, 1), None if b_enc is None else b_enc.t()
    return x, w_enc, b_enc


def _check_k(
    k: int | Tensor, x: Tensor, size: int, of_size: str, mask: Tensor | None
) -> tuple[int, Tensor | None]:
    """The largest k, and those of tokens (None: of all the same), if so many can be selected."""
    counts = None
    if isinstance(k, Tensor) and k.ndim > 0:
        counts, k = k, _largest_k(k, x)
    most = as_integer(k)
    check_count("k", most, 1, size, f"1 <= k <= {of_size}")
    check_mask(mask, size, tuple(x.shape[:-1]))
    if mask is not None and mask.ndim == 1 and has_values(mask):
        allowed = int(mask.sum())
        require(most <= allowed, f"k: expected at most the {allowed} latents in mask, got {most}")
    return most, counts


def _largest_k(counts: Tensor, x: Tensor) -> int:
    """The largest k of all tokens, at least 1."""
    check_tensors(k=counts)
    check_shape("k", counts, tuple(x.shape[:-1]), "one for each token, [...]")
    check_integers(k=counts)
    check_same("device", x=x, k=counts)
    require(
        has_values(counts),
        "k: one a token decides how wide the codes are, which torch.compile, vmap and fake tensors "
        "cannot know. Give the largest one as an integer, and set values to 0 after",
    )
    low, high = (int(bound) for bound in torch.aminmax(counts)) if counts.numel() else (0, 1)
    require(low >= 0, f"k: expected integers >= 0, got {low}")
    return max(1, high)


def _check_scale(scale: Tensor | None, x: Tensor, size: int, power: int) -> Tensor | None:
    """A scale [F] to a power (2: of the product under a root) in the dtype of values.

    Without its history, and divided by the largest first, so that the power is a float32.
    """
    if scale is None:
        return None
    check_floating(scale=scale)
    check_shape("scale", scale, (size,), "[F]")
    check_same("device", x=x, scale=scale)
    if has_values(scale):
        right = bool(((scale >= 0) & scale.isfinite()).all())
        require(right, SCALE_EXPECTED)
    # A device such as mps has no float64.
    wide = torch.float64 if scale.device.type in ("cpu", "cuda") else torch.float32
    scale = scale.detach().to(wide)
    scale = scale.where((scale >= 0) & scale.isfinite(), torch.nan)  # what a graph hides
    scale = scale / scale.amax().clamp(min=torch.finfo(scale.dtype).tiny)
    return (scale**power).to(accumulate_dtype(x.dtype))


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
    def flops(d_base, d_extension, indices, x, w_enc, m, need_x, need_w, impl):
        rows = indices.numel() * (1 if m is None else 2)
        return (need_x + need_w) * 2 * rows * x.shape[1]

    @staticmethod
    def rows(d_base, d_extension, indices, x, w_enc, m, need_x, need_w, impl):
        return () if need_w else (0, 1, 2, 3)  # a gradient of w_enc is a sum over rows

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

    The operator's arguments begin with x, w_enc, b_enc, m, composition and impl (then, with results
    as wide, k), its results with base, extension and indices.
    """

    @staticmethod
    def fake(x, w_enc, b_enc, m, composition, impl, k, *_):
        base = x.new_empty(x.shape[0], k, dtype=accumulate_dtype(x.dtype))
        extension = base.new_empty(0) if m is None else torch.empty_like(base)
        return base, extension, torch.empty_like(base, dtype=torch.int64)

    @staticmethod
    def flops(x, w_enc, *_):
        return 2 * x.shape[0] * w_enc.numel()

    @staticmethod
    def rows(*args):
        return (0,)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w_enc, _, ctx.m, ctx.composition, ctx.impl, *own = inputs
        ctx.not_derived = 3 + len(own)
        base, extension, *others = output
        indices, ctx.others = others[0], len(others)
        ctx.mark_non_differentiable(*others)
        ctx.save_for_backward(x, w_enc, indices, base, extension)
        ctx.save_for_forward(x, w_enc, indices, base, extension)

    @staticmethod
    def backward(ctx, d_base, d_extension, *_):
        x, w_enc, indices, base, extension = ctx.saved_tensors
        if ctx.composition not in WITHOUT_RELU:
            d_base, d_extension = d_base * (base > 0), d_extension * (extension > 0)
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        arguments = d_base, d_extension, indices, x, w_enc, ctx.m, need_x, need_w or need_b
        if derived_again():
            gradients = encode_backward(*arguments, ctx.impl)
        else:
            gradients = torch.ops.kronsae.encode_backward(*arguments, ctx.impl)
        needed = zip((need_x, need_w, need_b), gradients, strict=True)
        return (
            *(gradient if need else None for need, gradient in needed),
            *ctx.not_derived * [None],
        )

    @staticmethod
    def tangents(ctx, saved, t_x, t_w, t_b, *_):
        x, w_enc, indices, *factors = saved
        table, tangents = i_major(w_enc), []
        for factor, rows in zip(factors, rows_of(indices, w_enc, ctx.m), strict=False):

            def dots(x, table, factor=factor, rows=rows):
                return torch.ops.kronsae.decode_backward(
                    x, factor, rows, table, None, True, False, ctx.impl
                )[0]

            tangent = total(
                None if t_x is None else dots(t_x, table),
                None if t_w is None else dots(x, i_major(t_w)),
                None if t_b is None else i_major(t_b[..., None])[rows, 0].to(factor.dtype),
            )
            tangents.append(tangent if ctx.composition in WITHOUT_RELU else tangent * (factor > 0))
        if ctx.m is None:
            tangents.append(torch.zeros_like(factors[1]))
        return *tangents, *ctx.others * [None]


class SelectedAnyWidth(Selected):
    """`Selected` where the data decide how many latents there are. Counts [B] are a last result."""

    @staticmethod
    def fake(x, *_):
        width = torch.library.get_ctx().new_dynamic_size()
        base = x.new_empty(x.shape[0], width, dtype=accumulate_dtype(x.dtype))
        indices = torch.empty_like(base, dtype=torch.int64)
        return base, torch.empty_like(base), indices, indices.new_empty(x.shape[0])


@operator("encode")
class Encode(Selected):
    @staticmethod
    def compute(
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor | None,
        m: int | None,
        composition: str,
        impl: str,
        k: int,
        mask: Tensor | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if scale is not None and scale.device.type == "cpu":
            require(not scale.isnan().any(), SCALE_EXPECTED)
        with without_autocast(x):
            indices, base, extension = backends.module(impl).encode(
                x, w_enc, b_enc, mask, m, k, composition, scale
            )
        return base, extension, indices

    @staticmethod
    def rows(x, w_enc, b_enc, m, composition, impl, k, mask, scale):
        return (0,) if mask is None or mask.ndim == 1 else (0, 7)
