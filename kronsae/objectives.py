"""What training minimises: the reconstruction error, nested or not, and the dead latents' loss."""

from typing import NamedTuple

from torch import Tensor

from kronsae.sae import SAE
from kronsae_kernels import SparseCodes, nested_decode, sparse_decode


class Objective(NamedTuple):
    """What a forward pass of training gives."""

    loss: Tensor
    """What is minimised, apart from the loss of dead latents (scalar)."""
    mse: Tensor
    """Mean squared error of x_hat over tokens and dimensions (scalar)."""
    x_hat: Tensor
    """[B, d] reconstruction from all active latents."""
    codes: SparseCodes
    """The active latents of each token; their values' gradients are those of the decoder alone."""


def objective(sae: SAE, x: Tensor) -> Objective:
    """The objective of `sae.config` on normalised activations x [B, d]."""
    if sae.config.objective == "matryoshka":
        return _matryoshka(sae, x)
    x_hat, codes, loss = sae(x)
    return Objective(loss, loss, x_hat, codes)


def _matryoshka(sae: SAE, x: Tensor) -> Objective:
    """Sum of the errors of the reconstructions from each prefix of the dictionary.

    All prefixes from one gather of the decoder's rows. [Bussmann et al. 2025; KronSAE, App. A.1]
    """
    codes = sae.encode(x)
    nested = nested_decode(codes, sae.config.prefixes, sae.W_dec, sae.b_dec)
    errors = (nested - x[:, None]).square().mean((0, 2))
    return Objective(errors.sum(), errors[-1], nested[:, -1], codes)


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
    variance = (target - target.mean(0)).square().mean()
    # The constant only matters where nothing is left over: activations have unit variance.
    return error / (variance + 1e-8) * (available / k), codes
