"""Reconstructions from nested prefixes of the dictionary: kernels of `triton_impl.nested`."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae_kernels.triton_impl import nested
from kronsae_kernels.triton_impl.launch import cdiv, configure, launch, next_power_of_2
from kronsae_kernels.triton_impl.operations.gather import DecodeAndLoss, code_gradients, describe


class Grouped(NamedTuple):
    """Codes [B, k] in the order of their groups: latents between two of G bounds are one."""

    starts: Tensor
    """[B, G + 1] int32: group g of a token has places starts[g] to starts[g + 1]."""
    by_group: Tensor
    """[B, k] int32: the latents; those from the last bound on come last."""
    weights: Tensor
    """[B, k] float32: their values (empty without values)."""
    slots: Tensor
    """[B, k] int32: where they were among the codes as given."""
    of_slot: Tensor
    """[B, k] int32: row among sums [B G, d] of each code as given (empty without `rows`)."""

    @classmethod
    def of(
        cls,
        indices: Tensor,
        bounds: Sequence[int],
        values: Tensor | None = None,
        extension: Tensor | None = None,
        *,
        root: bool = False,
        eps: float = 0.0,
        rows: bool = False,
    ) -> "Grouped":
        """Codes by group, from indices: -1 for a place without a latent, which no prefix holds.

        values: of a Kron encoder either these, or the base, with the extension: they are composed
        (root: to the square root of the product + eps). None: for a backward pass.
        rows: whether `of_slot` is wanted. Raises RuntimeError for 2^31 sums or latents.
        """
        (tokens, k), prefixes = indices.shape, len(bounds)
        if tokens * prefixes >= 2**31:
            raise RuntimeError(f"expected fewer than 2^31 sums, got {tokens} * {prefixes}")
        columns, shape = torch.empty_like(indices, dtype=torch.int32), indices.shape
        grouped = cls(
            columns.new_empty(tokens, prefixes + 1),
            columns.new_empty(shape),
            columns.new_empty(shape if values is not None else 0, dtype=torch.float32),
            columns.new_empty(shape),
            columns.new_empty(shape if rows else 0),
        )
        launch(
            nested.group_codes,
            (tokens,),
            configure("group_codes", indices.device).capped(PLACES=next_power_of_2(k)),
            values=None if values is None else values.contiguous(),
            extension=extension,
            columns=indices.contiguous(),
            bounds=_edges(tuple(bounds), indices.device),
            k=k,
            prefixes=prefixes,
            eps=eps,
            ROOT=root,
            ROWS=rows,
            **grouped._asdict(),
        )
        return grouped


@functools.lru_cache(maxsize=64)
def _edges(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """Bounds [G] int32 on a device: kept, as each copy to a GPU would wait for it."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)


def nested_sums(codes: Grouped, table: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`combine` of the codes in the first 1, ..., G groups: [B, G, d] in `dtype`."""
    (tokens, k), d, prefixes = codes.by_group.shape, table.shape[1], codes.starts.shape[1] - 1
    out = table.new_empty(tokens, prefixes, d, dtype=dtype)
    launch(
        nested.nested_sums,
        lambda blocks: (tokens, cdiv(d, blocks["WIDTH"])),
        weights=codes.weights,
        by_group=codes.by_group,
        starts=codes.starts,
        table=table.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        out=out,
        k=k,
        d=d,
        prefixes=prefixes,
    )
    return out


def nested_decode_and_loss(
    x: Tensor,
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    table: Tensor,
    bias: Tensor | None,
    composition: str,
    eps: float,
    scale: float | Tensor,
    bounds: Sequence[int],
) -> tuple[DecodeAndLoss, Tensor]:
    """`decode_and_loss` of L = scale * (sum of the squared norms of all prefixes' residuals) / 2.

    bounds: of G prefixes (at most `step.MAX_PREFIXES`), the last that of all latents.
    `residual` is [B, G, d]: what decoder rows of each group get, the sum of the residuals of all
    prefixes that hold the group. The last is that of the whole reconstruction. Also returns [B, k]
    int32, the row of each code among these [B G, d]. sums is [3, B]: also the squared norm of the
    whole reconstruction's residual.
    """
    (tokens, k), d, prefixes = indices.shape, table.shape[1], len(bounds)
    dense, root = composition in ("dense", "linear"), composition == "mand"
    groups = Grouped.of(
        indices, bounds, base, None if dense else extension, root=root, eps=eps, rows=True
    )
    sums = table.new_empty(3, tokens, dtype=torch.float32)
    suffixes = table.new_empty(tokens, prefixes, d)
    config = configure("nested_errors", table.device)
    most = max(1, config.blocks.pop("TILE") // next_power_of_2(prefixes))
    launch(
        nested.nested_errors,
        (tokens,),
        config.capped(WIDTH=most),
        weights=groups.weights,
        by_group=groups.by_group,
        starts=groups.starts,
        table=table,
        bias=bias,
        x=x,
        suffixes=suffixes,
        sums=sums,
        tokens=tokens,
        k=k,
        d=d,
        PREFIXES=prefixes,
    )
    d_values = nested_dots(groups, suffixes, table, torch.float32)
    codes = describe(indices, base, extension, composition, eps, scale)
    of_codes = code_gradients(codes, d_values, sums)
    return DecodeAndLoss(suffixes, sums, **of_codes, d_values=d_values), groups.of_slot


def suffix_sums(y: Tensor) -> Tensor:
    """out[b, g] = sum of y[b, g'] over g' >= g: [B, G, d] float32."""
    tokens, prefixes, d = y.shape
    out = y.new_empty(y.shape, dtype=torch.float32)
    launch(
        nested.suffix_sums,
        lambda blocks: (tokens, cdiv(d, blocks["WIDTH"])),
        configure("suffix_sums", y.device).capped(PREFIXES=prefixes),
        d_out=y.contiguous(),
        suffixes=out,
        d=d,
        prefixes=prefixes,
    )
    return out


def nested_dots(codes: Grouped, suffixes: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """out[b, s] = suffixes[b, group of s] . table[latent of s], [B, k] in `dtype`.

    suffixes [B, G, d]: of `suffix_sums`, in any dtype.  0 where no prefix holds the latent.
    """
    (tokens, k), d = codes.by_group.shape, table.shape[1]
    out = table.new_empty(tokens, k, dtype=dtype)
    launch(
        nested.nested_dots,
        lambda blocks: (tokens, cdiv(k, blocks["ROWS"])),
        configure("nested_dots", table.device).capped(ROWS=next_power_of_2(k)),
        suffixes=suffixes,
        by_group=codes.by_group,
        slots=codes.slots,
        of_slot=codes.of_slot,
        starts=codes.starts,
        table=table.contiguous(),
        d_values=out,
        k=k,
        d=d,
        prefixes=codes.starts.shape[1] - 1,
    )
    return out
