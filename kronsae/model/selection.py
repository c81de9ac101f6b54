"""Selections choose the active latents of a token: TopK, BatchTopK, JumpReLU, or another one.

A selection is a module that turns activations into codes. It asks the encoder for the k largest
latents of each token (`Encoder.largest`), or for those above thresholds (`Encoder.above`). Some
select differently in training (while `training`) and in use (after `eval()`).
Letters: B tokens, F latents, w the width of the codes.

Codes are [B, w], and tokens with fewer than w active latents fill up with unused slots, at the end:
value 0, at the index of some latent in [0, F). (In training JumpReLU has them in between, too:
latents just below their threshold.) An unused slot adds nothing to the reconstruction,
gets no gradient, and does not count as fired (`Encoder.fired`).
"""

import math
from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kronsae.config import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.model.encoder import Encoder
from kronsae.registry import SELECTIONS, Kind
from kronsae.system.parallel import ALONE
from kronsae_kernels import SparseCodes, jump
from kronsae_kernels.batch_topk import candidates, selected
from kronsae_kernels.rules import has_values
from kronsae_kernels.step import BELOW, Thresholds

WIDEST_PER_K = 16
"""Candidates of the token of a batch that has most with BatchTopK, in multiples of k. Measured with
the embedded model (F = 8,192, k = 32): in the first 36 batches that token has 425 latents (median;
1,008 in the second batch), so that 512 are candidates, as their number doubles. Later it has fewer.
"""
THRESHOLD_RATE = 0.1
"""Share of the newest batch in the running mean of BatchTopK's threshold."""


class Penalty(NamedTuple):
    """A loss beside the reconstruction error.

    That error is a mean over the tokens of the batch and the dimensions of the target, of
    activations with mean squared norm d. A penalty that a paper adds to a sum over dimensions is
    therefore divided by d here.
    """

    loss: Tensor
    """Without its coefficient (scalar): what this process's tokens add to the whole."""
    coefficient: float


class Selection(Kind, nn.Module):
    """A way to select latents; its parameters and buffers are `sae.selection.…`.

    A kind of your own has to define `forward`; see `kronsae.registry` for how to register it.
    """

    aims_at_k: ClassVar[bool] = True
    """True if config.k is the number of active latents, exactly or on average.

    If False, --k is refused, config.k is 0, `forward` gets k = 0, and the kind says in `widest` and
    `describe` what is active.
    """
    by_k: ClassVar[bool] = False
    """True if it selects for any k, and can `cut` its codes to a smaller one."""
    exact: ClassVar[bool] = False
    """True if each token gets k latents, neither more nor fewer."""
    is_rowwise: ClassVar[bool] = False
    """True if whether a latent is active depends on its own value and threshold alone."""
    learns_thresholds: ClassVar[bool] = False
    """True if latents have thresholds that the loss learns (`jumprelu_bandwidth`)."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        self.k = config.k
        """k in training, which a schedule changes (`TrainConfig.k_start`)."""

    @classmethod
    def widest(cls, config: SAEConfig) -> int:
        """Estimated number of latents of the widest token of a batch, for the memory of a plan."""
        return config.k

    @classmethod
    def describe(cls, config: SAEConfig) -> str:
        """Number of active latents in words: "50 active per token"."""
        return f"{'' if cls.exact else 'about '}{config.k} active per token"

    @abstractmethod
    def forward(self, sae: Encoder, x: Tensor, k: int, impl: str | None = None) -> SparseCodes:
        """Codes of x [..., d]."""

    def cut(self, sae: Encoder, codes: SparseCodes, k: int) -> SparseCodes:
        """Codes of a smaller k, from those of a larger one."""
        raise NotImplementedError

    def codes_and_penalties(
        self, sae: Encoder, x: Tensor, config: TrainConfig, progress: float
    ) -> tuple[SparseCodes, dict[str, Penalty]]:
        """Codes of x [b, d] in training, and the selection's own losses by name.

        x is this process's part of a batch of `sae.mesh.data.count(b, x.device)` tokens.
        progress: share of the training that is done, from 0 to 1.
        """
        return self(sae, x, self.k), {}

    def prepare(self, sae: Encoder, x: Tensor) -> None:
        """Adapt to a batch x [B, d], before each step of the warm-up."""

    def update(self, sae: Encoder, codes: SparseCodes) -> None:
        """Learn from a batch's codes, after its optimizer step."""

    def scale_(self, factor: float | Tensor) -> None:
        """Adapt to latents in other units: all values are multiplied by `factor`.

        It is one for each latent, [F], only if each latent has a threshold of its own.
        """

    def thresholds(self, config: TrainConfig) -> Thresholds | None:
        """Thresholds that the fused step learns, beside the weights."""
        return None

    def activity_threshold(self) -> Tensor | None:
        """Thresholds [F] that a latent's value exceeds if it is active; None if k decides.

        For exports, of an SAE that takes raw activations (0 where any positive value counts).
        Raises InputError if there are none yet.
        """
        return None

    def load_activity_threshold(self, threshold: Tensor) -> dict[str, Tensor]:
        """Tensors of the selection's state_dict that make `activity_threshold` this one [F]."""
        return {}

    @classmethod
    def can_have(cls, threshold: Tensor | None) -> bool:
        """True if this `activity_threshold` [F] (or None) can be that of such a selection.

        Asked when another library's file says that it was exported from an SAE of this kind.
        """
        return threshold is None


@SELECTIONS.register("topk")
class TopK(Selection):
    """The k largest latents of each token. [Gao et al. 2024]"""

    title = "TopK"
    by_k = exact = fused = shares_heads = True

    def forward(self, sae: Encoder, x: Tensor, k: int, impl: str | None = None) -> SparseCodes:
        return sae.largest(x, k, impl=impl)

    def cut(self, sae: Encoder, codes: SparseCodes, k: int) -> SparseCodes:
        return SparseCodes(codes.values[..., :k], codes.indices[..., :k])


@SELECTIONS.register("batchtopk")
class BatchTopK(Selection):
    """In training the k B largest latents of a batch; in use all latents above a threshold.

    Both are exact: the candidates of a token are its largest latents, and if the last candidate is
    selected, the token is encoded again with twice as many. Of equal values those of earlier tokens
    come first, within a token as in `Encoder.largest`. Latents that are not active (0) are never
    selected. [Bussmann et al. 2024: BatchTopK]

    threshold: buffer, running mean of the smallest value selected from a batch; NaN before any.
    The batch is that of all processes: each gets the candidates' values of the others.
    Memory: O(B w), w the largest number of latents on one token.
    """

    title = "BatchTopK"
    by_k = fused = True
    threshold: Tensor

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.tensor(torch.nan))

    def forward(self, sae: Encoder, x: Tensor, k: int, impl: str | None = None) -> SparseCodes:
        """Codes of x [..., d]. Raises ValueError for inference without a threshold."""
        threshold = None if self.training else self.threshold
        if threshold is not None and has_values(threshold) and bool(threshold.isnan()):
            raise ValueError(
                "BatchTopK has no threshold yet: train it, or call train() to select over the batch"
            )
        codes = sae.of_batch(x, k, threshold, impl=impl)
        if codes is not None:
            return codes

        def select(values: Tensor) -> Tensor:
            if threshold is None:
                return _of_batch(sae, values, k)
            return selected(values, k, sae.silent_value, threshold)

        def encode(x: Tensor, width: int) -> SparseCodes:
            return sae.largest(x, width, impl=impl)

        def total(count: int) -> int:
            return count if threshold is not None else sae.mesh.data.count(count, x.device)

        flat, most = x.reshape(-1, x.shape[-1]), sae.latents_per_token
        (values, indices), kept = candidates(encode, select, flat, k, most, sae.dict_size, total)
        values, indices = _only(values, indices, kept)
        shape = (*x.shape[:-1], values.shape[1])
        return SparseCodes(values.reshape(shape), indices.reshape(shape))

    def cut(self, sae: Encoder, codes: SparseCodes, k: int) -> SparseCodes:
        return _only(*codes, _of_batch(sae, codes.values.detach(), k))

    @torch.no_grad()
    def update(self, sae: Encoder, codes: SparseCodes) -> None:
        """Move the threshold towards the smallest value that the batch selected."""
        smallest = _smallest(sae, codes)
        moved = self.threshold.lerp(smallest, THRESHOLD_RATE)
        moved = moved.where(~self.threshold.isnan(), smallest)
        self.threshold.copy_(moved.where(smallest.isfinite(), self.threshold))

    def scale_(self, factor: float | Tensor) -> None:
        self.threshold.mul_(factor)

    @classmethod
    def widest(cls, config: SAEConfig) -> int:
        return WIDEST_PER_K * config.k

    def activity_threshold(self) -> Tensor:
        smallest = _in_float32(self.threshold)
        if smallest.isnan():
            raise InputError("BatchTopK has no threshold yet: train the SAE before it is exported")
        # A latent whose value equals our threshold is active.
        below = torch.nextafter(smallest, torch.full_like(smallest, -torch.inf))
        return below.expand(self.config.dict_size).clone()

    def load_activity_threshold(self, threshold: Tensor) -> dict[str, Tensor]:
        smallest = torch.nextafter(threshold[0].float(), torch.tensor(torch.inf))
        return {"selection.threshold": smallest}

    @classmethod
    def can_have(cls, threshold: Tensor | None) -> bool:
        return threshold is not None and bool((threshold == threshold[0]).all())


@SELECTIONS.register("jumprelu")
class JumpReLU(Selection):
    """Every latent above its own, learned threshold.

    log_threshold: parameter [F]. It learns through the pseudo-derivatives of `jump`, also from a
    loss (L0 / k - 1)^2 that holds the mean number of active latents L0 at k.
    [Rajamanoharan et al. 2024: JumpReLU SAEs] That loss alone comes to rest off its aim, where the
    reconstruction error pulls as much as it does. So after each step all log thresholds also move
    together, by l0_rate (L0 / k - 1), until L0 is k.
    In the warm-up latents grow faster than thresholds learn, and L0 would grow with them: until its
    end `prepare` sets all thresholds just below the smallest of the batch's k B largest values.
    Memory: O(B w) and a chunk of scores [b, F].
    """

    title = "JumpReLU"
    learns_thresholds = is_rowwise = fused = True

    @classmethod
    def check(cls, config: SAEConfig) -> None:
        if config.experts:
            raise InputError(
                f"selection {config.selection!r} does not work with experts: they multiply latents "
                "by the router's probability, which differs for each token, so that no threshold "
                "holds for all tokens. Leave out experts, or take another selection"
            )

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.bandwidth = config.jumprelu_bandwidth
        self.l0_rate = TrainConfig.l0_rate
        self.log_threshold = nn.Parameter(torch.zeros(config.dict_size))

    def forward(self, sae: Encoder, x: Tensor, k: int, impl: str | None = None) -> SparseCodes:
        return self.codes_and_l0(sae, x, impl)[0]

    def codes_and_l0(
        self, sae: Encoder, x: Tensor, impl: str | None = None
    ) -> tuple[SparseCodes, Tensor]:
        """Codes of x [..., d], and the mean number of active latents (scalar, differentiable)."""
        threshold = self.log_threshold.exp()
        # Training needs the latents just below their threshold, which have a derivative, too.
        reach = self.bandwidth / 2 if self.training else 0.0
        values, indices = sae.above(x, (threshold - reach).detach(), impl=impl)
        used = values > sae.silent_value
        values, active = jump(values, threshold[indices], self.bandwidth, used)
        group = sae.mesh.data if self.training else ALONE.data
        tokens = group.count(active[..., 0].numel(), x.device)
        return SparseCodes(values, indices), group.total(active.sum() / max(1, tokens))

    @torch.no_grad()
    def prepare(self, sae: Encoder, x: Tensor) -> None:
        batch = BatchTopK(sae.config)
        smallest = _smallest(sae, batch(sae, x, self.k))
        if smallest.isfinite():
            self.log_threshold.fill_(smallest.log() - BELOW)

    def codes_and_penalties(
        self, sae: Encoder, x: Tensor, config: TrainConfig, progress: float
    ) -> tuple[SparseCodes, dict[str, Penalty]]:
        codes, l0 = self.codes_and_l0(sae, x)
        loss = sae.mesh.data.as_part((l0 / self.k - 1).square())
        return codes, {"l0_loss": Penalty(loss, config.l0_coefficient)}

    @torch.no_grad()
    def update(self, sae: Encoder, codes: SparseCodes) -> None:
        """Move all thresholds towards an L0 of k."""
        group = sae.mesh.data
        tokens = group.count(len(codes.values), codes.values.device)
        share = group.sum(sae.fired(codes).sum()) / (tokens * self.k)
        excess = (share - 1).clamp(max=1) * (share > 0)  # a step not made has no codes
        self.log_threshold.add_(excess, alpha=self.l0_rate)

    @torch.no_grad()
    def scale_(self, factor: float | Tensor) -> None:
        log = factor.log() if isinstance(factor, Tensor) else math.log(factor)
        self.log_threshold.add_(log)

    def thresholds(self, config: TrainConfig) -> Thresholds:
        return Thresholds(self.log_threshold, self.bandwidth, config.l0_coefficient)

    def activity_threshold(self) -> Tensor:
        return _in_float32(self.log_threshold).exp()

    def load_activity_threshold(self, threshold: Tensor) -> dict[str, Tensor]:
        # Nothing to speak of is below or above these limits, and their logarithms are finite.
        limits = torch.finfo(torch.float32)
        return {"selection.log_threshold": threshold.float().clamp(limits.tiny, limits.max).log()}

    @classmethod
    def can_have(cls, threshold: Tensor | None) -> bool:
        return threshold is not None


def _of_batch(sae: Encoder, values: Tensor, k: int) -> Tensor:
    """Mask of the values [b, w] that are selected from the batch of all processes."""
    kept = selected(sae.mesh.batch(values), k, sae.silent_value)
    return sae.mesh.part(kept)[:, : values.shape[1]]


def _only(values: Tensor, indices: Tensor, keep: Tensor) -> SparseCodes:
    """Codes [B, w] of the entries to `keep`, as wide as the widest token's; others are unused."""
    width = max(1, int(keep.sum(1).max()) if len(keep) else 0)
    return SparseCodes(values.where(keep, 0)[:, :width], indices[:, :width])


def _in_float32(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype if that is wider."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _smallest(sae: Encoder, codes: SparseCodes) -> Tensor:
    """Smallest active value of the batch of all ranks; infinity if no latent is active."""
    active = codes.values.detach().where(sae.fired(codes), torch.inf).flatten()
    smallest = active.amin() if len(active) else active.new_tensor(torch.inf)
    return sae.mesh.data.min(smallest)
