"""Tables and pictures from measurements: `python -m benchmarks.report RESULTS_DIR`.

Reads every JSON file of the folder that benchmarks.compare, isoflop, profile, stalls, memory or
pytest-benchmark wrote, and writes report.md and a PNG for each into the folder.
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
    "kron fused + aux": "#5b84b1",
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
        try:
            found = json.loads(path.read_text())
        except ValueError:  # stopped while it wrote
            continue
        for key, (table, picture) in KINDS.items():
            if isinstance(found, dict) and key in found:
                parts += [f"## {path.stem}", where(found), table(found)]
                if pictures and picture:
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
    for kind in ("ceilings", "assumed"):
        if rates := found.get(kind) or info.get(kind):
            text += (
                f"; {'measured' if kind == 'ceilings' else kind}: "
                f"{rates['multiply_adds_per_s'] / 1e12:.3g} T multiply-adds/s, "
                f"{rates['bytes_per_s'] / 1e9:,.0f} GB/s copied, "
                f"{rates['cached_bytes_per_s'] / 1e9:,.0f} within the cache"
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
        if "failed" in one:
            parts.append(f"**{title_of(one['shape'])}**: {one['failed']}")
        if "median_ms" not in one:
            continue
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
            f"{model} {floor[key]:.2f} ms {rates}"
            for rates, floor in (
                ("by measured rates", one["floor_ms"]),
                ("by assumed ones", one.get("assumed_floor_ms")),
            )
            for key, model in (("kron", "KronSAE"), ("dense", "TopK"))
            if floor
        )
        bare = ", ".join(
            f"{model} {medians[f'{key} product']:.2f} ms"
            for key, model in (("kron", "KronSAE"), ("dense", "TopK"))
            if f"{key} product" in medians
        )
        parts += [f"**{title_of(one['shape'])}**", markdown(head, rows)]
        parts.append(f"Floor of a step: {floors}. The encoder's bare product: {bare}.")
        parts.append("\n".join(f"- goal: {goal}" for goal in one.get("goals", [])))
        skipped = one["skipped"].items()
        parts.append("\n".join(f"- {LABELS.get(name, name)}: {why}" for name, why in skipped))
    return "\n\n".join(parts)


def _our_kron(medians: dict[str, float]) -> float | None:
    """What others are compared to, as `steps.best_of_ours` says."""
    return medians.get("kron fused") or medians.get("kron")


def steps_picture(found: Json, path: Path) -> None:
    shapes = [one for one in found["shapes"] if one.get("median_ms")]
    if not shapes:
        return
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
    label = "ms a training step (median; line: quartiles; ×: to our KronSAE)"
    panels[-1][0].set_xlabel(label, fontsize=9)
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
                _three_digits(60 * cell["equal_flops_hours"]),
            )
        )
    note = (
        f"m = {grid['m']}, n = {grid['n']}, k = {grid['k']}, {grid['tokens']} tokens a step. Equal "
        f"FLOPs [eq. 7]: those of a TopK SAE of the same F on {budget / 1e6:.0f} M tokens."
    )
    if grid["name"] != "cuda":
        note += " A reduced grid, not the paper's Fig. 8."
    head = ("F", "d", "", "ms a step", "tokens/s", "tokens for equal FLOPs", "minutes for them")
    return note + "\n\n" + markdown(head, sorted(rows, key=lambda row: (row[0], int(row[1]))))


def isoflop_picture(found: Json, path: Path) -> None:
    cells = [cell for cell in found["cells"] if "ms" in cell]
    sizes = sorted({cell["dict_size"] for cell in cells})
    if not sizes:
        return
    from matplotlib.ticker import LogLocator

    figure, panels = _figure(
        2, len(sizes), (3.6 * len(sizes) + 0.6, 6.4), sharex=True, sharey="row"
    )
    budget = f"minutes for the FLOPs of\nTopK on {found['budget_tokens'] / 1e6:.0f} M tokens"
    views = (
        ("tokens_per_s", 1, f"tokens/s of training\n({found['grid']['tokens']:,} a step)"),
        ("equal_flops_hours", 60, budget),
    )
    for row, (key, unit, label) in zip(panels, views, strict=True):
        for panel, size in zip(row, sizes, strict=True):
            for name in COLOURS:
                mine = [c for c in cells if c["dict_size"] == size and c["contender"] == name]
                if mine:
                    xs, ys = [c["d"] for c in mine], [unit * c[key] for c in mine]
                    style = "--" if name in ("topk", "listing") else "-"
                    panel.plot(xs, ys, style, marker="o", color=COLOURS[name], label=LABELS[name])
            widths = sorted({c["d"] for c in cells})
            panel.set_xscale("log", base=2)
            panel.set_xticks(widths, [str(d) for d in widths])
            panel.set_yscale("log")
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
            panel.yaxis.set_major_formatter(lambda value, _: _short(value))
            panel.grid(alpha=0.25)
            _bare(panel)
        row[0].set_ylabel(label, fontsize=9)
    for panel, size in zip(panels[0], sizes, strict=True):
        panel.set_title(f"F = $2^{{{math.log2(size):g}}}$", fontsize=10)
    for panel in panels[1]:
        panel.set_xlabel("d, width of an activation", fontsize=9)
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
        if one.get("predicted"):
            rows = [
                (p["kernel"], *(f"{p[key]:.3f}" for key in ("ms", "expected_ms", "floor_ms")))
                + (_times(p["ms"], p["expected_ms"]),)
                for p in one["predicted"]
            ]
            head = ("kernel", "ms", "predicted, ms", "floor, ms", "to the prediction")
            parts.append(markdown(head, rows))
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
            text = f" {stage['ms']:.3f}  {_times(stage['ms'], stage['floor_ms'])}"
            panel.text(max(stage.values()), place, text, va="center", fontsize=8)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.2 * max(max(stage.values()) for stage in one["stages"].values()))
        title = f"{LABELS[one['contender']]}; {title_of(one['shape'])}"
        panel.set_title(title, fontsize=9, loc="left")
        _bare(panel)
    panels[-1][0].set_xlabel("ms (light: measured; dark: floor; ×: to the floor)", fontsize=9)
    _save(figure, path)


# benchmarks.stalls: {"stalls": [{"shape", "kernels": {name: {"ms", "percent", "stalls"}}}]}


def stalls_table(found: Json) -> str:
    parts = []
    for one in found["stalls"]:
        title = f"**{title_of(one['shape'])}**"
        if "skipped" in one:
            parts.append(f"{title}: {one['skipped']}")
            continue
        rows = [
            (
                name,
                "" if kernel["ms"] is None else f"{kernel['ms']:.3f}",
                *("" if share is None else f"{share:.0f}" for share in kernel["percent"].values()),
                ", ".join(f"{why} {x:.1f}" for why, x in list(kernel["stalls"].items())[:4]),
            )
            for name, kernel in one["kernels"].items()
        ]
        head = ("kernel", "ms", "issue, %", "memory, %", "cache, %", "warps, %")
        parts += [title, markdown((*head, "warps that wait an instruction issued"), rows)]
    return "\n\n".join(parts)


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:#.3g}"


def _short(number: float) -> str:
    """0.5, 20, 5k, 2M."""
    if number >= 1e6:
        return f"{number / 1e6:.3g}M"
    return f"{number / 1e3:.3g}k" if number >= 1e3 else f"{number:.3g}"


def _times(ms: float, floor_ms: float) -> str:
    return f"×{ms / floor_ms:.2f}" if floor_ms > 0 else ""


# benchmarks.memory: {"memory": [{"shape", "contender", "terms_bytes": {name: bytes}, …}]}


def memory_table(found: Json) -> str:
    rows = []
    for one in found["memory"]:
        sizes = [one[f"{name}_bytes"] for name in ("state", "formula", "counted", "measured")]
        sizes += [one["largest"][0]["size_bytes"], _latents_bytes(one)]
        cells = [f"{size / 2**20:,.0f}" if size else "" for size in sizes]
        rows.append((one["shape"]["name"], LABELS[one["contender"]], *cells))
    head = ("", "MiB of a training step", "between steps", "peak by the formula", "counted")
    head += ("measured", "largest allocation", "one [B, F] in bfloat16 would be")
    note = "Counted: on meta tensors, products in bfloat16. Measured: by the allocator of a GPU."
    return note + "\n\n" + markdown(head, rows)


def memory_picture(found: Json, path: Path) -> None:
    from matplotlib import colormaps

    many = found["memory"]
    figure, ((panel,),) = _figure(1, 1, (8.5, 0.5 * len(many) + 1.6))
    terms = list(dict.fromkeys(name for one in many for name in one["terms_bytes"]))
    for place, one in enumerate(many):
        left = 0.0
        for number, term in enumerate(terms):
            size = one["terms_bytes"].get(term, 0) / 2**30
            panel.barh(place, size, left=left, height=0.6, color=colormaps["tab20"](number))
            left += size
        peak = one["measured_bytes"] or one["counted_bytes"]
        word = "measured" if one["measured_bytes"] else "counted"
        panel.plot(2 * [peak / 2**30], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        text = f" {peak / 2**30:.2f} {word}"
        panel.text(max(left, peak / 2**30), place, text, va="center", fontsize=8)
    labels = [f"{one['shape']['name']}, {LABELS[one['contender']]}" for one in many]
    panel.set_yticks(range(len(many)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.2 * max(one["formula_bytes"] for one in many) / 2**30)
    panel.set_xlabel("GiB at the peak of a step (bars: formula)", fontsize=9)
    handles = [panel.barh(0, 0, color=colormaps["tab20"](n), label=t) for n, t in enumerate(terms)]
    figure.legend(handles, terms, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _bare(panel)
    _save(figure, path)


def _latents_bytes(one: Json) -> int:
    return 2 * one["shape"]["tokens"] * Shape(**one["shape"]).dict_size


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
            for one in sorted(group, key=_pytest_order)
        ]
        head = ("", "of", "ms", "quartiles", "floor, ms", "share of the ceiling")
        title = f"**{title_of(group[0]['extra_info']['shape'])}**"
        parts += [title, markdown(head, rows)]
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
        group = sorted(group, key=_pytest_order)
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
    panels[-1][0].set_xlabel("ms (light: measured median; dark: floor)", fontsize=9)
    _save(figure, path)


def _pytest_order(one: Json) -> tuple[str, int, float]:
    """By operation, then forward, backward, both, then time."""
    operation, _, direction = one["group"].split(",")[0].partition(" ")
    directions = ("", "forward", "backward", "both")
    return operation, directions.index(direction), one["stats"]["median"]


def _pytest_name(one: Json) -> str:
    if one["name"].startswith("test_product"):
        return "bare product"
    of = one["params"]
    return LABELS.get(of["name"], of.get("impl", of["name"]))


KINDS: dict[str, tuple[Callable[[Json], str], Callable[[Json, Path], None] | None]] = {
    "shapes": (steps_table, steps_picture),
    "cells": (isoflop_table, isoflop_picture),
    "profiles": (profile_table, profile_picture),
    "stalls": (stalls_table, None),
    "memory": (memory_table, memory_picture),
    "benchmarks": (pytest_table, pytest_picture),
}
"""By the key that only such a file has: table, and picture if there is one."""


# Pictures


def _figure(rows: int, columns: int, size: tuple[float, float], **options):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
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
