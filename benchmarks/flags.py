"""Types of command-line arguments that several benchmarks take."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def positive_seconds(text: str) -> float:
    """A number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not found > 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return found


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


def written_by(benchmark: str, key: str) -> Callable[[str], dict[str, Any]]:
    """The type of a FILE argument: what `python -m benchmarks.BENCHMARK --json FILE` wrote.

    key: that such a file has.
    """

    def read(text: str) -> dict[str, Any]:
        expected = f"expected a file that python -m benchmarks.{benchmark} --json wrote"
        try:
            found = json.loads(Path(text).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{expected}, got {text}: {error}") from error
        if not isinstance(found, dict) or key not in found:
            raise argparse.ArgumentTypeError(f"{expected}, but {text} has no {key!r}")
        return found

    return read
