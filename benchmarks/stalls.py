"""What the warps of the largest kernels wait for: `python -m benchmarks.stalls --profile FILE`.

Runs `benchmarks.profile --once` under Nsight Compute (ncu), with the card's clocks as they are, and
reads its table. FILE is what `benchmarks.profile --json` wrote: the kernels that took longest there
are watched.
"""

import csv
import re
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.flags import command, save, written_by
from benchmarks.report import stalls_table
from benchmarks.shapes import GOAL_SHAPES, SHAPES

SECTIONS = ("WarpStateStats", "SpeedOfLight", "Occupancy")
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
SHARES = {
    "issue": "sm__throughput.avg.pct_of_peak",
    "memory": "(gpu__dram|dram_)_throughput.avg.pct_of_peak",
    "cache": "lts__throughput.avg.pct_of_peak",
    "warps": "sm__warps_active.avg.pct_of_peak",
}
"""Percent of the peak: patterns of the metrics' names, which differ between versions."""


def tool(name: str) -> str:
    """An NVIDIA tool where a CUDA toolkit puts it, unless it is on the path."""
    there = f"/usr/local/cuda/bin/{name}"
    return there if shutil.which(name) is None and shutil.which(there) else name


def largest(profile: dict[str, Any], shape: str, count: int = 4) -> list[str]:
    """Names of the kernels that took longest at a shape, ours alone: plain identifiers."""
    for one in profile["profiles"]:
        if one["shape"]["name"] == shape and "kernels_ms" in one:
            times = sorted(one["kernels_ms"].items(), key=lambda item: -item[1])
            return [name for name, _ in times if re.fullmatch(r"[a-z_0-9]+", name)][:count]
    return []


def parse(text: str) -> dict[str, dict[str, Any]]:
    """ncu's `--csv --page raw`: of each kernel's last launch its time, shares, and stalls.

    A stall is the number of warps that wait for a reason while one instruction is issued.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("no table in ncu's output: " + " ".join(lines[-3:])[:300])
    units, *rows = csv.DictReader(lines[start:])
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not (row["ID"] or "").isdigit():  # what the program printed itself
            continue
        numbers = {name: _number(value) for name, value in row.items() if name}
        stalls = {
            match[1]: numbers[name]
            for name in numbers
            if (match := STALL.match(name)) and numbers[name] is not None
        }
        shares = {
            share: next((v for n, v in numbers.items() if v is not None and re.match(p, n)), None)
            for share, p in SHARES.items()
        }
        time, unit = numbers.get("gpu__time_duration.sum"), units.get("gpu__time_duration.sum")
        scale = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3}.get(unit or "", 1.0)
        found[row["Kernel Name"]] = {
            "ms": None if time is None else time * scale,
            "percent": shares,
            "stalls": dict(sorted(stalls.items(), key=lambda item: -item[1])),
        }
    return found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def main(arguments: list[str] | None = None) -> None:
    parser = command("stalls", __doc__, shape=GOAL_SHAPES)
    parser.add_argument(
        "--profile", type=written_by("profile", "profiles"), required=True, metavar="FILE"
    )
    options = parser.parse_args(arguments)
    ncu, profile = tool("ncu"), options.profile
    result: dict[str, Any] = {"where": profile["where"], "stalls": []}
    for shape in options.shape:
        names = largest(profile, shape)
        one: dict[str, Any] = {"shape": SHAPES[shape]._asdict(), "kernels": {}}
        result["stalls"].append(one)
        if shutil.which(ncu) is None or not names:
            one["skipped"] = "no kernels of ours" if shutil.which(ncu) else "ncu is not on the path"
        else:
            watch = [ncu, "--csv", "--page", "raw", "--clock-control", "none"]
            watch += [part for section in SECTIONS for part in ("--section", section)]
            watch += ["--kernel-name", f"regex:^({'|'.join(names)})$"]
            watch += [sys.executable, "-m", "benchmarks.profile", "--once", "--shape", shape]
            done = subprocess.run(watch, capture_output=True, text=True)
            if options.json:
                options.json.with_name(f"stalls-{shape}.csv").write_text(done.stdout)
            try:
                one["kernels"] = parse(done.stdout)
            except ValueError as broken:
                one["skipped"] = f"{broken} {done.stderr[-300:]}"
        print(stalls_table({"stalls": [one]}), flush=True)
        save(options.json, result)


if __name__ == "__main__":
    main()
