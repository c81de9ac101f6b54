"""Command lines of benchmarks: the flags that many have, and the file that --json writes."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SHAPES


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def positive_seconds(text: str) -> float:
    """A number above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def usable_device(text: str) -> torch.device:
    """A device that can be used; "auto" is a GPU where there is one."""
    from kronsae.errors import InputError
    from kronsae.system.devices import resolve_device

    try:
        return resolve_device(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def output_file(text: str) -> Path:
    """A file to write: its folder exists. (Else all that was measured would be lost at the end.)"""
    if Path(text).is_dir() or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return Path(text)


FLAGS: dict[str, dict[str, Any]] = {
    "shape": {"nargs": "+", "choices": SHAPES, "metavar": "NAME"}
    | {"help": f"of {', '.join(SHAPES)} (benchmarks/shapes.py)"},
    "device": {"type": usable_device, "help": "cpu, cuda, cuda:1, ..."},
    "rounds": {"type": positive, "help": "how often each is timed"},
    "seconds": {"type": positive_seconds, "help": "nothing new is started after so many"},
    "json": {"type": output_file, "metavar": "FILE", "help": "write all figures here"},
}


def command(name: str, about: str, **defaults: Any) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`, with some of FLAGS and --json.

    about: its first line is printed by --help.  defaults: of the flags, by name.
    """
    parser = argparse.ArgumentParser(f"benchmarks.{name}", description=about.splitlines()[0])
    for flag, default in {**defaults, "json": None}.items():
        options = dict(FLAGS[flag])
        if default not in (None, math.inf):
            shown = " ".join(default) if isinstance(default, list) else default
            options["help"] += f" (default: {shown})"
        parser.add_argument(f"--{flag}", default=default, **options)
    return parser


def save(path: Path | None, figures: dict[str, Any]) -> None:
    """Write what there is so far into the file of --json, if one was given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")
