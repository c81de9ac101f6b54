"""Explained variance against h, m and n at a fixed dictionary size. [KronSAE, Fig. 2, App. A.8]"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

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

FIGURE = "Fig. 2, App. A.8"
STATEMENT = "At a fixed dictionary size, explained variance rises with h and falls with m."


@dataclasses.dataclass(frozen=True)
class Settings(TrainingSettings):
    tokens: int = axis(200_000, "tokens of a training")
    dict_size: int = axis(4096, "dictionary size F")
    m: tuple[int, ...] = axis((1, 2, 4, 8), "base widths")
    n: tuple[int, ...] = axis((4, 8, 16), "extension widths; those below m are left out")


SMALLEST = SMALLEST_TRAINING | {"tokens": 2048, "dict_size": 128, "m": (1, 4), "n": (4, 8)}
PAPER = QWEN | {"tokens": 125_000_000, "dict_size": 32768}


def shapes(settings: Settings) -> list[tuple[int, int]]:
    """(m, n) with m <= n."""
    return [(m, n) for m, n in itertools.product(settings.m, settings.n) if m <= n]


def cells(settings: Settings, runs: Sequence[Run]) -> list[dict[str, Any]]:
    size = settings.dict_size
    rows = [
        {"h": size // (m * n), "m": m, "n": n, "tokens": settings.tokens}
        for m, n in shapes(settings)
    ]
    return tuned_cells(rows, settings, runs)


def prepare(settings: Settings) -> Activations:
    return Activations(settings).hold(settings.tokens)


def run(settings: Settings, activations: Activations, cell: dict[str, Any]) -> dict[str, Any]:
    shape = f"h{cell['h']}m{cell['m']}n{cell['n']}"
    sae = sae_config(shape, settings.dict_size, settings.k)
    return quality(train(sae, activations, settings, cell))


def conclude(settings: Settings, runs: Sequence[Run]) -> Conclusion:
    found = {(m, n): explained(runs, m=m, n=n) for m, n in shapes(settings)}
    lines = [[m, *(found.get((m, n), "") for n in settings.n)] for m in settings.m]
    ev = [found[shape].mean for shape in found]
    with_h = correlation([math.log2(settings.dict_size / (m * n)) for m, n in found], ev)
    with_m = correlation([math.log2(m) for m, _ in found], ev)
    with_n = correlation([math.log2(n) for _, n in found], ev)
    line = (
        f"Over the {len(found)} shapes explained variance correlates with log h by {with_h:+.2f}, "
        f"with log m by {with_m:+.2f}, with log n by {with_n:+.2f} (paper: it rises with h and "
        "falls with m)."
    )
    header = ["m", *(f"n = {n}" for n in settings.n)]
    return Conclusion(markdown(header, lines), line)


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson correlation of two lists."""
    return torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1].item()


def draw(settings: Settings, runs: Sequence[Run], path: Path) -> None:
    """Explained variance against h, a line each m; then against m, a line each n."""
    figure, ((left, right),) = panels(1, 2, (9, 3.4))
    found = {(m, n): explained(runs, m=m, n=n).mean for m, n in shapes(settings)}
    for m in settings.m:
        of_m = {settings.dict_size // (m * n): ev for (mm, n), ev in found.items() if mm == m}
        left.plot(list(of_m), list(of_m.values()), "o-", label=f"m = {m}")
    for n in settings.n:
        of_n = {m: ev for (m, nn), ev in found.items() if nn == n}
        right.plot(list(of_n), list(of_n.values()), "o-", label=f"n = {n}")
    for axes, name in ((left, "heads h"), (right, "base width m")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(name)
        axes.set_ylabel("explained variance")
        axes.legend(frameon=False)
    save(figure, path)
