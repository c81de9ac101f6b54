"""Other settings than the paper's recipe, at equal cost; the best rate by dictionary and budget.

An *arm* is one setting of the trainer that differs from the recipe ("adam_beta2=0.95"). Each has a
learning rate of its own, chosen like every other experiment's. Beside that, the recipe alone is
tried at every rate, over dictionary sizes and budgets. [KronSAE, App. A.1]
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronsae.config import SAEConfig, TrainConfig, base_type
from kronsae.errors import InputError
from kronsae.experiments.activations import Activations
from kronsae.experiments.experiment import EXPERIMENTS, Run, axis
from kronsae.experiments.report import (
    Across,
    Spread,
    by_column,
    curves,
    explained,
    grouped,
    markdown,
    picture,
)
from kronsae.experiments.training import EqualTokens, product, quality
from kronsae.experiments.variants import dense_form, sae_config

RECIPE = "recipe"
"""The arm in which nothing differs."""

FIELDS = {
    spec.name: (kind, spec)
    for kind in (SAEConfig, TrainConfig)
    for spec in dataclasses.fields(kind)
    if base_type(spec)[0] is not bool
}
"""Settings that an arm may name, with the config that has them."""


def difference(arm: str) -> dict[type, dict[str, Any]]:
    """The setting that an arm changes and its value, under the config that has it.

    Raises InputError if `arm` names no setting, or no value that it can have.
    """
    if arm == RECIPE:
        return {}
    name, _, text = arm.partition("=")
    if name not in FIELDS or not text:
        raise InputError(f"arms: expected NAME=VALUE of a setting of the trainer, got {arm!r}")
    config, spec = FIELDS[name]
    kind, _ = base_type(spec)
    try:
        return {config: {name: kind(text)}}
    except ValueError:
        raise InputError(f"arms: {name} expects {kind.__name__}, got {text!r}") from None


@EXPERIMENTS.register("convergence")
@dataclasses.dataclass(frozen=True)
class Convergence(EqualTokens):
    figure = "App. A.1"
    statement = "Whether another recipe than the paper's explains more for the same cost."
    smallest = EqualTokens.smallest | {
        "arms": ("adam_beta2=0.95", "eps=1e-5"),
        "tokens": 1024,
        "rates": (8e-3, 1.6e-2),
        "rate_dict_sizes": (128,),
        "rate_tokens": (1024,),
    }
    paper = EqualTokens.paper | {
        "rates": (2e-4, 4e-4, 8e-4, 1.6e-3),
        "rate_dict_sizes": (32768, 65536, 131072),
        "rate_tokens": (125_000_000, 500_000_000),
    }

    arms: tuple[str, ...] = axis(
        (
            *("adam_beta2=0.99", "adam_beta2=0.95", "init_scale=2", "init_scale=4", "eps=1e-5"),
            *("auxk_coefficient=0", "auxk_coefficient=0.125", "decoder_norm=free"),
            *("warmup_fraction=0.02", "weight_decay=0.01"),
            *("encoder_lr_ratio=0.5", "encoder_lr_ratio=0.25"),
        ),
        "settings tried in place of the recipe's, as NAME=VALUE",
    )
    variants: tuple[str, ...] = axis(("m2n4", "topk"), "SAEs on which they are tried")
    learning_rates: tuple[float, ...] = axis(
        (8e-3, 1.6e-2), "rates to choose from, for each row on a seed of its own"
    )
    rates: tuple[float, ...] = axis(
        (4e-3, 8e-3, 1.6e-2, 3.2e-2), "rates of the recipe, each over all sizes and budgets"
    )
    rate_dict_sizes: tuple[int, ...] = axis((1024, 4096, 16384), "dictionary sizes for these")
    rate_tokens: tuple[int, ...] = axis((100_000, 400_000), "budgets for these, in tokens")
    rate_seeds: int = axis(1, "trainings at each of these rates")

    def compared(self) -> dict[str, Any]:
        return {"variant": self.variants, "arm": (RECIPE, *self.arms)}

    def rows(self) -> list[dict[str, Any]]:
        """Each arm on the variants that have its setting: a dense encoder has no gate, `eps`."""
        return [
            row
            for row in super().rows()
            if not row["arm"].startswith("eps=") or row["variant"] != dense_form(row["variant"])
        ]

    def cells(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        for arm in self.arms:  # a wrong arm raises before anything runs
            TrainConfig(**difference(arm).get(TrainConfig, {}))
        for row in self.rows():
            self.sae(row)
        return super().cells(runs) + product(
            rates_of=self.variants[:1],
            dict_size=self.rate_dict_sizes,
            tokens=self.rate_tokens,
            lr=self.rates,
            seed=range(self.rate_seeds),
        )

    def longest(self, d_model: int) -> int:
        return max(self.tokens, *self.rate_tokens)

    def sae(self, cell: dict[str, Any]) -> SAEConfig:
        sae = sae_config(self.variant(cell), cell["dict_size"], self.k)
        return dataclasses.replace(sae, **difference(cell.get("arm", RECIPE)).get(SAEConfig, {}))

    def variant(self, cell: dict[str, Any]) -> str:
        return cell.get("rates_of") or cell["variant"]

    def run(self, shared: Activations, cell: dict[str, Any]) -> dict[str, Any]:
        recipe = difference(cell.get("arm", RECIPE)).get(TrainConfig, {})
        return quality(self.train(self.sae(cell), shared, cell, **recipe))

    def conclude(self, runs: Sequence[Run]) -> tuple[str, str]:
        arm_evs = explained(runs, "arm", "variant")
        dead = explained(runs, "arm", "variant", figure="dead_share")
        figures = {
            key: [arm_evs[key], f"{group[0]['lr']:g}", f"{dead[key].mean:.2f}"]
            for key, group in grouped(runs, "arm", "variant").items()
        }
        lines = [
            [arm, *(part for v in self.variants for part in figures.get((arm, v), [""] * 3))]
            for arm in (RECIPE, *self.arms)
        ]
        header = ["", *(f"{v}{part}" for v in self.variants for part in ("", ": lr", ": dead"))]
        rate_header = ["F", "tokens", *(f"lr {rate:g}" for rate in self.rates)]
        _, rates = by_column(explained(runs, "dict_size", "tokens", "rates_of", "lr"), [], "")
        rates = [[size, tokens, *evs] for size, tokens, _, *evs in rates]
        table = (
            f"{markdown(header, lines)}\n\n{self.variants[0]} by the recipe at each rate:\n\n"
            f"{markdown(rate_header, rates)}"
        )
        most = [self.most(arm_evs, variant) for variant in self.variants]
        best = [
            f"{self.rates[evs.index(max(evs))]:g} at F = {size:,}, {tokens:,} tokens"
            for size, tokens, *evs in rates
        ]
        line = f"Most above the recipe: {'; '.join(most)}. Best rate: {'; '.join(best)}."
        return table, line

    def most(self, evs: dict[tuple, Spread], variant: str) -> str:
        """The arm that explains most with a variant, and what it gains over the recipe."""
        recipe = evs[RECIPE, variant]
        gain = {
            arm: ev.mean - recipe.mean
            for (arm, of), ev in evs.items()
            if of == variant and arm != RECIPE
        }
        best = max(gain, key=gain.__getitem__)
        spread = 0.0 if math.isnan(recipe.deviation) else recipe.deviation
        return f"{variant} by {best} ({gain[best]:+.4f}; the recipe's own spread is {spread:.4f})"

    def draw(self, runs: Sequence[Run], path: Path) -> None:
        """Left: what each arm explains above the recipe. Right: the recipe at each rate."""
        arms = [RECIPE, *self.arms]
        evs = explained(runs, "arm", "variant")
        with picture(path, 2, (7, 4.2)) as (left, right):
            for (arm, variant), ev in evs.items():
                offset = self.variants.index(variant)
                left.errorbar(
                    ev.mean - evs[RECIPE, variant].mean,
                    arms.index(arm) + 0.2 * offset,
                    xerr=ev.deviation,
                    fmt="o",
                    capsize=3,
                    color=f"C{offset}",
                    label=variant if arm == RECIPE else None,
                )
            left.axvline(0, color="0.8", zorder=0)
            left.set_yticks(range(len(arms)), arms)
            left.invert_yaxis()
            left.set_xlabel("explained variance above the recipe's")
            left.set_title(f"F = {self.dict_size:,}, {self.tokens:,} tokens")
            tried = [
                run | {"point": f"F = {run['dict_size']:,}, {run['tokens']:,} tokens"}
                for run in runs
                if "rates_of" in run
            ]
            curves(right, tried, "point", Across("lr", "learning rate", log=10))
            right.set_title(f"{self.variants[0]} by the recipe")
