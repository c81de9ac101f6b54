"""What training minimises: the reconstruction error, of one or several reconstructions, and more.

Letters: B tokens, d width of the target, k active latents.

Of a batch that processes share (`kronsae.system.parallel`), each computes its part of every loss:
what its tokens add to the mean over all B. The parts, and the gradients of all of them, add up.
"""

import math
from typing import NamedTuple

from torch import Tensor

from kronsae.config import MULTI_TOPK, SAEConfig, TrainConfig
from kronsae.model.sae import SAE
from kronsae.model.selection import JumpReLU
from kronsae.system.parallel import ALONE, Group
from kronsae_kernels import SparseCodes, nested_decode

MULTI_TOPK_WEIGHT = 1 / 8
"""Of the error with MULTI_TOPK k latents. [Gao et al. 2024, App. A.2]"""

VARIANCE_FLOOR = 1e-8
"""Added to the variance of what is left over: it only matters where nothing is, as activations
have unit variance."""


class Objective(NamedTuple):
    """What a forward pass of training gives."""

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
    penalties: dict[str, Tensor]
    """Losses that are part of `loss` with a coefficient, by name, without it (scalars)."""


def objective(
    sae: SAE,
    x: Tensor,
    config: TrainConfig,
    target: Tensor | None = None,
    tokens: int | None = None,
) -> Objective:
    """The objective of `sae.config` on normalised activations x [b, d].

    target: what is to be reconstructed, [b, d_target]; by default x.
    tokens: B, of the whole batch of which x is this process's part; by default b.
    """
    target = x if target is None else target
    tokens = len(x) if tokens is None else tokens
    penalties = {}
    if isinstance(sae.selection, JumpReLU):
        codes, l0 = sae.selection.codes_and_l0(sae, x)
        penalties["l0_loss"] = sae.mesh.data.as_part((l0 / sae.config.k - 1).square())
    elif sae.config.objective == "multi_topk":
        wide = sae.selection(sae, x, MULTI_TOPK * sae.config.k)
        codes = sae.selection.cut(sae, wide, sae.config.k)
    else:
        codes = sae.encode(x)
    if sae.router is not None:
        penalties["balance_loss"] = sae.router.balance_loss(x, sae.mesh.data)

    if sae.config.objective == "matryoshka":
        # From each prefix of the dictionary. [Bussmann et al. 2025; KronSAE, App. A.1]
        nested = nested_decode(codes, sae.config.prefixes, sae.W_dec, sae.b_dec)
        nested = sae.with_skip(nested, x[:, None])
        errors = (nested - target[:, None]).square().sum((0, 2)) / (tokens * target.shape[1])
        loss, mse, x_hat = errors.sum(), errors[-1], nested[:, -1]
        decoded = codes
    else:
        decoded = sae.own(codes)
        x_hat = sae.with_skip(sae.sum_of_rows(decoded), x)
        loss = mse = _part_of_mean(x_hat - target, tokens)
    if sae.config.objective == "multi_topk":
        decoded = wide
        error = _part_of_mean(sae.decode(wide, x) - target, tokens)
        loss = loss + MULTI_TOPK_WEIGHT * error
    coefficients = {
        "l0_loss": config.l0_coefficient,
        "balance_loss": config.balance_coefficient,
    }
    for name, penalty in penalties.items():
        loss = loss + coefficients[name] * penalty
    return Objective(loss, mse, x_hat, codes, decoded, penalties)


def auxk_latents(sae: SAEConfig, config: TrainConfig) -> int:
    """Dead latents a token in their loss, if so many are dead."""
    return config.auxk or max(1, sae.d_model // 2)


def auxk_tokens(sae: SAEConfig, config: TrainConfig, batch: int) -> int:
    """Of how many tokens of a batch, the first, the loss of dead latents is taken; 0: of none.

    Of config.auxk_fraction of them; of fewer if that loss has more latents a token than the rest of
    the step, so that it never gathers more than that fraction of what the rest does. At least two.
    """
    share = config.auxk_fraction * min(1.0, sae.k / auxk_latents(sae, config))
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
    error = _part_of_mean(sae.sum_of_rows(codes, bias=False) - target, tokens)
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
    variance = group.sum(_part_of_mean(target - mean, tokens))
    return (available / k) / (variance + VARIANCE_FLOOR), tokens


def _part_of_mean(error: Tensor, tokens: int) -> Tensor:
    """What errors [b, d] of some of B tokens add to the mean square over all (scalar)."""
    return error.square().sum() / (tokens * error.shape[1])
