"""Do the latents of a head fire together? [KronSAE, section 5.2, Fig. 6]

Pearson correlations of latents after TopK, over held-out tokens: of each latent with the others of
its head, on average, and with all others; in a trained KronSAE and in one of uniform random weights
(on the same centred activations). Latents that never fire there have no correlation, and are left
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig
from kronsae.experiments.activations import Activations
from kronsae.experiments.experiment import EXPERIMENTS, Run, axis
from kronsae.experiments.report import Spread, grouped, markdown, picture
from kronsae.experiments.training import EqualTokens, quality
from kronsae.model.normalizer import Normalizer
from kronsae.model.sae import SAE
from kronsae.properties.correlation import Correlations, correlations_of

BINS, LOWEST, HIGHEST = 60, -0.05, 0.25


@torch.no_grad()
def uniform_sae(config: SAEConfig, x: Tensor, seed: int) -> SAE:
    """An SAE of x [t, d] whose encoder is uniform in (-1, 1), up to scale, with no bias."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(config, generator=generator)
    sae.W_enc.copy_(2 * torch.rand(sae.W_enc.shape, generator=generator) - 1)
    normalizer = Normalizer.of(x)
    return sae.folded(normalizer.mean, normalizer.scale)


def summary(correlations: Correlations) -> dict[str, Any]:
    """Mean correlations, and a histogram of those within heads (its end bins count all beyond)."""
    head = correlations.head[correlations.head.isfinite()]
    counts = torch.histc(head.clamp(LOWEST, HIGHEST), BINS, LOWEST, HIGHEST)
    return {
        "head": head.mean().item(),
        "others": correlations.others.mean().item(),
        "head_shares": (counts / counts.sum()).tolist(),
        "latents": len(correlations.others),
    }


@EXPERIMENTS.register("correlation")
@dataclass(frozen=True)
class Correlation(EqualTokens):
    figure = "section 5.2, Fig. 6"
    statement = (
        "How latents correlate within their head and with all others, in a trained KronSAE and in "
        "a random one."
    )
    smallest = EqualTokens.smallest | {"shapes": ("m2n4",)}

    tokens: int = axis(400_000, "tokens of a training")
    shapes: tuple[str, ...] = axis(("m2n4", "m4n4", "m4n8"), "shapes of the heads")
    learning_rates: tuple[float, ...] = axis((1.6e-2,), "rates to choose from")

    def compared(self) -> dict[str, Any]:
        return {"shape": self.shapes}

    def variant(self, cell: dict[str, Any]) -> str:
        return cell["shape"]

    def run(self, shared: Activations, cell: dict[str, Any]) -> dict[str, Any]:
        result = self.train(self.sae(cell), shared, cell)
        sae = result.sae
        assert sae is not None
        random = uniform_sae(sae.config, shared.heldout, cell["seed"]).to(sae.W_dec.device)
        return {
            **quality(result),
            "trained": summary(correlations_of(sae, shared.heldout)),
            "random": summary(correlations_of(random, shared.heldout)),
        }

    def conclude(self, runs: Sequence[Run]) -> tuple[str, str]:
        lines = []
        within = learned = 0
        for (shape,), group in grouped(runs, "shape").items():
            head, others, random_head, random_others = (
                Spread.of(run[weights][latents] for run in group)
                for weights in ("trained", "random")
                for latents in ("head", "others")
            )
            lines.append([shape, head, others, random_head, random_others])
            within += head.mean > others.mean
            learned += head.mean > random_head.mean
        line = (
            f"Latents correlate more with their own head than with all others in {within} of "
            f"{len(lines)} trained shapes, and more than in a head of random weights in {learned} "
            "(paper: a picture, Fig. 6)."
        )
        header = ["shape", "trained: own head", "all others", "random: own head", "all others"]
        return markdown(header, lines), line

    def draw(self, runs: Sequence[Run], path: Path) -> None:
        """How correlations within a head are distributed, trained and random, a panel a shape."""
        shapes = grouped(runs, "shape")
        edges = torch.linspace(LOWEST, HIGHEST, BINS + 1).tolist()
        with picture(path, len(shapes), (4, 3.2)) as row:
            for axes, ((shape,), group) in zip(row, shapes.items(), strict=True):
                for weights, color, dash in (("random", "C7", "--"), ("trained", "C0", ":")):
                    shares = torch.tensor([run[weights]["head_shares"] for run in group]).mean(0)
                    axes.stairs(shares.tolist(), edges, color=color, label=weights)
                    others = Spread.of(run[weights]["others"] for run in group).mean
                    label = f"{weights}, all others"
                    axes.axvline(others, color=color, linestyle=dash, label=label)
                axes.set_title(shape)
                axes.set_xlabel("mean correlation with its head")
                axes.set_ylabel("share of latents")
