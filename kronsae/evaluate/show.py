"""Output of `python -m kronsae.evaluate`: a table of runs, for people and machines, and pictures.

A document is what it writes as JSON: {"judged": [{"name", "kind", "dict_size", "k", "metrics",
"densities", …}], …}; see `kronsae.evaluate.__main__`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kronsae.data.packing import contexts_in_words
from kronsae.metrics.figures import MEANING
from kronsae.system import tables

Entry = Mapping[str, Any]
"""One judged SAE of a document."""


def rows(judged: Sequence[Entry]) -> list[tuple[str, str, list[str]]]:
    """(name in `MEANING`, label, a text for each SAE) of every figure that some SAE has."""
    return [
        (name, label, [_text(name, entry["metrics"].get(name)) for entry in judged])
        for name, (label, _) in MEANING.items()
        if any(name in entry["metrics"] for entry in judged)
    ]


def _text(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "heldout_tokens":
        return f"{value:,}"
    if name == "l0":
        return f"{value:.1f}"
    return f"{100 * value:.2f} %" if "_share" in name else f"{value:.4f}"


def facts(entry: Entry) -> list[str]:
    """Kind, size and training of an SAE, a line each."""
    tokens = entry.get("trained_tokens")
    return [
        entry["kind"],
        f"F = {entry['dict_size']:,}" + (f", k = {entry['k']}" if entry["k"] else ""),
        f"trained on {tokens:,} tokens" if tokens else "",
    ]


_COLUMNS = {
    "explained_variance": "EV",
    "explained_variance_all": "EV, all",
    "l0": "L0",
    "dead_share": "dead",
    "dead_share_10k": "dead/10k",
    "ce_recovered": "CE rec.",
    "ce_recovered_mean": "of mean's",
    "kl_spliced": "KL",
}
"""Figures of a table of several SAEs on a console, and their short names."""


def console_table(judged: Sequence[Entry]) -> Table:
    """For a terminal: all figures of one SAE, or a row with the main ones for each of several."""
    shown = rows(judged)
    if len(judged) == 1:
        table = tables.console_table(("figure", "value"))
        for _, label, [text] in shown:
            table.add_row(label, text)
        return table
    equal = all("dead_share_10k" in entry["metrics"] for entry in judged)
    left_out = "dead_share" if equal else "dead_share_10k"
    columns = {
        _COLUMNS[name]: texts for name, _, texts in shown if name in _COLUMNS and name != left_out
    }
    table = tables.console_table(("SAE", *columns))
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for entry, *texts in zip(judged, *columns.values(), strict=True):
        table.add_row(Text(entry["name"]), *texts)
    return table


def markdown(document: Mapping[str, Any]) -> str:
    """The same as a page: the table, what its rows mean, and how it was made."""
    judged = document["judged"]
    lines = [["", *line] for line in zip(*map(facts, judged), strict=True) if any(line)]
    lines += [[label, *texts] for _, label, texts in rows(judged)]
    table = tables.markdown(["", *(entry["name"] for entry in judged)], lines, numeric=True)
    meanings = "\n".join(f"- **{label}**: {MEANING[name][1]}." for name, label, _ in rows(judged))
    texts = "\n".join(
        f"- {', '.join(text['of'])}: {text['tokens']:,} tokens of "
        f"{text['dataset']} ({text['which']}), in {text_in_words(text)}, read by "
        f"{text['model']['name']} in {text['model']['dtype']} at {text['model']['hookpoint']}; "
        f"{text['left_out']}.{_beside(text)}"
        + (f" **Warning**: {text['warning']}." if "warning" in text else "")
        for text in document["texts"]
    )
    return (
        f"# Evaluation on held-out text\n\n    {document['command']}\n\n{table}\n\n{texts}\n\n"
        f"{meanings}\n"
    )


def _beside(text: Mapping[str, Any]) -> str:
    """On what --absorption and --probe measure, in sentences that follow another; "" without."""
    words, probe = text.get("absorption"), text.get("probe")
    first = f" First letters: {words['words']:,} words of the vocabulary." if words else ""
    if not probe:
        return first
    return first + (
        f" Classes: {len(probe['classes'])} of the column {probe['column']}, on the first "
        f"{probe['context_length']} tokens of {probe['documents']:,} documents; of "
        f"{probe['measured']:,} that are measured, the run held out "
        f"{probe['measured_of_heldout']:,}."
    )


def text_in_words(text: Mapping[str, Any]) -> str:
    """The contexts that a text was read in."""
    return contexts_in_words(text["context_length"], text.get("context_begin"))


def draw(judged: Sequence[Entry], folder: Path) -> list[Path]:
    """densities.png; of several also tradeoff.png: what each explains and recovers, against its L0.

    A figure that is not finite has no point in it, and there is none without points.
    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figures = {"densities.png": _densities(judged)}
        if len(judged) > 1 and (points := _points(judged)):
            figures["tradeoff.png"] = _tradeoff(points)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=110)
        pyplot.close("all")
    return [folder / name for name in figures]


def _densities(judged: Sequence[Entry]) -> Any:
    """A histogram for each SAE below each other, on one axis; dead latents at its left end."""
    from matplotlib import pyplot

    count = len(judged)
    figure, panels = pyplot.subplots(
        count, 1, figsize=(7, 1.2 + 1.7 * count), sharex=True, squeeze=False, layout="constrained"
    )
    first = min(entry["densities"]["log10_edges"][0] for entry in judged)
    for axes, entry in zip(panels[:, 0], judged, strict=True):
        densities = entry["densities"]
        edges, latents = densities["log10_edges"], densities["latents"]
        width = edges[1] - edges[0]
        axes.bar(edges[:-1], latents, width=width, align="edge", color="#4477aa")
        axes.bar(
            first - 4 * width, densities["dead"], width=2 * width, align="edge", color="#bbbbbb"
        )
        axes.axvline(-1, color="#cc6677", linewidth=1, linestyle=":")
        axes.set_title(entry["name"], fontsize=9, loc="left")
        axes.set_ylabel("latents")
    ticks = range(round(first), 1)
    axes = panels[-1, 0]
    axes.set_xticks(
        [first - 3 * width, *ticks],
        ["dead", *(f"$10^{{{tick}}}$" if tick else "1" for tick in ticks)],
    )
    axes.set_xlabel("share of tokens on which a latent fires (right of the dotted line: dense)")
    return figure


_FIGURES = (
    ("explained_variance", "Explained variance"),
    ("ce_recovered", "Cross-entropy recovered\n(1: clean, 0: zeroed)"),
    ("ce_recovered_mean", "Cross-entropy recovered\n(1: clean, 0: mean-ablated)"),
)


_Points = dict[str, list[tuple[int, Entry, float, float]]]
"""By a figure's label: number and entry of each SAE that has it, its L0, and the figure."""


def _points(judged: Sequence[Entry]) -> _Points:
    points = {
        label: [
            (number, entry, entry["metrics"]["l0"], entry["metrics"][name])
            for number, entry in enumerate(judged)
            if entry["metrics"].get(name) is not None
        ]
        for name, label in _FIGURES
    }
    return {label: some for label, some in points.items() if some}


def _tradeoff(points: _Points) -> Any:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(points), figsize=(3.6 * len(points) + 1.8, 3.4), squeeze=False, layout="constrained"
    )
    for axes, (label, some) in zip(panels[0], points.items(), strict=True):
        for number, entry, *point in some:
            marker = "osD^v"[number // 10 % 5]  # there are ten colours
            axes.plot(*point, marker, color=f"C{number}", label=entry["name"])
        for source in dict.fromkeys(entry["source"] for _, entry, *_ in some):  # of several k
            curve = sorted(point for _, entry, *point in some if entry["source"] == source)
            axes.plot(*zip(*curve, strict=True), color="0.8", zorder=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.margins(0.2)
        axes.set_xlabel("L0 (active latents a token)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure
