"""`python -m kronsae.experiments NAME`: check one of the paper's statements."""

import argparse
import dataclasses
import importlib
import shlex
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

from kronsae.commandline import (
    Parser,
    Terminated,
    add_flag,
    load_plugins,
    signal_of,
    stoppable,
    stopped,
)
from kronsae.errors import InputError
from kronsae.experiments import NAMES
from kronsae.experiments.common import Run, Stopped, require, run_grid


def load(name: str) -> ModuleType:
    """The module of an experiment."""
    return importlib.import_module(f"kronsae.experiments.{name}")


def overview() -> str:
    """What each experiment checks."""
    lines = [
        textwrap.fill(
            f"[{load(name).FIGURE}] {load(name).STATEMENT}",
            width=80,
            initial_indent=f"  {name:13}",
            subsequent_indent=" " * 15,
        )
        for name in NAMES
    ]
    return "experiments:\n" + "\n".join(lines)


def make_parser(name: str) -> Parser:
    """Flags of one experiment: one a field of its Settings, and those of all."""
    experiment = load(name)
    parser = Parser(
        f"experiments {name}",
        f"[KronSAE, {experiment.FIGURE}] {experiment.STATEMENT}",
        f"kronsae experiments {name} --smallest",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder (default: runs/experiments/{name})"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smallest", action="store_true", help="a form that takes seconds")
    size.add_argument("--paper", action="store_true", help="the paper's model, layer and tokens")
    for spec in dataclasses.fields(experiment.Settings):
        add_flag(parser, spec)
    return parser


def parse(name: str, argv: list[str]) -> tuple[Any, Path]:
    """Settings and folder. Raises InputError for anything wrong."""
    experiment = load(name)
    found = make_parser(name).parse(argv)
    flags = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(found).items()
    }
    out = flags.pop("out", None)
    size = "smallest" if flags.pop("smallest", False) else ""
    size = "paper" if flags.pop("paper", False) else size
    preset = {"": {}, "smallest": experiment.SMALLEST, "paper": experiment.PAPER}[size]
    default = Path("runs/experiments") / (f"{name}-{size}" if size else name)
    return experiment.Settings(**(preset | flags)), out or default


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the experiment is complete.

    2: what was asked for cannot work. 128 + n: stopped by signal n; the same command goes on.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "Check a statement of the KronSAE paper.\n\n"
            "Example:\n  kronsae experiments toy --smallest\n\n"
            "usage: kronsae experiments NAME [--smallest | --paper] [flags]\n\n"
            f"{overview()}\n\nkronsae experiments NAME --help lists an experiment's flags."
        )
        return 0 if argv else 2
    try:
        name, *rest = load_plugins(argv)
        if name not in NAMES:
            raise InputError(f"no experiment {name!r}: expected one of {', '.join(NAMES)}")
        settings, out = parse(name, rest)
        require("matplotlib")
        command = shlex.join(["python", "-m", "kronsae.experiments", *argv])
        with stoppable():
            run_grid(load(name), settings, out, command, show)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"{stop}: the same command goes on from here", file=sys.stderr)
        return 128 + stop.number
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
