"""Tables as text: Markdown, and columns of fixed width for a terminal."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
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


def fitted(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, left: int = 1
) -> str:
    """`aligned`, made narrow where it is wider than `width`, if that can be done.

    Then words of the header stand below each other, and columns whose cells are all the same are
    named in a line below the table.
    """
    text = aligned(header, rows, left=left)
    if len(rows) < 2 or max(map(len, text.splitlines())) <= width:
        return text
    member, *figures = zip(header, *rows, strict=True)
    same = [column for column in figures if len(set(column[1:])) == 1]
    columns = [member, *(column for column in figures if column not in same)]
    heads = [
        textwrap.wrap(head, max(map(len, (*head.split(), *cells))), break_on_hyphens=False)
        for head, *cells in columns
    ]
    height = max(map(len, heads))
    lines = zip(*([""] * (height - len(head)) + head for head in heads), strict=True)
    first, *others = [*lines, *zip(*(column[1:] for column in columns), strict=True)]
    text = aligned(first, others, left=1 + sum(c not in same for c in figures[: left - 1]))
    if same:
        shared = ", ".join(f"{head} {cell}" for head, cell, *_ in same)
        text += "\n" + textwrap.fill(f"the same for all: {shared}", width)
    return text


def wrapping_console(**options: Any) -> Console:
    """A console that breaks lines between words on a terminal, and no lines elsewhere."""
    console = Console(highlight=False, **options)
    console.soft_wrap = not console.is_terminal
    return console


def console_table(header: Sequence[str], *, left: int = 1) -> Table:
    """A table without lines for a terminal, to add rows to; `left` as in `aligned`."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column < left else "right", no_wrap=True)
    return table


def _cell(value: Any) -> str:
    return " ".join(str(value).splitlines()).replace("|", "\\|")
