"""report.html: a run on one page that needs nothing else, neither a network nor a script.

Everything that comes from a file or from text passes through `_escape` on its way into the page.
"""

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from html import escape as _escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from kronsae.config import all_settings, kind_of, without_nesting
from kronsae.data.token_text import token_texts
from kronsae.metrics.figures import MEANING
from kronsae.properties.contexts import LatentContexts, Window, short, title
from kronsae.registry import SELECTIONS
from kronsae.system.files import write_text

Record = dict[str, Any]
"""A line of metrics.jsonl."""

_SHARES = {
    "explained_variance",
    "fvu",
    "explained_variance_batch",
    "dead_share",
    "dense_share",
    "ce_recovered",
}


class Chart(NamedTuple):
    """One figure over the tokens of the run."""

    title: str
    key: str
    """In the records of metrics.jsonl."""
    note: str
    bounds: tuple[float | None, float | None] = (0.0, None)
    """Ends of the vertical axis; None: from the values."""
    kinds: tuple[str, ...] = ("train",)
    logarithmic: bool = False


_CHARTS = (
    Chart(
        "Explained variance",
        "explained_variance",
        "share of the variance, of training batches and of held-out text",
        (0.0, 1.0),
        ("train", "heldout"),
    ),
    Chart(
        "Loss",
        "loss",
        "mean squared error of normalised activations (logarithmic axis)",
        (None, None),
        logarithmic=True,
    ),
    Chart(
        "Dead latents",
        "dead_share",
        "share of latents: silent for long in training; on no held-out token",
        kinds=("train", "heldout"),
    ),
    Chart("Active latents", "l0", "latents active on a token of the training batch, on average"),
    Chart(
        "Balance of the experts",
        "balance_loss",
        "1 where each expert gets as many tokens; their number where one gets all",
        (1.0, None),
    ),
    Chart("Learning rate", "lr", "of AdamW"),
    Chart(
        "Gradient norm",
        "grad_norm",
        "before clipping (logarithmic axis)",
        (None, None),
        logarithmic=True,
    ),
    Chart("Speed", "tokens_per_s", "tokens trained on, a second"),
)

_KINDS = {"train": "training", "heldout": "held-out"}
"""Lines of the charts; the "final" record is the last point of "heldout"."""


def write_report(
    run_folder: Path, *, contexts: Sequence[LatentContexts] | None = None, tokenizer: Any = None
) -> Path:
    """Write report.html of a run from its config.json and metrics.jsonl; returns its path.

    contexts: latents to show (`kronsae.properties.contexts.top_contexts`). What is missing, in the
    files or here, is left out of the page. Raises InputError if the page cannot be written.
    """
    settings = _read_settings(run_folder / "config.json")
    records = read_metrics(run_folder / "metrics.jsonl")
    body = "".join(
        (
            _summary(settings, records, run_folder),
            _evaluation(records),
            _latents(contexts or (), tokenizer),
            _training(records),
            _commands(settings, run_folder),
            _settings(settings),
        )
    )
    name = _escape(f"KronSAE run {run_folder.resolve().name}")
    page = _PAGE.substitute(title=name, style=_STYLE, body=body)
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
        if isinstance(record, dict) and _is_number(record.get("step")):
            records.append(record)
    return sorted(records, key=lambda record: record["step"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _figure(key: str, value: Any) -> str:
    """A value of a record for people: 96.03 % for shares, four digits for the rest."""
    if not _is_number(value):
        return _escape(str(value))
    if key in _SHARES:
        return f"{100 * value:.2f} %"
    return f"{value:#.4g}" if 0 < abs(value) < 1000 else f"{value:,.0f}"


def _tick(key: str, value: float) -> str:
    """A number on an axis: 25 % for shares; else 0.25, 500, 20 k, 1.5 M, 2 B."""
    if key in _SHARES:
        return f"{100 * value:.4g} %"
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"


def _last_evaluation(records: Sequence[Record]) -> Record | None:
    for kind in ("final", "heldout"):
        found = [record for record in records if record.get("kind") == kind]
        if found:
            return found[-1]
    return None


def _summary(settings: dict[str, Any], records: Sequence[Record], run_folder: Path) -> str:
    sae, data = (settings["config"][part] for part in ("sae", "data"))
    kron = sae.get("encoder", "kron") == "kron"
    hook = data.get("hookpoint") or f"layer {data.get('layer')}"
    source = f"{hook} of {data['model']}" if data.get("model") else ""
    sentences = []
    if _is_number(sae.get("dict_size")):
        latents = f"<strong>{sae['dict_size']:,} latents</strong>"
        if kron and all(_is_number(sae.get(key)) for key in ("heads", "m", "n")):
            latents += f" ({sae['heads']:,} heads of {sae['m']} base × {sae['n']} extension)"
        exact = SELECTIONS[sae["selection"]].exact if sae.get("selection") in SELECTIONS else True
        about, k = "" if exact else "about ", _escape(str(sae.get("k")))
        active = f", {about}{k} of them active on each token," if sae.get("k") else ""
        vectors = f"vectors of width {sae.get('d_model')}"
        if source:
            vectors += f", the activations of {source} as it reads {data.get('dataset')}"
        if sae.get("d_target"):
            of_target = data.get("target_hookpoint") or "another stream"
            does = f"predict {of_target}, vectors of width {sae['d_target']}, from {vectors}"
        else:
            does = f"reconstruct {vectors}"
        sentences.append(f"{latents}{active} {_escape(does)}")
    timed = [r for r in records if _is_number(r.get("tokens")) and _is_number(r.get("seconds"))]
    if timed:
        time = _duration(timed[-1]["seconds"])
        sentences.append(f"They were trained on {timed[-1]['tokens']:,} tokens in {time}")
    figures = _last_evaluation(records) or {}
    if _is_number(figures.get("explained_variance")):
        share = _figure("explained_variance", figures["explained_variance"])
        sentences.append(
            f"On held-out text the reconstruction explains <strong>{share} of the variance</strong>"
        )
    if all(_is_number(figures.get(key)) for key in ("ce_clean", "ce_spliced")):
        sentences.append(
            "In place of the activations it changes the language model's loss from <strong>"
            f"{figures['ce_clean']:.3f} to {figures['ce_spliced']:.3f} nats</strong> a token"
        )
    text = "".join(f"{sentence}. " for sentence in sentences)
    heading = f"{kind_of(sae)}{' on ' if source else ''}{source}"
    return f"<header><h1>{_escape(heading)}</h1><p>{text}</p></header>"


def _evaluation(records: Sequence[Record]) -> str:
    record = _last_evaluation(records)
    if record is None:
        return ""
    rows = [
        (f'<th scope="row">{label}</th>', f"<td>{_figure(key, record[key])}</td>", meaning)
        for key, (label, meaning) in MEANING.items()
        if key in record
    ]
    body = "".join(f"<tr>{head}{value}<td>{meaning}</td></tr>" for head, value, meaning in rows)
    unfinished = "" if record["kind"] == "final" else " The run has not ended."
    return (
        f'<section id="evaluation"><h2>On held-out text</h2><p>After step {record["step"]:,}, on '
        f"text that training has not seen.{unfinished}</p>"
        '<table class="figures wide"><thead><tr><th scope="col">Figure</th><th scope="col">Value'
        f'</th><th scope="col">Meaning</th></tr></thead><tbody>{body}</tbody></table></section>'
    )


def _latents(contexts: Sequence[LatentContexts], tokenizer: Any) -> str:
    if not contexts:
        return ""
    articles = "".join(_latent(found, tokenizer) for found in contexts)
    grids = (
        " The squares are the latents of its head, a row for each base and a column for each "
        "extension: the stronger the colour, the more often it fires."
        if any(found.head_densities for found in contexts)
        else ""
    )
    return (
        '<section id="latents"><h2>What some latents have learned</h2><p>Where each fires most in '
        "the held-out text: the number is its activation on the framed token, the shade its "
        "activation on the others. ↵ is a line break, ⇥ a tab or four spaces."
        f"{grids}</p>{articles}</section>"
    )


def _latent(found: LatentContexts, tokenizer: Any) -> str:
    windows = "".join(_window(found, window, tokenizer) for window in found.windows)
    return (
        f"<article><h3>{_escape(title(found))}</h3>{_head_grid(found)}<ol>{windows}</ol></article>"
    )


def _window(found: LatentContexts, window: Window, tokenizer: Any) -> str:
    tokens = []
    texts = token_texts(window.tokens, tokenizer, window.activations)
    for place, (text, value) in enumerate(zip(texts, window.activations, strict=True)):
        token, peak = _escape(text), place == window.position - window.start
        if value > 0 or peak:
            shade = max(0.0, value) / (max(found.max_activation, value) or 1.0)
            tag = "mark" if peak else "span"
            token = f'<{tag} style="--a:{shade:.2f}" title="{short(value)}">{token}</{tag}>'
        tokens.append(token)
    return f"<li><b>{short(window.activation)}</b><code>{''.join(tokens)}</code></li>"


def _head_grid(found: LatentContexts) -> str:
    """The m x n latents of the head as squares, the shown one framed."""
    grid, side = found.head_densities, 14
    if not grid or len(grid) * len(grid[0]) > 256:
        return ""
    m, n = len(grid), len(grid[0])
    highest = max(map(max, grid)) or 1.0
    squares = []
    for i, row in enumerate(grid):
        for j, density in enumerate(row):
            shown = ' class="shown"' if (i, j) == (found.base, found.extension) else ""
            latent = (found.head * m + i) * n + j
            squares.append(
                f'<rect{shown} x="{j * side + 1}" y="{i * side + 1}" width="{side - 2}" '
                f'height="{side - 2}" style="--a:{(density / highest) ** 0.5:.2f}"><title>'
                f"latent {latent} (base {i} × extension {j}): {100 * density:.2g} %</title></rect>"
            )
    return (
        f'<svg class="head" role="img" aria-label="How often each latent of head {found.head} '
        f'fires, {m} base × {n} extension" viewBox="0 0 {n * side} {m * side}" '
        f'width="{n * side}" height="{m * side}">{"".join(squares)}</svg>'
    )


def _training(records: Sequence[Record]) -> str:
    charts = "".join(_chart(chart, records) for chart in _CHARTS)
    if not charts:
        return ""
    return (
        f'<section id="training"><h2>Training</h2><div class="charts">{charts}</div>'
        f"{_heldout_table(records)}</section>"
    )


def _heldout_table(records: Sequence[Record]) -> str:
    rows = [record for record in records if record.get("kind") in ("heldout", "final")]
    if not rows:
        return ""
    keys = [key for key in MEANING if key in rows[0]]
    head = "".join(f'<th scope="col">{MEANING[key][0]}</th>' for key in keys)
    body = "".join(
        f'<tr><th scope="row">{record["step"]:,}</th>'
        + "".join(f"<td>{_figure(key, record.get(key, '–'))}</td>" for key in keys)
        + "</tr>"
        for record in rows
    )
    return (
        '<details><summary>All evaluations on held-out text</summary><div class="scroll" '
        'tabindex="0" role="region" aria-label="All evaluations"><table class="numbers"><thead>'
        f'<tr><th scope="col">Step</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        "</details>"
    )


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 220, 52, 26, 10, 36
"""Of a chart and the margins around its plot, in SVG units."""


def _chart(chart: Chart, records: Sequence[Record]) -> str:
    """A figure with its lines, axes and legend; empty if the records hold no such values."""
    lines = {kind: _points(records, kind, chart) for kind in chart.kinds}
    lines = {kind: _thinned(points) for kind, points in lines.items() if points}
    if not lines:
        return ""
    every = [y for points in lines.values() for _, y in points]
    last = max(r["tokens"] for r in records if _is_number(r.get("tokens"))) or 1
    bottom = min(every) if chart.bounds[0] is None else chart.bounds[0]
    top = max(bottom, *every) if chart.bounds[1] is None else chart.bounds[1]
    ticks = (_log_ticks if chart.logarithmic else _ticks)(bottom, top)
    scale = math.log10 if chart.logarithmic else float
    low, high = scale(ticks[0]), scale(ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        share = (scale(y) - low) / (high - low)
        across = LEFT + x / last * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - min(1, max(0, share)) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ticks:
        _, at = place(0, y)
        parts.append(
            f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_tick(chart.key, y)}</text>'
        )
    for x in _ticks(0, last, 4):
        if x <= last:
            at, _ = place(x, ticks[0])
            parts.append(
                f'<path class="axis" d="M{at:.1f} {HEIGHT - BOTTOM}v4"/>'
                f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
                f"{_tick('tokens', x)}</text>"
            )
    parts.append(
        f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">tokens</text>'
    )
    for kind, points in lines.items():
        places = [place(*point) for point in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line {kind}" d="M{path}"/>')
        if kind != "train" or len(places) == 1:
            parts += [
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>'
                f"{point[0]:,.0f} tokens: {_figure(chart.key, point[1])}</title></circle>"
                for (x, y), point in zip(places, points, strict=True)
            ]
    said = ", ".join(
        f"{_KINDS[kind]} from {_figure(chart.key, points[0][1])} "
        f"to {_figure(chart.key, points[-1][1])}"
        for kind, points in lines.items()
    )
    names = _KINDS if len(lines) > 1 else dict.fromkeys(_KINDS, "")
    legend = " · ".join(
        f'<span class="{kind}">{names[kind]} {_figure(chart.key, points[-1][1])}</span>'
        for kind, points in lines.items()
    )
    return (
        f"<figure><figcaption><strong>{chart.title}</strong> {legend}<br><small>{chart.note}"
        f'</small></figcaption><svg role="img" aria-label="{chart.title}: {said}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg></figure>'
    )


def _points(records: Iterable[Record], kind: str, chart: Chart) -> list[tuple[float, float]]:
    """(tokens, value) of each record of a kind that has the value."""
    return [
        (record["tokens"], record[chart.key])
        for record in records
        if str(record.get("kind")).replace("final", "heldout") == kind
        and _is_number(record.get("tokens"))
        and _is_number(record.get(chart.key))
        and (record[chart.key] > 0 or not chart.logarithmic)
    ]


def _thinned(points: list[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours."""
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(part) / len(group) for part in zip(*group, strict=True)) for group in groups]


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    spread = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(spread / about))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor * about >= spread)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 and 10 times powers of ten around [low, high]; powers alone if it is wide."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    below = max((tick for tick in ticks if tick <= low * 1.001), default=ticks[0])
    above = min(tick for tick in ticks if tick >= high * 0.999 and tick > below)
    return [tick for tick in ticks if below <= tick <= above]


def _commands(settings: dict[str, Any], run_folder: Path) -> str:
    folder = shlex.quote(str(run_folder))
    config = shlex.quote(str(run_folder / "config.json"))
    sae = settings["config"]["sae"]
    width = sae.get("d_model") or "d"
    blocks = {
        "As it was started": _command(settings.get("command")),
        "Repeat it": f"python -m kronsae.train --config {config}",
        "Go on if it was stopped": f"python -m kronsae.train --resume {folder}",
        "Use it in Python": "import kronsae\n\n"
        f"sae = kronsae.load({str(run_folder)!r})\n"
        f"codes = sae.encode(x)      # x: [..., {width}] raw activations\n"
        "codes.indices, codes.values  # the active latents of each vector\n"
        + ("y_hat = sae(x).x_hat" if sae.get("d_target") else "x_hat = sae.decode(codes)"),
    }
    body = "".join(
        f"<h3>{name}</h3><pre><code>{_escape(text)}</code></pre>"
        for name, text in blocks.items()
        if text
    )
    return f'<section id="commands"><h2>Use and repeat</h2>{body}</section>'


def _command(command: Any) -> str:
    """The command line, from a string or from sys.argv."""
    if not isinstance(command, list) or not command:
        return command if isinstance(command, str) else ""
    program, *arguments = map(str, command)
    place = Path(program).parts[-2:]
    if place == ("kronsae", "train.py"):
        start = ["python", "-m", "kronsae.train"]
    elif place == ("kronsae", "__main__.py") or place[-1:] == ("kronsae",):
        start = ["kronsae"]
    else:
        start = ["python", Path(program).name]
    return shlex.join([*start, *arguments])


def _settings(settings: dict[str, Any]) -> str:
    config = settings["config"]
    tables = []
    known = all_settings()
    for label, name in (("SAE", "sae"), ("Data", "data"), ("Training", "train")):
        plain = without_nesting(config[name])
        rows = [
            (key, value, known[key].spec.metadata["help"] if key in known else "")
            for key, value in plain.items()
        ]
        tables.append(_table(label, rows))
    versions = settings.get("versions")
    rows = versions.items() if isinstance(versions, dict) else ()
    tables.append(_table("Versions", [(key, value, "") for key, value in rows]))
    above = ("config", "versions", "command", "format", "format_version")
    rest = [(key, value, "") for key, value in settings.items() if key not in above]
    tables.append(_table("Further", rest))
    body = "".join(tables)
    if not body:
        return ""
    return f'<section id="settings"><h2>Settings and versions</h2>{body}</section>'


def _table(name: str, rows: Sequence[tuple[str, Any, str]]) -> str:
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row"><code>{_escape(key)}</code></th>'
        f"<td>{_escape(_plain(value))}</td>"
        f"<td>{_escape(help)}</td></tr>"
        for key, value, help in rows
    )
    return f'<details><summary>{name}</summary><table class="wide">{body}</table></details>'


def _plain(value: Any) -> str:
    """A setting as in JSON, but strings without quotes and – for none."""
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>$body</main>
</body>
</html>
""")

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c2126; --faint: #5a646e;
  --rule: #d8dde2; --train: #1f62ad; --heldout: #b4480a; --mark: 255 166 0; --most: .75; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181b; --text: #e6e9ec; --faint: #9da8b2; --rule: #363e46;
    --train: #6fb1f7; --heldout: #f4a261; --most: .45; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { max-width: 46rem; margin: .25rem 0 .75rem; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: .875rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem .8rem;
  border: 1px solid var(--rule); border-radius: 4px; margin: .25rem 0; }
table { border-collapse: collapse; font-size: .9375rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0;
  border-bottom: 1px solid var(--rule); font-weight: normal; overflow-wrap: break-word; }
thead th, .wide td:last-child { color: var(--faint); }
.figures :is(th, td):nth-child(2), .numbers * { text-align: right; }
.figures td:nth-child(2), .numbers td { white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.figures td:nth-child(2) { font-weight: 600; }
.scroll { overflow-x: auto; }
details { border-top: 1px solid var(--rule); padding: .4rem 0; }
summary { cursor: pointer; }
:focus-visible { outline: 2px solid var(--train); outline-offset: 2px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem 2rem; margin: 1rem 0; }
figure { margin: 0; }
figcaption small { color: var(--faint); }
figure svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--faint); }
.grid { stroke: var(--rule); }
.axis { stroke: var(--faint); }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.line.train { stroke: var(--train); }
.line.heldout { stroke: var(--heldout); stroke-dasharray: 5 3; }
circle.train { fill: var(--train); }
circle.heldout { fill: var(--heldout); }
span.train { color: var(--train); }
span.heldout { color: var(--heldout); }
article { display: flow-root; border-top: 1px solid var(--rule); margin-top: .75rem; }
article h3 { margin-top: .6rem; }
.head { float: right; margin: 0 0 .5rem 1rem; max-width: 40%; }
.head rect { fill: rgb(var(--mark) / calc(.06 + .94 * var(--a))); stroke: var(--rule); }
.head .shown { stroke: var(--text); stroke-width: 2; }
ol { list-style: none; margin: .25rem 0 .75rem; padding: 0; }
li { display: flex; gap: .75rem; align-items: baseline; padding: .1rem 0; }
li b { min-width: 3rem; text-align: right; font-weight: normal; color: var(--faint);
  font-variant-numeric: tabular-nums; }
li code { white-space: pre-wrap; overflow-wrap: anywhere; }
li span, li mark { color: inherit; border-radius: 2px; padding-block: 1px 3px;
  background: rgb(var(--mark) / calc(var(--most) * var(--a))); }
li mark { outline: 1.5px solid var(--text); outline-offset: 0; }
figcaption span { white-space: nowrap; }
@media (max-width: 40rem) {
  .wide thead { position: absolute; clip-path: inset(50%); }
  .wide tr { display: grid; grid-template-columns: 1fr auto; padding: .3rem 0;
    border-bottom: 1px solid var(--rule); }
  .wide th, .wide td { border: 0; padding: 0; }
  .wide td:last-child { grid-column: 1 / -1; font-size: .875rem; } }
@media print { details { display: none; } }
"""
