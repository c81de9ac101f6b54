"""What training minimises: the reconstruction error, of one or several reconstructions, and more.

Letters: B tokens, d width of the target, k active latents.
"""

from typing import NamedTuple

from torch import Tensor

from kronsae.config import MULTI_TOPK, TrainConfig
from kronsae.sae import SAE
from kronsae.selection import JumpReLU
from kronsae_kernels import SparseCodes, nested_decode, sparse_decode

MULTI_TOPK_WEIGHT = 1 / 8
"""Of the error with MULTI_TOPK k latents. [Gao et al. 2024, App. A.2]"""


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
    """All latents that were decoded; the gradient of their values comes from decoding alone."""
    penalties: dict[str, Tensor]
    """Losses that are part of `loss` with a coefficient, by name, without it (scalars)."""


def objective(sae: SAE, x: Tensor, config: TrainConfig, target: Tensor | None = None) -> Objective:
    """The objective of `sae.config` on normalised activations x [B, d].

    target: what is to be reconstructed, [B, d_target]; by default x.
    """
    target = x if target is None else target
    penalties = {}
    if isinstance(sae.selection, JumpReLU):
        codes, l0 = sae.selection.codes_and_l0(sae, x)
        penalties["l0_loss"] = (l0 / sae.config.k - 1).square()
    elif sae.config.objective == "multi_topk":
        decoded = sae.selection(sae, x, MULTI_TOPK * sae.config.k)
        codes = sae.selection.cut(sae, decoded, sae.config.k)
    else:
        codes = sae.encode(x)
    if sae.router is not None:
        penalties["balance_loss"] = sae.router.balance_loss(x)

    if sae.config.objective == "matryoshka":
        # From each prefix of the dictionary. [Bussmann et al. 2025; KronSAE, App. A.1]
        nested = nested_decode(codes, sae.config.prefixes, sae.W_dec, sae.b_dec)
        nested = sae.with_skip(nested, x[:, None])
        errors = (nested - target[:, None]).square().mean((0, 2))
        loss, mse, x_hat = errors.sum(), errors[-1], nested[:, -1]
    else:
        x_hat = sae.decode(codes, x)
        loss = mse = (x_hat - target).square().mean()
    if sae.config.objective == "multi_topk":
        wide = (sae.decode(decoded, x) - target).square().mean()
        loss = loss + MULTI_TOPK_WEIGHT * wide
    else:
        decoded = codes
    coefficients = {
        "l0_loss": config.l0_coefficient,
        "balance_loss": config.balance_coefficient,
    }
    for name, penalty in penalties.items():
        loss = loss + coefficients[name] * penalty
    return Objective(loss, mse, x_hat, codes, decoded, penalties)


def auxk_loss(
    sae: SAE, x: Tensor, x_hat: Tensor, dead: Tensor, k: int, target: Tensor | None = None
) -> tuple[Tensor, SparseCodes]:
    """Error of the k strongest dead latents as a model of what the live ones leave over.

    What they model, x - x_hat, is detached, b_dec takes no part, and the error is divided by the
    variance of x - x_hat. [Gao et al. 2024, App. A.2; KronSAE, App. A.1] The gradient reaches the
    base and extension rows behind each dead latent, and its decoder row. Only dead latents are
    scored (with experts: those of the token's expert).

    x, x_hat: [B, d], B >= 2.  dead: bool [F], at least one True.  k is cut to the number of dead
    latents, and the loss scaled down in proportion.  target: what a transcoder shall predict,
    [B, d_target], in place of x. Returns the loss (scalar) and the dead latents' codes.
    """
    target = ((x if target is None else target) - x_hat).detach()
    if x.shape[0] < 2:
        raise ValueError(
            f"x: expected at least 2 tokens, whose variance is taken, got {x.shape[0]}"
        )
    available = min(k, int(dead.sum()))
    codes = sae.encode(x, k=available, mask=dead)
    error = (sparse_decode(codes, w_dec=sae.W_dec) - target).square().mean()
    return error * auxk_weight(target, available, k), codes


def auxk_weight(target: Tensor, available: int, k: int) -> Tensor:
    """What `auxk_loss` multiplies its mean squared error with: 1 / variance, and available / k.

    target: [B, d], what is left over.  available, k: dead latents a token taken, and asked for.
    """
    variance = (target - target.mean(0)).square().mean()
    # The constant only matters where nothing is left over: activations have unit variance.
    return (available / k) / (variance + 1e-8)
