"""Figures of runs over their seeds, in tables and pictures."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kronsae.experiments.experiment import Run
from kronsae.system import tables

TUNING_SEED = 1000
"""Seed of the runs that choose a learning rate; their figures are not reported."""


class Spread(NamedTuple):
    """Mean and sample standard deviation (nan for one value, or if any is not finite)."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        several = len(values) > 1 and all(map(math.isfinite, values))
        deviation = statistics.stdev(values) if several else math.nan
        return cls(statistics.fmean(values), deviation)

    def __str__(self) -> str:
        return self.to(4)

    def to(self, digits: int) -> str:
        """Text with so many digits."""
        mean = f"{self.mean:.{digits}f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:.{digits}f}"


def grouped(runs: Iterable[Run], *keys: str) -> dict[tuple, list[Run]]:
    """Runs by their values of the keys, in their order.

    Without those that lack a key, and those that chose a learning rate.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        if run["seed"] != TUNING_SEED and all(key in run for key in keys):
            groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def number(figure: float | None) -> float:
    """A figure of a run; -inf for one that is not finite, as of a training that diverged."""
    return -math.inf if figure is None else figure


def explained(
    runs: Iterable[Run], *keys: str, figure: str = "explained_variance"
) -> dict[tuple, Spread]:
    """Explained variance, or another figure, over the seeds, by the values of the keys."""
    return {
        values: Spread.of(number(run[figure]) for run in group)
        for values, group in grouped(runs, *keys).items()
    }


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; thousands of whole numbers are set apart."""
    texts = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    return tables.markdown(header, texts)


def by_column(
    spreads: dict[tuple, Spread], headings: Sequence[str], name: str
) -> tuple[list, list]:
    """Header and rows of a table: the last part of each key is a column, the others name a row.

    name: what the numbers among the columns are, for their headings ("k = 32").
    """
    columns = list(dict.fromkeys(key[-1] for key in spreads))
    rows = [
        [*row, *(spreads.get((*row, column), "") for column in columns)]
        for row in dict.fromkeys(key[:-1] for key in spreads)
    ]
    return [*headings, *(c if isinstance(c, str) else f"{name} = {c}" for c in columns)], rows


@contextmanager
def picture(path: Path, panels: int = 1, size: tuple[float, float] = (6, 3.6)) -> Iterator[Any]:
    """A row of matplotlib axes to draw on, written to `path` in the end.

    size: of each panel, in inches. A legend stands beside the last of panels with the same labels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width, height = size
    figure, (row,) = pyplot.subplots(
        1, panels, figsize=(width * panels, height), squeeze=False, layout="constrained"
    )
    yield row
    labels = [axes.get_legend_handles_labels()[1] for axes in row]
    for axes, own, following in zip(row, labels, [*labels[1:], []], strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        if own != following:
            axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


class Across(NamedTuple):
    """The horizontal axis of a picture."""

    key: str
    """Figure of a run; its values are averaged over the seeds."""
    label: str
    log: int = 0
    """Base of a logarithmic scale; 0: linear."""


def curves(axes: Any, runs: Sequence[Run], line: str, across: Across, *points: str) -> None:
    """Explained variance with error bars, a line for each value of the key `line`.

    points: keys that tell the points of a line apart (default: `across.key`).
    """
    numbers = not isinstance(runs[0][across.key], str)
    lines: dict[Any, list[tuple]] = {}
    for (value, *_), group in grouped(runs, line, *(points or [across.key])).items():
        xs = [run[across.key] for run in group]
        x = statistics.fmean(xs) if numbers else xs[0]
        lines.setdefault(value, []).append((x, *explained(group)[()]))
    for value, rows in lines.items():
        label = value if isinstance(value, str) else f"{line} = {value}"
        parts = zip(*(sorted(rows) if numbers else rows), strict=True)
        axes.errorbar(*parts, fmt="o-", capsize=3, label=label)
    if across.log:
        axes.set_xscale("log", base=across.log)
    if numbers and (not points or across.key in points):
        ticks = sorted({x for rows in lines.values() for x, *_ in rows})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    axes.set_xlabel(across.label)
    axes.set_ylabel("explained variance")
