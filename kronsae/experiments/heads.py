"""Explained variance against h, m and n at a fixed dictionary size. [KronSAE, Fig. 2, App. A.8]"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronsae.experiments.experiment import EXPERIMENTS, Run, axis
from kronsae.experiments.report import Across, Spread, curves, picture
from kronsae.experiments.training import EqualTokens, product
from kronsae.metrics.figures import pearson


@EXPERIMENTS.register("heads")
@dataclass(frozen=True)
class Heads(EqualTokens):
    figure = "Fig. 2, App. A.8"
    statement = "At a fixed dictionary size, explained variance rises with h and falls with m."
    smallest = EqualTokens.smallest | {"m": (1, 4), "n": (4, 8)}
    headings = {"m": "m"}
    column = "n"

    m: tuple[int, ...] = axis((1, 2, 4, 8), "base widths")
    n: tuple[int, ...] = axis((4, 8, 16), "extension widths; those below m are left out")

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"h": self.dict_size // (row["m"] * row["n"]), **row}
            for row in product(m=self.m, n=self.n, tokens=self.tokens)
            if row["m"] <= row["n"]
        ]

    def variant(self, cell: dict[str, Any]) -> str:
        return f"h{cell['h']}m{cell['m']}n{cell['n']}"

    def sentence(self, spreads: dict[tuple, Spread]) -> str:
        ev = [spread.mean for spread in spreads.values()]
        with_h = pearson([math.log2(self.dict_size / (m * n)) for m, n in spreads], ev)
        with_m = pearson([math.log2(m) for m, _ in spreads], ev)
        with_n = pearson([math.log2(n) for _, n in spreads], ev)
        return (
            f"Over the {len(spreads)} shapes explained variance correlates with log h by "
            f"{with_h:+.2f}, with log m by {with_m:+.2f}, with log n by {with_n:+.2f} (paper: it "
            "rises with h and falls with m)."
        )

    def draw(self, runs: Sequence[Run], path: Path) -> None:
        """Explained variance against h, a line each m; then against m, a line each n."""
        with picture(path, 2) as (left, right):
            curves(left, runs, "m", Across("h", "heads h", log=2))
            curves(right, runs, "n", Across("m", "base width m", log=2))
