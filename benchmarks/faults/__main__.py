"""`python -m benchmarks.faults --out DIR`: tries every fault on short runs, and writes a table.

Runs are killed, starved of disk, damaged; taken up again; and compared, bit for bit, with runs that
nothing happened to. Exit status 1 if anything was lost.
"""

import argparse
import json
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.faults.campaign import Campaign, run_all
from kronsae.runs.folder import versions
from kronsae.system.tables import markdown


def page(found: dict[str, Any]) -> str:
    """Markdown of what came of all faults."""
    rows = []
    for each in found["outcomes"]:
        message = textwrap.shorten((each["messages"] or ["–"])[0], 120, placeholder=" …")
        lost = each["note"] or "nothing"
        if each["lost"]:
            lost = f"{len(each['lost'])} times: {each['lost'][0]}"
        cells = each["fault"], each["kind"], each["tried"], each["hit"]
        rows.append((*cells, lost, message))
    facts = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    return "\n\n".join(
        [
            "# Faults, and what was lost",
            f"{found['tried']} attempts, in which faults hit {found['hit']} times (some again when "
            f"the run went on); what was lost: {found['lost'] or 'nothing'}. After each the run "
            "was taken up again, and compared, bit for bit, with one that nothing happened to: "
            "weights, the tensors of the last checkpoint, the log; of a harvest every byte.",
            f"Made by `{found['command']}` (seed {found['seed']}). Versions: {facts}.",
            markdown(("Fault", "Run", "Tried", "Hit", "Lost", "Message"), rows),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for faults.md and faults.json")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--scale", type=float, default=1.0, help="of how often each is tried")
    parser.add_argument("--kinds", nargs="+", help="of runs: on these alone")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        campaign = Campaign(Path(folder), options.seed, lambda line: print(line, flush=True))
        outcomes = run_all(campaign, options.scale, options.kinds)
    arguments = sys.argv[1:] if argv is None else argv
    found = {
        "command": " ".join(["python -m benchmarks.faults", *arguments]),
        "seed": options.seed,
        "versions": {name: version for name, version in versions().items() if name != "platform"},
        "tried": sum(each.tried for each in outcomes),
        "hit": sum(each.hit for each in outcomes),
        "lost": sum(len(each.lost) for each in outcomes),
        "outcomes": [vars(each) for each in outcomes],
    }
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        (options.out / "faults.json").write_text(text)
        (options.out / "faults.md").write_text(page(found) + "\n")
    print(f"tried {found['tried']}, hit {found['hit']}, lost {found['lost']}")
    return 1 if found["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
