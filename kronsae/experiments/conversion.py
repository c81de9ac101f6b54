"""A dense SAE made into a Kron one of the same decoder, and trained on. No claim of the paper's.

A Kron latent is the root of a product of a base and an extension pre-latent, so it is that of the
dense SAE where both have its encoder row. Latents with similar rows are therefore grouped into
heads, and the rows of a head are fitted to those of its m n latents.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.config import SAEConfig, setting
from kronsae.experiments.activations import Activations
from kronsae.experiments.experiment import EXPERIMENTS, Run, axis
from kronsae.experiments.report import (
    Across,
    Spread,
    curves,
    explained,
    grouped,
    picture,
)
from kronsae.experiments.training import EqualTokens, product, quality
from kronsae.experiments.variants import sae_config
from kronsae.metrics.heldout import Heldout, evaluate
from kronsae.model.normalizer import SAMPLE_TOKENS, Normalizer
from kronsae.model.sae import SAE
from kronsae.training.session import FitResult

SCRATCH, DECODER, CONVERTED = "random weights", "its decoder", "its decoder, encoder fitted"
STARTS = (SCRATCH, DECODER, CONVERTED)


def nearest_groups(rows: Tensor, size: int) -> Tensor:
    """Indices [F / size, size] of rows [F, d] by similarity, each in one group.

    Greedily: the next row that is in none, with those of the rest that are nearest by cosine.
    """
    rows = torch.nn.functional.normalize(rows, dim=1)
    free = torch.arange(len(rows))
    groups = []
    while len(free):
        order = (rows[free] @ rows[free[0]]).argsort(descending=True, stable=True)
        groups.append(free[order[:size]])
        free = free[order[size:].sort().values]
    return torch.stack(groups)


def grid_of(rows: Tensor, m: int) -> Tensor:
    """Order of the rows [m n, d] of a head as latents [m, n], with similar ones in a row or column.

    Each row of latents is a group of near ones; greedily, each next one goes to the column whose
    first latent it is most like.
    """
    grid = nearest_groups(rows, len(rows) // m)
    for i in range(1, m):
        similar = rows[grid[0]] @ rows[grid[i]].T
        columns = torch.empty_like(grid[i])
        for _ in columns:
            column, chosen = divmod(int(similar.argmax()), len(columns))
            columns[column] = grid[i, chosen]
            similar[column], similar[:, chosen] = -torch.inf, -torch.inf
        grid[i] = columns
    return grid


def additive(latents: Tensor) -> Tensor:
    """Rows [h, m + n, ...] whose means of a base and an extension row are nearest to the latents'.

    latents: [h, m, n, ...]; nearest by least squares.
    """
    mean = latents.mean((1, 2))[:, None]
    return torch.cat([2 * latents.mean(2) - mean, 2 * latents.mean(1) - mean], dim=1)


@torch.no_grad()
def converted(dense: SAE, kron: SAE, fitted: bool) -> SAE:
    """`kron` with the decoder of a dense SAE, both of raw activations.

    fitted: whether its encoder is fitted to the dense one, too.
    """
    h, m, n = kron.config.heads, kron.config.m, kron.config.n
    heads = nearest_groups(dense.W_enc, m * n)
    order = torch.cat([head[grid_of(dense.W_enc[head], m).flatten()] for head in heads])
    if fitted:
        kron.W_enc.copy_(additive(dense.W_enc[order].view(h, m, n, -1)))
        kron.b_enc.copy_(additive(dense.b_enc[order].view(h, m, n)))
    kron.W_dec.copy_(dense.W_dec[order])
    kron.b_dec.copy_(dense.b_dec)
    return kron


class Shared(NamedTuple):
    """What all runs share."""

    activations: Activations
    dense: Callable[[int], FitResult]
    """The dense SAE of a seed."""


@EXPERIMENTS.register("conversion")
@dataclass(frozen=True)
class Conversion(EqualTokens):
    figure = "no figure"
    statement = "Whether a Kron SAE learns faster from the weights of a dense one."
    smallest = EqualTokens.smallest | {"dense_tokens": 2048, "tokens": (1024, 2048)}
    paper = EqualTokens.paper | {
        "dense_tokens": 125_000_000,
        "dense_lr": 8e-4,
        "tokens": (12_500_000, 125_000_000),
    }
    across = Across("tokens", "tokens of the Kron SAE", log=10)
    column = "start"
    headings = {"variant": "Kron SAE", "tokens": "tokens"}

    variants: tuple[str, ...] = axis(("m2n4",), "Kron SAEs, by the shape of their heads")
    tokens: tuple[int, ...] = axis((50_000, 200_000), "tokens of a Kron SAE")  # type: ignore[assignment]
    dict_size: int = axis(2048, "dictionary size F")
    dense_tokens: int = setting(400_000, "tokens of the dense SAE")
    dense_lr: float = setting(1.6e-2, "its learning rate")
    learning_rates: tuple[float, ...] = axis(
        (4e-3, 1.6e-2), "rates to choose from, for each row on a seed of its own"
    )
    seeds: int = axis(2, "trainings of each row")

    def rows(self) -> list[dict[str, Any]]:
        return product(
            variant=self.variants, tokens=self.tokens, start=STARTS, dict_size=self.dict_size
        )

    def longest(self, d_model: int) -> int:
        return max(self.dense_tokens, *self.tokens)

    def prepare(self) -> Shared:
        activations = self.activations()
        return Shared(activations, cache(partial(self.train_dense, activations)))

    def train_dense(self, activations: Activations, seed: int) -> FitResult:
        cell = {"tokens": self.dense_tokens, "lr": self.dense_lr, "seed": seed}
        return self.train(sae_config("topk", self.dict_size, self.k), activations, cell)

    def run(self, shared: Shared, cell: dict[str, Any]) -> dict[str, Any]:
        activations, dense = shared.activations, shared.dense(cell["seed"])
        kron, start, before = self.sae(cell), None, {}
        if cell["start"] != SCRATCH:
            assert dense.sae is not None  # one process trains it
            start = self.random(activations, kron, cell["seed"])
            start = converted(dense.sae, start, cell["start"] == CONVERTED)
            heldout = evaluate(start, Heldout(activations.heldout))
            before = {"before": heldout["explained_variance"]}
        figures = quality(self.train(start or kron, activations, cell))
        return {**figures, **before, "dense": dense.metrics["explained_variance"]}

    def random(self, activations: Activations, config: SAEConfig, seed: int) -> SAE:
        """A new SAE, of raw activations."""
        d_model = activations.heldout.shape[1]
        generator = torch.Generator().manual_seed(seed)
        sae = SAE(dataclasses.replace(config, d_model=d_model), generator=generator)
        normalizer = Normalizer.of(activations.heldout[:SAMPLE_TOKENS])
        return sae.folded(normalizer.mean, normalizer.scale)

    def conclude(self, runs: Sequence[Run]) -> tuple[str, str]:
        table, line = super().conclude(runs)
        dense = explained(runs, figure="dense")[()]
        before = explained([run for run in runs if "before" in run], "start", figure="before")
        untrained = "; ".join(f"from {start}: {ev}" for (start,), ev in before.items())
        return table, f"{line} The dense SAE explains {dense}. Before any step, {untrained}."

    def sentence(self, spreads: dict[tuple, Spread]) -> str:
        gains = []
        for variant, tokens in dict.fromkeys(key[:2] for key in spreads):
            scratch, *others = (spreads[variant, tokens, start].mean for start in STARTS)
            above = " and ".join(f"{mean - scratch:+.4f}" for mean in others)
            gains.append(f"{variant} at {tokens:,} tokens {above}")
        return (
            f"Explained variance above that from {SCRATCH}, with {DECODER} alone and with the "
            f"encoder fitted: {'; '.join(gains)}."
        )

    def draw(self, runs: Sequence[Run], path: Path) -> None:
        """Explained variance over tokens, a panel each Kron SAE."""
        of_variants = grouped(runs, "variant")
        with picture(path, len(of_variants)) as row:
            for axes, ((variant,), group) in zip(row, of_variants.items(), strict=True):
                curves(axes, group, "start", self.across)
                axes.set_title(f"{variant}, F = {self.dict_size:,}")
