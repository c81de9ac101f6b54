"""KronSAE against TopK over the layers of a model, at equal tokens. [KronSAE, Fig. 12]"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kronsae.experiments.activations import Activations
from kronsae.experiments.experiment import EXPERIMENTS, axis
from kronsae.experiments.report import Across, Spread
from kronsae.experiments.training import EqualTokens


@EXPERIMENTS.register("layers")
@dataclass(frozen=True)
class Layers(EqualTokens):
    figure = "Fig. 12"
    statement = "How KronSAE stands beside TopK at each layer of a model."
    smallest = EqualTokens.smallest | {"layer": (0, 2), "variants": ("topk", "m4n4")}
    paper = EqualTokens.paper | {"layer": tuple(range(0, 28, 4))}
    headings = {"layer": "layer"}
    across = Across("layer", "layer")

    layer: tuple[int, ...] = axis((0, 1, 2, 3), "residual streams after these blocks, from 0")  # type: ignore[assignment]
    variants: tuple[str, ...] = axis(("topk", "m2n4", "m4n4"), "what is compared, with the first")

    def compared(self) -> dict[str, Any]:
        return {"layer": self.layer, "variant": self.variants}

    def prepare(self) -> Callable[[int], Activations]:
        """Activations of a layer, those of the last one asked for being kept."""
        return lru_cache(maxsize=1)(lambda layer: self.activations(layer=layer))

    def run(self, shared: Callable[[int], Activations], cell: dict[str, Any]) -> dict[str, Any]:
        return super().run(shared(cell["layer"]), cell)

    def sentence(self, spreads: dict[tuple, Spread]) -> str:
        baseline, *others = self.variants
        gaps = {
            name: [spreads[at, name].mean - spreads[at, baseline].mean for at in self.layer]
            for name in others
        }
        return (
            f"Explained variance above that of {baseline}, over the layers: "
            + ", ".join(f"{name} {min(gap):+.4f} to {max(gap):+.4f}" for name, gap in gaps.items())
            + ". (The paper has a picture of it, and no number.)"
        )
