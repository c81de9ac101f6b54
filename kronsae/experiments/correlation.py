"""Do the latents of a head fire together? [KronSAE, section 5.2, Fig. 6]

Pearson correlations of latents after TopK, over held-out tokens: of each latent with the others of
its head, on average, and with all others; in a trained KronSAE and in one of uniform random weights
(on the same centred activations). Latents that never fire there have no correlation, and are left
out.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig
from kronsae.experiments.common import (
    QWEN,
    SMALLEST_TRAINING,
    Activations,
    Conclusion,
    Run,
    Spread,
    TrainingSettings,
    axis,
    markdown,
    panels,
    quality,
    reported,
    sae_config,
    save,
    train,
    tuned_cells,
)
from kronsae.model.normalizer import Normalizer
from kronsae.model.sae import SAE
from kronsae.properties.correlation import Correlations, correlations_of

FIGURE = "section 5.2, Fig. 6"
STATEMENT = (
    "How latents correlate within their head and with all others, in a trained KronSAE and in a "
    "random one."
)

BINS, LOWEST, HIGHEST = 60, -0.05, 0.25


@dataclasses.dataclass(frozen=True)
class Settings(TrainingSettings):
    tokens: int = axis(400_000, "tokens of a training")
    dict_size: int = axis(4096, "dictionary size F")
    shapes: tuple[str, ...] = axis(("m2n4", "m4n4", "m4n8"), "shapes of the heads")
    learning_rates: tuple[float, ...] = axis((1.6e-2,), "rates to choose from")


SMALLEST = SMALLEST_TRAINING | {"tokens": 2048, "dict_size": 128, "shapes": ("m2n4",)}
PAPER = QWEN | {"tokens": 125_000_000, "dict_size": 32768}


def cells(settings: Settings, runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = [
        {"dict_size": settings.dict_size, "shape": shape, "tokens": settings.tokens}
        for shape in settings.shapes
    ]
    return tuned_cells(rows, settings, runs)


def prepare(settings: Settings) -> Activations:
    return Activations(settings).hold(settings.tokens)


def run(settings: Settings, activations: Activations, cell: dict[str, Any]) -> dict[str, Any]:
    config = sae_config(cell["shape"], cell["dict_size"], settings.k)
    result = train(config, activations, settings, cell)
    random = uniform_sae(result.sae.config, activations.heldout, cell["seed"])
    random = random.to(result.sae.W_dec.device)
    return {
        **quality(result),
        "trained": summary(correlations_of(result.sae, activations.heldout)),
        "random": summary(correlations_of(random, activations.heldout)),
    }


@torch.no_grad()
def uniform_sae(config: SAEConfig, x: Tensor, seed: int) -> SAE:
    """An SAE of x [t, d] whose encoder is uniform in (-1, 1), up to scale, with no bias."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(config, generator=generator)
    sae.W_enc.copy_(2 * torch.rand(sae.W_enc.shape, generator=generator) - 1)
    normalizer = Normalizer.of(x)
    return sae.folded(normalizer.mean, normalizer.scale)


def summary(found: Correlations) -> dict[str, Any]:
    """Means, and the histogram of the first, as shares of bins (what is outside: the outermost)."""
    head = found.head[found.head.isfinite()]
    counts = torch.histc(head.clamp(LOWEST, HIGHEST), BINS, LOWEST, HIGHEST)
    return {
        "head": head.mean().item(),
        "others": found.others.mean().item(),
        "head_shares": (counts / counts.sum()).tolist(),
        "latents": len(found.others),
    }


def figures(runs: Sequence[Run], shape: str) -> dict[tuple[str, str], Spread]:
    """Mean correlations over the seeds, by weights and group of latents."""
    of_shape = reported(runs, shape=shape)
    return {
        (weights, group): Spread.of(run[weights][group] for run in of_shape)
        for weights in ("trained", "random")
        for group in ("head", "others")
    }


def conclude(settings: Settings, runs: Sequence[Run]) -> Conclusion:
    found = {shape: figures(runs, shape) for shape in settings.shapes}
    header = ["shape", "trained: own head", "all others", "random: own head", "all others"]
    lines = [[shape, *of_shape.values()] for shape, of_shape in found.items()]
    within = sum(f["trained", "head"].mean > f["trained", "others"].mean for f in found.values())
    learned = sum(f["trained", "head"].mean > f["random", "head"].mean for f in found.values())
    line = (
        f"Latents correlate more with their own head than with all others in {within} of "
        f"{len(found)} trained shapes, and more than in a head of random weights in {learned} "
        "(paper: a picture, Fig. 6)."
    )
    return Conclusion(markdown(header, lines), line)


def draw(settings: Settings, runs: Sequence[Run], path: Path) -> None:
    """How correlations within a head are distributed, trained and random, a panel each shape."""
    count = len(settings.shapes)
    figure, (row,) = panels(1, count, (4 * count, 3.2))
    edges = torch.linspace(LOWEST, HIGHEST, BINS + 1).tolist()
    for axes, shape in zip(row, settings.shapes, strict=True):
        for weights, color in (("trained", "C0"), ("random", "C7")):
            shares = [run[weights]["head_shares"] for run in reported(runs, shape=shape)]
            axes.stairs(torch.tensor(shares).mean(0).tolist(), edges, color=color, label=weights)
            others = figures(runs, shape)[weights, "others"].mean
            axes.axvline(others, color=color, linestyle=":", label=f"{weights}, all others")
        axes.set_title(shape)
        axes.set_xlabel("mean correlation with its head")
        axes.set_ylabel("share of latents")
    row[-1].legend(frameon=False, fontsize=8)
    save(figure, path)
