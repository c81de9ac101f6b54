"""A latent's card as text for a terminal of 80 columns."""

import textwrap
from itertools import zip_longest

from rich.cells import cell_len, set_cell_size

from kronsae.features.contents import Bar, Contents, Passage

WIDTH, TOKEN, VALUE = 78, 14, 8
"""Columns of the card, and of the tokens and values in its lists."""

PASSAGES = 3
"""Strongest examples, of those that the card has."""


def as_text(card: Contents) -> str:
    """The card: figures, tokens, examples with the strongest token in «», and the gate."""
    lines = [" · ".join(filter(None, (f"Latent {card.latent}", card.place)))]
    label = "".join(each if each.isprintable() else " " for each in card.label or "")
    lines += textwrap.wrap(label, WIDTH)
    lines += [", ".join(f"{name} {value}" for name, value in card.figures)]
    if card.passages:
        lines += ["", *_lists(card)]
        lines += ["", "Top activations", *map(_passage, card.passages[:PASSAGES])]
    else:
        lines += ["It does not fire here."]
    return "\n".join([*lines, "", *textwrap.wrap(f"{card.gate} {card.text}".strip(), WIDTH)])


def _lists(card: Contents) -> list[str]:
    """The lists of tokens, side by side."""
    columns = [
        [_sized(title, TOKEN + 1 + VALUE), *map(_bar, bars)] for title, _, bars in card.lists
    ]
    empty = " " * (TOKEN + 1 + VALUE)
    return ["  ".join(row).rstrip() for row in zip_longest(*columns, fillvalue=empty)]


def _bar(bar: Bar) -> str:
    return f"{_sized(bar.text, TOKEN)} {bar.shown:>{VALUE}}"


def _passage(passage: Passage) -> str:
    """Its activation, and the text around the token on which it is strongest."""
    values = [value for _, value in passage.tokens]
    at = values.index(passage.peak) if passage.peak in values else values.index(max(values))
    texts = [text for text, _ in passage.tokens]
    inner = texts[at].lstrip(" ")
    shown = f"{' ' * (len(texts[at]) - len(inner))}«{inner}»"
    room = WIDTH - VALUE - 2
    for before, after in zip_longest(texts[:at][::-1], texts[at + 1 :], fillvalue=""):
        wider = before + shown + after
        if cell_len(wider) > room:
            break
        shown = wider
    return f"{passage.peak:>{VALUE}.3g}  {_sized(shown, min(cell_len(shown), room))}"


def _sized(text: str, width: int) -> str:
    """A text of exactly so many columns, cut with … if it is longer."""
    cut = text if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…"
    return set_cell_size(cut, width)
