"""Which latents of a token are active: TopK, BatchTopK or JumpReLU.

A selection is a module that turns activations into codes, with what the encoder gives: the k
largest latents of each token (`Encoder.largest`), or those above thresholds (`Encoder.above`). It
selects as in training while `training`, and as in use after `eval()`.
Letters: B tokens, F latents, w the width of the codes.

Codes are [B, w], and tokens with fewer than w active latents fill up with unused slots, at the end:
value 0, at the index of some latent in [0, F). (In training JumpReLU has them in between, too:
latents just below their threshold.) An unused slot adds nothing to the reconstruction,
gets no gradient, and does not count as fired (`Encoder.fired`).
"""

import math

import torch
from torch import Tensor, nn

from kronsae.config import SAEConfig
from kronsae.model.encoder import Encoder, widened
from kronsae.system.parallel import ALONE
from kronsae_kernels import SparseCodes
from kronsae_kernels.step import BELOW

CANDIDATES = 2
"""A token's candidates, at first: so many times k. More are looked at only where it is needed."""
THRESHOLD_RATE = 0.1
"""Share of the newest batch in the running mean of BatchTopK's threshold."""


class TopK(nn.Module):
    """The k largest latents of each token. [Gao et al. 2024]"""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()

    def forward(self, sae: Encoder, x: Tensor, k: int, impl: str | None = None) -> SparseCodes:
        return sae.largest(x, k, impl=impl)

    def cut(self, sae: Encoder, codes: SparseCodes, k: int) -> SparseCodes:
        """What a smaller k selects, from the codes of a larger one."""
        return SparseCodes(codes.values[..., :k], codes.indices[..., :k])

    def prepare(self, sae: Encoder, x: Tensor) -> None:
        """Get ready for a batch x [B, d], before each step of the warm-up."""

    def update(self, sae: Encoder, codes: SparseCodes) -> None:
        """Learn from a batch's codes, after its optimizer step."""

    def scale_(self, factor: float) -> None:
        """Take latents in other units: all values times `factor`."""


class BatchTopK(TopK):
    """In training the k B largest latents of a batch; later, of each token all above a threshold.

    Both are exact: a token's candidates are its largest latents, and where the last of them is
    still selected, the token is looked at again with twice as many. Of equal values the earlier
    token's come first, within a token as in `Encoder.largest`. Latents that are not active (0) are
    never selected. [Bussmann et al. 2024: BatchTopK]

    threshold: buffer, running mean of the smallest value selected from a batch; NaN before any.
    The batch is that of all processes: each gets the candidates' values of the others.
    Memory: O(B w), w the largest number of latents on one token.
    """

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.tensor(torch.nan))

    def forward(self, sae: Encoder, x: Tensor, k: int, impl: str | None = None) -> SparseCodes:
        """Codes of x [..., d]. Raises ValueError for inference without a threshold."""
        if not self.training and bool(self.threshold.isnan()):
            raise ValueError(
                "BatchTopK has no threshold yet: train it, or call train() to select over the batch"
            )
        flat = x.reshape(-1, x.shape[-1])
        width = min(CANDIDATES * k, sae.latents_per_token)
        values, indices = sae.largest(flat, width, impl=impl)
        while True:
            seen = values.detach()
            if self.training:
                keep = _largest_of_all(sae, seen, k)
            else:
                keep = seen >= self.threshold
            keep &= seen > sae.silent_value
            rows = keep[:, -1].nonzero().squeeze(1)
            again = len(rows)
            if self.training:  # if one rank looks again, all do
                again = sae.mesh.data.count(again, x.device)
            if not again or width == sae.latents_per_token:
                break
            width = min(2 * width, sae.latents_per_token)
            more = sae.largest(flat[rows], width, impl=impl)
            values, indices = widened(values, indices, width, sae.dict_size)  # new tensors
            values.index_copy_(0, rows, more.values)
            indices.index_copy_(0, rows, more.indices)
        values, indices = _without(values, indices, keep)
        shape = (*x.shape[:-1], values.shape[1])
        return SparseCodes(values.reshape(shape), indices.reshape(shape))

    def cut(self, sae: Encoder, codes: SparseCodes, k: int) -> SparseCodes:
        seen = codes.values.detach()
        keep = _largest_of_all(sae, seen, k) & (seen > sae.silent_value)
        return _without(*codes, keep)

    @torch.no_grad()
    def update(self, sae: Encoder, codes: SparseCodes) -> None:
        """Move the threshold towards the smallest value that the batch selected."""
        smallest = _smallest(sae, codes)
        moved = self.threshold.lerp(smallest, THRESHOLD_RATE)
        moved = moved.where(~self.threshold.isnan(), smallest)
        self.threshold.copy_(moved.where(smallest.isfinite(), self.threshold))

    def scale_(self, factor: float) -> None:
        self.threshold.mul_(factor)


class JumpReLU(TopK):
    """Of each token every latent above a threshold of its own, which is learned.

    log_threshold: parameter [F]. The loss learns it through the pseudo-derivatives of `jump`, and
    through a loss (L0 / k - 1)^2 that holds the mean number of active latents L0 at k.
    [Rajamanoharan et al. 2024: JumpReLU SAEs]
    In the warm-up latents grow faster than thresholds are learned, and L0 with them: until its end
    `prepare` sets all thresholds just below the smallest of the k B largest values of the batch.
    Memory: O(B w) and a chunk of scores [b, F].
    """

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.bandwidth = config.jumprelu_bandwidth
        self.log_threshold = nn.Parameter(torch.zeros(config.dict_size))

    def forward(self, sae: Encoder, x: Tensor, k: int, impl: str | None = None) -> SparseCodes:
        return self.codes_and_l0(sae, x, impl)[0]

    def codes_and_l0(
        self, sae: Encoder, x: Tensor, impl: str | None = None
    ) -> tuple[SparseCodes, Tensor]:
        """Codes of x [..., d], and the mean number of active latents (scalar, differentiable)."""
        threshold = self.log_threshold.exp()
        # In training, also those below their threshold whose distance from it has a derivative.
        reach = self.bandwidth / 2 if self.training else 0.0
        values, indices = sae.above(x, (threshold - reach).detach(), impl=impl)
        found = values > sae.silent_value
        values, active = jump(values, threshold[indices], found, self.bandwidth)
        group = sae.mesh.data if self.training else ALONE.data
        tokens = group.count(active[..., 0].numel(), x.device)
        return SparseCodes(values, indices), group.total(active.sum() / max(1, tokens))

    @torch.no_grad()
    def prepare(self, sae: Encoder, x: Tensor) -> None:
        batch = BatchTopK(sae.config)
        smallest = _smallest(sae, batch(sae, x, sae.config.k))
        if smallest.isfinite():
            self.log_threshold.fill_(smallest.log() - BELOW)

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        self.log_threshold.add_(math.log(factor))


def jump(
    values: Tensor, threshold: Tensor, found: Tensor, bandwidth: float
) -> tuple[Tensor, Tensor]:
    """JumpReLU z = v H(v - t) and activity H(v - t) of values v with thresholds t, elementwise.

    Derivatives by t: dz/dt = -(t / w) K((v - t) / w) and dH/dt = -(1 / w) K((v - t) / w), with the
    rectangle K(u) = 1 for |u| < 1/2 and w the bandwidth. By v: dz/dv = H(v - t) and dH/dv = 0.
    found: False where there is no latent (all 0). [Rajamanoharan et al. 2024]
    """
    return _Jump.apply(values, threshold, found, bandwidth)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, threshold, found, bandwidth):
        active = (values > threshold) & found
        near = ((values - threshold).abs() < bandwidth / 2) & found
        ctx.save_for_backward(active, near, threshold)
        ctx.bandwidth = bandwidth
        return values.where(active, 0), active.to(values.dtype)

    @staticmethod
    def backward(ctx, d_z, d_active):
        active, near, threshold = ctx.saved_tensors
        d_threshold = -(threshold * d_z + d_active) / ctx.bandwidth
        return d_z * active, d_threshold * near, None, None


def _largest_of_all(sae: Encoder, values: Tensor, k: int) -> Tensor:
    """Which of values [b, w] are among the k B largest of the batch (bool); ties: the earlier."""
    batch = sae.mesh.batch(values)
    flat, count = batch.flatten(), k * len(batch)
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    limit = flat.kthvalue(flat.numel() - count + 1).values
    above, ties = flat > limit, flat == limit
    ties &= ties.cumsum(0) <= count - above.sum()
    return sae.mesh.part((above | ties).view_as(batch))[:, : values.shape[1]]


def _without(values: Tensor, indices: Tensor, keep: Tensor) -> SparseCodes:
    """Codes [B, w] as unused slots where not `keep`, cut to the widest token's."""
    keep = keep | values.isnan()  # which comes from x, and goes on to the reconstruction
    width = max(1, int(keep.sum(1).max()) if len(keep) else 0)
    return SparseCodes(values.where(keep, 0)[:, :width], indices[:, :width])


def _smallest(sae: Encoder, codes: SparseCodes) -> Tensor:
    """The smallest active value of the batch (infinity if none is)."""
    active = codes.values.detach().where(sae.fired(codes), torch.inf).flatten()
    smallest = active.amin() if len(active) else active.new_tensor(torch.inf)
    return sae.mesh.data.min(smallest)


SELECTIONS = {"topk": TopK, "batchtopk": BatchTopK, "jumprelu": JumpReLU}
