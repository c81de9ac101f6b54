"""Other settings than the paper's recipe, at equal cost; the best rate by dictionary and budget.

An *arm* is one setting of the trainer that differs from the recipe ("adam_beta2=0.95"). Each has a
learning rate of its own, chosen like every other experiment's. Beside that, the recipe alone is
tried at every rate, over dictionary sizes and budgets. [KronSAE, App. A.1]
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kronsae.config import SAEConfig, TrainConfig, base_type
from kronsae.errors import InputError
from kronsae.experiments.common import (
    QWEN,
    SMALLEST_TRAINING,
    Activations,
    Conclusion,
    Run,
    Spread,
    TrainingSettings,
    axis,
    dense_form,
    explained,
    markdown,
    panels,
    quality,
    reported,
    sae_config,
    save,
    train,
    tuned_cells,
)

FIGURE = "App. A.1"
STATEMENT = "Whether another recipe than the paper's explains more for the same cost."

RECIPE = "recipe"
"""The arm in which nothing differs."""


@dataclasses.dataclass(frozen=True)
class Settings(TrainingSettings):
    arms: tuple[str, ...] = axis(
        (
            *("adam_beta2=0.99", "adam_beta2=0.95", "init_scale=2", "init_scale=4", "eps=1e-5"),
            *("auxk_coefficient=0", "auxk_coefficient=0.125", "decoder_norm=free"),
            *("warmup_fraction=0.02", "weight_decay=0.01"),
        ),
        "settings tried in place of the recipe's, as NAME=VALUE",
    )
    variants: tuple[str, ...] = axis(("m2n4", "topk"), "SAEs on which they are tried")
    tokens: int = axis(200_000, "tokens of a training")
    dict_size: int = axis(4096, "dictionary size F")
    learning_rates: tuple[float, ...] = axis(
        (8e-3, 1.6e-2), "rates to choose from, for each row on a seed of its own"
    )
    rates: tuple[float, ...] = axis(
        (4e-3, 8e-3, 1.6e-2, 3.2e-2), "rates of the recipe, each over all sizes and budgets"
    )
    rate_dict_sizes: tuple[int, ...] = axis((1024, 4096, 16384), "dictionary sizes for these")
    rate_tokens: tuple[int, ...] = axis((100_000, 400_000), "budgets for these, in tokens")
    rate_seeds: int = axis(1, "trainings at each of these rates")


SMALLEST = SMALLEST_TRAINING | {
    "arms": ("adam_beta2=0.95", "eps=1e-5"),
    "tokens": 1024,
    "dict_size": 128,
    "rates": (8e-3, 1.6e-2),
    "rate_dict_sizes": (128,),
    "rate_tokens": (1024,),
}
PAPER = QWEN | {
    "tokens": 125_000_000,
    "dict_size": 32768,
    "rates": (2e-4, 4e-4, 8e-4, 1.6e-3),
    "rate_dict_sizes": (32768, 65536, 131072),
    "rate_tokens": (125_000_000, 500_000_000),
}


def difference(arm: str) -> tuple[str, Any]:
    """Name and value of the setting that an arm changes. Raises InputError for what is none."""
    name, _, text = arm.partition("=")
    fields = {spec.name: spec for kind in (SAEConfig, TrainConfig) for spec in _fields(kind)}
    if name not in fields or not text:
        raise InputError(f"arms: expected NAME=VALUE of a setting of the trainer, got {arm!r}")
    kind, _ = base_type(fields[name])
    try:
        return name, kind(text)
    except ValueError:
        raise InputError(f"arms: {name} expects {kind.__name__}, got {text!r}") from None


def _fields(kind: type) -> Iterable[dataclasses.Field]:
    """Settings of one type that an arm may name: those that are no boolean."""
    return (spec for spec in dataclasses.fields(kind) if base_type(spec)[0] is not bool)


def configured(settings: Settings, variant: str, arm: str) -> tuple[SAEConfig, dict[str, Any]]:
    """The SAE of a variant under an arm, and the settings of its training that differ."""
    sae = sae_config(variant, settings.dict_size, settings.k)
    if arm == RECIPE:
        return sae, {}
    name, value = difference(arm)
    if name in {spec.name for spec in _fields(SAEConfig)}:
        return dataclasses.replace(sae, **{name: value}), {}
    return sae, {name: value}


def has(settings: Settings, variant: str, arm: str) -> bool:
    """Whether a variant has the setting of an arm: a dense encoder has no gate."""
    return difference(arm)[0] != "eps" or variant != dense_form(variant)


def arms_of(settings: Settings, variant: str) -> list[str]:
    return [RECIPE, *(arm for arm in settings.arms if has(settings, variant, arm))]


def cells(settings: Settings, runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = [
        {
            "arm": arm,
            "variant": variant,
            "dict_size": settings.dict_size,
            "tokens": settings.tokens,
        }
        for variant in settings.variants
        for arm in arms_of(settings, variant)
    ]
    for row in rows:  # what cannot be configured is said before anything runs
        TrainConfig(**configured(settings, row["variant"], row["arm"])[1])
    return tuned_cells(rows, settings, runs) + [
        {"rates_of": settings.variants[0], **point, "lr": lr, "seed": seed}
        for point in points(settings)
        for lr in settings.rates
        for seed in range(settings.rate_seeds)
    ]


def points(settings: Settings) -> list[dict[str, int]]:
    """Where all rates are tried."""
    return [
        {"dict_size": size, "tokens": tokens}
        for size in settings.rate_dict_sizes
        for tokens in settings.rate_tokens
    ]


def prepare(settings: Settings) -> Activations:
    return Activations(settings).hold(max(settings.tokens, *settings.rate_tokens))


def run(settings: Settings, activations: Activations, cell: dict[str, Any]) -> dict[str, Any]:
    if "arm" in cell:
        sae, recipe = configured(settings, cell["variant"], cell["arm"])
    else:
        sae, recipe = sae_config(cell["rates_of"], cell["dict_size"], settings.k), {}
    return quality(train(sae, activations, settings, cell, **recipe))


def conclude(settings: Settings, runs: Sequence[Run]) -> Conclusion:
    found = gains(settings, runs)
    lines = []
    for arm in (RECIPE, *settings.arms):
        cells = []
        for variant in settings.variants:
            if arm not in arms_of(settings, variant):
                cells += ["", "", ""]
                continue
            of_arm = reported(runs, arm=arm, variant=variant)
            dead = Spread.of(run["dead_share"] for run in of_arm)
            cells += [explained(of_arm), f"{of_arm[0]['lr']:g}", f"{dead.mean:.2f}"]
        lines.append([arm, *cells])
    header = ["", *(f"{v}{part}" for v in settings.variants for part in ("", ": lr", ": dead"))]
    arms = markdown(header, lines)
    rates = markdown(
        ["F", "tokens", *(f"lr {rate:g}" for rate in settings.rates)],
        [
            [f"{point['dict_size']:,}", f"{point['tokens']:,}"]
            + [explained(runs, **point, **_rate(settings, rate)) for rate in settings.rates]
            for point in points(settings)
        ],
    )
    table = f"{arms}\n\n{settings.variants[0]} by the recipe at each rate:\n\n{rates}"
    line = "Most above the recipe: " + "; ".join(
        f"{variant} by {arm} ({gain:+.4f}; the recipe's own spread is {spread:.4f})"
        for variant, (arm, gain, spread) in found.items()
    )
    best = [
        f"{max(settings.rates, key=lambda lr: explained(runs, **at, **_rate(settings, lr)).mean):g}"
        f" at F = {at['dict_size']:,}, {at['tokens']:,} tokens"
        for at in points(settings)
    ]
    return Conclusion(table, f"{line}. Best rate: {'; '.join(best)}.")


def _rate(settings: Settings, rate: float) -> dict[str, Any]:
    """What cells of one rate have in common."""
    return {"rates_of": settings.variants[0], "lr": rate}


def gains(settings: Settings, runs: Sequence[Run]) -> dict[str, tuple[str, float, float]]:
    """Of each variant its best arm, that arm's gain over the recipe, and the recipe's spread."""
    found = {}
    for variant in settings.variants:
        recipe = explained(runs, arm=RECIPE, variant=variant)
        gain = {
            arm: explained(runs, arm=arm, variant=variant).mean - recipe.mean
            for arm in arms_of(settings, variant)[1:]
        }
        best = max(gain, key=gain.get)
        spread = 0.0 if math.isnan(recipe.deviation) else recipe.deviation
        found[variant] = (best, gain[best], spread)
    return found


def draw(settings: Settings, runs: Sequence[Run], path: Path) -> None:
    """Left: what each arm explains above the recipe. Right: the recipe at each rate."""
    figure, ((left, right),) = panels(1, 2, (12.5, 4.2))
    names = [RECIPE, *settings.arms]
    for offset, variant in enumerate(settings.variants):
        recipe = explained(runs, arm=RECIPE, variant=variant).mean
        arms = arms_of(settings, variant)
        found = [explained(runs, arm=arm, variant=variant) for arm in arms]
        left.errorbar(
            [each.mean - recipe for each in found],
            [names.index(arm) + 0.2 * offset for arm in arms],
            xerr=[each.deviation for each in found],
            fmt="o",
            capsize=3,
            label=variant,
        )
    left.axvline(0, color="0.8", zorder=0)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("explained variance above the recipe's")
    left.set_title(f"F = {settings.dict_size:,}, {settings.tokens:,} tokens")
    left.legend(frameon=False)
    for point in points(settings):
        size = settings.rate_dict_sizes.index(point["dict_size"])
        budget = settings.rate_tokens.index(point["tokens"])
        right.plot(
            settings.rates,
            [explained(runs, **point, **_rate(settings, rate)).mean for rate in settings.rates],
            color=f"C{size}",
            marker="os^v"[budget % 4],
            linestyle=("--", "-", ":", "-.")[budget % 4],
            label=f"F = {point['dict_size']:,}, {point['tokens']:,} tokens",
        )
    right.set_xscale("log")
    right.set_xticks(settings.rates, [f"{rate:g}" for rate in settings.rates])
    right.minorticks_off()
    right.set_xlabel("learning rate")
    right.set_title(f"{settings.variants[0]} by the recipe")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
