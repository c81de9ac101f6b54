"""Each figure of merit, once. Sums run in float64 and stream over batches."""

import torch
from torch import Tensor

MEANING = {
    "explained_variance": (
        "Explained variance",
        "share of the activations' variance that the reconstruction explains: 1 is perfect, 0 no "
        "better than their mean",
    ),
    "fvu": ("FVU", "fraction of variance unexplained: 1 - explained variance"),
    "explained_variance_batch": (
        "Explained variance, batch form",
        "mean over tokens of 1 - error / spread, as the KronSAE paper computes it (App. H)",
    ),
    "mse": ("MSE", "mean squared error of a coordinate of the raw activations"),
    "l0": ("L0", "latents active on a token, on average; with TopK at most k"),
    "dead_share": ("Dead latents", "share of latents that no held-out token activates"),
    "ce_clean": (
        "Cross-entropy, clean",
        "loss of the language model as it is, in nats a token; lower is better",
    ),
    "ce_spliced": (
        "Cross-entropy, spliced",
        "the same with the reconstruction in place of the activations: the closer to clean, the "
        "better",
    ),
    "ce_zero": ("Cross-entropy, zeroed", "the same with zeros in place of the activations"),
    "ce_recovered": (
        "Cross-entropy recovered",
        "share of the damage done by zeros that the reconstruction avoids: 1 is perfect",
    ),
}
"""Label and meaning of each figure of an evaluation, in the order to show them."""


class ReconstructionMetrics:
    """Streaming comparison of x [B, d] with x_hat [B, d] over an evaluation set.

    explained_variance = 1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2, the mean being that of the
    whole set; fvu = 1 - explained_variance.
    explained_variance_batch = mean over tokens of 1 - |x - x_hat|^2 / |x - mean(x)|^2, with the
    mean of the token's batch: the form of [KronSAE, App. H].
    """

    def __init__(self, d_model: int) -> None:
        self.tokens = 0
        self.squared_error = 0.0
        self.squared_norm = 0.0
        self.sum = torch.zeros(d_model, dtype=torch.float64)
        self.batch_form = 0.0
        self.batch_tokens = 0

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        x, x_hat = x.double(), x_hat.double()
        errors = (x - x_hat).square().sum(-1)
        self.tokens += x.shape[0]
        self.squared_error += errors.sum().item()
        self.squared_norm += x.square().sum().item()
        self.sum += x.sum(0).cpu()
        spread = (x - x.mean(0)).square().sum(-1)
        varied = spread > 0  # a batch of one token is its own mean
        self.batch_form += (1 - errors[varied] / spread[varied]).sum().item()
        self.batch_tokens += int(varied.sum())

    def compute(self) -> dict[str, float]:
        """Raises ValueError if nothing was seen, or all of it was the same vector."""
        if not self.tokens:
            raise ValueError("no tokens to evaluate on")
        variance = self.squared_norm - self.sum.square().sum().item() / self.tokens
        if variance <= 0:
            raise ValueError("all activations are equal: explained variance is undefined")
        fvu = self.squared_error / variance
        return {
            "explained_variance": 1 - fvu,
            "fvu": fvu,
            "explained_variance_batch": self.batch_form / max(1, self.batch_tokens),
            "mse": self.squared_error / (self.tokens * self.sum.numel()),
        }


def l0(fired: Tensor) -> float:
    """Mean number of active latents a token, from `fired` bool [B, k]."""
    return fired.sum(-1).double().mean().item()


def cross_entropy_recovered(clean: float, spliced: float, ablated: float) -> float:
    """Share of the damage of ablating the hookpoint that splicing in x_hat avoids.

    1 for a perfect reconstruction, 0 for one as bad as zeros. All three in nats a token.
    """
    damage = ablated - clean
    return (ablated - spliced) / damage if damage else float(spliced == clean)
