"""Types of command-line arguments that several benchmarks take."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


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
