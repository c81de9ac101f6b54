"""Definitions of all metrics of SAEs. Sums run in float64 and stream over batches.

Letters: B tokens, d width, F latents, V vocabulary size.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kronsae.errors import InputError
from kronsae.system.devices import as_double, of_doubles

MEANING = {
    "explained_variance": (
        "Explained variance",
        "share of the activations' variance that the reconstruction explains: 1 is perfect, 0 no "
        "better than their mean",
    ),
    "explained_variance_all": (
        "Explained variance, all tokens",
        "the same with massive tokens, such as attention sinks, which all other figures leave out",
    ),
    "massive_share": ("Massive tokens", "share of the held-out tokens that are massive"),
    "massive_variance_share": (
        "Variance of massive tokens",
        "share of the variance of all held-out tokens that the massive ones hold",
    ),
    "fvu": ("FVU", "fraction of variance unexplained: 1 - explained variance"),
    "explained_variance_batch": (
        "Explained variance, batch form",
        "mean over tokens of 1 - error / spread, as the KronSAE paper computes it (App. H)",
    ),
    "mse": ("MSE", "mean squared error of a coordinate of the raw activations"),
    "cosine": ("Cosine", "mean cosine of the angle between activations and reconstruction"),
    "relative_norm": (
        "Relative norm",
        "mean length of the reconstruction over that of the activations: below 1 it shrinks",
    ),
    "l0": ("L0", "latents active on a token, on average; with TopK at most k"),
    "dead_share": (
        "Dead latents",
        "share of latents that no held-out token activates; the more tokens, the fewer",
    ),
    "dead_share_10k": (
        "Dead latents, on 10,000 tokens",
        "the share expected on 10,000 of these tokens: compare this one between texts of several "
        "lengths",
    ),
    "dense_share": (
        "Dense latents",
        "share of latents that more than a tenth of the held-out tokens activates",
    ),
    "firing_gini": (
        "Gini coefficient of firings",
        "how unequally the latents share all firings: 0 if each fires equally often, near 1 if few "
        "latents fire and most never do",
    ),
    "largest_share": (
        "Largest share of firings",
        "share of all firings that are those of the one latent that fires most",
    ),
    "heldout_tokens": (
        "Held-out tokens",
        "tokens that figures are measured on, without massive ones",
    ),
    "ce_clean": (
        "Cross-entropy, clean",
        "loss of the language model as it is, in nats a token; lower is better",
    ),
    "ce_spliced": (
        "Cross-entropy, spliced",
        "the same with the reconstruction in place of the activations: the closer to clean, the "
        "better",
    ),
    "ce_mean": (
        "Cross-entropy, mean",
        "the same with the mean of the activations in place of each of them",
    ),
    "ce_zero": ("Cross-entropy, zeroed", "the same with zeros in place of the activations"),
    "ce_recovered": (
        "Cross-entropy recovered",
        "share of the damage done by zeros that the reconstruction avoids: 1 is perfect",
    ),
    "ce_recovered_mean": (
        "Recovered, of the mean's",
        "share of the damage done by the mean that the reconstruction avoids: the stricter figure",
    ),
    "kl_spliced": (
        "KL divergence, spliced",
        "of the model's next-token distribution with the reconstruction from the clean one, in "
        "nats a token: 0 is perfect",
    ),
    "kl_mean": ("KL divergence, mean", "the same with the mean of the activations"),
    "kl_zero": ("KL divergence, zeroed", "the same with zeros"),
    "absorbed_share": (
        "Absorption",
        "share of a first letter's direction that other latents hold in place of the letter's own, "
        "on words that begin with it: mean over letters; lower is better",
    ),
    "fully_absorbed_share": (
        "Full absorption",
        "share of these words on which none of the letter's latents fires, and another stands in",
    ),
    "letter_latents": (
        "Latents of a first letter",
        "how many latents share a first letter, on average: above 1 it is split",
    ),
    "letter_f1": (
        "First letters, by latents",
        "F1 with which these latents tell whether a word begins with their letter",
    ),
    "letter_f1_probe": (
        "First letters, by activations",
        "the same of a linear probe on the activations, which depends on no SAE",
    ),
    "class_accuracy_1": (
        "Class of a text, by 1 latent",
        "accuracy with which the mean of one latent tells a document of a class from others: 0.5 "
        "is chance, mean over classes",
    ),
    "class_accuracy_2": ("Class of a text, by 2 latents", "the same by two latents"),
    "class_accuracy_5": ("Class of a text, by 5 latents", "the same by five latents"),
    "class_accuracy_all": (
        "Class of a text, by activations",
        "the same by all coordinates of the activations, which depends on no SAE",
    ),
}
"""Label and meaning of each metric of an evaluation, in the order of tables."""

HOPELESS = -1.0
"""Explained variance below which training has diverged: noise of the size of the activations would
do no worse."""

MASSIVE_VARIANCE = 0.05
"""Share of the variance above which a warning tells of massive tokens."""


def massive_warning(metrics: Mapping[str, Any], tokens: Sequence[str] = ()) -> str | None:
    """A warning about an evaluation whose variance massive tokens dominate; None without need.

    tokens: texts of the massive tokens, each of them once.
    """
    variance = metrics.get("massive_variance_share") or 0.0
    if variance <= MASSIVE_VARIANCE:
        return None
    named = f" ({', '.join(map(repr, tokens))})" if tokens else ""
    left_out = (
        "The figures leave them out. Only the explained variance of all tokens has them, which "
        "says little about the ordinary ones"
    )
    left_in = "--massive-multiple 0 leaves them in: the figures say little about the ordinary ones"
    return (
        f"Massive tokens{named} are {100 * metrics['massive_share']:.2f} % of the held-out tokens "
        f"and hold {100 * variance:.0f} % of the variance. "
        + (left_out if "explained_variance_all" in metrics else left_in)
    )


DENSE = 0.1
"""Share of tokens above which a latent counts as dense."""

EQUAL_TOKENS = 10_000
"""Tokens for which dead latents are compared between texts of several lengths."""


class ReconstructionMetrics:
    """Streaming comparison of x [B, d] with x_hat [B, d] over an evaluation set.

    explained_variance = 1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2 with the mean of the whole set;
    fvu = 1 - explained_variance.
    explained_variance_batch = mean over tokens of 1 - |x - x_hat|^2 / |x - mean(x)|^2, with the
    mean of the token's batch: the form of [KronSAE, App. H].
    cosine = mean over tokens of x . x_hat / (|x| |x_hat|), 0 where one of them is 0;
    relative_norm = mean of |x_hat| / |x| over tokens that are not 0.
    """

    def __init__(self, d_model: int) -> None:
        self.tokens = 0
        self.squared_error = 0.0
        self.squared_norm = 0.0
        self.sum = torch.zeros(d_model, dtype=torch.float64)
        self.batch_form = 0.0
        self.batch_tokens = 0
        self.cosines = 0.0
        self.norm_ratios = 0.0
        self.nonzero = 0

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        x, x_hat = as_double(x), as_double(x_hat)
        errors = (x - x_hat).square().sum(-1)
        self.tokens += x.shape[0]
        self.squared_error += errors.sum().item()
        self.squared_norm += x.square().sum().item()
        self.sum += x.sum(0).cpu()
        spread = (x - x.mean(0)).square().sum(-1)
        varied = spread > 0  # a batch of one token is its own mean
        self.batch_form += (1 - errors[varied] / spread[varied]).sum().item()
        self.batch_tokens += int(varied.sum())
        norms, norms_hat = x.norm(dim=-1), x_hat.norm(dim=-1)
        both = (norms != 0) & (norms_hat != 0)  # also NaN, which is no right angle
        products = (x * x_hat).sum(-1)[both]
        self.cosines += (products / (norms * norms_hat)[both]).sum().item()
        nonzero = norms > 0
        self.norm_ratios += (norms_hat[nonzero] / norms[nonzero]).sum().item()
        self.nonzero += int(nonzero.sum())

    def with_tokens_of(self, other: "ReconstructionMetrics") -> "ReconstructionMetrics":
        """The comparison over the tokens of both."""
        both = ReconstructionMetrics(self.sum.numel())
        for name in vars(both):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    @property
    def variance(self) -> float:
        """Sum of squared distances of x from its mean."""
        return self.squared_norm - self.sum.square().sum().item() / max(1, self.tokens)

    def compute(self) -> dict[str, float]:
        """The metrics. Raises InputError without tokens, or if all were the same vector."""
        if not self.tokens:
            raise InputError("no tokens to evaluate on")
        if self.variance <= 0:
            raise InputError("all activations are equal: explained variance is undefined")
        fvu = self.squared_error / self.variance
        return {
            "explained_variance": 1 - fvu,
            "fvu": fvu,
            "explained_variance_batch": self.batch_form / max(1, self.batch_tokens),
            "mse": self.squared_error / (self.tokens * self.sum.numel()),
            "cosine": self.cosines / self.tokens,
            "relative_norm": self.norm_ratios / max(1, self.nonzero),
        }


class FiringMetrics:
    """Streaming counts of how often each latent fires.

    l0 = latents that fire per token; dead_share, dense_share = shares of latents that fire on no
    token, and on more than a share DENSE of all tokens; dead_share_10k = the share expected to fire
    on none of EQUAL_TOKENS of these tokens, drawn without replacement (absent if there are fewer).
    firing_gini, largest_share: `gini` of the counts, and the largest of them over their sum; 0 if
    nothing fires.
    """

    def __init__(self, dict_size: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.counts = torch.zeros(dict_size, dtype=torch.int64, device=device)
        """[F] tokens on which each latent fired."""

    def update(self, indices: Tensor, fired: Tensor) -> None:
        """Count a batch. indices: [B, k] of latents, distinct in a row.  fired: bool [B, k]."""
        self.tokens += indices.shape[0]
        self.counts += torch.bincount(indices[fired], minlength=len(self.counts))

    @property
    def densities(self) -> Tensor:
        """[F] float64: share of the tokens on which each latent fires."""
        return as_double(self.counts) / self.tokens

    def compute(self) -> dict[str, float]:
        """The metrics. Raises InputError without tokens."""
        if not self.tokens:
            raise InputError("no tokens to evaluate on")
        equal = {}
        if self.tokens >= EQUAL_TOKENS:
            silent = probability_of_silence(self.counts, self.tokens, EQUAL_TOKENS)
            equal = {"dead_share_10k": silent.mean().item()}
        return {
            "l0": int(self.counts.sum()) / self.tokens,
            "dead_share": as_double(self.counts == 0).mean().item(),
            **equal,
            "dense_share": as_double(self.densities > DENSE).mean().item(),
            "firing_gini": gini(self.counts),
            "largest_share": int(self.counts.max()) / max(1, int(self.counts.sum())),
            "heldout_tokens": self.tokens,
        }


def gini(counts: Tensor) -> float:
    """Gini coefficient of counts [F] >= 0: sum_ij |c_i - c_j| / (2 F sum c).

    0 if all are equal (also if all are 0), (F - 1) / F if one of them has everything.
    """
    ranked = as_double(counts).sort().values
    ranks = torch.arange(1, len(ranked) + 1, dtype=ranked.dtype, device=ranked.device)
    above = (2 * ranks - len(ranked) - 1) @ ranked
    return (above / (len(ranked) * ranked.sum()).clamp(min=1)).item()


def probability_of_silence(counts: Tensor, tokens: int, drawn: int) -> Tensor:
    """Probability [F] float64 that a latent fires on none of `drawn` tokens of `tokens`.

    counts: [F] tokens on which each latent fires. C(tokens - count, drawn) / C(tokens, drawn), as
    tokens are drawn without replacement.
    """
    left = tokens - as_double(counts)

    def log_choices(n: Tensor) -> Tensor:
        """log n! - log (n - drawn)!"""
        return (n + 1).lgamma() - (n - drawn + 1).clamp(min=1).lgamma()

    log_share = log_choices(left) - log_choices(torch.full_like(left, tokens))
    return torch.where(left < drawn, 0.0, log_share.exp())


def density_histogram(counts: Tensor, tokens: int, bins_a_decade: int = 4) -> dict[str, object]:
    """Histogram of the latents' densities, in bins of equal width in log10.

    counts: [F] tokens on which each latent fired, of `tokens`.
    Returns log10_edges [b + 1], from the decade of one token to 0 (all tokens); latents [b]; and
    dead: the number that never fire. A bin includes its lower edge; the last one also its upper.
    """
    decades = max(1, math.ceil(math.log10(tokens)))
    edges = [-decades + i / bins_a_decade for i in range(decades * bins_a_decade + 1)]
    alive = as_double(counts[counts > 0]) / tokens
    # Compare densities, not logarithms, so that rounding does not decide at an edge.
    bounds = torch.tensor([10.0**edge for edge in edges], dtype=torch.float64)
    bins = torch.bucketize(alive.cpu(), bounds, right=True) - 1
    latents = torch.bincount(bins.clamp_(0, len(edges) - 2), minlength=len(edges) - 1)
    dead = int((counts == 0).sum())
    return {"log10_edges": edges, "latents": latents.tolist(), "dead": dead}


def cross_entropy_recovered(clean: float, spliced: float, ablated: float) -> float:
    """Share of the loss increase by ablation that the reconstruction avoids.

    1 for a perfect reconstruction, 0 for one as bad as ablation. Arguments in nats per token.
    """
    damage = ablated - clean
    return (ablated - spliced) / damage if damage else float(spliced == clean)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats: [n] float64 for logits [n, V] and targets [n]."""
    return torch.nn.functional.cross_entropy(
        as_double(logits), targets.to(of_doubles(targets.device)), reduction="none"
    )


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(other)) in nats: [n] float64 for [n, V] each.

    NaN where either softmax is NaN.
    """
    return divergence(log_probabilities(logits), log_probabilities(other))


def log_probabilities(logits: Tensor) -> Tensor:
    """Logarithms of softmax(logits): float64 [n, V] for logits [n, V]."""
    return as_double(logits).log_softmax(-1)


def divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) in nats: [n], from logarithms [n, V] of probabilities."""
    p = logp.exp()
    return (p * (logp - logq)).masked_fill(p == 0, 0).sum(-1)  # 0 log 0 = 0: logits may be -inf


Numbers = Sequence[float] | Tensor


def pearson(x: Numbers, y: Numbers) -> float:
    """Pearson correlation of two lists of numbers; nan if one of them is constant."""
    a, b = (torch.as_tensor(values, dtype=torch.float64) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    norms = (a.norm() * b.norm()).item()
    return (a @ b).item() / norms if norms else math.nan


def spearman(x: Numbers, y: Numbers) -> float:
    """Correlation of ranks; equal values share their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Numbers) -> Tensor:
    numbers = torch.as_tensor(values, dtype=torch.float64)
    _, group, counts = torch.unique(numbers, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]
