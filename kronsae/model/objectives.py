"""What training minimises: the reconstruction error, of one or several reconstructions, and more.

Letters: B tokens, d width of the target, k active latents.

Of a batch that processes share (`kronsae.system.parallel`), each computes its part of every loss:
what its tokens add to the mean over all B. The parts, and the gradients of all of them, add up.
"""

import math
from typing import ClassVar, NamedTuple

from torch import Tensor

from kronsae.config import SAEConfig, TrainConfig
from kronsae.errors import InputError
from kronsae.model.sae import SAE
from kronsae.model.selection import Penalty
from kronsae.registry import OBJECTIVES, SELECTIONS, Kind
from kronsae.system.parallel import ALONE, Group
from kronsae_kernels import SparseCodes, nested_decode

MULTI_TOPK = 4
"""Multi-TopK adds the error with so many times k latents. [Gao et al. 2024]"""
MULTI_TOPK_WEIGHT = 1 / 8
"""Of the error with MULTI_TOPK k latents. [Gao et al. 2024, App. A.2]"""

VARIANCE_FLOOR = 1e-8
"""Added to the variance of what is left over: it only matters where nothing is, as activations
have unit variance."""


class Reconstruction(NamedTuple):
    """What an objective makes of a batch."""

    loss: Tensor
    """What is minimised, apart from the loss of dead latents (scalar)."""
    mse: Tensor
    """Mean squared error of x_hat over tokens and dimensions (scalar)."""
    x_hat: Tensor
    """[B, d] reconstruction from all active latents."""
    codes: SparseCodes
    """The active latents of each token."""
    decoded: SparseCodes
    """All latents that were decoded here (`SAE.own`); the gradient of their values comes from
    decoding alone."""
    penalties: dict[str, Penalty]
    """Other losses, by name."""


class Objective(Kind):
    """What the reconstruction is judged by. See `kronsae.registry` for how to add another one."""

    nested: ClassVar[bool] = False
    """Whether prefixes of the dictionary reconstruct, too (`SAEConfig.prefixes`)."""
    decoded_per_k: ClassVar[int] = 1
    """So many times k latents of a token are decoded: for the memory of a plan."""

    @classmethod
    def reconstruct(
        cls, sae: SAE, x: Tensor, target: Tensor, tokens: int, config: TrainConfig, progress: float
    ) -> Reconstruction:
        """The error on normalised activations x [b, d] with the target [b, d_out], and penalties
        that are not yet in `loss`.

        tokens: B, of the whole batch of which x is this process's part.
        progress: share of the training that is done, from 0 to 1.
        """
        raise NotImplementedError


@OBJECTIVES.register("plain")
class Plain(Objective):
    """The mean squared error with all active latents."""

    fused = shares_heads = True

    @classmethod
    def reconstruct(cls, sae, x, target, tokens, config, progress):
        codes, penalties = sae.selection.codes_and_penalties(sae, x, config, progress)
        decoded = sae.own(codes)
        x_hat = sae.with_skip(sae.sum_of_rows(decoded), x)
        mse = part_of_mean(x_hat - target, tokens)
        return Reconstruction(mse, mse, x_hat, codes, decoded, penalties)


@OBJECTIVES.register("matryoshka")
class Matryoshka(Objective):
    """The sum of the errors with the active latents of each prefix of the dictionary.

    [Bussmann et al. 2025; KronSAE, App. A.1]
    """

    title = "Matryoshka"
    nested = fused = True

    @classmethod
    def reconstruct(cls, sae, x, target, tokens, config, progress):
        codes, penalties = sae.selection.codes_and_penalties(sae, x, config, progress)
        nested = nested_decode(codes, sae.config.prefixes, sae.W_dec, sae.b_dec)
        nested = sae.with_skip(nested, x[:, None])
        errors = (nested - target[:, None]).square().sum((0, 2)) / (tokens * target.shape[1])
        return Reconstruction(errors.sum(), errors[-1], nested[:, -1], codes, codes, penalties)


@OBJECTIVES.register("multi_topk")
class MultiTopK(Objective):
    """The error with k latents, and an eighth of that with MULTI_TOPK k. [Gao et al. 2024]"""

    title = "Multi-TopK"
    decoded_per_k = MULTI_TOPK

    @classmethod
    def check(cls, config):
        if not SELECTIONS[config.selection].by_k:
            raise InputError(
                f"objective 'multi_topk' needs a selection by k, which {config.selection!r} is not"
            )
        if MULTI_TOPK * config.k > config.latents_per_token:
            raise InputError(
                f"objective 'multi_topk' selects {MULTI_TOPK} k = {MULTI_TOPK * config.k} latents, "
                f"more than the {config.latents_per_token} that a token has"
            )

    @classmethod
    def reconstruct(cls, sae, x, target, tokens, config, progress):
        wide = sae.selection(sae, x, MULTI_TOPK * sae.config.k)
        codes = sae.selection.cut(sae, wide, sae.config.k)
        x_hat = sae.with_skip(sae.sum_of_rows(sae.own(codes)), x)
        mse = part_of_mean(x_hat - target, tokens)
        error = part_of_mean(sae.decode(wide, x) - target, tokens)
        loss = mse + MULTI_TOPK_WEIGHT * error
        return Reconstruction(loss, mse, x_hat, codes, wide, {})


def objective(
    sae: SAE,
    x: Tensor,
    config: TrainConfig,
    target: Tensor | None = None,
    tokens: int | None = None,
    progress: float = 1.0,
) -> Reconstruction:
    """The objective of `sae.config` on normalised activations x [b, d].

    target: what is to be reconstructed, [b, d_target]; by default x.
    tokens: B, of the whole batch of which x is this process's part; by default b.
    progress: share of the training that is done, from 0 to 1.
    """
    target = x if target is None else target
    tokens = len(x) if tokens is None else tokens
    kind = OBJECTIVES[sae.config.objective]
    found = kind.reconstruct(sae, x, target, tokens, config, progress)
    found.penalties.update(sae.kind.penalties(sae, x, target, tokens))
    if sae.router is not None:
        balance = sae.router.balance_loss(x, sae.mesh.data)
        found.penalties["balance_loss"] = Penalty(balance, config.balance_coefficient)
    loss = found.loss
    for penalty in found.penalties.values():
        loss = loss + penalty.coefficient * penalty.loss
    return found._replace(loss=loss)


def auxk_latents(sae: SAEConfig, config: TrainConfig) -> int:
    """Dead latents a token in their loss, if so many are dead."""
    return config.auxk or max(1, sae.d_model // 2)


def auxk_tokens(sae: SAEConfig, config: TrainConfig, batch: int) -> int:
    """Of how many tokens of a batch, the first, the loss of dead latents is taken; 0: of none.

    Of config.auxk_fraction of them; of fewer if that loss has more latents a token than the rest of
    the step, so that it never gathers more than that fraction of what the rest does. At least two.
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
    """Error of the k strongest dead latents as a model of what the live ones leave over.

    What they model, x - x_hat, is detached, b_dec takes no part, and the error is divided by the
    variance of x - x_hat. [Gao et al. 2024, App. A.2; KronSAE, App. A.1] The gradient reaches the
    base and extension rows behind each dead latent, and its decoder row. Only dead latents are
    scored (with experts: those of the token's expert).

    x, x_hat: [b, d], of B >= 2 in all.  dead: bool [F], of the latents that this process holds.
    available: how many are dead in all, at least one; by default those in `dead`. k is cut to it,
    and the loss scaled down in proportion.  target: what a transcoder shall predict, [b, d_target],
    in place of x. Returns the loss (scalar) and the dead latents' codes, as they were decoded.
    """
    target = ((x if target is None else target) - x_hat).detach()
    available = min(k, int(dead.sum()) if available is None else available)
    weight, tokens = auxk_weight(target, available, k, sae.mesh.data)
    codes = sae.own(sae.encode(x, k=available, mask=dead))
    error = part_of_mean(sae.sum_of_rows(codes, bias=False) - target, tokens)
    return error * weight, codes


def auxk_weight(
    target: Tensor, available: int, k: int, group: Group = ALONE.data
) -> tuple[Tensor, int]:
    """What `auxk_loss` multiplies its mean squared error with: 1 / variance, and available / k.

    target: [b, d], what is left over.  available, k: dead latents a token taken, and asked for.
    group: of ranks that have other tokens. Also returns B, how many tokens all of them have.
    Raises ValueError for fewer than 2.
    """
    tokens = group.count(len(target), target.device)
    if tokens < 2:
        raise ValueError(f"x: expected at least 2 tokens, whose variance is taken, got {tokens}")
    mean = group.sum(target.sum(0)) / tokens
    variance = group.sum(part_of_mean(target - mean, tokens))
    return (available / k) / (variance + VARIANCE_FLOOR), tokens


def part_of_mean(error: Tensor, tokens: int) -> Tensor:
    """What errors [b, d] of some of B tokens add to the mean square over all (scalar)."""
    return error.square().sum() / (tokens * error.shape[1])
