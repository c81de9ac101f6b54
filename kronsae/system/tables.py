"""Tables as text: Markdown, and columns of fixed width for a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], *, numeric: bool = False) -> str:
    """A Markdown table of rows as long as the header, without a line break at its end.

    Pipes in cells are escaped, and line breaks become spaces.
    numeric: all columns but the first hold numbers, which are aligned on the right.
    """
    rules = ["---", *["---:" if numeric else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in (header, rules, *rows))


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table in columns as wide as their widest cell, without a line break at its end.

    left: how many columns are aligned on the left; the others, of numbers, are on the right.
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def console_table(header: Sequence[str], *, left: int = 1) -> Table:
    """A table without lines for a terminal, to add rows to; `left` as in `aligned`."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column < left else "right", no_wrap=True)
    return table


def _cell(value: Any) -> str:
    return " ".join(str(value).splitlines()).replace("|", "\\|")
