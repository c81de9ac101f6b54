"""report.html: a run on one page that needs nothing else, neither a network nor a script.

`page/report.html.j2` is the page; here is what it shows.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kronsae.config import all_settings, kind_of, without_nesting
from kronsae.data.token_text import token_texts
from kronsae.explore import charts
from kronsae.explore.charts import Record, is_number
from kronsae.metrics.figures import MEANING
from kronsae.properties.contexts import LatentContexts, Window, short, title
from kronsae.registry import SELECTIONS
from kronsae.system.files import write_text
from kronsae.system.templates import render

_TEMPLATE = Path(__file__).parent / "page" / "report.html.j2"

MOST_SQUARES = 256
"""Latents of a head that are drawn as squares."""


def write_report(
    run_folder: Path, *, contexts: Sequence[LatentContexts] | None = None, tokenizer: Any = None
) -> Path:
    """Write report.html of a run from its config.json and metrics.jsonl; returns its path.

    contexts: latents to show (`kronsae.properties.contexts.top_contexts`). What is missing, in the
    files or here, is left out of the page. Raises InputError if the page cannot be written.
    """
    settings = _read_settings(run_folder / "config.json")
    records = read_metrics(run_folder / "metrics.jsonl")
    sae, data = settings["config"]["sae"], settings["config"]["data"]
    hook = data.get("hookpoint") or f"layer {data.get('layer')}"
    selection = sae.get("selection")
    evaluations = [record for record in records if record.get("kind") in ("heldout", "final")]
    timed = [r for r in records if is_number(r.get("tokens")) and is_number(r.get("seconds"))]
    page = render(
        _TEMPLATE,
        name=run_folder.resolve().name,
        kind=kind_of(sae),
        source=f"{hook} of {data['model']}" if data.get("model") else "",
        sae=sae,
        data=data,
        heads=sae.get("encoder", "kron") == "kron"
        and all(is_number(sae.get(key)) for key in ("heads", "m", "n")),
        exact=SELECTIONS[selection].exact if selection in SELECTIONS else True,
        trained=timed[-1] if timed else None,
        evaluation=_last_evaluation(evaluations),
        evaluations=evaluations,
        figures=MEANING,
        latents=[_latent(latent, tokenizer) for latent in contexts or ()],
        charts=[drawing for chart in charts.CHARTS if (drawing := charts.draw(chart, records))],
        chart_size=charts.SIZE,
        folder=str(run_folder),
        command=_command(settings.get("command")),
        settings=_settings_tables(settings),
        grouped="{:,}".format,
        quoted=shlex.quote,
        repr=repr,
        short=short,
        duration=_duration,
        is_number=is_number,
        figure_text=charts.figure_text,
    )
    write_text(run_folder / "report.html", page)
    return run_folder / "report.html"


def _read_settings(path: Path) -> dict[str, Any]:
    """config.json as {"config": {"sae": {}, "data": {}, "train": {}}, ...}, {} where missing."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    settings = settings if isinstance(settings, dict) else {}
    config = settings.get("config")
    config = config if isinstance(config, dict) else {}
    parts = {part: config.get(part) or {} for part in ("sae", "data", "train")}
    return {**settings, "config": parts}


def read_metrics(path: Path) -> list[Record]:
    """The records, by step; what is no line of the log (half a one, of a run that was
    killed, or a damaged one) is skipped."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and is_number(record.get("step")):
            records.append(record)
    return sorted(records, key=lambda record: record["step"])


def _last_evaluation(evaluations: Sequence[Record]) -> Record:
    """The final one, or the last held-out one of a run that has not ended; empty without any."""
    final = [record for record in evaluations if record["kind"] == "final"]
    return (final or evaluations or [{}])[-1]


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"


class Token(NamedTuple):
    """A token of a window, and how it is marked."""

    text: str
    tag: str
    """"mark" for the token where the latent fires most, "span" for others where it fires."""
    activation: float
    shade: float
    """From 0 to 1: its share of the latent's largest activation."""


class Square(NamedTuple):
    """A latent of the grid of a head."""

    base: int
    extension: int
    label: str
    shade: float
    """From 0 to 1: the root of its share of the highest density."""
    shown: bool
    """Whether it is the latent whose head this is."""


class Latent(NamedTuple):
    """A latent as the page shows it."""

    contexts: LatentContexts
    title: str
    squares: list[Square]
    """The latents of its head; none for a dense encoder, or if there are too many to draw."""
    windows: list[tuple[float, list[Token]]]
    """The activation at the peak of each, and its tokens."""


def _latent(latent: LatentContexts, tokenizer: Any) -> Latent:
    windows = [
        (window.activation, _tokens(window, latent.max_activation, tokenizer))
        for window in latent.windows
    ]
    return Latent(latent, title(latent), _squares(latent), windows)


def _tokens(window: Window, strongest: float, tokenizer: Any) -> list[Token]:
    tokens = []
    texts = token_texts(window.tokens, tokenizer, window.activations)
    for position, (text, value) in enumerate(zip(texts, window.activations, strict=True)):
        peak = position == window.position - window.start
        shade = max(0.0, value) / (max(strongest, value) or 1.0)
        tokens.append(Token(text, "mark" if peak else "span" if value > 0 else "", value, shade))
    return tokens


def _squares(latent: LatentContexts) -> list[Square]:
    grid = latent.head_densities
    if latent.head is None or not grid or len(grid) * len(grid[0]) > MOST_SQUARES:
        return []
    highest = max(map(max, grid)) or 1.0
    first = latent.head * len(grid) * len(grid[0])
    return [
        Square(
            i,
            j,
            f"latent {first + i * len(row) + j} (base {i} × extension {j}): {100 * density:.2g} %",
            (density / highest) ** 0.5,
            (i, j) == (latent.base, latent.extension),
        )
        for i, row in enumerate(grid)
        for j, density in enumerate(row)
    ]


def _command(command: Any) -> str:
    """The command line, from a string or from sys.argv."""
    if not isinstance(command, list) or not command:
        return command if isinstance(command, str) else ""
    program, *arguments = map(str, command)
    parts = Path(program).parts[-2:]
    if parts == ("kronsae", "train.py"):
        start = ["python", "-m", "kronsae.train"]
    elif parts == ("kronsae", "__main__.py") or parts[-1:] == ("kronsae",):
        start = ["kronsae"]
    else:
        start = ["python", Path(program).name]
    return shlex.join([*start, *arguments])


def _settings_tables(settings: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Label of each table that has rows, and the name, value and meaning of each setting in it."""
    known = all_settings()
    versions = settings.get("versions")
    shown = ("config", "versions", "command", "format", "format_version")
    tables = {
        "SAE": without_nesting(settings["config"]["sae"]),
        "Data": without_nesting(settings["config"]["data"]),
        "Training": without_nesting(settings["config"]["train"]),
        "Versions": versions if isinstance(versions, dict) else {},
        "Further": {key: value for key, value in settings.items() if key not in shown},
    }
    return [
        (
            label,
            [
                (key, _plain(value), known[key].spec.metadata["help"] if key in known else "")
                for key, value in values.items()
            ],
        )
        for label, values in tables.items()
        if values
    ]


def _plain(value: Any) -> str:
    """A setting as in JSON, but strings without quotes and – for none."""
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)
