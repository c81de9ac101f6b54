"""One SAE for every k, against an SAE for each. [Balagansky et al. 2025, arXiv:2505.24473]"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronsae.config import SAEConfig, setting
from kronsae.experiments.activations import Activations
from kronsae.experiments.experiment import EXPERIMENTS, Run
from kronsae.experiments.report import Across, Spread
from kronsae.experiments.training import EqualTokens, quality
from kronsae.metrics.heldout import Heldout, evaluate
from kronsae.model.massive import rule_of

ONE, EACH, LARGEST = "one SAE for all k", "an SAE for each k", "the SAE of the largest k"


@EXPERIMENTS.register("hierarchical")
@dataclasses.dataclass(frozen=True)
class Hierarchical(EqualTokens):
    cited = "HierarchicalTopK"
    figure = "arXiv:2505.24473"
    statement = "One SAE, trained for all k, explains as much at each as the SAE trained for it."
    smallest = EqualTokens.smallest | {"k": (4, 8), "tokens": 1024}
    paper = EqualTokens.paper | {"k": (8, 16, 32, 64, 128)}
    headings = {"k": "k"}
    column = line = "trained"
    across = Across("k", "k, active latents a token", log=2)

    k: tuple[int, ...] = setting((4, 8, 16, 32, 64), "active latents a token")  # type: ignore[assignment]
    variant_of_all: str = setting("topk", "SAE of all trainings: topk, or a Kron form, as m2n4")

    def compared(self) -> dict[str, Any]:
        return {"trained": (ONE, EACH), "k": self.k}

    def rows(self) -> list[dict[str, Any]]:
        """One SAE for all k is trained at the largest alone."""
        largest = max(self.k)
        return [row for row in super().rows() if row["trained"] == EACH or row["k"] == largest]

    def variant(self, cell: dict[str, Any]) -> str:
        return self.variant_of_all

    def sae(self, cell: dict[str, Any]) -> SAEConfig:
        sae = super().sae(cell)
        objective = "hierarchical" if cell["trained"] == ONE else "plain"
        return dataclasses.replace(sae, objective=objective, objective_settings=None)

    def run(self, shared: Activations, cell: dict[str, Any]) -> dict[str, Any]:
        result = self.train(self.sae(cell), shared, cell)
        assert result.sae is not None
        sae, heldout = result.sae, Heldout(shared.heldout).leaving_out(rule_of(result.sae.metadata))
        by_k = {
            str(k): evaluate(sae.with_k(k), heldout)["explained_variance"]
            for k in self.k
            if k <= cell["k"]
        }
        return {**quality(result), "by_k": by_k}

    def merit(self, run: Run) -> Any:
        if run["trained"] == ONE:
            return statistics.fmean(run["by_k"].values())
        return run["explained_variance"]

    def points(self, runs: Sequence[Run]) -> list[Run]:
        """A run for each SAE and each k at which it is compared."""
        points = []
        for run in runs:
            for k, explained in run["by_k"].items():
                point = {**run, "k": int(k), "explained_variance": explained}
                if run["trained"] == ONE or int(k) == run["k"]:
                    points.append(point)
                if run["trained"] == EACH and run["k"] == max(self.k):
                    points.append({**point, "trained": LARGEST})
        return points

    def conclude(self, runs: Sequence[Run]) -> tuple[str, str]:
        points = sorted(self.points(runs), key=lambda run: run["k"])
        return super().conclude(points)

    def draw(self, runs: Sequence[Run], path: Path) -> None:
        super().draw(self.points(runs), path)

    def subject(self) -> str:
        return f"{self.variant_of_all}, "

    def sentence(self, spreads: dict[tuple, Spread]) -> str:
        def above(other: str, k: int) -> str:
            gain = spreads[k, ONE].mean - spreads[k, other].mean
            return f"{gain:+.4f} at k = {k}"

        ks = sorted(self.k)
        return (
            "One SAE for all k explains, beside the SAE trained for that k, "
            f"{', '.join(above(EACH, k) for k in ks)}; beside the SAE of the largest k, "
            f"{', '.join(above(LARGEST, k) for k in ks[:-1])}."
        )
