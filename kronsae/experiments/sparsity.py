"""TopK, Matryoshka and Switch SAEs with a Kron encoder, by sparsity. [KronSAE, Figs. 3, 10]"""

import dataclasses
from collections.abc import Sequence
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
    dense_form,
    explained,
    markdown,
    panels,
    quality,
    sae_config,
    save,
    train,
    tuned_cells,
    with_dense_forms,
)

FIGURE = "Figs. 3, 10"
STATEMENT = (
    "How a Kron encoder stands beside a dense one at each sparsity, in TopK, Matryoshka and Switch "
    "SAEs."
)


@dataclasses.dataclass(frozen=True)
class Settings(TrainingSettings):
    k: tuple[int, ...] = axis((16, 32, 64, 128), "active latents a token")
    tokens: int = axis(200_000, "tokens of a training")
    dict_size: int = axis(4096, "dictionary size F")
    variants: tuple[str, ...] = axis(
        ("m2n4", "matryoshka-m2n4", "switch-m2n4"), "Kron forms, each held against its dense form"
    )
    seeds: int = axis(2, "trainings of each point")


SMALLEST = SMALLEST_TRAINING | {"k": (4, 8), "tokens": 1024, "dict_size": 128}
PAPER = QWEN | {"k": (16, 32, 64, 128), "tokens": 125_000_000, "dict_size": 32768}


def cells(settings: Settings, runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = [
        {
            "dict_size": settings.dict_size,
            "variant": variant,
            "k": k,
            "tokens": settings.tokens,
        }
        for variant in with_dense_forms(settings.variants)
        for k in settings.k
    ]
    return tuned_cells(rows, settings, runs)


def prepare(settings: Settings) -> Activations:
    return Activations(settings).hold(settings.tokens)


def run(settings: Settings, activations: Activations, cell: dict[str, Any]) -> dict[str, Any]:
    sae = sae_config(cell["variant"], cell["dict_size"], cell["k"])
    return quality(train(sae, activations, settings, cell))


def conclude(settings: Settings, runs: Sequence[Run]) -> Conclusion:
    variants = with_dense_forms(settings.variants)
    found = {
        (k, variant): explained(runs, k=k, variant=variant)
        for k in settings.k
        for variant in variants
    }
    krons = [variant for variant in variants if variant != dense_form(variant)]
    wins = {
        kron: sum(found[k, kron].mean > found[k, dense_form(kron)].mean for k in settings.k)
        for kron in krons
    }
    line = (
        "At equal tokens (not equal FLOPs) "
        + ", ".join(
            f"{kron} explains more than {dense_form(kron)} at {count} of {len(settings.k)} k"
            for kron, count in wins.items()
        )
        + " (paper: pictures, Figs. 3 and 10)."
    )
    lines = [[k, *(found[k, variant] for variant in variants)] for k in settings.k]
    return Conclusion(markdown(["k", *variants], lines), line)


def draw(settings: Settings, runs: Sequence[Run], path: Path) -> None:
    """Explained variance by k: a colour each dense form, broken lines with a Kron encoder."""
    figure, ((axes,),) = panels(1, 1, (5.5, 3.8))
    variants = with_dense_forms(settings.variants)
    families = list(dict.fromkeys(map(dense_form, variants)))
    ks = sorted(settings.k)
    for variant in variants:
        found = [explained(runs, k=k, variant=variant) for k in ks]
        means, deviations = zip(*found, strict=True)
        family = dense_form(variant)
        axes.errorbar(
            ks,
            means,
            deviations,
            fmt="o-" if variant == family else "s--",
            color=f"C{families.index(family)}",
            capsize=3,
            label=variant,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, map(str, ks))
    axes.set_xlabel("k, active latents a token")
    axes.set_ylabel("explained variance")
    axes.set_title(f"F = {settings.dict_size:,}, {settings.tokens:,} tokens")
    # Six curves leave no room within the axes.
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
