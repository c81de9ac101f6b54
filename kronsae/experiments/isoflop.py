"""Explained variance at equal FLOPs, over budgets and dictionary sizes. [KronSAE, Figs. 1, 9]

A budget is what a TopK SAE of the same dictionary size spends on so many tokens (eq. 7); a variant
with a cheaper encoder sees more tokens for it. The learning rate is chosen for each point. A
Matryoshka SAE costs what its plain form does: one pass over the active latents reconstructs from
all nested prefixes.
"""

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
from kronsae.model.flops import equal_budget, flops_per_token

FIGURE = "Figs. 1, 9"
STATEMENT = "How much a Kron encoder explains with the FLOPs of a dense one."

BASELINE = "topk"
"""The variant whose FLOPs are the budget."""


@dataclasses.dataclass(frozen=True)
class Settings(TrainingSettings):
    budgets: tuple[int, ...] = axis((100_000, 200_000, 400_000), "tokens that a TopK SAE sees")
    dict_sizes: tuple[int, ...] = axis((2048, 4096), "dictionary sizes F")
    variants: tuple[str, ...] = axis(
        ("m2n4", "m4n4", "matryoshka-m2n4"), "Kron forms, each held against its dense form"
    )
    seeds: int = axis(2, "trainings of each point")


SMALLEST = SMALLEST_TRAINING | {
    "budgets": (1024, 2048),
    "dict_sizes": (128,),
    "variants": ("m2n4", "matryoshka-m2n4"),
}
PAPER = QWEN | {
    "budgets": (125_000_000, 500_000_000, 1_000_000_000, 2_000_000_000),
    "dict_sizes": (32768, 65536, 131072),
}


def cells(settings: Settings, runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = [
        {"dict_size": size, "variant": variant, "budget": budget}
        for size in settings.dict_sizes
        for variant in compared(settings)
        for budget in settings.budgets
    ]
    return tuned_cells(rows, settings, runs)


def compared(settings: Settings) -> tuple[str, ...]:
    """All variants: the baseline, Kron forms, and what they are held against."""
    return with_dense_forms((BASELINE, *settings.variants))


def equal_flops_tokens(variant: str, dict_size: int, k: int, d_model: int, budget: int) -> int:
    """Tokens for which a variant spends what the baseline does on `budget`. [KronSAE, eq. 7]"""
    cost = {
        name: flops_per_token(dataclasses.replace(sae_config(name, dict_size, k), d_model=d_model))
        for name in (BASELINE, variant)
    }
    return equal_budget(budget, cost[BASELINE], cost[variant])


def prepare(settings: Settings) -> Activations:
    """Activations for the cheapest variant at the largest budget."""
    activations = Activations(settings)
    most = max(
        equal_flops_tokens(variant, size, settings.k, activations.d_model, max(settings.budgets))
        for variant in compared(settings)
        for size in settings.dict_sizes
    )
    return activations.hold(most)


def run(settings: Settings, activations: Activations, cell: dict[str, Any]) -> dict[str, Any]:
    variant, size, budget = cell["variant"], cell["dict_size"], cell["budget"]
    tokens = equal_flops_tokens(variant, size, settings.k, activations.d_model, budget)
    sae = sae_config(variant, size, settings.k)
    result = train(sae, activations, settings, {**cell, "tokens": tokens})
    flops = tokens * flops_per_token(result.sae.config)
    return {"tokens": tokens, "flops": flops, **quality(result)}


def conclude(settings: Settings, runs: Sequence[Run]) -> Conclusion:
    krons = [variant for variant in compared(settings) if variant != dense_form(variant)]
    lines, wins = [], dict.fromkeys(krons, 0)
    for size in settings.dict_sizes:
        for budget in settings.budgets:
            found = {
                variant: explained(runs, dict_size=size, budget=budget, variant=variant)
                for variant in compared(settings)
            }
            lines.append([f"{size:,}", f"{budget:,}", *found.values()])
            for variant in krons:
                wins[variant] += found[variant].mean >= found[dense_form(variant)].mean
    points = len(settings.dict_sizes) * len(settings.budgets)
    line = (
        "At equal FLOPs, at least as much as its dense form explains: "
        + ", ".join(f"{variant} at {count} of {points} points" for variant, count in wins.items())
        + " (paper: pictures, Figs. 1 and 9; its authors expect TopK to win at large budgets)."
    )
    header = ["F", "TopK's tokens", *compared(settings)]
    return Conclusion(markdown(header, lines), line)


def draw(settings: Settings, runs: Sequence[Run], path: Path) -> None:
    """Explained variance against FLOPs, a line each variant, a panel each dictionary size."""
    count = len(settings.dict_sizes)
    figure, (row,) = panels(1, count, (4.5 * count, 3.4))
    for axes, size in zip(row, settings.dict_sizes, strict=True):
        for variant in compared(settings):
            points = []
            for budget in sorted(settings.budgets):
                of_point = {"dict_size": size, "budget": budget, "variant": variant}
                flops = next(r["flops"] for r in runs if all(r[k] == of_point[k] for k in of_point))
                points.append((flops, *explained(runs, **of_point)))
            flops, means, deviations = zip(*points, strict=True)
            axes.errorbar(flops, means, deviations, fmt="o-", capsize=3, label=variant)
        axes.set_xscale("log")
        axes.set_xlabel("multiply-adds of the forward passes (eq. 7)")
        axes.set_ylabel("explained variance")
        axes.set_title(f"F = {size:,}")
    row[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
