"""Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], *, numeric: bool = False) -> str:
    """A Markdown table of rows as long as the header, without a line break at its end.

    Pipes in cells are escaped, and line breaks become spaces.
    numeric: all columns but the first hold numbers, which are aligned on the right.
    """
    rules = ["---", *["---:" if numeric else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in (header, rules, *rows))


def _cell(value: Any) -> str:
    return " ".join(str(value).splitlines()).replace("|", "\\|")
