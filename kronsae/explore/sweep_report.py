"""report.html of a sweep: its members side by side, and, of several hookpoints, over these.

`page/sweep.html.j2` is the page; here is what it shows.
"""

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from kronsae.config import DataConfig, with_defaults
from kronsae.explore import charts
from kronsae.explore.charts import Drawing, is_number
from kronsae.metrics.figures import massive_warning
from kronsae.runs.folder import SweepFolder
from kronsae.runs.sweep import comparison, hookpoint_name
from kronsae.system.documents import part_of
from kronsae.system.files import write_text
from kronsae.system.templates import render

_TEMPLATE = Path(__file__).parent / "page" / "sweep.html.j2"

COLOURS = 8
"""Number of colours of lines, after which they begin again, dashed."""


class Figure(NamedTuple):
    """A figure of merit that is drawn over the hookpoints."""

    title: str
    key: str
    note: str
    highest: float | None = None
    """Top of its axis; None: from the values."""


FIGURES = (
    Figure("Explained variance", "explained_variance", "share of the variance", 1.0),
    Figure("Cross-entropy recovered", "ce_recovered", "1: the reconstruction loses nothing", 1.0),
    Figure("Dead latents", "dead_share", "share of latents that no held-out token activates"),
    Figure("Active latents", "l0", "latents active on a token, on average"),
    Figure(
        "Massive tokens' variance",
        "massive_variance_share",
        "share of the variance that tokens far from the mean hold",
    ),
)


def write_sweep_report(sweep: SweepFolder) -> Path:
    """Write report.html of a sweep that has ended, from its sweep.json; returns its path.

    Raises InputError if it cannot be written.
    """
    members = sweep.members()
    head, rows = comparison(members)
    settings = {
        name: with_defaults(DataConfig, part_of(entry, "config", "data"))
        for name, entry in members.items()
    }
    places = {name: hookpoint_name(data) for name, data in settings.items()}
    data = next(iter(settings.values()))
    hookpoints = list(dict.fromkeys(places.values()))
    variants = {name: variant_of(name, places[name]) for name in members}
    drawings = []
    if len(hookpoints) > 1:
        for figure in FIGURES:
            values: dict[str, dict[int, float]] = {}
            for name, entry in members.items():
                value = entry["metrics"].get(figure.key)
                if is_number(value) and not entry["failed"]:
                    of_variant = values.setdefault(variants[name], {})
                    of_variant[hookpoints.index(places[name])] = value
            if any(max(of.values()) > 0 for of in values.values()):
                drawings.append(draw(figure, values, ticks_of(hookpoints)))
    metrics: list[dict[str, Any]] = [entry["metrics"] for entry in members.values()]
    warnings: dict[str, list[str]] = {}  # members at one hookpoint have the same
    for name, entry in members.items():
        if (warning := massive_warning(entry["metrics"])) is not None:
            warnings.setdefault(warning, []).append(name)
    page = render(
        _TEMPLATE,
        name=sweep.path.resolve().name,
        data=data,
        hookpoints=hookpoints,
        count=len(members),
        tokens=max((entry["tokens"] for entry in members.values()), default=0),
        heldout_tokens=next((x["heldout_tokens"] for x in metrics if "heldout_tokens" in x), None),
        head=head,
        rows=list(zip(members, rows, strict=True)),
        reports={name: run.report.is_file() for name, run in sweep.runs.items()},
        failed={name: entry["failed"] for name, entry in members.items() if entry["failed"]},
        warnings={", ".join(names): warning for warning, names in warnings.items()},
        charts=drawings,
        colours=COLOURS,
        edges=charts,
        folder=str(sweep.path),
        quoted=shlex.quote,
        repr=repr,
        example=next(iter(members)),
    )
    write_text(sweep.report, page)
    return sweep.report


def variant_of(name: str, hookpoint: str) -> str:
    """What a member's name says beside its hookpoint, which is the same at other hookpoints."""
    return name.replace(hookpoint, "").strip("-") or "SAE"


def ticks_of(hookpoints: list[str], most: int = 12) -> list[tuple[int, str]]:
    """Number and label of the hookpoints that an axis names: of layers, their numbers."""
    every = -(-len(hookpoints) // most)
    numbers = list(range(0, len(hookpoints), every))
    layers = all(name.startswith("layer") for name in hookpoints)
    return [(n, hookpoints[n].removeprefix("layer") if layers else str(n)) for n in numbers]


def draw(
    figure: Figure, values: dict[str, dict[int, float]], labels: list[tuple[int, str]]
) -> Drawing:
    """The chart of a figure over the hookpoints, a line for each variant.

    values: {variant: {number of the hookpoint: value}}, not empty.
    """
    every = [value for of in values.values() for value in of.values()]
    last = max(1, *(number for of in values.values() for number in of))
    top = max(every) if figure.highest is None else figure.highest
    ticks = charts.linear_ticks(min(0.0, *every), max(top, *every))

    def across(number: float) -> float:
        return charts.LEFT + (number + 0.5) / (last + 1) * (charts.RIGHT - charts.LEFT)

    def up(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return charts.BOTTOM - share * (charts.BOTTOM - charts.TOP)

    lines = []
    for variant, of in values.items():
        places = [f"{across(number):.1f} {up(of[number]):.1f}" for number in sorted(of)]
        rings = "".join(f"M{place}m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0" for place in places)
        mean = charts.figure_text(figure.key, sum(of.values()) / len(of))
        lines.append((variant, mean, f"M{'L'.join(places)}{rings}"))
    return Drawing(
        figure.title,
        figure.note,
        [(across(number), label) for number, label in labels],
        [(up(value), charts.tick_text(figure.key, value)) for value in ticks],
        lines,
    )
