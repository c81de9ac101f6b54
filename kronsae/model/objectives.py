"""The losses that training minimises: reconstruction errors, penalties, and that of dead latents.

Letters: B tokens, d width of the target, k active latents.

Processes that share a batch (`kronsae.system.parallel`) each compute their part of every loss: the
sum over their own tokens, divided by all B. The parts add up to the loss, and so do gradients.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from kronsae.config import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.model.sae import SAE
from kronsae.model.selection import Penalty
from kronsae.registry import OBJECTIVES, SELECTIONS, Kind
from kronsae_kernels import SparseCodes, nested_decode

MULTI_TOPK = 4
"""Multi-TopK also reconstructs with so many times k latents. [Gao et al. 2024]"""
MULTI_TOPK_WEIGHT = 1 / 8
"""Weight of the error with MULTI_TOPK k latents. [Gao et al. 2024, App. A.2]"""

VARIANCE_FLOOR = 1e-8
"""Added to the variance of the residual x - x_hat, by which the loss of dead latents is divided:
activations have unit variance, so that it only matters for a perfect reconstruction."""


class Reconstruction(NamedTuple):
    """Losses and codes that an objective computes for a batch."""

    loss: Tensor
    """The loss to minimise, without that of dead latents (scalar)."""
    mse: Tensor
    """Mean squared error of x_hat over tokens and dimensions (scalar)."""
    x_hat: Tensor
    """[B, d] reconstruction from all active latents."""
    codes: SparseCodes
    """The active latents of each token."""
    selected: SparseCodes
    """The same with the values by which they were selected (`SAE.refined` changes values)."""
    decoded: SparseCodes
    """All latents that were decoded here (`SAE.own`); their values have gradients from decoding
    alone."""
    penalties: dict[str, Penalty]
    """Other losses, by name."""


class Objective(Kind):
    """A loss of reconstructions. See `kronsae.registry` for how to add another one."""

    nested: ClassVar[bool] = False
    """True if prefixes of the dictionary reconstruct, too (`SAEConfig.prefixes`)."""
    decoded_per_k: ClassVar[int] = 1
    """Decoded latents of a token in multiples of k, for the memory of a plan."""

    @classmethod
    @abstractmethod
    def reconstruct(
        cls, sae: SAE, x: Tensor, target: Tensor, tokens: int, config: TrainConfig, progress: float
    ) -> Reconstruction:
        """The error on normalised activations x [b, d] with target [b, d_out]; `loss` is without
        the penalties.

        tokens: B of the whole batch, of which x is this process's part.
        progress: share of the training that is done, from 0 to 1.
        """

    @classmethod
    def step_arguments(cls, config: SAEConfig, k: int) -> dict[str, Any]:
        """Arguments of `kronsae_kernels.step.TrainingStep.accumulate` for a step with this k, by
        which a `fused` kind has another loss than the mean squared error."""
        return {}

    @classmethod
    def step_bytes(cls, config: SAEConfig, k: int, batch: int, on_cpu: bool) -> int:
        """Bytes of a step beyond those of its codes and one reconstruction, for a plan."""
        return 0


@OBJECTIVES.register("plain")
class Plain(Objective):
    """The mean squared error with all active latents."""

    fused = shares_heads = True

    @classmethod
    def reconstruct(cls, sae, x, target, tokens, config, progress):
        selected, penalties = sae.selection.codes_and_penalties(sae, x, config, progress)
        codes = sae.refined(selected, x)
        decoded = sae.own(codes)
        x_hat = sae.with_skip(sae.sum_of_rows(decoded), x)
        mse = part_of_mean(x_hat - target, tokens)
        return Reconstruction(mse, mse, x_hat, codes, selected, decoded, penalties)


@OBJECTIVES.register("matryoshka")
class Matryoshka(Objective):
    """The sum over prefixes of the dictionary of the error with their active latents.

    [Bussmann et al. 2025; KronSAE, App. A.1]
    """

    title = "Matryoshka"
    nested = fused = True

    @classmethod
    def reconstruct(cls, sae, x, target, tokens, config, progress):
        selected, penalties = sae.selection.codes_and_penalties(sae, x, config, progress)
        codes = sae.refined(selected, x)
        nested = nested_decode(codes, sae.config.prefixes, sae.W_dec, sae.b_dec)
        nested = sae.with_skip(nested, x[:, None])
        errors = (nested - target[:, None]).square().sum((0, 2)) / (tokens * target.shape[1])
        loss = errors.sum()
        return Reconstruction(loss, errors[-1], nested[:, -1], codes, selected, codes, penalties)

    @classmethod
    def step_arguments(cls, config, k):
        return {"bounds": config.prefixes}

    @classmethod
    def step_bytes(cls, config, k, batch, on_cpu):
        # Nested reconstructions, their gradients, and suffix sums of these.
        return 3 * 4 * batch * len(config.prefixes) * config.d_out


@OBJECTIVES.register("multi_topk")
class MultiTopK(Objective):
    """The error with k latents, plus an eighth of that with MULTI_TOPK k. [Gao et al. 2024]"""

    title = "Multi-TopK"
    decoded_per_k = MULTI_TOPK

    @classmethod
    def check(cls, config):
        if not SELECTIONS[config.selection].by_k:
            raise InputError(
                f"objective 'multi_topk' needs a selection by k, and {config.selection!r} is none: "
                "take --selection topk or batchtopk"
            )
        if MULTI_TOPK * config.k > config.latents_per_token:
            raise InputError(
                f"objective 'multi_topk' selects {MULTI_TOPK} k = {MULTI_TOPK * config.k} latents, "
                f"more than the {config.latents_per_token} of a token"
            )

    @classmethod
    def reconstruct(cls, sae, x, target, tokens, config, progress):
        wide = sae.selection(sae, x, MULTI_TOPK * sae.selection.k)
        selected = sae.selection.cut(sae, wide, sae.selection.k)
        codes, wide = sae.refined(selected, x), sae.refined(wide, x)
        x_hat = sae.with_skip(sae.sum_of_rows(sae.own(codes)), x)
        mse = part_of_mean(x_hat - target, tokens)
        error = part_of_mean(sae.decode(wide, x) - target, tokens)
        loss = mse + MULTI_TOPK_WEIGHT * error
        return Reconstruction(loss, mse, x_hat, codes, selected, wide, {})


def objective(
    sae: SAE,
    x: Tensor,
    config: TrainConfig,
    target: Tensor | None = None,
    tokens: int | None = None,
    progress: float = 1.0,
) -> Reconstruction:
    """The objective of `sae.config` on normalised activations x [b, d].

    target: [b, d_target], to be reconstructed; by default x.
    tokens: B of the whole batch, of which x is this process's part; by default b.
    progress: share of the training that is done, from 0 to 1.
    """
    target = x if target is None else target
    tokens = len(x) if tokens is None else tokens
    kind = OBJECTIVES[sae.config.objective]
    result = kind.reconstruct(sae, x, target, tokens, config, progress)
    result.penalties.update(sae.kind.penalties(sae, x, target, tokens))
    if sae.router is not None:
        balance = sae.router.balance_loss(x, sae.mesh.data)
        result.penalties["balance_loss"] = Penalty(balance, config.balance_coefficient)
    loss = result.loss
    for penalty in result.penalties.values():
        loss = loss + penalty.coefficient * penalty.loss
    return result._replace(loss=loss)


def auxk_latents(sae: SAEConfig, config: TrainConfig) -> int:
    """Number of dead latents per token in their loss, if so many are dead."""
    return config.auxk or max(1, sae.d_model // 2)


def auxk_tokens(sae: SAEConfig, config: TrainConfig, batch: int) -> int:
    """Number of tokens on which the loss of dead latents is measured, the first of a batch, or 0.

    A share auxk_fraction of them. Fewer, if that loss has more latents per token than the rest of
    the step: it never gathers more than that fraction of the rows that the rest does. At least 2.
    """
    auxk = auxk_latents(sae, config)
    share = config.auxk_fraction * min(1.0, (sae.k or auxk) / auxk)
    if not (share and config.auxk_coefficient and batch >= 2):
        return 0
    return max(2, math.ceil(batch * share))


def auxk_loss(
    sae: SAE,
    x: Tensor,
    x_hat: Tensor,
    dead: Tensor,
    k: int,
    target: Tensor | None = None,
    available: int | None = None,
) -> tuple[Tensor, SparseCodes]:
    """Error with which the k strongest dead latents reconstruct the residual x - x_hat.

    The residual is detached, b_dec takes no part, and the error is divided by the residual's
    variance. [Gao et al. 2024, App. A.2; KronSAE, App. A.1] The gradient reaches the base and
    extension rows behind each dead latent, and its decoder row. Only dead latents are scored (with
    experts: those of the token's expert).

    x, x_hat: [b, d] of B >= 2 tokens.  dead: bool [F], of the latents that this process holds.
    available: number of dead latents on all processes, at least 1; by default those in `dead`. If
    it is below k, k is cut to it and the loss scaled down in proportion.
    target: [b, d_target], that of a transcoder, in place of x.
    Returns the loss (scalar) and the codes of the dead latents, as they were decoded. Raises
    ValueError for fewer than 2 tokens.
    """
    group = sae.mesh.data
    residual = ((x if target is None else target) - x_hat).detach()
    available = min(k, int(dead.sum()) if available is None else available)
    tokens = group.count(len(residual), residual.device)
    if tokens < 2:
        raise ValueError(f"x: expected at least 2 tokens, whose variance is taken, got {tokens}")
    mean = group.sum(residual.sum(0)) / tokens
    variance = group.sum(part_of_mean(residual - mean, tokens))
    codes = sae.own(sae.largest(x, available, mask=dead))
    error = part_of_mean(sae.sum_of_rows(codes, bias=False) - residual, tokens)
    return error * ((available / k) / (variance + VARIANCE_FLOOR)), codes


def part_of_mean(error: Tensor, tokens: int) -> Tensor:
    """Sum of squared errors [b, d], divided by the number of errors of all `tokens` (scalar)."""
    return error.square().sum() / (tokens * error.shape[1])
