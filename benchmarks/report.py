"""Tables and pictures from measurements: `python -m benchmarks.report RESULTS_DIR`.

Reads every JSON file of the folder that benchmarks.compare, benchmarks.isoflop, benchmarks.profile
or pytest-benchmark wrote, and writes report.md and a PNG for each into the folder.
Pictures need matplotlib: pip install 'kronsae[report]'.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import quartiles
from benchmarks.shapes import Shape
from benchmarks.steps import LABELS

COLOURS = {
    "kron graphed": "#08306b",
    "dense graphed": "#7f3b08",
    "kron fused": "#0b4f8a",
    "kron": "#3f8fd2",
    "dense fused": "#c2570c",
    "dense": "#f0913e",
    "listing": "#8fbce6",
    "topk": "#8c8c8c",
    "eai-sparsify": "#5f9e6e",
    "sae-lens": "#9a6fb0",
    "dictionary-learning": "#b8a13a",
}
"""KronSAE blue, our TopK orange, others their own."""
Json = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of JSON files")
    parser.add_argument("--no-pictures", action="store_true", help="tables alone")
    options = parser.parse_args(arguments)
    print(write(options.results, pictures=not options.no_pictures))


def write(folder: Path, pictures: bool = True) -> str:
    """Write report.md and pictures for all results in the folder; returns the Markdown."""
    parts = ["# Benchmarks"]
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        for key, (table, picture) in KINDS.items():
            if isinstance(found, dict) and key in found:
                parts += [f"## {path.stem}", where(found), table(found)]
                if pictures:
                    image = path.with_suffix(".png")
                    picture(found, image)
                    parts.append(f"![{path.stem}]({image.name})")
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "report.md").write_text(text)
    return text


def where(found: Json) -> str:
    """Machine, versions and measured ceilings of a result."""
    info = found.get("where") or next(
        (one["extra_info"] for one in found.get("benchmarks", []) if one["extra_info"]), {}
    )
    names = ("device", "processor", "threads", "compute", "python", "torch", "triton")
    libraries = ("kronsae", "eai-sparsify", "sae-lens", "dictionary-learning")
    text = ", ".join(f"{n} {info[n]}" for n in (*names, *libraries) if info.get(n) is not None)
    ceilings = found.get("ceilings") or info.get("ceilings")
    if ceilings:
        text += (
            f"; measured: {ceilings['multiply_adds_per_s'] / 1e12:.3g} T multiply-adds/s, "
            f"{ceilings['bytes_per_s'] / 1e9:,.0f} GB/s copied"
        )
    return text


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def title_of(shape: Json) -> str:
    return str(Shape(**shape))


# benchmarks.compare: {"shapes": [{"shape", "times_ms", …}]}


def steps_table(found: Json) -> str:
    parts = []
    for one in found["shapes"]:
        tokens, medians = one["shape"]["tokens"], one["median_ms"]
        ours = _our_kron(medians)
        rows = []
        for name in sorted((n for n in medians if n in LABELS), key=medians.get):
            low, high = quartiles(one["times_ms"][name])
            peak = one["peak_bytes"].get(name)
            rows.append(
                (
                    LABELS[name],
                    f"{medians[name]:.2f}",
                    f"{low:.2f} … {high:.2f}",
                    f"{1e3 * tokens / medians[name]:,.0f}",
                    f"×{medians[name] / ours:.2f}" if ours else "",
                    f"{peak / 2**30:.1f}" if peak else "",
                )
            )
        head = ("a training step", "ms", "quartiles", "tokens/s", "to our KronSAE", "peak GiB")
        if not any(row[-1] for row in rows):
            head, rows = head[:-1], [row[:-1] for row in rows]
        floors = ", ".join(
            f"{model} {one['floor_ms'][key]:.2f} ms"
            for key, model in (("kron", "KronSAE"), ("dense", "TopK"))
        )
        bare = ", ".join(
            f"{model} {medians[f'{key} product']:.2f} ms"
            for key, model in (("kron", "KronSAE"), ("dense", "TopK"))
            if f"{key} product" in medians
        )
        parts += [f"**{title_of(one['shape'])}**", markdown(head, rows)]
        parts.append(f"Floor of a step: {floors}. The encoder's bare product: {bare}.")
        parts.append("\n".join(f"- {LABELS[name]}: {why}" for name, why in one["skipped"].items()))
    return "\n\n".join(parts)


def _our_kron(medians: dict[str, float]) -> float | None:
    """What others are compared to, as `steps.best_of_ours` says."""
    return medians.get("kron fused") or medians.get("kron")


def steps_picture(found: Json, path: Path) -> None:
    shapes = found["shapes"]
    counts = [sum(name in LABELS for name in one["median_ms"]) for one in shapes]
    height = sum(counts) * 0.34 + 1.0 * len(shapes) + 0.5
    figure, panels = _figure(len(shapes), 1, (8.5, height), height_ratios=counts)
    for (panel,), one in zip(panels, shapes, strict=True):
        names = sorted((n for n in one["median_ms"] if n in LABELS), key=one["median_ms"].get)
        ours = _our_kron(one["median_ms"])
        for place, name in enumerate(names):
            median = one["median_ms"][name]
            low, high = quartiles(one["times_ms"][name])
            panel.barh(place, median, color=COLOURS[name], height=0.74)
            panel.plot([low, high], [place, place], color="black", linewidth=1)
            text = f" {median:.3g} ms" + (f", ×{median / ours:.1f}" if ours else "")
            panel.text(max(median, high), place, text, va="center", fontsize=8)
        panel.set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=8)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.22 * max(one["median_ms"][name] for name in names))
        panel.set_title(title_of(one["shape"]), fontsize=9, loc="left")
        _bare(panel)
    panels[-1][0].set_xlabel("ms a training step (median; line: quartiles; ×: to our KronSAE)")
    _save(figure, path)


# benchmarks.isoflop: {"cells": […]}


def isoflop_table(found: Json) -> str:
    budget, grid = found["budget_tokens"], found["grid"]
    rows = []
    for cell in found["cells"]:
        head = (
            f"2^{math.log2(cell['dict_size']):g}",
            str(cell["d"]),
            LABELS[cell["contender"]],
        )
        if "skipped" in cell:
            rows.append((*head, cell["skipped"], "", "", ""))
            continue
        rows.append(
            (
                *head,
                f"{cell['ms']:.2f}",
                f"{cell['tokens_per_s']:,.0f}",
                f"{cell['equal_flops_tokens'] / 1e6:,.0f} M",
                f"{cell['equal_flops_hours']:.2f}",
            )
        )
    note = (
        f"m = {grid['m']}, n = {grid['n']}, k = {grid['k']}, {grid['tokens']} tokens a step. Equal "
        f"FLOPs [eq. 7]: those of a TopK SAE of the same F on {budget / 1e6:.0f} M tokens."
    )
    if grid["name"] != "cuda":
        note += " A reduced grid, not the paper's Fig. 8."
    head = ("F", "d", "", "ms a step", "tokens/s", "tokens for equal FLOPs", "hours for them")
    return note + "\n\n" + markdown(head, sorted(rows, key=lambda row: (row[0], int(row[1]))))


def isoflop_picture(found: Json, path: Path) -> None:
    cells = [cell for cell in found["cells"] if "ms" in cell]
    sizes = sorted({cell["dict_size"] for cell in cells})
    if not sizes:
        return
    figure, panels = _figure(2, len(sizes), (3.6 * len(sizes) + 0.6, 6.4), sharex=True)
    budget = f"hours for the FLOPs of\nTopK on {found['budget_tokens'] / 1e6:.0f} M tokens"
    views = (("ms", f"ms a training step\n({found['grid']['tokens']:,} tokens)"),)
    views += (("equal_flops_hours", budget),)
    for row, (key, label) in zip(panels, views, strict=True):
        for panel, size in zip(row, sizes, strict=True):
            for name in LABELS:
                mine = [c for c in cells if c["dict_size"] == size and c["contender"] == name]
                if mine:
                    xs, ys = [c["d"] for c in mine], [c[key] for c in mine]
                    style = "--" if name in ("topk", "listing") else "-"
                    panel.plot(xs, ys, style, marker="o", color=COLOURS[name], label=LABELS[name])
            widths = sorted({c["d"] for c in cells})
            panel.set_xscale("log", base=2)
            panel.set_xticks(widths, [str(d) for d in widths])
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.25)
            _bare(panel)
        row[0].set_ylabel(label)
    for panel, size in zip(panels[0], sizes, strict=True):
        panel.set_title(f"F = $2^{{{math.log2(size):g}}}$", fontsize=10)
    for panel in panels[1]:
        panel.set_xlabel("d, width of an activation")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    _save(figure, path)


# benchmarks.profile: {"profiles": [{"shape", "contender", "stages": {name: {"ms", "floor_ms"}}}]}


def profile_table(found: Json) -> str:
    parts = []
    for one in found["profiles"]:
        if "skipped" in one:
            parts.append(f"**{title_of(one['shape'])}**, {one['contender']}: {one['skipped']}")
            continue
        rows = [
            (name, f"{s['ms']:.3f}", f"{s['floor_ms']:.3f}", _times(s["ms"], s["floor_ms"]))
            for name, s in one["stages"].items()
        ]
        ms, floor = (sum(s[key] for s in one["stages"].values()) for key in ("ms", "floor_ms"))
        rows.append(("**all kernels**", f"{ms:.3f}", f"{floor:.3f}", _times(ms, floor)))
        rows.append(("**step, by events**", f"{one['step_ms']:.3f}", f"{floor:.3f}", ""))
        rows[-1] = (*rows[-1][:3], _times(one["step_ms"], floor))
        parts += [
            f"**{title_of(one['shape'])}**, {LABELS[one['contender']]}",
            markdown(("stage", "ms", "floor, ms", "ratio"), rows),
        ]
    return "\n\n".join(parts)


def profile_picture(found: Json, path: Path) -> None:
    profiles = [one for one in found["profiles"] if one.get("stages")]
    if not profiles:
        return
    figure, panels = _figure(len(profiles), 1, (8.5, 2.6 * len(profiles) + 0.4))
    for (panel,), one in zip(panels, profiles, strict=True):
        names = list(one["stages"])
        for place, name in enumerate(names):
            stage = one["stages"][name]
            panel.barh(place, stage["ms"], color="#3f8fd2", height=0.7)
            panel.barh(place, stage["floor_ms"], color="#0b3c66", height=0.28)
            text = f" {stage['ms']:.3f}, {_times(stage['ms'], stage['floor_ms'])}"
            panel.text(stage["ms"], place, text, va="center", fontsize=8)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.2 * max(stage["ms"] for stage in one["stages"].values()))
        title = f"{LABELS[one['contender']]}; {title_of(one['shape'])}"
        panel.set_title(title, fontsize=9, loc="left")
        _bare(panel)
    panels[-1][0].set_xlabel("ms (light: measured; dark: floor)")
    _save(figure, path)


def _times(ms: float, floor_ms: float) -> str:
    return f"×{ms / floor_ms:.2f}" if floor_ms > 0 else ""


# pytest-benchmark: {"benchmarks": […]}


def pytest_table(found: Json) -> str:
    groups: dict[str, list[Json]] = {}
    for one in found["benchmarks"]:
        groups.setdefault(one["extra_info"]["shape"]["name"], []).append(one)
    parts = []
    for group in groups.values():
        rows = [
            (
                _pytest_name(one),
                one["group"].split(",")[0],
                f"{1e3 * one['stats']['median']:.3f}",
                f"{1e3 * one['stats']['q1']:.3f} … {1e3 * one['stats']['q3']:.3f}",
                f"{one['extra_info']['floor_ms']:.3f}",
                f"{one['extra_info']['share_of_ceiling']:.0%}",
            )
            for one in group
        ]
        head = ("", "of", "ms", "quartiles", "floor, ms", "share of the ceiling")
        title = f"**{title_of(group[0]['extra_info']['shape'])}**"
        parts += [title, markdown(head, sorted(rows, key=lambda row: (row[1], float(row[2]))))]
    return "\n\n".join(parts)


def pytest_picture(found: Json, path: Path) -> None:
    chosen = [one for one in found["benchmarks"] if not one["name"].startswith("test_step")]
    names = list(dict.fromkeys(one["extra_info"]["shape"]["name"] for one in chosen))
    if not names:
        return
    groups = [[o for o in chosen if o["extra_info"]["shape"]["name"] == name] for name in names]
    height = 0.27 * len(chosen) + 0.9 * len(groups) + 0.4
    ratios = [len(group) for group in groups]
    figure, panels = _figure(len(groups), 1, (8.5, height), height_ratios=ratios)
    for (panel,), group in zip(panels, groups, strict=True):
        group = sorted(group, key=lambda one: (one["group"], one["stats"]["median"]))
        for place, one in enumerate(group):
            ms, floor = 1e3 * one["stats"]["median"], one["extra_info"]["floor_ms"]
            panel.barh(place, ms, color="#3f8fd2", height=0.7)
            panel.barh(place, floor, color="#0b3c66", height=0.28)
            text = f" {ms:.3g} ms, {floor / ms:.0%} of the ceiling"
            panel.text(max(ms, floor), place, text, va="center", fontsize=7.5)
        labels = [f"{one['group'].split(',')[0]}: {_pytest_name(one)}" for one in group]
        panel.set_yticks(range(len(group)), labels, fontsize=8)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.35 * max(1e3 * one["stats"]["median"] for one in group))
        panel.set_title(title_of(group[0]["extra_info"]["shape"]), fontsize=9, loc="left")
        _bare(panel)
    panels[-1][0].set_xlabel("ms (light: measured median; dark: floor)")
    _save(figure, path)


def _pytest_name(one: Json) -> str:
    if one["name"].startswith("test_product"):
        return "bare product"
    of = one["params"]
    return LABELS.get(of["name"], of.get("impl", of["name"]))


KINDS: dict[str, tuple[Callable[[Json], str], Callable[[Json, Path], None]]] = {
    "shapes": (steps_table, steps_picture),
    "cells": (isoflop_table, isoflop_picture),
    "profiles": (profile_table, profile_picture),
    "benchmarks": (pytest_table, pytest_picture),
}
"""By the key that only such a file has: table and picture."""


# Pictures


def _figure(rows: int, columns: int, size: tuple[float, float], sharex=False, height_ratios=None):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows,
        columns,
        figsize=size,
        squeeze=False,
        sharex=sharex,
        height_ratios=height_ratios,
        layout="constrained",
    )


def _bare(panel) -> None:
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.tick_params(labelsize=8)


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
