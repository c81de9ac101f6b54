"""KronSAE against TopK over the layers of a model, at equal tokens. [KronSAE, Fig. 12]"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

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

FIGURE = "Fig. 12"
STATEMENT = "How KronSAE stands beside TopK at each layer of a model."


@dataclasses.dataclass(frozen=True)
class Settings(TrainingSettings):
    layer: tuple[int, ...] = axis((0, 1, 2, 3), "residual streams after these blocks, from 0")
    tokens: int = axis(200_000, "tokens of a training")
    dict_size: int = axis(4096, "dictionary size F")
    variants: tuple[str, ...] = axis(("topk", "m2n4", "m4n4"), "what is compared, with the first")


SMALLEST = SMALLEST_TRAINING | {
    "tokens": 2048,
    "layer": (0, 2),
    "dict_size": 128,
    "variants": ("topk", "m4n4"),
}
PAPER = QWEN | {"tokens": 125_000_000, "layer": tuple(range(0, 28, 4)), "dict_size": 32768}


def cells(settings: Settings, runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = [
        {"layer": layer, "dict_size": settings.dict_size, "variant": variant}
        for layer in settings.layer
        for variant in settings.variants
    ]
    return tuned_cells([{**row, "tokens": settings.tokens} for row in rows], settings, runs)


def prepare(settings: Settings) -> Callable[[int], Activations]:
    """Activations of a layer, those of the last one asked for being kept."""
    return lru_cache(maxsize=1)(lambda layer: Activations(settings, layer).hold(settings.tokens))


def run(
    settings: Settings, activations_of: Callable[[int], Activations], cell: dict[str, Any]
) -> dict[str, Any]:
    sae = sae_config(cell["variant"], cell["dict_size"], settings.k)
    return quality(train(sae, activations_of(cell["layer"]), settings, cell))


def conclude(settings: Settings, runs: Sequence[Run]) -> Conclusion:
    baseline, *others = settings.variants
    found = {
        (layer, variant): explained(runs, layer=layer, variant=variant)
        for layer in settings.layer
        for variant in settings.variants
    }
    lines = [
        [layer, *(found[layer, variant] for variant in settings.variants)]
        for layer in settings.layer
    ]
    gaps = {
        variant: [
            found[layer, variant].mean - found[layer, baseline].mean for layer in settings.layer
        ]
        for variant in others
    }
    line = (
        f"Explained variance above that of {baseline}, over the layers: "
        + ", ".join(f"{name} {min(gap):+.4f} to {max(gap):+.4f}" for name, gap in gaps.items())
        + ". (The paper has a picture of it, and no number.)"
    )
    return Conclusion(markdown(["layer", *settings.variants], lines), line)


def draw(settings: Settings, runs: Sequence[Run], path: Path) -> None:
    """Explained variance by layer, a line each variant."""
    figure, ((axes,),) = panels(1, 1, (5.5, 3.4))
    for variant in settings.variants:
        found = [explained(runs, layer=layer, variant=variant) for layer in settings.layer]
        means, deviations = zip(*found, strict=True)
        axes.errorbar(settings.layer, means, deviations, fmt="o-", capsize=3, label=variant)
    axes.set_xticks(settings.layer)
    axes.set_xlabel("layer")
    axes.set_ylabel("explained variance")
    axes.legend(frameon=False)
    save(figure, path)
