"""JumpReLU in place of TopK, with a dense and a Kron encoder. [KronSAE, App. A.6, Table 6]

Training only aims a JumpReLU SAE at k active latents a token, and more of them explain more. So
the table has the L0 on held-out tokens beside the aim, and JumpReLU is judged at the L0 that it
has, against the curve of TopK, unless it misses its aim by more than MISS. A learning rate at which
it misses is chosen only if it misses at all rates.
"""

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kronsae.config import setting
from kronsae.experiments.experiment import EXPERIMENTS, Run, axis
from kronsae.experiments.report import Across, explained, markdown
from kronsae.experiments.training import EqualTokens

MISS = 0.02
"""Share of its aim by which L0 may be off and still count as met."""

PAPER_EV = {
    "TopK": {32: 0.809, 50: 0.837, 64: 0.852},
    "JumpReLU": {32: 0.813, 50: 0.838, 64: 0.844},
    "Kron TopK": {32: 0.814, 50: 0.840, 64: 0.853},
    "Kron JumpReLU": {32: 0.790, 50: 0.817, 64: 0.828},
}
"""Explained variance by L0."""


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


@EXPERIMENTS.register("jumprelu")
@dataclass(frozen=True)
class JumpReLU(EqualTokens):
    figure = "Table 6"
    statement = "With a dense encoder JumpReLU explains as much as TopK; with a Kron encoder, less."
    smallest = EqualTokens.smallest | {"k": (4, 8)}
    paper = EqualTokens.paper | {"k": (32, 50, 64)}
    headings = {"k": "L0 aimed at"}
    across = Across("l0", "L0, active latents a token")

    k: tuple[int, ...] = axis((32, 50, 64), "active latents a token (JumpReLU aims at them)")  # type: ignore[assignment]
    shape: str = setting("m2n4", "shape of the heads of the Kron forms")

    def names(self) -> dict[str, str]:
        """The paper's name of each variant."""
        return {
            "topk": "TopK",
            "jumprelu": "JumpReLU",
            self.shape: "Kron TopK",
            f"jumprelu-{self.shape}": "Kron JumpReLU",
        }

    def compared(self) -> dict[str, Any]:
        return {"k": self.k, "variant": self.names()}

    def merit(self, run: Run) -> tuple[float, float]:
        """Runs that meet their L0 rank by explained variance, above the rest, nearest first."""
        return -max(MISS, abs(run["l0"] / run["k"] - 1)), run["explained_variance"]

    def conclude(self, runs: Sequence[Run]) -> tuple[str, str]:
        evs = explained(runs, "variant", "k")
        l0s = explained(runs, "variant", "k", figure="l0")
        dead = explained(runs, "variant", "k", figure="dead_share")
        names = self.names()
        figures = {(names[variant], k): (l0s[variant, k], evs[variant, k]) for variant, k in evs}
        lines = [
            [
                *(k, names[variant], l0s[variant, k].to(1), ev, dead[variant, k].to(3)),
                f"{PAPER_EV[names[variant]][k]:.3f}" if k in PAPER_EV[names[variant]] else "-",
            ]
            for (variant, k), ev in evs.items()
        ]
        verdicts = []
        for name, rival in (("JumpReLU", "TopK"), ("Kron JumpReLU", "Kron TopK")):
            curve = [(l0.mean, ev.mean) for l0, ev in (figures[rival, k] for k in self.k)]
            met = [k for k in self.k if abs(figures[name, k][0].mean / k - 1) <= MISS]
            ours = sum(
                ev.mean > on_curve(curve, l0.mean) for l0, ev in (figures[name, k] for k in met)
            )
            theirs = sum(ev > PAPER_EV[rival][k] for k, ev in PAPER_EV[name].items())
            verdicts.append(
                f"{name} meets {len(met)} of {len(self.k)} L0s within {MISS:.0%} and explains "
                f"more than {rival} would at its L0 in {ours} of them "
                f"(paper: {theirs} of {len(PAPER_EV[name])})"
            )
        shares = [l0.mean / k for (name, k), (l0, _) in figures.items() if "JumpReLU" in name]
        line = (
            f"At equal tokens {'; '.join(verdicts)}. L0 with JumpReLU is {min(shares):.2f} to "
            f"{max(shares):.2f} times what it aimed at."
        )
        header = ["L0 aimed at", "SAE", "L0", "explained variance", "dead latents", "paper"]
        return markdown(header, lines), line
