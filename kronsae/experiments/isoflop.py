"""Explained variance at equal FLOPs, over budgets and dictionary sizes. [KronSAE, Figs. 1, 9]

A budget is what a TopK SAE of the same dictionary size spends on so many tokens (eq. 7); a variant
with a cheaper encoder sees more tokens for it. So does a dense SAE with half of the latents
("topk-half"), which shows what comes from more tokens alone. The learning rate is chosen for each
point. A
Matryoshka SAE costs what its plain form does: one pass over the active latents reconstructs from
all nested prefixes.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

from kronsae.experiments.activations import Activations
from kronsae.experiments.experiment import EXPERIMENTS, axis
from kronsae.experiments.report import Across, Spread
from kronsae.experiments.training import QWEN, SMALLEST, TrainingExperiment, product, quality
from kronsae.experiments.variants import (
    dense_form,
    half_form,
    sae_config,
    wins,
    with_dense_forms,
)
from kronsae.model.flops import equal_budget, flops_per_token

BASELINE = "topk"
"""The variant whose FLOPs are the budget."""


def equal_flops_tokens(variant: str, dict_size: int, k: int, d_model: int, budget: int) -> int:
    """Tokens for which a variant spends what the baseline does on `budget`. [KronSAE, eq. 7]"""
    baseline, own = (
        flops_per_token(dataclasses.replace(sae_config(name, dict_size, k), d_model=d_model))
        for name in (BASELINE, variant)
    )
    return equal_budget(budget, baseline, own)


@EXPERIMENTS.register("isoflop")
@dataclasses.dataclass(frozen=True)
class IsoFLOP(TrainingExperiment):
    figure = "Figs. 1, 9"
    statement = "A Kron encoder explains more than a dense one with the same FLOPs."
    smallest = SMALLEST | {
        **{"budgets": (1024, 2048), "dict_sizes": (128,)},
        "variants": ("topk-half", "topk-mixed", "m2n4", "matryoshka-m2n4"),
    }
    paper = QWEN | {
        "budgets": (125_000_000, 500_000_000, 1_000_000_000, 2_000_000_000),
        "dict_sizes": (32768, 65536, 131072),
    }
    headings = {"dict_size": "F", "budget": "TopK's tokens"}
    across = Across("flops", "multiply-adds of the forward passes (eq. 7)", log=10)

    budgets: tuple[int, ...] = axis((100_000, 200_000, 400_000), "tokens that a TopK SAE sees")
    dict_sizes: tuple[int, ...] = axis((2048, 4096), "dictionary sizes F")
    variants: tuple[str, ...] = axis(
        ("topk-half", "topk-mixed", "m2n4", "m4n4", "matryoshka-m2n4"),
        "SAEs, each held against its dense form: Kron forms, or half as many latents",
    )
    seeds: int = axis(2, "trainings of each point")

    def rows(self) -> list[dict[str, Any]]:
        variants = with_dense_forms((BASELINE, *self.variants))
        return product(dict_size=self.dict_sizes, variant=variants, budget=self.budgets)

    def tokens_of(self, row: dict[str, Any], d_model: int) -> int:
        variant, size, budget = row["variant"], row["dict_size"], row["budget"]
        return equal_flops_tokens(variant, size, self.k, d_model, budget)

    def run(self, shared: Activations, cell: dict[str, Any]) -> dict[str, Any]:
        result = self.train(self.sae(cell), shared, cell)
        assert result.sae is not None
        config = result.sae.config
        tokens = self.tokens_of(cell, config.d_model)
        return {"tokens": tokens, "flops": tokens * flops_per_token(config), **quality(result)}

    def sentence(self, spreads: dict[tuple, Spread]) -> str:
        points = len({key[:-1] for key in spreads})

        def counted(against: Callable[[str], str]) -> str:
            counts = wins(spreads, operator.ge, against).items()
            return ", ".join(f"{variant} at {count} of {points}" for variant, count in counts)

        halves = counted(half_form)
        return (
            "At equal FLOPs, points at which an SAE explains at least as much as a dense encoder "
            f"with as many latents: {counted(dense_form)}"
            + f"; as one with half as many: {halves}" * bool(halves)
            + " (paper: pictures, Figs. 1 and 9; its authors expect TopK to win at large budgets)."
        )
