"""`batch_topk_encode`: the largest latents of a whole batch, as BatchTopK SAEs need them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kronsae_kernels import backends, reference
from kronsae_kernels.common import (
    COMPOSITIONS,
    SparseCodes,
    accumulate_dtype,
    as_integer,
    as_number,
    check_choice,
    check_count,
    check_mask,
    check_number,
    dict_size,
    without_autocast,
)
from kronsae_kernels.encode import SelectedAnyWidth, check_encoder, codes_of
from kronsae_kernels.rules import operator

CANDIDATES_PER_K = 2
"""Candidates of a token at first, in multiples of k. Tokens that need more are encoded again."""


def batch_topk_encode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    k: int,
    m: int | None = None,
    composition: str = "mand",
    eps: float = 0.0,
    impl: str | None = None,
    mask: Tensor | None = None,
    layout: str = "head-major",
) -> SparseCodes:
    """The k B largest latents of a batch of B tokens; padded to [..., w].

    Equals `reference.batch_topk_encode`. [Bussmann et al. 2024: BatchTopK]
    Of equal values those of earlier tokens come first. Latents that are not active (0; "mand":
    sqrt(eps)) are never selected. A token whose largest latent is not finite competes with none,
    and gets its k largest.
    w is the largest number of such latents on one token (at least 1). Tokens with fewer fill up at
    the end: value 0, at the index of some latent, without gradient.
    In use, a BatchTopK SAE selects what exceeds a fixed threshold: `threshold_encode`.

    x: [..., d], all of whose tokens are the batch.  w_enc: [h, m + n, d] with m given (Kron), or
    [F, d] without (dense).  b_enc: [h, m + n] or [F], or None.  mask: [F] bool or None.
    composition, eps, impl, layout, order of a token's latents, gradients and errors: as in
    `fused_encode`.
    Memory: O(B w), and one chunk of pre-latents.
    """
    rank = 2 if m is None else 3
    x, w_enc, b_enc = check_encoder(x, w_enc, b_enc, mask, rank=rank, layout=layout)
    m, k, eps = as_integer(m), as_integer(k), as_number(eps)
    size = dict_size(w_enc, m)
    check_count("k", k, 1, size, f"1 <= k <= F = {size}")
    check_mask(mask, size)
    check_choice("composition", composition, COMPOSITIONS)
    check_number("eps", eps, 0)
    gate: dict[str, Any] = {"m": m, "composition": composition, "eps": eps}
    if backends.choose(impl, x.device, x.dtype) == "reference":
        return reference.batch_topk_encode(x, w_enc, b_enc, k=k, mask=mask, **gate)
    return encode_batch(x, w_enc, b_enc, k=k, mask=mask, impl=impl, **gate)


def encode_batch(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    *,
    k: int,
    m: int | None = None,
    composition: str = "mand",
    eps: float = 0.0,
    impl: str | None = None,
    mask: Tensor | None = None,
    threshold: Tensor | None = None,
) -> SparseCodes:
    """`batch_topk_encode` of arguments that are checked; or all latents of at least a threshold.

    threshold: None or a scalar. k then is about how many of those a token has.
    Raises ValueError for a threshold that is NaN.
    """
    x, w_enc, b_enc = check_encoder(x, w_enc, b_enc, mask, rank=2 if m is None else 3)
    name = backends.choose(impl, x.device, x.dtype)
    *results, counts = torch.ops.kronsae.encode_batch(
        *(x.reshape(-1, x.shape[-1]), w_enc, b_enc, m, composition, name),
        *(k, eps, threshold, mask),
    )
    return codes_of(x, *results, m=m, composition=composition, eps=eps, counts=counts)


@operator("encode_batch")
class EncodeBatch(SelectedAnyWidth):
    @staticmethod
    def compute(
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor | None,
        m: int | None,
        composition: str,
        impl: str,
        k: int,
        eps: float,
        threshold: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if threshold is not None and bool(threshold.isnan()):
            raise ValueError("threshold: expected a number, got NaN (none was learned yet)")
        size, silent = dict_size(w_enc, m), eps**0.5 if composition == "mand" and m else 0.0

        def encode(x: Tensor, width: int) -> tuple[Tensor, ...]:
            indices, base, extension = backends.module(impl).encode(
                x, w_enc, b_enc, mask, m, width, composition
            )
            if m is None:
                return base, indices, base, torch.zeros_like(base)
            return reference.compose(base * extension, composition, eps), indices, base, extension

        def select(values: Tensor) -> Tensor:
            return selected(values, k, silent, threshold)

        most = size if mask is None else int(mask.sum())
        if not most:
            return EncodeBatch.nothing(x)
        with without_autocast(x):
            (values, indices, *factors), kept = candidates(encode, select, x, k, most, size)
        counts = kept.sum(1)
        width = max(1, int(counts.max()) if counts.numel() else 0)
        used = kept[:, :width]
        base, extension = (factor[:, :width].where(used, 0) for factor in factors)
        indices = indices[:, :width].where(used, spread(indices[:, :width], size))
        return base, extension, indices, counts

    @staticmethod
    def nothing(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Results without an active latent."""
        base = x.new_zeros(len(x), 1, dtype=accumulate_dtype(x.dtype))
        indices = torch.zeros_like(base, dtype=torch.int64)
        return base, torch.zeros_like(base), indices, indices.new_zeros(len(x))

    @staticmethod
    def rows(x, w_enc, b_enc, m, composition, impl, k, eps, threshold, mask):
        return () if threshold is None else (0,)  # without a threshold all tokens compete


def candidates(
    encode: Callable[[Tensor, int], tuple[Tensor, ...]],
    select: Callable[[Tensor], Tensor],
    x: Tensor,
    k: int,
    most: int,
    size: int,
    total: Callable[[int], int] = lambda count: count,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each token's largest latents, so many that all selected ones are among them; and which.

    encode: values [b, w], indices [b, w] and more of the w largest latents of x [b, d].
    select: the mask of values [B, w] that are selected. While the last one of a token is, it is
    encoded again with twice as many, up to `most` of F = size latents.
    total: adds up over processes how many tokens are (if one encodes again, all do).
    """
    width = min(CANDIDATES_PER_K * k, most)
    entries = encode(x, width)
    while True:
        kept = select(entries[0].detach())
        rows = kept[:, -1].nonzero().squeeze(1)
        if width >= most or not total(len(rows)):
            return entries, kept
        width = min(2 * width, most)
        wider = encode(x[rows], width)
        entries = tuple(_widened(entry, width, size) for entry in entries)  # new tensors
        for entry, wide in zip(entries, wider, strict=True):
            entry.index_copy_(0, rows, wide)


def selected(values: Tensor, k: int, silent: float, threshold: Tensor | None = None) -> Tensor:
    """Mask of the values [B, w], each token's largest first, that BatchTopK selects.

    The k B largest, of equal ones the earlier, or all of at least a threshold (scalar); above
    `silent`. A token whose largest value is not finite competes with none and gets the first k, so
    that it changes nothing for others, and goes on to the reconstruction.
    """
    broken = ~(values[:, :1] < torch.inf)
    if threshold is None:
        kept = _largest_of_batch(values.masked_fill(broken, -torch.inf), k)
    else:
        kept = values >= threshold
    kept = kept & (values > silent) & ~broken
    kept[:, :k] |= broken
    return kept


def _largest_of_batch(values: Tensor, k: int) -> Tensor:
    """Mask of the values [B, w] among the k B largest; of equal ones, the earlier."""
    flat, count = values.flatten(), k * len(values)
    if count == 0 or count >= flat.numel():
        return torch.full_like(values, count > 0, dtype=torch.bool)
    limit = flat.kthvalue(flat.numel() - count + 1).values
    above, ties = flat > limit, flat == limit
    ties &= ties.cumsum(0) <= count - above.sum()
    return (above | ties).view_as(values)


def spread(indices: Tensor, size: int) -> Tensor:
    """Indices in the shape of these that go through all F = size latents, for unused slots.

    A single latent with all of them would have a long list of entries, which slows down the
    gradient of its decoder row.
    """
    return torch.arange(indices.numel(), device=indices.device).view(indices.shape) % size


def _widened(entry: Tensor, width: int, size: int) -> Tensor:
    """[B, w] filled up to a width: with 0, or indices (int64) of unused slots."""
    added = entry.new_zeros(len(entry), width - entry.shape[1])
    if entry.dtype != torch.int64:
        return pad(entry, (0, added.shape[1]))
    return torch.cat([entry, spread(added, size)], 1)
