"""Sums over the entries of a row, and AdamW in the same kernel: `triton_impl.backward`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae_kernels.step_arguments import SEEDS
from kronsae_kernels.triton_impl import backward
from kronsae_kernels.triton_impl.configs import Config
from kronsae_kernels.triton_impl.launch import cdiv, configure, launch, next_power_of_2

MAX_EXTENSIONS = 16
"""Extension rows that one program sums at most, in registers."""
Updated = tuple[Tensor, Tensor, Tensor]
"""A float32 weight and AdamW's two moments of it (of matrices also bfloat16), changed in place."""
MODES = {"gradient": 0, "measure": 1, "update": 2}


class Entries(NamedTuple):
    """The (token, latent) pairs of sparse codes [B, k], sorted by latent (stably)."""

    tokens: Tensor
    """[E] int32."""
    latents: Tensor
    """[E] int32, ascending."""
    offsets: Tensor
    """[F + 1] int32: latent f owns entries offsets[f] to offsets[f + 1]."""
    coefficients: tuple[Tensor, ...]
    """[E] float32 each: those that `of` was given."""
    rows: Tensor | None
    """[E] int32: those that `of` was given."""

    @classmethod
    def of(
        cls,
        indices: Tensor,
        size: int,
        coefficients: tuple[Tensor, ...] = (),
        tokens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> "Entries":
        """Entries from latent indices [B, k] in [0, size), or [E] with the token of each, int32.

        coefficients: up to 5 numbers of each code, shaped as indices.
        rows: another number of each code, [E] int32.
        Raises RuntimeError for 2^31 entries or latents: kernels count them in int32.
        """
        count = indices.numel()
        if count >= 2**31 or size >= 2**31:
            raise RuntimeError(
                f"expected fewer than 2^31 codes and latents, got {count} and {size}"
            )
        latents, order = indices.flatten().int().sort(stable=True)
        of_entry, offsets = torch.empty_like(latents), latents.new_empty(size + 1)
        sorted_ = latents.new_empty(len(coefficients), count, dtype=torch.float32)
        names = ("one", "two", "three", "four", "five")
        given: dict[str, Any] = dict.fromkeys(names)
        for name, coefficient in zip(names, coefficients, strict=False):
            given[name] = coefficient.contiguous()
        launch(
            backward.group_entries,
            lambda blocks: (cdiv(count, blocks["WIDTH"]) + cdiv(size + 1, blocks["WIDTH"]),),
            order=order,
            latents=latents,
            of_code=tokens,
            tokens=of_entry,
            coefficients=sorted_,
            offsets=offsets,
            k=1 if tokens is not None else indices.shape[1],
            size=count,
            rows=size,
            COUNT=len(coefficients),
            **given,
        )
        rows = None if rows is None else rows[order]
        return cls(of_entry, latents, offsets, tuple(sorted_), rows)


def sum_entries(entries: Entries, coefficients: Tensor) -> Tensor:
    """The sum of the coefficients of each latent's entries, [F] float32."""
    rows = len(entries.offsets) - 1
    out = coefficients.new_empty(rows)
    launch(
        backward.sum_entries,
        (rows,),
        coefficients=coefficients,
        offsets=entries.offsets,
        out=out,
    )
    return out


def row_gradients(
    entries: Entries, coefficients: Tensor, y: Tensor, out: Tensor, out_bias: Tensor | None
) -> None:
    """out[f] [rows, d] = sum of coefficient * y[token] over f's entries; out_bias: with y = 1."""
    rows, d = out.shape
    launch(
        backward.row_gradients,
        lambda blocks: (rows, cdiv(d, blocks["WIDTH"])),
        out=out,
        out_bias=out_bias,
        **_row_sums(entries, coefficients, y.contiguous()),
    )


def _row_sums(entries: Entries, coefficients: Tensor, y: Tensor) -> dict[str, Any]:
    """Arguments of kernels that sum coefficient * y[token] over the entries of each row.

    Made here are the sums over segments that lie in one row: partial [segments, d] float32.
    """
    d = y.shape[1]
    length = configure("segments", y.device).blocks["ROW_LENGTH"]
    segments = entries.tokens.numel() // length
    shared: dict[str, Any] = {
        "coefficients": coefficients,
        "tokens": entries.tokens,
        "y": y,
        "partial": y.new_empty(max(1, segments), d, dtype=torch.float32),
        "d": d,
        "LENGTH": length,
    }
    launch(
        backward.sum_row_segments,
        lambda blocks: (segments, cdiv(d, blocks["WIDTH"])),
        latents=entries.latents,
        **shared,
    )
    return {"offsets": entries.offsets, **shared}


def update_rows(
    entries: Entries,
    coefficients: Tensor,
    along: Tensor,
    y: Tensor,
    hyper: Tensor,
    mode: str,
    unit_norm: bool,
    weight: Updated,
    copy: Tensor | None,
    bias: Updated | None = None,
) -> Tensor:
    """AdamW step of weight [rows, d] from `row_gradients`; returns squares that add up to the
    gradient's squared norm.

    mode "measure": only that. copy: the weight in another dtype, kept up to date.
    hyper [2, 10]: for w_enc and for the others, of which are rows without a bias (decoders).
    """
    rows, d = weight[0].shape
    sums, squares = _row_sums(entries, coefficients, y), y.new_empty(rows, dtype=torch.float32)
    config = configure("update_rows", y.device)
    blocks = dict(config.blocks)
    warps = min(config.num_warps, next_power_of_2(cdiv(d, blocks.pop("PER_WARP"))))
    width = warps * blocks.pop("PER_LOAD")
    launch(
        backward.update_rows,
        (rows,),
        Config(warps, config.num_stages, blocks),
        along=along,
        squares=squares,
        UNIT_NORM=unit_norm,
        PIECES=cdiv(d, width),
        WIDTH=width,
        **sums,
        **_updated(weight, copy, bias or (None, None, None), mode),
        hyper=hyper[1 if bias is None else 0],
        bias_hyper=hyper[1],
        SEED=SEEDS["w_dec" if bias is None else "w_enc"],
    )
    return squares


Gradient = tuple[Tensor | None, Tensor | None, Tensor | None]
"""`Updated`, or memory for a gradient, which has no moments, or nothing."""


def _updated(weight: Gradient, copy: Tensor | None, bias: Gradient, mode: str) -> dict[str, Any]:
    """Arguments of a kernel for the tensors that it changes, and its MODE."""
    return {
        **dict(zip(("weight", "first", "second"), weight, strict=True)),
        **dict(zip(("bias", "bias_first", "bias_second"), bias, strict=True)),
        "shadow": copy,
        "MODE": MODES[mode],
    }


def head_gradients(
    entries: Entries,
    d_base: Tensor,
    d_extension: Tensor,
    x: Tensor,
    m: int,
    weight: Tensor,
    bias: Tensor,
) -> None:
    """Write the gradients weight [m + n, h, d] and bias [m + n, h].

    d_base, d_extension [E]: in the order of the entries.
    """
    what = _updated((weight, None, None), None, (bias, None, None), "gradient")
    strides = {"bias_of_row": bias.stride(0), "bias_of_head": bias.stride(1)}
    _head_sums(entries, d_base, d_extension, x, m, hyper=None, bias_hyper=None, **what, **strides)


def update_heads(
    entries: Entries,
    d_base: Tensor,
    d_extension: Tensor,
    x: Tensor,
    m: int,
    hyper: Tensor,
    mode: str,
    weight: Updated,
    copy: Tensor | None,
    bias: Updated,
) -> Tensor:
    """AdamW step of weight [m + n, h, d] and bias [h, m + n] from `head_gradients`.

    Otherwise as `update_rows`.
    """
    what = _updated(weight, copy, bias, mode)
    what |= {"hyper": hyper[0], "bias_hyper": hyper[1]}
    what |= {"bias_of_row": bias[0].stride(1), "bias_of_head": bias[0].stride(0)}
    return _head_sums(entries, d_base, d_extension, x, m, **what)


def _head_sums(
    entries: Entries, d_base: Tensor, d_extension: Tensor, x: Tensor, m: int, **what: Any
) -> Tensor:
    """Sums over the entries of each head, for what is done with them; returns squared norms."""
    rows, h, d = what["weight"].shape
    n, x = rows - m, x.contiguous()
    length = configure("segments", x.device).blocks["HEAD_LENGTH"]
    segments, extensions = entries.tokens.numel() // length, min(n, MAX_EXTENSIONS)
    shared = {
        "d_base": d_base,
        "d_extension": d_extension,
        "latents": entries.latents,
        "tokens": entries.tokens,
        "x": x,
        "partial": x.new_empty(max(1, segments), 1 + n, d, dtype=torch.float32),
        "d": d,
        "N": n,
        "EXTENSIONS": extensions,
        "LENGTH": length,
    }

    def configured(kernel: str) -> tuple[Config, int]:
        """A kernel's configuration, and how many programs share a head, or a segment."""
        config = configure(kernel, x.device)
        if extensions > 8:
            config = config._replace(blocks={**config.blocks, "PIECES": 1})
        blocks = config.blocks
        return config, cdiv(n, extensions) * cdiv(d, blocks["PIECES"] * blocks["WIDTH"])

    config, programs = configured("sum_head_segments")
    launch(backward.sum_head_segments, (segments * programs,), config, **shared)
    config, programs = configured("head_gradients")
    squares = x.new_empty(h * programs, dtype=torch.float32)
    launch(
        backward.head_gradients,
        (h * programs,),
        config,
        offsets=entries.offsets,
        squares=squares,
        h=h,
        M=m,
        SEED=SEEDS["w_enc"],
        **what,
        **shared,
    )
    return squares


def update_vector(gradient: Tensor, weight: Updated, hyper: Tensor) -> None:
    """AdamW step of a vector from its gradient; hyper: [10]."""
    size = gradient.numel()
    launch(
        backward.update_vector,
        lambda blocks: (cdiv(size, blocks["WIDTH"]),),
        gradient=gradient,
        weight=weight[0],
        first=weight[1],
        second=weight[2],
        hyper=hyper,
        size=size,
    )
