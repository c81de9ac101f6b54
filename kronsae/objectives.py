"""Losses beside the reconstruction error."""

from torch import Tensor

from kronsae.sae import SAE
from kronsae_kernels import SparseCodes, sparse_decode


def auxk_loss(
    sae: SAE, x: Tensor, x_hat: Tensor, dead: Tensor, k: int
) -> tuple[Tensor, SparseCodes]:
    """Error of the k strongest dead latents as a model of what the live ones leave over.

    The target x - x_hat is detached, b_dec takes no part, and the error is divided by the target's
    variance. [Gao et al. 2024, App. A.2; KronSAE, App. A.1] The gradient reaches the base and
    extension rows behind each dead latent, and its decoder row. Only dead latents are scored.

    x, x_hat: [B, d], B >= 2.  dead: bool [F], at least one True.  k is cut to the number of dead
    latents, and the loss scaled down in proportion. Returns the loss (scalar) and the dead latents'
    codes.
    """
    target = (x - x_hat).detach()
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
