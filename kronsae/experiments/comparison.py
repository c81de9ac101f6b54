"""SAEs side by side at equal tokens and at equal FLOPs, at several layers. [KronSAE, Table 4]

At equal FLOPs an SAE with a Kron encoder spends on its forward passes what a TopK SAE spends at
equal tokens (eq. 7); so does a dense SAE with half of the latents ("topk-half"), beside which one
sees what a Kron encoder adds to more tokens. The learning rate of an SAE is chosen for each budget,
on as many tokens as its trainings have: a rate that is best after fewer tokens can be too small or
too large for more.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from kronsae.config import setting
from kronsae.experiments.activations import Activations
from kronsae.experiments.experiment import EXPERIMENTS, Run, axis
from kronsae.experiments.isoflop import BASELINE, equal_flops_tokens
from kronsae.experiments.report import TUNING_SEED, Spread, explained, grouped, markdown, picture
from kronsae.experiments.training import (
    QWEN,
    SMALLEST,
    TrainingExperiment,
    product,
    quality,
)
from kronsae.experiments.variants import dense_form, half_form, sae_config, wins
from kronsae.model.flops import flops_per_token

EQUAL_TOKENS, EQUAL_FLOPS = "tokens", "FLOPs"


@EXPERIMENTS.register("comparison")
@dataclasses.dataclass(frozen=True)
class Comparison(TrainingExperiment):
    figure = "Table 4"
    statement = "At equal tokens TopK explains more than KronSAE; at equal FLOPs, KronSAE more."
    smallest = SMALLEST | {
        **{"layer": (2,), "tokens": 2048, "dict_size": 128},
        "variants": ("topk", "topk-half", "topk-mixed", "m2n4", "m2n4-refined"),
    }
    paper = QWEN | {"layer": (14,), "tokens": 125_000_000, "dict_size": 32768}

    saes: str | None = setting(None, "folder to save the trained SAEs in (default: none is saved)")
    layer: tuple[int, ...] = axis((2,), "residual streams after these blocks, from 0")  # type: ignore[assignment]
    variants: tuple[str, ...] = axis(
        ("topk", "topk-half", "topk-mixed", "m2n4", "m4n4", "m4n8", "topk-refined", "m4n4-refined"),
        "SAEs to compare",
    )
    dict_size: int = axis(4096, "dictionary size F")
    equal: tuple[str, ...] = axis((EQUAL_TOKENS, EQUAL_FLOPS), "in what SAEs are equal")
    tokens: int = axis(400_000, "tokens of a training, at equal tokens")

    def rows(self) -> list[dict[str, Any]]:
        """SAEs by layer and budget; dense SAEs with all latents are held equal in tokens alone."""
        return [
            {**row, "budget": self.tokens}
            for row in product(
                layer=self.layer,
                equal=self.equal,
                variant=self.variants,
                dict_size=self.dict_size,
            )
            if row["equal"] == EQUAL_TOKENS or row["variant"] != dense_form(row["variant"])
        ]

    def tokens_of(self, row: dict[str, Any], d_model: int) -> int:
        if row["equal"] == EQUAL_TOKENS:
            return row["budget"]
        variant, size = row["variant"], row["dict_size"]
        return equal_flops_tokens(variant, size, self.k, d_model, row["budget"])

    def prepare(self) -> Callable[[int], Activations]:
        """Activations of a layer, those of the last one asked for being kept."""
        return lru_cache(maxsize=1)(lambda layer: self.activations(layer=layer))

    def run(self, shared: Callable[[int], Activations], cell: dict[str, Any]) -> dict[str, Any]:
        activations = shared(cell["layer"])
        result = self.train(self.sae(cell), activations, cell)
        sae = result.sae
        assert sae is not None
        baseline = sae_config(BASELINE, self.dict_size, self.k).with_widths(sae.d_model, 0)
        figures: dict[str, Any] = {
            "tokens": result.tokens,
            "flops_share": flops_per_token(sae.config) / flops_per_token(baseline),
            **quality(result),
        }
        if self.saes is not None and cell["seed"] != TUNING_SEED:
            name = "layer{layer}-{variant}-F{dict_size}-equal-{equal}-{seed}".format_map(cell)
            sae.metadata["config"]["data"] = activations.facts["config"]
            sae.metadata["data"] = activations.facts["data"]
            sae.save(Path(self.saes) / name)
            figures["sae"] = name
        return figures

    def conclude(self, runs: Sequence[Run]) -> tuple[str, str]:
        """A table of explained variance, a row each SAE."""
        spreads = explained(runs, "layer", "variant", "equal")
        rows = []
        for (layer, variant), group in grouped(runs, "layer", "variant").items():
            by_budget = [spreads.get((layer, variant, b), "") for b in (EQUAL_TOKENS, EQUAL_FLOPS)]
            dead = Spread.of(run["dead_share"] for run in group)
            share = f"{group[0]['flops_share']:.2f}"
            rates = ", ".join(dict.fromkeys(f"{run['lr']:g}" for run in group))
            rows.append([layer, variant, share, rates, *by_budget, dead])
        header = ["layer", "SAE", f"FLOPs, of {BASELINE}'s", "learning rate"]
        header += ["at equal tokens", "at equal FLOPs", "dead latents"]
        return markdown(header, rows), self.sentence(spreads)

    def sentence(self, spreads: dict[tuple, Spread]) -> str:
        at_tokens = {key[:2]: spread for key, spread in spreads.items() if key[2] == EQUAL_TOKENS}
        at_flops = {key[:2]: spread for key, spread in spreads.items() if key[2] == EQUAL_FLOPS}
        parts = []
        for equal, own in ((EQUAL_TOKENS, at_tokens), (EQUAL_FLOPS, at_flops)):
            dense = {at: ev for at, ev in at_tokens.items() if at[1] == dense_form(at[1])}
            for other, against in (("as many", dense_form), ("half", half_form)):
                counts = wins(dense | own, operator.ge, against).items()
                texts = [f"{name} at {won} of {len(self.layer)}" for name, won in counts]
                if texts:
                    parts.append(f"at equal {equal} {', '.join(texts)} ({other})")
        return (
            "Layers at which an SAE explains at least as much as a dense one with as many latents "
            f"(or with half): {'; '.join(parts) or 'none to compare'} (paper, Table 4: at equal "
            "tokens the best KronSAE is 0.001 to 0.011 below TopK)."
        )

    def draw(self, runs: Sequence[Run], path: Path) -> None:
        """A panel each layer; an SAE a line, a point each budget."""
        with picture(path, len(self.layer), (5, 0.6 + 0.28 * len(self.variants))) as row:
            for axes, layer in zip(row, self.layer, strict=True):
                here = explained(runs, "layer", "equal", "variant")
                for equal, marker in ((EQUAL_TOKENS, "o"), (EQUAL_FLOPS, "D")):
                    points = [
                        (spread, -place)
                        for place, variant in enumerate(self.variants)
                        if (spread := here.get((layer, equal, variant))) is not None
                    ]
                    if not points:
                        continue
                    means, places = [s.mean for s, _ in points], [y for _, y in points]
                    errors = [s.deviation for s, _ in points]
                    axes.errorbar(means, places, xerr=errors, fmt=marker, label=f"at equal {equal}")
                axes.set_yticks([-i for i in range(len(self.variants))], self.variants)
                axes.set_ylim(0.5 - len(self.variants), 0.5)
                axes.locator_params("x", nbins=4)  # labels of close values are long
                axes.set_xlabel("explained variance")
                axes.set_title(f"layer {layer}")
                axes.grid(axis="y", alpha=0.3)
