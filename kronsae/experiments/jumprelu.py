"""JumpReLU in place of TopK, with a dense and a Kron encoder. [KronSAE, App. A.6, Table 6]

Training only aims a JumpReLU SAE at k active latents a token, and more of them explain more. So
what is active on held-out tokens stands beside the aim, and JumpReLU is judged at the L0 that it
has, against the curve of TopK, unless it misses its aim by more than MISS. A learning rate at which
it does is chosen only where all do.
"""

import dataclasses
import math
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronsae.config import setting
from kronsae.experiments.common import (
    QWEN,
    SMALLEST_TRAINING,
    Activations,
    Conclusion,
    Run,
    Spread,
    TrainingSettings,
    axis,
    explained,
    markdown,
    panels,
    quality,
    reported,
    sae_config,
    save,
    train,
    tuned_cells,
)

FIGURE = "Table 6"
STATEMENT = "With a dense encoder JumpReLU explains as much as TopK; with a Kron encoder, less."

MISS = 0.1
"""Share of its aim by which L0 may be off and still count as met."""

PAPER_EV = {
    "TopK": {32: 0.809, 50: 0.837, 64: 0.852},
    "JumpReLU": {32: 0.813, 50: 0.838, 64: 0.844},
    "Kron TopK": {32: 0.814, 50: 0.840, 64: 0.853},
    "Kron JumpReLU": {32: 0.790, 50: 0.817, 64: 0.828},
}
"""Explained variance by L0."""


@dataclasses.dataclass(frozen=True)
class Settings(TrainingSettings):
    k: tuple[int, ...] = axis((32, 50, 64), "active latents a token (JumpReLU aims at them)")
    tokens: int = axis(200_000, "tokens of a training")
    dict_size: int = axis(4096, "dictionary size F")
    shape: str = setting("m2n4", "shape of the heads of the Kron forms")


SMALLEST = SMALLEST_TRAINING | {"k": (4, 8), "tokens": 2048, "dict_size": 128}
PAPER = QWEN | {"k": (32, 50, 64), "tokens": 125_000_000, "dict_size": 32768}


def variants(settings: Settings) -> dict[str, str]:
    """Variants by what the paper calls them."""
    return {
        "TopK": "topk",
        "JumpReLU": "jumprelu",
        "Kron TopK": settings.shape,
        "Kron JumpReLU": f"jumprelu-{settings.shape}",
    }


def cells(settings: Settings, runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = [
        {
            "dict_size": settings.dict_size,
            "variant": variant,
            "k": k,
            "tokens": settings.tokens,
        }
        for k in settings.k
        for variant in variants(settings).values()
    ]
    return tuned_cells(rows, settings, runs, merit)


def merit(run: Run) -> tuple[float, float]:
    """What it explains counts among the runs that meet their L0; else who is nearest to it."""
    return -max(MISS, abs(run["l0"] / run["k"] - 1)), run["explained_variance"]


def prepare(settings: Settings) -> Activations:
    return Activations(settings).hold(settings.tokens)


def run(settings: Settings, activations: Activations, cell: dict[str, Any]) -> dict[str, Any]:
    sae = sae_config(cell["variant"], cell["dict_size"], cell["k"])
    return quality(train(sae, activations, settings, cell))


def measured(settings: Settings, runs: Sequence[Run]) -> dict[tuple[str, int], list[Spread]]:
    """L0 and explained variance, by the paper's name and k."""
    return {
        (name, k): [
            Spread.of(each["l0"] for each in reported(runs, variant=variant, k=k)),
            explained(runs, variant=variant, k=k),
        ]
        for k in settings.k
        for name, variant in variants(settings).items()
    }


def on_curve(points: Sequence[tuple[float, float]], l0: float) -> float:
    """Explained variance at an L0: straight lines over log L0 through points (L0, EV).

    The outermost lines go on beyond the ends; one point stands for every L0.
    """
    points = sorted(points)
    if len(points) == 1:
        return points[0][1]
    right = min(max(1, bisect(points, (l0,))), len(points) - 1)
    (low, ev_low), (high, ev_high) = points[right - 1 : right + 1]
    return ev_low + (ev_high - ev_low) * math.log(l0 / low) / math.log(high / low)


def conclude(settings: Settings, runs: Sequence[Run]) -> Conclusion:
    found = measured(settings, runs)
    lines = [
        [k, name, l0.to(1), ev, f"{PAPER_EV[name][k]:.3f}" if k in PAPER_EV[name] else "-"]
        for (name, k), (l0, ev) in found.items()
    ]
    verdicts = []
    for name, rival in (("JumpReLU", "TopK"), ("Kron JumpReLU", "Kron TopK")):
        curve = [(l0.mean, ev.mean) for l0, ev in (found[rival, k] for k in settings.k)]
        met = [k for k in settings.k if abs(found[name, k][0].mean / k - 1) <= MISS]
        ours = sum(ev.mean > on_curve(curve, l0.mean) for l0, ev in (found[name, k] for k in met))
        theirs = sum(ev > PAPER_EV[rival][k] for k, ev in PAPER_EV[name].items())
        verdicts.append(
            f"{name} meets {len(met)} of {len(settings.k)} L0s within {MISS:.0%} and explains "
            f"more than {rival} would at its L0 in {ours} of them "
            f"(paper: {theirs} of {len(PAPER_EV[name])})"
        )
    shares = [l0.mean / k for (name, k), (l0, _) in found.items() if "JumpReLU" in name]
    line = (
        f"At equal tokens {'; '.join(verdicts)}. L0 with JumpReLU is {min(shares):.2f} to "
        f"{max(shares):.2f} times what it aimed at."
    )
    header = ["L0 aimed at", "SAE", "L0", "explained variance", "paper"]
    return Conclusion(markdown(header, lines), line)


def draw(settings: Settings, runs: Sequence[Run], path: Path) -> None:
    """Explained variance against the measured L0, a line each SAE."""
    figure, ((axes,),) = panels(1, 1, (5.5, 3.6))
    found = measured(settings, runs)
    for name in variants(settings):
        points = [(l0.mean, *ev) for l0, ev in (found[name, k] for k in sorted(settings.k))]
        l0s, means, deviations = zip(*points, strict=True)
        axes.errorbar(l0s, means, deviations, fmt="o-", capsize=3, label=name)
    axes.set_xlabel("L0, active latents a token")
    axes.set_ylabel("explained variance")
    axes.legend(frameon=False)
    save(figure, path)
