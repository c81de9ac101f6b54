"""`python -m benchmarks.faults --out DIR`: tries every fault on short runs, and writes a table.

Runs are killed, starved of disk, damaged; taken up again; and compared, bit for bit, with runs that
nothing happened to. Exit status 1 if anything was lost.
"""

import argparse
import json
import shlex
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


def page(results: dict[str, Any]) -> str:
    """Markdown of what came of all faults."""
    rows = []
    for outcome in results["outcomes"]:
        message = textwrap.shorten((outcome["messages"] or ["–"])[0], 120, placeholder=" …")
        lost = outcome["note"] or "nothing"
        if outcome["lost"]:
            lost = f"{len(outcome['lost'])} times: {outcome['lost'][0]}"
        cells = outcome["fault"], outcome["kind"], outcome["tried"], outcome["hit"]
        rows.append((*cells, lost, message))
    facts = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    return "\n\n".join(
        [
            "# Faults, and what was lost",
            f"{results['tried']} attempts, in which faults hit {results['hit']} times (some again "
            f"when the run went on); what was lost: {results['lost'] or 'nothing'}. After each the "
            "run was taken up again, and compared, bit for bit, with one that nothing happened to: "
            "weights, the tensors of the last checkpoint, the log; of a harvest every byte.",
            f"Made by `{results['command']}` (seed {results['seed']}). Versions: {facts}.",
            markdown(("Fault", "Run", "Tried", "Hit", "Lost", "Message"), rows),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for faults.md and faults.json")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--scale", type=float, default=1.0, help="of how often each is tried")
    parser.add_argument("--kinds", nargs="+", help="of runs: on these alone")
    parser.add_argument("--faults", nargs="+", help="words: only faults whose name has one")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        campaign = Campaign(Path(folder), options.seed, lambda line: print(line, flush=True))
        outcomes = run_all(campaign, options.scale, options.kinds, options.faults)
    arguments = sys.argv[1:] if argv is None else argv
    results = {
        "command": shlex.join(["python", "-m", "benchmarks.faults", *arguments]),
        "seed": options.seed,
        "versions": {name: version for name, version in versions().items() if name != "platform"},
        "tried": sum(outcome.tried for outcome in outcomes),
        "hit": sum(outcome.hit for outcome in outcomes),
        "lost": sum(len(outcome.lost) for outcome in outcomes),
        "outcomes": [vars(outcome) for outcome in outcomes],
    }
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        (options.out / "faults.json").write_text(text)
        (options.out / "faults.md").write_text(page(results) + "\n")
    print(f"tried {results['tried']}, hit {results['hit']}, lost {results['lost']}")
    return 1 if results["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
