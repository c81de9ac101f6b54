"""Kernels of a training step alone: selection over its batch, its numbers and counters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kronsae_kernels.common import SparseCodes
from kronsae_kernels.triton_impl import batch, counters
from kronsae_kernels.triton_impl.launch import cdiv, launch


def keep_largest(
    indices: Tensor,
    base: Tensor,
    extension: Tensor,
    count: int,
    composition: str,
    eps: float,
    silent: float,
    size: int,
    narrow: Tensor,
) -> None:
    """Keep `count` of the candidates [B, w], the largest: the index of others becomes -1.

    Of equal values the earlier token's are kept, within a token the first. Values of `silent` or
    less are never kept. composition: as of `decode_and_loss`.  size: latents that there are.
    narrow: float32 scalar, set to 1 where a token has kept all of its w < size candidates.
    """
    values, candidates = base, base.numel()
    if composition != "dense":
        values = torch.empty_like(base)
        launch(
            batch.code_values,
            lambda blocks: (cdiv(candidates, blocks["ENTRIES"]),),
            base=base,
            extension=extension,
            values=values,
            size=candidates,
            eps=eps,
            ROOT=composition == "mand",
        )
    ranked, order = values.flatten().sort(descending=True, stable=True)
    launch(
        batch.keep_first,
        lambda blocks: (cdiv(candidates, blocks["ENTRIES"]),),
        ranked=ranked,
        order=order,
        indices=indices,
        narrow=narrow,
        count=count,
        size=candidates,
        width=indices.shape[1],
        silent=silent,
        WHOLE=indices.shape[1] == size,
    )


def prepare_update(
    sums: Tensor,
    missed: Tensor,
    size: int,
    lr: Tensor,
    adamw: Tensor,
    hyper: Tensor,
    steps: Sequence[Tensor],
) -> None:
    """Fill hyper [2, 10] for the next AdamW step, and count it: `counters.prepare_update`.

    steps: float32 scalars of w_enc, b_enc, w_dec, b_dec, and perhaps of thresholds.
    """
    w_enc, b_enc, w_dec, b_dec, *rest = steps
    launch(
        counters.prepare_update,
        (1,),
        sums=sums,
        missed=missed,
        size=size,
        lr=lr,
        adamw=adamw,
        hyper=hyper,
        steps_w_enc=w_enc,
        steps_b_enc=b_enc,
        steps_w_dec=w_dec,
        steps_b_dec=b_dec,
        steps_more=rest[0] if rest else None,
    )


def note_active(
    codes: SparseCodes, silent: Tensor, hyper: Tensor, tokens: int, threshold: float
) -> None:
    """Mark the latents of codes [B, k] that are active, above the threshold, in silent [F]."""
    size = codes.values.numel()
    launch(
        counters.note_active,
        lambda blocks: (cdiv(size, blocks["ENTRIES"]),),
        values=codes.values,
        indices=codes.indices,
        silent=silent,
        hyper=hyper,
        tokens=tokens,
        size=size,
        threshold=threshold,
    )


def finish_update(
    square: Tensor,
    skips: Tensor,
    missed: Tensor,
    x: Tensor,
    hyper: Tensor,
    silent: Tensor | None,
    tokens: int,
) -> Tensor:
    """The norm of a step's gradient (scalar), and its counters: `counters.finish_update`."""
    norm = torch.empty_like(square)
    latents = 0 if silent is None else silent.numel()
    launch(
        counters.finish_update,
        lambda blocks: (max(1, cdiv(latents, blocks["MANY"])),),
        square=square,
        norm=norm,
        skips=skips,
        missed=missed,
        x=x,
        silent=silent,
        hyper=hyper,
        size=x.numel(),
        latents=latents,
        tokens=tokens,
    )
    return norm
