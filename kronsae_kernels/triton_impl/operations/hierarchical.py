"""Reconstructions from a token's first codes: kernels of `triton_impl.hierarchical`."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae_kernels import reference, torch_impl
from kronsae_kernels.step import MAX_WIDTH
from kronsae_kernels.triton_impl import hierarchical as kernels
from kronsae_kernels.triton_impl.launch import configure, launch, next_power_of_2
from kronsae_kernels.triton_impl.operations.gather import DecodeAndLoss, code_gradients, describe
from kronsae_kernels.triton_impl.operations.gradients import Entries, row_gradients


class Errors(NamedTuple):
    """Errors of the reconstructions from a token's first codes, by G prefixes of k codes."""

    suffixes: Tensor
    """[B, G, d]: sum of the errors of prefixes g to G - 1; the last is that of all codes."""
    rows: Tensor
    """[B, k] int32: row of each code among these [B G, d]."""
    d_values: Tensor
    """[B, k] float32: that row times the code's row of the table."""
    sums: Tensor
    """[3, B] float32: squared norm of all errors; unwritten; squared norm of the last error."""

    @classmethod
    def of(
        cls,
        target: Tensor,
        values: Tensor,
        indices: Tensor,
        table: Tensor,
        bias: Tensor | None,
        prefixes: Sequence[int],
        dtype: torch.dtype,
    ) -> "Errors":
        """Errors against target [B, d], with their sums in `dtype`.

        indices: -1 for a place without a latent.  Raises RuntimeError for 2^31 sums.
        """
        (tokens, k), d, count = indices.shape, table.shape[1], len(prefixes)
        if tokens * count >= 2**31:
            raise RuntimeError(f"expected fewer than 2^31 sums, got {tokens} * {count}")
        ends, groups = _ends(tuple(prefixes), indices.device)
        first = torch.arange(0, tokens * count, count, dtype=torch.int32, device=indices.device)
        errors = cls(
            table.new_empty(tokens, count, d, dtype=dtype),
            first[:, None] + groups,
            table.new_empty(tokens, k, dtype=torch.float32),
            table.new_empty(3, tokens, dtype=torch.float32),
        )
        launch(
            kernels.hierarchical_errors,
            (tokens,),
            configure("hierarchical_errors", table.device, WIDTH=next_power_of_2(d)),
            weights=values.contiguous(),
            columns=indices.contiguous(),
            ends=ends,
            table=table.contiguous(),
            bias=bias,
            x=target,
            suffixes=errors.suffixes,
            d_values=errors.d_values,
            sums=errors.sums,
            tokens=tokens,
            k=k,
            d=d,
            prefixes=count,
        )
        return errors


@functools.lru_cache(maxsize=64)
def _ends(prefixes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """[k] int32 each, kept on a device: 1 where a prefix ends; the first prefix with each code."""
    ends = torch.zeros(prefixes[-1], dtype=torch.int32)
    ends[[end - 1 for end in prefixes]] = 1
    groups = ends.cumsum(0, dtype=torch.int32) - ends
    return ends.to(device), groups.to(device)


def hierarchical(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    target: Tensor,
    prefixes: Sequence[int],
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same as `torch_impl.hierarchical`, which also serves for rows too long for one program.

    Memory: O(B (G d + k) + F d).
    """
    if w_dec.shape[1] > MAX_WIDTH:
        return torch_impl.hierarchical(values, indices, w_dec, target, prefixes, gradients)
    target = target.contiguous()
    errors = Errors.of(target, values.float(), indices, w_dec, None, prefixes, torch.float32)
    loss, residual = errors.sums[0].sum(), errors.suffixes[:, -1].clone()
    if not gradients:
        return loss, residual, target.new_empty(0), target.new_empty(0), target.new_empty(0)
    entries = Entries.of(indices, len(w_dec), (values,), errors.rows.flatten())
    d_w = target.new_empty(w_dec.shape)
    row_gradients(entries, entries.coefficients[0], errors.suffixes.flatten(0, 1), d_w, None)
    return loss, residual, 2 * errors.d_values, d_w.mul_(2), -2 * errors.suffixes[:, 0]


def hierarchical_decode_and_loss(
    x: Tensor,
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    table: Tensor,
    bias: Tensor | None,
    composition: str,
    eps: float,
    scale: float | Tensor,
    prefixes: Sequence[int],
) -> tuple[DecodeAndLoss, Tensor]:
    """`nested_decode_and_loss`, with prefixes of each token's codes, the last of them of all k."""
    codes = describe(indices, base, extension, composition, eps, scale)
    values = base
    if composition != "dense":
        values = reference.compose(base * extension, composition, eps)
    suffixes, rows, d_values, sums = Errors.of(
        x, values, indices, table, bias, prefixes, table.dtype
    )
    of_codes = code_gradients(codes, d_values, sums)
    return DecodeAndLoss(suffixes, sums, **of_codes, d_values=d_values), rows
