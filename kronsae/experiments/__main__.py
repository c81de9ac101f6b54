"""`python -m kronsae.experiments NAME`: check one of the paper's statements."""

import argparse
import dataclasses
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

from kronsae.commandline import (
    Parser,
    Terminated,
    add_flag,
    as_command,
    load_plugins,
    signal_of,
    status_of,
    stoppable,
    stopped,
)
from kronsae.errors import require
from kronsae.experiments.experiment import EXPERIMENTS, Experiment, Run
from kronsae.experiments.grid import run_grid
from kronsae.system.devices import seed_everything


def overview() -> str:
    """How to call them, and what each experiment checks."""
    lines = [
        textwrap.fill(
            f"[{experiment.figure}] {experiment.statement}",
            width=80,
            initial_indent=f"  {name:13}",
            subsequent_indent=" " * 15,
        )
        for name, experiment in EXPERIMENTS.items()
    ]
    return (
        "Check a statement of the KronSAE paper.\n\n"
        "Example:\n  kronsae experiments toy --smallest\n\n"
        "usage: kronsae experiments NAME [--smallest | --paper] [flags]\n\nexperiments:\n"
        + "\n".join(lines)
        + "\n\nkronsae experiments NAME --help lists an experiment's flags."
    )


def make_parser(name: str) -> Parser:
    """Flags of one experiment: one a setting, and those of all."""
    experiment = EXPERIMENTS[name]
    parser = Parser(
        f"experiments {name}",
        f"[{experiment.cited}, {experiment.figure}] {experiment.statement}",
        f"kronsae experiments {name} --smallest",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder (default: runs/experiments/{name})"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smallest", action="store_true", help="a form that takes seconds")
    size.add_argument("--paper", action="store_true", help="the paper's model, layer and tokens")
    for spec in dataclasses.fields(experiment):
        add_flag(parser, spec)
    return parser


def parse(name: str, argv: list[str]) -> tuple[Experiment, Path]:
    """The experiment by its flags, and its folder. Raises InputError for anything wrong."""
    kind = EXPERIMENTS[name]
    flags: dict[str, Any] = {
        flag: tuple(value) if isinstance(value, list) else value
        for flag, value in vars(make_parser(name).parse(argv)).items()
    }
    folder, preset = name, {}
    for size in ("smallest", "paper"):
        if flags.pop(size, False):
            folder, preset = f"{name}-{size}", getattr(kind, size)
    out = flags.pop("out", Path("runs/experiments") / folder)
    return kind(**{**preset, **flags}), out


@as_command()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the experiment is complete.

    2: what was asked for cannot work. 128 + n: stopped by signal n; the same command goes on.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        name, *flags = load_plugins(argv) or [""]
        if name in ("", "-h", "--help"):
            print(overview())
            return 0 if name else 2
        experiment, out = parse(name, flags)
        require("matplotlib", "a picture")
        command = shlex.join(["python", "-m", "kronsae.experiments", *argv])
        seed_everything(0)
        with stoppable():
            run_grid(name, experiment, out, command, show)
    except Exception as error:
        return status_of(error)
    except (KeyboardInterrupt, Terminated) as error:
        print(f"{stopped(error)}: the same command goes on from here", file=sys.stderr)
        return 128 + signal_of(error)
    print((out / f"{name}.md").read_text(encoding="utf-8"))
    print(f"In {out}: {name}.json, {name}.md, {name}.png")
    return 0


def show(run: Run, done: int, total: int) -> None:
    """A line a run: its cell and its plain figures."""
    texts = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in run.items()
        if key != "command" and isinstance(value, int | float | str)
    ]
    print(f"[{done}/{total}]", "  ".join(texts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
