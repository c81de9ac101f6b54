"""Which latents of a token are active: TopK or BatchTopK.

A selection is a module that turns activations into codes, with what `SAE.largest` gives: the k
largest latents of each token. Letters: B tokens, F latents, w the width of the codes.

Codes are [B, w], and tokens with fewer than w active latents fill up with unused slots, at the end:
value 0, at the index of some latent in [0, F). An unused slot adds nothing to the reconstruction,
gets no gradient, and does not count as fired (`SAE.fired`).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kronsae_kernels import SparseCodes

if TYPE_CHECKING:
    from kronsae.config import SAEConfig
    from kronsae.sae import SAE

CANDIDATES = 2
"""A token's candidates, at first: so many times k. More are looked at only where it is needed."""
THRESHOLD_RATE = 0.05
"""Share of the newest batch in the running mean of BatchTopK's threshold."""


class TopK(nn.Module):
    """The k largest latents of each token. [Gao et al. 2024]"""

    def __init__(self, config: "SAEConfig") -> None:
        super().__init__()

    def forward(self, sae: "SAE", x: Tensor, k: int, impl: str | None = None) -> SparseCodes:
        return sae.largest(x, k, impl=impl)

    def update(self, sae: "SAE", codes: SparseCodes) -> None:
        """Learn from a batch's codes, after its optimizer step."""

    def scale_(self, factor: float) -> None:
        """Take latents in other units: all values times `factor`."""


class BatchTopK(nn.Module):
    """In training the k B largest latents of a batch; later, of each token all above a threshold.

    Both are exact: a token's candidates are its largest latents, and where the last of them is
    still selected, the token is looked at again with twice as many. Of equal values the earlier
    token's come first, within a token as in `SAE.largest`. Latents that are not active (0) are
    never selected. [Bussmann et al. 2024: BatchTopK]

    threshold: buffer, running mean of the smallest value selected from a batch; NaN before any.
    Memory: O(B w), w the largest number of latents on one token.
    """

    def __init__(self, config: "SAEConfig") -> None:
        super().__init__()
        self.register_buffer("threshold", torch.tensor(torch.nan))

    def forward(self, sae: "SAE", x: Tensor, k: int, impl: str | None = None) -> SparseCodes:
        """Codes of x [..., d]. Raises ValueError for inference without a threshold."""
        if not self.training and bool(self.threshold.isnan()):
            raise ValueError(
                "BatchTopK has no threshold yet: train it, or call train() to select over the batch"
            )
        flat = x.reshape(-1, x.shape[-1])
        count, width = k * flat.shape[0], min(CANDIDATES * k, sae.latents_per_token)
        values, indices = sae.largest(flat, width, impl=impl)
        while True:
            seen = values.detach()
            if self.training:
                keep = _largest_of_all(seen, count)
            else:
                keep = seen >= self.threshold
            keep &= seen > sae.silent_value
            rows = keep[:, -1].nonzero().squeeze(1)
            if not len(rows) or width == sae.latents_per_token:
                break
            width = min(2 * width, sae.latents_per_token)
            more = sae.largest(flat[rows], width, impl=impl)
            values, indices = (
                nn.functional.pad(narrow, (0, width - narrow.shape[1])).index_copy(0, rows, wide)
                for narrow, wide in zip((values, indices), more, strict=True)
            )
        keep |= seen.isnan()  # which come from x, and go on to the reconstruction
        used = int(keep.sum(1).max()) if len(keep) else 0
        shape = (*x.shape[:-1], max(1, used))
        values = values.where(keep, 0)[:, : shape[-1]]
        return SparseCodes(values.reshape(shape), indices[:, : shape[-1]].reshape(shape))

    @torch.no_grad()
    def update(self, sae: "SAE", codes: SparseCodes) -> None:
        """Move the threshold towards the smallest value that the batch selected."""
        values = codes.values.detach()
        smallest = values.where(sae.fired(codes), torch.inf).amin()
        moved = self.threshold.lerp(smallest, THRESHOLD_RATE)
        moved = moved.where(~self.threshold.isnan(), smallest)
        self.threshold.copy_(moved.where(smallest.isfinite(), self.threshold))

    def scale_(self, factor: float) -> None:
        self.threshold.mul_(factor)


def _largest_of_all(values: Tensor, count: int) -> Tensor:
    """Which of values [B, w] are among the `count` largest of all (bool); ties: the earlier."""
    flat = values.flatten()
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    limit = flat.kthvalue(flat.numel() - count + 1).values
    above, ties = flat > limit, flat == limit
    ties &= ties.cumsum(0) <= count - above.sum()
    return (above | ties).view_as(values)


SELECTIONS = {"topk": TopK, "batchtopk": BatchTopK}
