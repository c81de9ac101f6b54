"""`python -m benchmarks.faults --out DIR`: tries every fault on short runs, and writes a table.

Runs are struck (killed, starved of disk, damaged), taken up again, and compared, bit for bit, with
runs that nothing happened to. Exit status 1 if anything was lost.
"""

import argparse
import json
import os
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.faults.campaign import Campaign, run_all
from kronsae.runs.folder import versions

COUNTS = ("tried", "struck", "lost")


def write(out: Path, document: dict[str, Any], group: str | None) -> None:
    """Write what came of some faults, and a table of all that were tried into this folder."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    (out / f"faults-{group or 'all'}.json").write_text(text)
    names = {path.name for path in out.glob("faults-*.json")} - {"faults-all.json"}
    names = sorted(names) if group else ["faults-all.json"]
    parts = [json.loads((out / name).read_text()) for name in names]
    (out / "faults.md").write_text(markdown(parts))


def markdown(parts: list[dict[str, Any]]) -> str:
    tried, struck, lost = (sum(part[name] for part in parts) for name in COUNTS)
    lines = ["# Faults, and what was lost", ""]
    lines += [
        f"{tried} attempts, in which faults struck {struck} times (some again when the run went "
        f"on); what was lost: {lost or 'nothing'}. After each the run was taken up again, and "
        "compared, bit for bit, with one that nothing happened to: weights, the tensors of the "
        "last checkpoint, the log; of a harvest every byte."
    ]
    lines += ["", "Made by:", ""]
    lines += [f"- `{part['command']}` (seed {part['seed']})" for part in parts]
    versions = ", ".join(f"{name} {value}" for name, value in parts[0]["versions"].items())
    lines += ["", f"Versions: {versions}.", ""]
    lines += ["| Fault | Run | Tried | Struck | Lost | Message |", "| --- " * 6 + "|"]
    outcomes = [outcome for part in parts for outcome in part["outcomes"]]
    for each in outcomes:
        message = textwrap.shorten((each["messages"] or ["–"])[0], 120, placeholder=" …")
        lost = f"{len(each['lost'])} times: {each['lost'][0]}" if each["lost"] else "nothing"
        cells = [each["fault"], each["kind"], each["tried"], each["struck"]]
        cells += [each["note"] or lost, message]
        row = (str(cell).replace("\n", " ").replace("|", "\\|") for cell in cells)
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "## All that was said", "", "Numbers are N, the run's folder is RUN.", ""]
    for text in dict.fromkeys(text for each in outcomes for text in each["messages"]):
        lines += ["```", *text.splitlines(), "```", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for faults.md, a table, and faults-*.json")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--scale", type=float, default=1.0, help="of how often each is tried")
    parser.add_argument(
        "--only",
        choices=("kill", "signal", "disk", "rank", "damage", "source"),
        help="try these faults alone",
    )
    parser.add_argument("--kinds", nargs="+", help="on these runs alone")
    found = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        campaign = Campaign(Path(folder), found.seed, lambda line: print(line, flush=True))
        outcomes = run_all(campaign, found.scale, found.only, found.kinds)
    used = os.times()
    counts = [(each.tried, each.struck, len(each.lost)) for each in outcomes]
    facts = {
        "command": "python -m benchmarks.faults "
        + " ".join(sys.argv[1:] if argv is None else argv),
        "seed": found.seed,
        "versions": {name: version for name, version in versions().items() if name != "platform"},
        "processor_seconds": round(sum(used[:4])),
        "seconds": round(time.monotonic() - began),
        **dict(zip(COUNTS, map(sum, zip(*counts, strict=True)), strict=True)),
    }
    if found.out is not None:
        write(found.out, {**facts, "outcomes": [vars(each) for each in outcomes]}, found.only)
    print(f"tried {facts['tried']}, struck {facts['struck']}, lost {facts['lost']}")
    return 1 if facts["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
