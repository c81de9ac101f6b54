"""TopK, Matryoshka and Switch SAEs with a Kron encoder, by sparsity. [KronSAE, Figs. 3, 10]"""

import operator
from dataclasses import dataclass
from typing import Any

from kronsae.experiments.experiment import EXPERIMENTS, axis
from kronsae.experiments.report import Across, Spread
from kronsae.experiments.training import EqualTokens
from kronsae.experiments.variants import dense_form, wins, with_dense_forms


@EXPERIMENTS.register("sparsity")
@dataclass(frozen=True)
class Sparsity(EqualTokens):
    figure = "Figs. 3, 10"
    statement = (
        "How a Kron encoder stands beside a dense one at each sparsity, in TopK, Matryoshka and "
        "Switch SAEs."
    )
    smallest = EqualTokens.smallest | {"k": (4, 8), "tokens": 1024}
    paper = EqualTokens.paper | {"k": (16, 32, 64, 128)}
    headings = {"k": "k"}
    across = Across("k", "k, active latents a token", log=2)

    k: tuple[int, ...] = axis((16, 32, 64, 128), "active latents a token")  # type: ignore[assignment]
    variants: tuple[str, ...] = axis(
        ("m2n4", "matryoshka-m2n4", "switch-m2n4"), "Kron forms, each held against its dense form"
    )
    seeds: int = axis(2, "trainings of each point")

    def compared(self) -> dict[str, Any]:
        return {"variant": with_dense_forms(self.variants), "k": self.k}

    def sentence(self, spreads: dict[tuple, Spread]) -> str:
        counts = [
            f"{kron} explains more than {dense_form(kron)} at {count} of {len(self.k)} k"
            for kron, count in wins(spreads, operator.gt).items()
        ]
        return (
            f"At equal tokens (not equal FLOPs) {', '.join(counts)} (paper: pictures, Figs. 3 and "
            "10)."
        )
