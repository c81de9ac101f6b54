"""Sums of gathered rows, and a decoder with its loss: kernels of `triton_impl.decode`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae_kernels import reference
from kronsae_kernels.triton_impl import decode as kernels
from kronsae_kernels.triton_impl.launch import cdiv, configure, launch, next_power_of_2


def combine(
    coefficients: Tensor, columns: Tensor, table: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """C table + bias, [B, d] in `dtype` (see `torch_impl.combine`)."""
    (tokens, r), d = columns.shape, table.shape[1]
    out = table.new_empty(tokens, d, dtype=dtype)
    launch(
        kernels.combine,
        lambda blocks: (tokens, cdiv(d, blocks["WIDTH"])),
        coefficients=coefficients.contiguous(),
        columns=columns.contiguous(),
        table=table.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        out=out,
        r=r,
        d=d,
    )
    return out


def pair_dots(y: Tensor, columns: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """out[b, s] = y[b] . table[columns[b, s]], [B, r] in `dtype`."""
    (tokens, r), d = columns.shape, table.shape[1]
    out = table.new_empty(tokens, r, dtype=dtype)
    launch(
        kernels.pair_dots,
        lambda blocks: (tokens, cdiv(r, blocks["ROWS"])),
        y=y.contiguous(),
        columns=columns.contiguous(),
        table=table.contiguous(),
        out=out,
        r=r,
        d=d,
    )
    return out


class DecodeAndLoss(NamedTuple):
    """Results of `decode_and_loss`, whose L = scale * (squared norm of the residual) / 2."""

    residual: Tensor
    """[B, d] reconstruction minus x, in the table's dtype."""
    sums: Tensor
    """[2, B] float32: the residual's squared norm; and 0 if that times scale, d_base and
    d_extension are finite, else NaN."""
    values: Tensor
    """[B, k] float32, as all that follow."""
    scaled: Tensor
    """values times scale."""
    along: Tensor
    """values times dL/dvalues."""
    d_base: Tensor
    """dL by the base's pre-latent (a dense encoder's pre-activation)."""
    d_extension: Tensor
    """dL by the extension's pre-latent (a dense encoder's: d_base)."""
    d_values: Tensor | None = None
    """dL/dvalues / scale, also where a factor is 0; None where rows are gathered once."""


def decode_and_loss(
    x: Tensor,
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    table: Tensor,
    bias: Tensor | None,
    composition: str,
    eps: float,
    scale: float | Tensor,
    one_gather: bool,
    total: Callable[[Tensor], Tensor] | None = None,
) -> DecodeAndLoss:
    """Decoder, squared error against x [B, d], and its gradients by the codes [B, k].

    indices: -1 for a place without a latent, which takes no part: its numbers are 0.
    composition: one of COMPOSITIONS, or "dense" (base holds the values, of a ReLU), or "linear"
    (base holds the values, of any sign). scale: a number, or a float32 scalar on the device.
    one_gather: rows are gathered once, for which a chunk of k of them must fit into a warp's
    registers.
    total: adds up [B, d] float32 over processes that decode other codes of the same tokens, of
    which one has the bias; rows are then gathered twice.
    """
    codes = describe(indices, base, extension, composition, eps, scale)
    if one_gather and total is None:
        return _decode_and_loss(x, codes, table, bias)
    sums = table.new_empty(2, len(indices), dtype=torch.float32)
    values = values_of(base, extension, composition, eps)
    x_hat = combine(values, indices, table, bias, torch.float32)
    error = (x_hat if total is None else total(x_hat)).sub_(x)
    d_values = pair_dots(error, indices, table, torch.float32)
    torch.sum(error.square(), 1, out=sums[0])
    of_codes = code_gradients(codes, d_values, sums)
    return DecodeAndLoss(error.to(table.dtype), sums, **of_codes, d_values=d_values)


def values_of(base: Tensor, extension: Tensor, composition: str, eps: float) -> Tensor:
    """Values [B, k] of codes, from their factors."""
    if composition in ("dense", "linear"):
        return base
    return reference.compose(base * extension, composition, eps)


def describe(
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    composition: str,
    eps: float,
    scale: float | Tensor,
) -> dict[str, Any]:
    """Codes [B, k], and how they are made, as arguments of kernels."""
    return {
        "columns": indices,
        "base": base,
        "extension": extension,
        "k": indices.shape[1],
        "scale": scale,
        "ON_DEVICE": isinstance(scale, Tensor),
        "eps": eps,
        "ROOT": composition == "mand",
        "SIGNED": composition in ("mul", "linear"),
        "DENSE": composition in ("dense", "linear"),
    }


def _decode_and_loss(
    x: Tensor, codes: dict[str, Any], table: Tensor, bias: Tensor | None
) -> DecodeAndLoss:
    """`decode_and_loss` in one kernel, which gathers rows once."""
    tokens, d = len(x), table.shape[1]
    sums = table.new_empty(2, tokens, dtype=torch.float32)
    residual, into = table.new_empty(tokens, d), _like(codes)
    config = configure("decode_and_loss", table.device)
    rows = next_power_of_2(cdiv(codes["k"], config.blocks["BLOCKS"]))
    width = min(max(16, config.blocks["TILE"] // rows), next_power_of_2(d))
    blocks = {
        "BLOCKS": cdiv(codes["k"], rows),
        "ROWS": rows,
        "WIDTH": width,
        "TOGETHER": min(width, 16 // table.element_size()),
        "STAGES": config.blocks["STAGES"],
    }
    launch(
        kernels.decode_and_loss,
        (tokens,),
        config._replace(blocks=blocks),
        x=x,
        table=table,
        bias=bias,
        residual=residual,
        sums=sums,
        tokens=tokens,
        d=d,
        **codes,
        **into,
    )
    return DecodeAndLoss(residual, sums, **into)


def code_gradients(codes: dict[str, Any], d_values: Tensor, sums: Tensor) -> dict[str, Any]:
    """The fields of `DecodeAndLoss` that belong to codes, from d_values [B, k], not yet scaled.

    codes: of `describe`.  sums [2 or more, B]: row 0 the squared norms; row 1 is written.
    """
    into = _like(codes)
    launch(
        kernels.code_gradients,
        (len(d_values),),
        d_values=d_values,
        squares=sums[0],
        finite=sums[1],
        **codes,
        **into,
    )
    return into


def _like(codes: dict[str, Any]) -> dict[str, Any]:
    """Memory for the fields of `DecodeAndLoss` that belong to codes [B, k]."""
    base = codes["base"]
    into = {name: torch.empty_like(base) for name in ("values", "scaled", "along", "d_base")}
    return into | {"d_extension": into["d_base"] if codes["DENSE"] else torch.empty_like(base)}
