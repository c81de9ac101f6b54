"""Charts of a run's records over its tokens: where their lines, axes and labels lie."""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]
"""A line of metrics.jsonl."""

Points = list[tuple[float, float]]

SHARES = (
    "explained_variance",
    "explained_variance_all",
    "massive_share",
    "massive_variance_share",
    "fvu",
    "explained_variance_batch",
    "dead_share",
    "dead_share_10k",
    "dense_share",
    "largest_share",
    "ce_recovered",
)
"""Figures that are shown in percent."""

_SMALLEST = 1e-290
"""Values below it, and above 1 over it, are not drawn: ticks around them would not be finite."""

LEFT, RIGHT, TOP, BOTTOM = 52, 414, 10, 184
"""Edges of the plot in its SVG, of 440 by 220 units."""


class Chart(NamedTuple):
    """A figure over the tokens of a run."""

    title: str
    key: str
    """Name of the figure in the records of metrics.jsonl."""
    note: str
    bounds: tuple[float, float | None] | None = (0.0, None)
    """Ends of the vertical axis; None: from the values. Without any, the axis is logarithmic."""


CHARTS = (
    Chart(
        "Explained variance",
        "explained_variance",
        "share of the variance, of training batches and of held-out text",
        (0.0, 1.0),
    ),
    Chart("Loss", "loss", "mean squared error of normalised activations (logarithmic axis)", None),
    Chart(
        "Dead latents",
        "dead_share",
        "share of latents: silent for long in training; on no held-out token",
    ),
    Chart("Active latents", "l0", "latents active on a token, on average"),
    Chart(
        "Balance of the experts",
        "balance_loss",
        "1 where each expert gets as many tokens; their number where one gets all",
        (1.0, None),
    ),
    Chart("Learning rate", "lr", "of AdamW"),
    Chart("Gradient norm", "grad_norm", "before clipping (logarithmic axis)", None),
    Chart("Speed", "tokens_per_s", "tokens trained on, a second"),
)


class Drawing(NamedTuple):
    """A chart, ready to be drawn; places are in SVG units."""

    title: str
    note: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str, str]]
    """Kind of record ("train" or "heldout"), the last value as text, and an SVG path: a line
    through the training batches, and a dot for each evaluation on held-out text."""


def draw(chart: Chart, records: Sequence[Record]) -> Drawing | None:
    """A chart of the records; None if they hold no such values."""
    logarithmic = chart.bounds is None
    curves = {
        kind: thinned(curve) if kind == "train" else curve
        for kind in ("train", "heldout")
        if (curve := points(records, kind, chart.key, logarithmic))
    }
    if not curves:
        return None
    values = [y for curve in curves.values() for _, y in curve]
    last = max(x for curve in curves.values() for x, _ in curve) or 1
    bottom, top = chart.bounds or (min(values), None)
    top = max(bottom, *values) if top is None else top
    ticks = (log_ticks if logarithmic else linear_ticks)(bottom, top)
    scale = math.log10 if logarithmic else float
    low, high = scale(ticks[0]), scale(ticks[-1])

    def across(x: float) -> float:
        return LEFT + x / last * (RIGHT - LEFT)

    def up(y: float) -> float:
        share = (scale(y) - low) / (high - low)
        return BOTTOM - min(1, max(0, share)) * (BOTTOM - TOP)

    def path(kind: str, curve: Points) -> str:
        places = [f"{across(x):.1f} {up(y):.1f}" for x, y in curve]
        if kind == "heldout":  # nothing was measured between two evaluations
            return "".join(f"M{place}L{place}" for place in places)
        if len(curve) == 1:
            return f"M{places[0]}m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0"  # a ring
        return f"M{'L'.join(places)}"

    return Drawing(
        chart.title,
        chart.note,
        [(across(x), tick_text("tokens", x)) for x in linear_ticks(0, last, 4) if x <= last],
        [(up(y), tick_text(chart.key, y)) for y in ticks],
        [(kind, figure_text(chart.key, c[-1][1]), path(kind, c)) for kind, c in curves.items()],
    )


def points(records: Iterable[Record], kind: str, key: str, positive: bool) -> Points:
    """(tokens, value) of each record of a kind that has the value; of "heldout" the final one, too.

    positive: only values above 0.
    """
    return [
        (record["tokens"], record[key])
        for record in records
        if str(record.get("kind")).replace("final", "heldout") == kind
        and is_number(record.get("tokens"))
        and is_number(record.get(key))
        and (record[key] > 0 or not positive)
        and (record[key] == 0 or _SMALLEST < abs(record[key]) < 1 / _SMALLEST)
    ]


def thinned(curve: Points, most: int = 300) -> Points:
    """At most `most` points: means of neighbours."""
    size = math.ceil(len(curve) / most)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    spread = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(spread / about))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor * about >= spread)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from at most `low` to at least `high`."""
    first = math.floor(math.log10(low))
    last = max(math.ceil(math.log10(high)), first + 1)
    return [10.0**power for power in range(first, last + 1)]


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def figure_text(key: str, value: Any) -> str:
    """A value of a record for people: 96.03 % for shares, else 0.1235, 12,345 or 1.235e+09."""
    if not is_number(value):
        return "–" if value is None else str(value)
    if key in SHARES:
        return f"{100 * value:.2f} %" if abs(value) < 1e4 else f"{100 * value:.3g} %"
    whole = value == 0 or 999.95 <= abs(value) < 1e9
    return f"{value:,.0f}" if whole else f"{value:#.4g}"


def tick_text(key: str, value: float) -> str:
    """A number on an axis: 25 % for shares; else 0.25, 500, 20 k, 1.5 M, 2 B, 5e+24."""
    if key in SHARES:
        return f"{100 * value:.4g} %"
    if abs(value) >= 1e12:
        return f"{value:.2g}"
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
