"""How base and extension compose: mAND against ReLU·ReLU and u·v. [KronSAE, Table 1]"""

from dataclasses import dataclass
from typing import Any

from kronsae.config import COMPOSITIONS
from kronsae.experiments.experiment import EXPERIMENTS, axis
from kronsae.experiments.report import Across, Spread
from kronsae.experiments.training import QWEN, SMALLEST, TrainingExperiment, product

PAPER_EV = {
    (32768, "m2n4"): (0.8336, 0.8267, 0.8237),
    (32768, "m4n8"): (0.8220, 0.8191, 0.8143),
    (65536, "m2n4"): (0.8445, 0.8328, 0.8297),
    (65536, "m4n8"): (0.8350, 0.8297, 0.8251),
}
"""By dict_size and shape: explained variance for mand, relu_mul, mul."""


@EXPERIMENTS.register("composition")
@dataclass(frozen=True)
class Composition(TrainingExperiment):
    figure = "Table 1"
    statement = "mAND explains more than ReLU·ReLU, which explains more than u·v, at equal tokens."
    smallest = SMALLEST | {"tokens": 2048, "dict_sizes": (128,)}
    paper = QWEN | {"tokens": 125_000_000, "dict_sizes": (32768, 65536)}
    headings = {"dict_size": "F", "shape": "shape"}
    column = "composition"
    published = [
        [f"{size:,}, paper", shape, *(f"{ev:.4f}" for ev in values)]
        for (size, shape), values in PAPER_EV.items()
    ]
    line, across = "shape", Across("composition", "")

    tokens: int = axis(200_000, "tokens of a training")
    dict_sizes: tuple[int, ...] = axis((4096,), "dictionary sizes F")
    shapes: tuple[str, ...] = axis(("m2n4", "m4n8"), "shapes of the heads")
    learning_rates: tuple[float, ...] = axis((8e-3, 1.6e-2, 2.4e-2), "rates to choose from")

    def rows(self) -> list[dict[str, Any]]:
        grid = {"dict_size": self.dict_sizes, "shape": self.shapes, "composition": COMPOSITIONS}
        return product(**grid, tokens=self.tokens)

    def variant(self, cell: dict[str, Any]) -> str:
        return f"{cell['shape']}-{cell['composition']}"

    def sentence(self, spreads: dict[tuple, Spread]) -> str:
        points = dict.fromkeys(key[:-1] for key in spreads)
        ev = [[spreads[point + (name,)].mean for name in COMPOSITIONS] for point in points]
        first = sum(mand > max(others) for mand, *others in ev)
        ordered = sum(mand > relu_mul > mul for mand, relu_mul, mul in ev)
        return (
            f"mand explains most in {first} of {len(ev)} rows (paper: {len(PAPER_EV)} of "
            f"{len(PAPER_EV)}); mand > relu_mul > mul in {ordered} (paper: {len(PAPER_EV)})."
        )
