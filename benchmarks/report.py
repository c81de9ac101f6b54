"""Tables from measurements: `python -m benchmarks.report RESULTS_DIR`.

Reads every JSON file of the folder that benchmarks.compare, profile, memory or overlap wrote, and
writes report.md into it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import quartiles
from benchmarks.shapes import Shape
from benchmarks.steps import LABELS
from kronsae.system.tables import markdown

ENCODERS = {"kron": "KronSAE", "dense": "TopK"}
Json = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of JSON files")
    print(write(parser.parse_args(arguments).results))


def write(folder: Path) -> str:
    """Write report.md for all results in the folder; returns the Markdown."""
    parts = ["# Benchmarks"]
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError:  # stopped while it wrote
            continue
        for key, table in TABLES.items():
            if isinstance(result, dict) and key in result:
                parts += [f"## {path.stem}", where(result), table(result)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "report.md").write_text(text)
    return text


def where(result: Json) -> str:
    """Machine, versions and measured ceilings of a result."""
    info = result.get("where", {})
    names = ("device", "processor", "threads", "compute", "python", "torch", "triton")
    libraries = ("kronsae", "eai-sparsify", "sae-lens", "dictionary-learning")
    text = ", ".join(f"{n} {info[n]}" for n in (*names, *libraries) if info.get(n) is not None)
    for kind in ("ceilings", "assumed"):
        if rates := result.get(kind):
            text += (
                f"; {'measured' if kind == 'ceilings' else kind}: "
                f"{rates['multiply_adds_per_s'] / 1e12:.3g} T multiply-adds/s, "
                f"{rates['bytes_per_s'] / 1e9:,.0f} GB/s copied, "
                f"{rates['cached_bytes_per_s'] / 1e9:,.0f} within the cache"
            )
    return text


def bold(shape: Json) -> str:
    return f"**{Shape(**shape)}**"


def times(ms: float, floor_ms: float) -> str:
    return f"×{ms / floor_ms:.2f}" if floor_ms > 0 else ""


# benchmarks.compare: {"shapes": [{"shape", "times_ms", …}]}


def ranked(one: Json) -> list[str]:
    """The contenders that were timed at a shape, the fastest first."""
    medians = one["median_ms"]
    return sorted((name for name in medians if name in LABELS), key=medians.get)


def to_ours(medians: dict[str, float], name: str) -> str:
    """Ratio to the step that the trainer takes (`steps.best_of_ours`); "" if it was not timed."""
    ours = medians.get("kron fused") or medians.get("kron")
    return f"×{medians[name] / ours:.2f}" if ours else ""


def steps_table(result: Json) -> str:
    parts = []
    for one in result["shapes"]:
        if "failed" in one:
            parts.append(f"{bold(one['shape'])}: {one['failed']}")
        if "median_ms" not in one:
            continue
        tokens, medians = one["shape"]["tokens"], one["median_ms"]
        rows = []
        for name in ranked(one):
            low, high = quartiles(one["times_ms"][name])
            peak = one["peak_bytes"].get(name)
            cells = f"{medians[name]:.2f}", f"{low:.2f} … {high:.2f}"
            cells += f"{1e3 * tokens / medians[name]:,.0f}", to_ours(medians, name)
            rows.append((LABELS[name], *cells, f"{peak / 2**30:.1f}" if peak else ""))
        head = ("a training step", "ms", "quartiles", "tokens/s", "to our KronSAE", "peak GiB")
        if not any(row[-1] for row in rows):
            head, rows = head[:-1], [row[:-1] for row in rows]
        kinds = {"by measured rates": "floor_ms", "by assumed ones": "assumed_floor_ms"}
        floors = ", ".join(
            f"{model} {one[key][encoder]:.2f} ms {rates}"
            for rates, key in kinds.items()
            if one.get(key)
            for encoder, model in ENCODERS.items()
        )
        bare = ", ".join(
            f"{model} {medians[f'{encoder} product']:.2f} ms"
            for encoder, model in ENCODERS.items()
            if f"{encoder} product" in medians
        )
        skipped = one["skipped"].items()
        dense, kron = (Shape(**one["shape"]).flops_per_token(name) for name in ("dense", "kron"))
        parts += [
            bold(one["shape"]),
            markdown(head, rows, numeric=True),
            f"Floor of a step: {floors}. The encoder's bare product: {bare}.",
            f"With a TopK SAE's FLOPs [eq. 7] on one token, KronSAE sees {dense / kron:.2f}.",
            "\n".join(f"- goal: {goal}" for goal in one.get("goals", [])),
            "\n".join(f"- {LABELS.get(name, name)}: {why}" for name, why in skipped),
        ]
    return "\n\n".join(part for part in parts if part)


# benchmarks.profile: {"profiles": [{"shape", "contender", "stages": {name: {"ms", "floor_ms"}}}]}


def profile_table(result: Json) -> str:
    parts = []
    for one in result["profiles"]:
        if "skipped" in one:
            parts.append(f"{bold(one['shape'])}, {one['contender']}: {one['skipped']}")
            continue
        stages = one["stages"].values()
        ms, floor = (sum(stage[key] for stage in stages) for key in ("ms", "floor_ms"))
        pairs = {name: (stage["ms"], stage["floor_ms"]) for name, stage in one["stages"].items()}
        pairs |= {"**all kernels**": (ms, floor), "**step, by events**": (one["step_ms"], floor)}
        rows = [(name, f"{a:.3f}", f"{b:.3f}", times(a, b)) for name, (a, b) in pairs.items()]
        parts += [
            f"{bold(one['shape'])}, {LABELS[one['contender']]}",
            markdown(("stage", "ms", "floor, ms", "ratio"), rows, numeric=True),
        ]
        if one.get("predicted"):
            rows = [
                (p["kernel"], *(f"{p[key]:.3f}" for key in ("ms", "expected_ms", "floor_ms")))
                + (times(p["ms"], p["expected_ms"]),)
                for p in one["predicted"]
            ]
            head = ("kernel", "ms", "predicted, ms", "floor, ms", "to the prediction")
            parts.append(markdown(head, rows, numeric=True))
    return "\n\n".join(parts)


# benchmarks.overlap: {"medians": {name: {"seconds", …}}, "of_the_model_alone", "bounds"}


def overlap_table(result: Json) -> str:
    """Tokens a second, shares of the language model alone, and waits."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{share:.0%}"

    header = ("", "tokens/s", "of the language model alone", "CPU µs a token")
    rows = [
        (
            name,
            f"{1 / times['seconds']:,.0f}",
            percent(result["of_the_model_alone"].get(name)),
            f"{1e6 * times['cpu_seconds']:.1f}",
            percent(times.get("wait_share")),
            percent(times.get("model_wait_share")),
        )
        for name, times in result["medians"].items()
    ]
    bounds = ", ".join(f"{name} {share:.0%}" for name, share in result["bounds"].items())
    return (
        markdown((*header, "waited for activations", "model waited"), rows)
        + f"\n\nFrom the two alone: {bounds} of the language model."
    )


# benchmarks.memory: {"memory": [{"shape", "contender", "counted_bytes", …}]}


def memory_table(result: Json) -> str:
    rows = []
    for one in result["memory"]:
        sizes = [one[f"{name}_bytes"] for name in ("state", "counted", "measured")]
        latents = 2 * one["shape"]["tokens"] * Shape(**one["shape"]).dict_size
        sizes += [one["largest"][0]["size_bytes"], latents]
        cells = [f"{size / 2**20:,.0f}" if size else one.get("skipped", "") for size in sizes]
        rows.append((one["shape"]["name"], LABELS[one["contender"]], *cells))
    head = ("", "MiB of a training step", "between steps", "peak, counted", "measured")
    head += ("largest allocation", "one [B, F] in bfloat16 would be")
    note = "Counted: on meta tensors, products in bfloat16. Measured: by the allocator of a GPU."
    return note + "\n\n" + markdown(head, rows)


TABLES: dict[str, Callable[[Json], str]] = {
    "shapes": steps_table,
    "profiles": profile_table,
    "medians": overlap_table,
    "memory": memory_table,
}
"""Functions that make tables, each by the key that only its files have."""


if __name__ == "__main__":
    main()
