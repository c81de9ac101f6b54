"""All that wants a GPU, within a time: `python -m benchmarks.on_gpu --out DIR --seconds 520`.

Correctness on the card, training steps side by side, the operations, a profile of the fused step
beside its floors, the memory of a step, the iso-FLOP grid with the time that is left (and, with
--tune, half of that for a search of better configurations). Each part is a process of its own
with its own limit, and writes as it goes, so that what fails or runs long costs only itself. At the
end DIR holds summary.md, summary.json and pictures for benchmarks/results/, and the raw files in
DIR/raw.

Works from a bare checkout: torch, triton, numpy, pytest, pytest-benchmark (with transformers also
training beside the language model). Without matplotlib there
are no pictures; `python -m benchmarks.report DIR/raw` makes them later, elsewhere.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESERVE = 25.0
"""Seconds kept for the summary and the pictures."""
WHOLE = 520.0
"""The seconds that the parts' limits are made for."""


class Part(NamedTuple):
    """A command, and the seconds it may take out of WHOLE."""

    name: str
    command: list[str]
    limit: float
    timing: bool = True
    """Whether it measures time, and so runs alone."""


class Done(NamedTuple):
    """How a part ended."""

    name: str
    status: str
    """"ok", "exit status N" or "stopped after its N s"."""
    seconds: float
    tail: str
    """The last lines it printed."""


def parts(raw: Path, smallest: bool, scale: float, tune: bool) -> list[Part]:
    """The parts in order of importance; modules take their own limit a little early.

    Those whose limit is WHOLE share the time that is left.
    """
    python = [sys.executable, "-m"]

    def module(name: str, limit: float, *options: str, timed: bool = True) -> Part:
        file = raw / f"{name}.json"
        device = "cpu" if smallest else "cuda"
        command = [*python, f"benchmarks.{name}", "--device", device, "--json", str(file), *options]
        if timed:
            command += ["--seconds", f"{0.75 * limit * scale:.0f}"]
        return Part(name, command, limit, timed)

    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider"]
    tests = sorted(str(path) for path in (ROOT / "tests").glob("test_triton*.py"))
    collect = ["--collect-only"] if smallest else ["--maxfail=20"]
    shapes = ["toy"] if smallest else ["P1", "P2", "P3", "S1", "S2"]
    profiled = ["toy"] if smallest else ["P1", "P2", "P3", "P4"]
    grid = ["--grid", "smallest" if smallest else "cuda"]
    overlap = ["--dict-size", "65536", "--k", "50", "--batch-size", "8192"]
    overlap += ["--contexts-per-batch", "128", "--buffer-tokens", "131072"]
    if smallest:
        overlap = ["--rounds", "1", "--dict-size", "256", "--k", "4", "--batch-size", "128"]
        overlap += ["--context-length", "32", "--buffer-tokens", "512"]
    operations = [
        *[*pytest, "benchmarks", "--benchmark-only", "-k", "operation or product"],
        *["--shapes", shapes[0] if smallest else "P2"],
        f"--benchmark-json={raw / 'operations.json'}",
    ]
    return [
        module("check", 120, timed=False),
        *(
            [Part("tests", [*pytest, *tests, "-m", "not slow", *collect], 120, False)]
            if tests
            else []
        ),
        module("profile", 90, "--shape", *profiled),
        module("memory", 120, "--shape", *(["toy"] if smallest else ["P1", "P3"]), timed=False),
        module("compare", 130, "--shape", *shapes, *(["--rounds", "3"] if smallest else [])),
        Part("operations", operations, 60),
        *([module("overlap", 60, *overlap)] if importlib.util.find_spec("transformers") else []),
        module("isoflop", WHOLE, *grid),
        *([module("tune", WHOLE)] if tune else []),
    ]


def run(part: Part, limit: float, logs: Path) -> Done:
    """Run a part for at most `limit` seconds; what it started ends with it."""
    log, began = logs / f"{part.name}.txt", time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after its {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-600:]
    return Done(part.name, status, time.monotonic() - began, tail)


def brief(raw: Path, done: list[Done]) -> dict[str, Any]:
    """The figures that matter, in a few kilobytes."""
    found: dict[str, Any] = {}
    for path in raw.glob("*.json"):
        try:
            found[path.stem] = json.loads(path.read_text())
        except ValueError:  # stopped while it wrote
            continue
    any_result = next(
        (found[name] for name in ("compare", "profile", "check") if name in found), {}
    )
    checks = found.get("check", {})
    tuned = found.get("tune", {})
    return {
        "where": any_result.get("where"),
        "ceilings": any_result.get("ceilings"),
        "runs": [one._asdict() for one in done],
        "checked": len(checks.get("checks", [])),
        "wrong": checks.get("wrong", [])[:10],
        "steps": [
            {
                "shape": one["shape"]["name"],
                **{key: _rounded(one[key]) for key in ("median_ms", "floor_ms", "ratios")},
                "peak_gib": {n: round(b / 2**30, 2) for n, b in one["peak_bytes"].items()},
                "skipped": one["skipped"],
            }
            for one in found.get("compare", {}).get("shapes", [])
        ],
        "stages": [
            {
                "shape": one["shape"]["name"],
                "contender": one["contender"],
                "skipped": one.get("skipped"),
                "step_ms": one.get("step_ms"),
                "peak_gib": one["peak_bytes"] / 2**30 if one.get("peak_bytes") else None,
                "state_gib": one.get("state_bytes", 0) / 2**30,
                "latents_gib": one.get("latents_bytes", 0) / 2**30,
                "losses": one.get("losses"),
                "ms_and_floor": {
                    stage: [round(times["ms"], 4), round(times["floor_ms"], 4)]
                    for stage, times in one.get("stages", {}).items()
                },
            }
            for one in found.get("profile", {}).get("profiles", [])
        ],
        "memory": [
            {
                "shape": one["shape"]["name"],
                "contender": one["contender"],
                "skipped": one.get("skipped"),
                **{
                    f"{name}_gib": round((one[f"{name}_bytes"] or 0) / 2**30, 2)
                    for name in ("formula", "counted", "measured")
                },
            }
            for one in found.get("memory", {}).get("memory", [])
        ],
        "overlap": {
            name: {"tokens_per_s": round(1 / times["seconds"]), **_waits(times)}
            for name, times in found.get("overlap", {}).get("medians", {}).items()
        },
        "better": {"generation": tuned.get("generation"), **tuned["better"]} if tuned else None,
    }


def _waits(times: dict[str, float]) -> dict[str, float]:
    return {name: round(share, 3) for name, share in times.items() if name.endswith("wait_share")}


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{figure:.4g}") for name, figure in figures.items()}


def summary(figures: dict[str, Any], tables: str) -> str:
    """Markdown: how the parts ended, what was wrong, memory, then the tables."""
    lines = ["# Summary", "", "| part | | seconds |", "|---|---|---:|"]
    lines += [f"| {r['name']} | {r['status']} | {r['seconds']:.0f} |" for r in figures["runs"]]
    lines += [
        "",
        f"{figures['checked'] - len(figures['wrong'])} of {figures['checked']} checks of ",
    ]
    lines[-1] += "values and gradients are right."
    lines += [f"- wrong: {one}" for one in figures["wrong"]]
    lines.append("")
    for one in figures["stages"]:
        if one["skipped"]:
            lines.append(f"- {one['shape']}: {one['skipped']}")
        elif one["peak_gib"]:
            first, *_, last = one["losses"]
            lines.append(
                f"- {one['shape']}, {one['contender']}: {one['step_ms']:.2f} ms a step, peak "
                f"{one['peak_gib']:.1f} GiB (weights and moments {one['state_gib']:.1f}; one "
                f"[B, F] would be {one['latents_gib']:.1f}), loss {first:.4f} to {last:.4f} in ten"
            )
    for one in figures["memory"]:
        measured = f"{one['measured_gib']:.2f} GiB measured, " if one["measured_gib"] else ""
        lines.append(
            f"- memory of a step, {one['shape']}, {one['contender']}: {measured}"
            f"{one['counted_gib']:.2f} counted, {one['formula_gib']:.2f} by the formula"
            + (f"; {one['skipped']}" if one["skipped"] else "")
        )
    for name, one in figures["overlap"].items():
        waits = "".join(f", {key} {one[key]:.0%}" for key in one if key != "tokens_per_s")
        lines.append(f"- training, {name}: {one['tokens_per_s']:,} tokens/s{waits}")
    if figures["better"]:
        lines.append(f"- better configurations: {figures['better']}")
    for r in figures["runs"]:
        if r["status"] != "ok":
            lines += ["", f"{r['name']}, {r['status']}:", "```", r["tail"], "```"]
    return "\n".join(lines) + "\n\n" + tables.replace("# Benchmarks", "", 1).strip() + "\n"


def finish(out: Path, raw: Path, done: list[Done]) -> None:
    """Write the summary first, then again with tables and pictures, should those fail."""
    figures = brief(raw, done)
    (out / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "summary.md").write_text(summary(figures, ""))
    from benchmarks import report

    pictures = importlib.util.find_spec("matplotlib") is not None
    (out / "summary.md").write_text(summary(figures, report.write(raw, pictures=pictures)))
    for picture in raw.glob("*.png"):
        picture.replace(out / picture.name)


def tell(one: Done) -> None:
    print(f"{one.name}: {one.status}, {one.seconds:.0f} s\n{one.tail}\n", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=WHOLE, help="never more than this")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--tune", action="store_true", help="search for better configurations")
    parser.add_argument(
        "--smallest", action="store_true", help="a toy shape on the CPU: a rehearsal"
    )
    options = parser.parse_args(arguments)
    began = time.monotonic()
    out = options.out.absolute()
    raw, logs = out / "raw", out / "raw" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    end = began + options.seconds - min(RESERVE, 0.2 * options.seconds)
    scale = options.seconds / WHOLE
    done: list[Done] = []

    def start(part: Part) -> Done:
        left = end - time.monotonic()
        if left < 5:
            return Done(part.name, "no time left", 0.0, "")
        if part.limit == WHOLE:  # what is left, shared; and it must end by itself
            begun = {one.name for one in done}
            left /= sum(one.limit == WHOLE and one.name not in begun for one in chosen)
            part.command[-1] = f"{max(0.0, 0.8 * left - 5):.0f}"
        return run(part, min(part.limit * scale, left), logs)

    tune = options.tune or "tune" in (options.only or ())
    chosen = parts(raw, options.smallest, scale, tune)
    if options.only:
        chosen = [part for part in chosen if part.name in options.only]
    together = [part for part in chosen if not part.timing]
    with ThreadPoolExecutor(max(1, len(together))) as pool:
        done += pool.map(start, together)
    for one in done:
        tell(one)
    for part in chosen:
        if part.timing:
            done.append(start(part))
            tell(done[-1])
            (out / "summary.json").write_text(json.dumps(brief(raw, done), indent=1) + "\n")
    finish(out, raw, done)
    print((out / "summary.md").read_text())


if __name__ == "__main__":
    main()
