"""JumpReLU in place of TopK, with a dense and a Kron encoder. [KronSAE, App. A.6, Table 6]

Training only aims a JumpReLU SAE at k active latents a token, and more of them explain more. So
the table has two L0s beside the aim: that of the last steps, which says whether training met it,
and that on held-out tokens, which may differ since their text is another. JumpReLU is judged at the
L0 on held-out tokens, against the curve of TopK, unless training missed its aim by more than MISS.
A learning rate at which it misses is chosen only if it misses at all rates.
"""

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kronsae.config import setting
from kronsae.errors import InputError
from kronsae.experiments.activations import Activations
from kronsae.experiments.experiment import EXPERIMENTS, Run, axis
from kronsae.experiments.report import Across, explained, markdown
from kronsae.experiments.training import EqualTokens, quality

MISS = 0.02
"""Share of its aim by which L0 may be off in training and still count as met."""

LAST = 0.2
"""Share of the steps, the last ones, over which the L0 in training is the mean."""

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
    across = Across("l0", "L0 on held-out tokens")

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

    def cells(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        if any("l0_training" not in run for run in runs):
            raise InputError(
                "the runs there are of an older version, which did not keep the L0 in training: "
                "choose another --out, or remove jumprelu.json"
            )
        return super().cells(runs)

    def merit(self, run: Run) -> tuple[bool, float, float]:
        """Runs that meet their L0 rank by explained variance, above the rest, nearest first.

        Those that explain nothing come last, whatever their L0: they have diverged.
        """
        missed_by, explained = abs(run["l0_training"] / run["k"] - 1), super().merit(run)
        return explained > 0, -max(MISS, missed_by), explained

    def run(self, shared: Activations, cell: dict[str, Any]) -> dict[str, Any]:
        result = self.train(self.sae(cell), shared, cell, log_every=1)
        l0s = [record["l0"] for record in result.history if record["kind"] == "train"]
        last = l0s[-math.ceil(LAST * len(l0s)) :]
        return {**quality(result), "l0_training": fmean(last)}

    def conclude(self, runs: Sequence[Run]) -> tuple[str, str]:
        evs = explained(runs, "variant", "k")
        l0s = explained(runs, "variant", "k", figure="l0")
        trained = explained(runs, "variant", "k", figure="l0_training")
        dead = explained(runs, "variant", "k", figure="dead_share")
        names = self.names()
        figures = {(names[variant], k): (l0s[variant, k], evs[variant, k]) for variant, k in evs}
        shares = {(names[variant], k): l0.mean / k for (variant, k), l0 in trained.items()}
        lines = [
            [
                *(k, names[variant], trained[variant, k].to(1), l0s[variant, k].to(1), ev),
                dead[variant, k].to(3),
                f"{PAPER_EV[names[variant]][k]:.3f}" if k in PAPER_EV[names[variant]] else "-",
            ]
            for (variant, k), ev in evs.items()
        ]
        verdicts = []
        at_its_l0 = "would at its L0" if len(self.k) > 1 else "does at an L0 of k"
        for name, rival in (("JumpReLU", "TopK"), ("Kron JumpReLU", "Kron TopK")):
            curve = [(l0.mean, ev.mean) for l0, ev in (figures[rival, k] for k in self.k)]
            met = [k for k in self.k if abs(shares[name, k] - 1) <= MISS]
            ours = sum(
                ev.mean > on_curve(curve, l0.mean) for l0, ev in (figures[name, k] for k in met)
            )
            theirs = sum(ev > PAPER_EV[rival][k] for k, ev in PAPER_EV[name].items())
            verdicts.append(
                f"{name} meets {len(met)} of {len(self.k)} L0s within {MISS:.0%} and explains "
                f"more than {rival} {at_its_l0} in {ours} of them "
                f"(paper: {theirs} of {len(PAPER_EV[name])})"
            )
        jump = [share for (name, _), share in shares.items() if "JumpReLU" in name]
        line = (
            f"At equal tokens {'; '.join(verdicts)}. L0 with JumpReLU is at the end of training "
            f"{min(jump):.2f} to {max(jump):.2f} times what it aimed at."
        )
        header = ["L0 aimed at", "SAE", "L0 in training", "L0 held out", "explained variance"]
        header += ["dead latents", "paper"]
        return markdown(header, lines), line
