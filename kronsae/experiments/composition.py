"""How base and extension compose: mAND against ReLU·ReLU and u·v. [KronSAE, Table 1]"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronsae.config import COMPOSITIONS
from kronsae.experiments.common import (
    QWEN,
    SMALLEST_TRAINING,
    Activations,
    Conclusion,
    Run,
    TrainingSettings,
    axis,
    explained,
    markdown,
    panels,
    quality,
    sae_config,
    save,
    train,
    tuned_cells,
)

FIGURE = "Table 1"
STATEMENT = "mAND explains more than ReLU·ReLU, which explains more than u·v, at equal tokens."

PAPER_EV = {
    (32768, "m2n4"): (0.8336, 0.8267, 0.8237),
    (32768, "m4n8"): (0.8220, 0.8191, 0.8143),
    (65536, "m2n4"): (0.8445, 0.8328, 0.8297),
    (65536, "m4n8"): (0.8350, 0.8297, 0.8251),
}
"""By dict_size and shape: explained variance for mand, relu_mul, mul."""


@dataclasses.dataclass(frozen=True)
class Settings(TrainingSettings):
    tokens: int = axis(200_000, "tokens of a training")
    dict_sizes: tuple[int, ...] = axis((4096,), "dictionary sizes F")
    shapes: tuple[str, ...] = axis(("m2n4", "m4n8"), "shapes of the heads")
    learning_rates: tuple[float, ...] = axis((8e-3, 1.6e-2, 2.4e-2), "rates to choose from")


SMALLEST = SMALLEST_TRAINING | {"tokens": 2048, "dict_sizes": (128,)}
PAPER = QWEN | {"tokens": 125_000_000, "dict_sizes": (32768, 65536)}


def cells(settings: Settings, runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = [
        {
            "dict_size": size,
            "shape": shape,
            "composition": composition,
            "tokens": settings.tokens,
        }
        for size in settings.dict_sizes
        for shape in settings.shapes
        for composition in COMPOSITIONS
    ]
    return tuned_cells(rows, settings, runs)


def prepare(settings: Settings) -> Activations:
    return Activations(settings).hold(settings.tokens)


def run(settings: Settings, activations: Activations, cell: dict[str, Any]) -> dict[str, Any]:
    variant = f"{cell['shape']}-{cell['composition']}"
    sae = sae_config(variant, cell["dict_size"], settings.k)
    return quality(train(sae, activations, settings, cell))


def conclude(settings: Settings, runs: Sequence[Run]) -> Conclusion:
    lines, first, verdicts = [], [], []
    for size in settings.dict_sizes:
        for shape in settings.shapes:
            found = [
                explained(runs, dict_size=size, shape=shape, composition=composition)
                for composition in COMPOSITIONS
            ]
            lines.append([f"{size:,}", shape, *found])
            first.append(found[0].mean > max(found[1].mean, found[2].mean))
            verdicts.append(found[0].mean > found[1].mean > found[2].mean)
    published = [
        [f"{size:,}, paper", shape, *(f"{ev:.4f}" for ev in values)]
        for (size, shape), values in PAPER_EV.items()
    ]
    header = ["F", "shape", *COMPOSITIONS]
    line = (
        f"mand explains most in {sum(first)} of {len(first)} rows (paper: {len(PAPER_EV)} of "
        f"{len(PAPER_EV)}); mand > relu_mul > mul in {sum(verdicts)} (paper: {len(PAPER_EV)})."
    )
    return Conclusion(markdown(header, lines + published), line)


def draw(settings: Settings, runs: Sequence[Run], path: Path) -> None:
    """Explained variance by composition, a panel each dictionary size."""
    figure, (row,) = panels(1, len(settings.dict_sizes), (4.5 * len(settings.dict_sizes), 3.2))
    for axes, size in zip(row, settings.dict_sizes, strict=True):
        for shape in settings.shapes:
            found = [
                explained(runs, dict_size=size, shape=shape, composition=composition)
                for composition in COMPOSITIONS
            ]
            means, deviations = zip(*found, strict=True)
            axes.errorbar(COMPOSITIONS, means, deviations, fmt="o", capsize=3, label=shape)
        axes.set_title(f"F = {size:,}")
        axes.set_ylabel("explained variance")
        axes.legend(frameon=False)
    save(figure, path)
