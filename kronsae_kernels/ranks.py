"""Processes that hold one autoencoder's latents together: what a step asks of them.

Each of R ranks sees the same tokens, and has w candidates for the k latents of each.
"""

from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """R processes. All of them call a method together, with tensors of the same shape and dtype."""

    rank: int
    """This one's number, in [0, R)."""
    size: int
    """R."""

    def sum(self, x: Tensor) -> Tensor:
        """Sum of all ranks' x, in place; the same bits on each."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x: [R, *x.shape]."""
        ...


def largest_of_all(scores: Tensor, k: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Scores of all ranks [B, R w], and the places [B, k] of the k largest there, largest first.

    scores: [B, w] of this rank's candidates; place r w + s is candidate s of rank r. Of equal ones
        the lowest place comes first; NaN is larger than any number.
    """
    gathered = ranks.gather(scores).transpose(0, 1).flatten(1)
    return gathered, gathered.sort(dim=1, descending=True, stable=True).indices[:, :k]


def keep_largest_of_all(
    indices: Tensor, base: Tensor, extension: Tensor | None, k: int, ranks: Ranks
) -> Tensor:
    """indices [B, w] of a rank's candidates; -1 for those not among the k largest of all ranks.

    Latents compete by base * extension (None: by base), [B, w] float32. A rank's candidates are its
    own w first latents in their order: largest first, then lowest index first. With R w >= k, and
    w >= k unless a rank has no more, what is kept is exact: of equal latents those of the lowest
    rank, and of that rank the lowest index.
    """
    scores = base if extension is None else base * extension
    scores = scores.masked_fill(indices < 0, -torch.inf)
    width = scores.shape[1]
    _, taken = largest_of_all(scores, k, ranks)
    own = (taken // width == ranks.rank).sum(1, keepdim=True)  # which are its first ones
    return indices.masked_fill(torch.arange(width, device=indices.device) >= own, -1)
