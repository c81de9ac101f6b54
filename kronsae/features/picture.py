"""A latent's card as a picture, drawn by matplotlib without a display.

Letters: x and y in points from the top left corner.
"""

import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from kronsae.features.contents import Bar, Contents, Passage

WIDTH, MARGIN, GAP = 640.0, 18.0, 20.0
SIZE, LINE = 8.5, 12.5
"""Size of the text of tokens, and the height of its lines."""

ADVANCE = 0.602
"""Width of a character of DejaVu Sans Mono, in its size."""

SHADES = 0.7
"""Opacity behind the strongest token."""

LABEL_CHARACTERS, LABEL_LINES = 104, 4

INK, FAINT, RULE, CHIP, MARK = "#1d2226", "#636d76", "#d5d9d9", "#eceeed", "#ffa600"
COLOURS = {
    "latent": "#1c5f9e",
    "share": "#e59a00",
    "raised": "#2a7550",
    "lowered": "#a8480c",
    "base": "#2a7550",
    "extension": "#a8480c",
}


def draw(card: Contents, path: Path) -> None:
    """Write the picture of a card as a PNG. Characters that no font here has become boxes."""
    sheet = _Sheet()
    sheet.rule("latent", MARGIN, WIDTH - MARGIN)
    sheet.down(18)
    sheet.text(MARGIN, f"Latent {card.latent}", 14, weight="bold")
    sheet.text(WIDTH - MARGIN, card.place, 9.5, FAINT, ha="right")
    sheet.down(5)
    for line in textwrap.wrap(
        " ".join((card.label or "").split()),
        LABEL_CHARACTERS,
        max_lines=LABEL_LINES,
        placeholder=" …",
    ):
        sheet.down(14)
        sheet.text(MARGIN, line, 10)
    sheet.down(14)
    sheet.figures(MARGIN, card.figures)
    if card.passages:
        _columns(sheet, card)
        _passages(sheet, card.passages)
    else:
        sheet.down(32)
        sheet.text(MARGIN, "It does not fire here.", 10)
    _parents(sheet, card)
    sheet.down(20)
    sheet.text(MARGIN, card.text, 8, FAINT)
    sheet.save(path)


def _columns(sheet: "_Sheet", card: Contents) -> None:
    """The histogram and the lists of tokens, side by side."""
    sheet.down(38)
    count = 1 + len(card.lists)
    width = (WIDTH - 2 * MARGIN - GAP * (count - 1)) / count
    places = [MARGIN + i * (width + GAP) for i in range(count)]
    sheet.text(places[0], "Activations", 8, FAINT, weight="bold")
    height, bottom = 52.0, sheet.y + 60
    step = width / max(1, len(card.counts))
    for i, share in enumerate(card.heights):
        tall = share * height
        sheet.box(places[0] + i * step, bottom - tall, 0.9 * step, tall, COLOURS["latent"])
    sheet.box(places[0], bottom, width, 0.7, RULE)
    sheet.text(places[0], "0", 7, FAINT, y=bottom + 9)
    sheet.text(places[0] + width, f"{card.end:.3g}", 7, FAINT, y=bottom + 9, ha="right")
    for place, (title, name, bars) in zip(places[1:], card.lists, strict=True):
        sheet.text(place, title, 8, FAINT, weight="bold")
        sheet.bars(place, width, bars, COLOURS[name])
    sheet.down(74)


def _passages(sheet: "_Sheet", passages: tuple[Passage, ...]) -> None:
    sheet.down(22)
    sheet.text(MARGIN, "Top activations", 8, FAINT, weight="bold")
    left = MARGIN + 40
    for passage in passages:
        sheet.down(5 + LINE)
        sheet.text(left - 8, f"{passage.peak:.3g}", SIZE, FAINT, ha="right")
        sheet.passage(left, WIDTH - MARGIN, passage)
        sheet.box(MARGIN, sheet.y + 5, WIDTH - 2 * MARGIN, 0.5, RULE)


def _parents(sheet: "_Sheet", card: Contents) -> None:
    """Base and extension, side by side."""
    if not card.parents:
        return
    sheet.down(22)
    width = (WIDTH - 2 * MARGIN - GAP) / 2
    for i, parent in enumerate(card.parents):
        place = MARGIN + i * (width + GAP)
        sheet.rule(parent.kind, place, place + width)
        title = f"{parent.kind} {parent.number} by itself"
        sheet.text(place, title, 8, FAINT, y=sheet.y + 14, weight="bold")
        sheet.figures(place, parent.figures, sheet.y + 29, 47)
        sheet.bars(place + 0.5 * width, 0.5 * width, parent.tokens, COLOURS["share"])
    sheet.down(84)
    sheet.text(MARGIN, card.gate, 8, FAINT)


class _Sheet:
    """A picture that grows downwards, to which texts and boxes are added."""

    def __init__(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.font_manager import get_font_names

        self.figure = Figure(facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")
        wide = sorted(name for name in get_font_names() if "CJK" in name)
        self.proportional = ["DejaVu Sans", *wide]
        self.monospaced = ["DejaVu Sans Mono", "DejaVu Sans", *wide]
        self.y = 10.0

    def down(self, points: float) -> None:
        self.y += points

    def text(
        self, x: float, text: str, size: float, colour: str = INK, *, y: float = 0, **style: Any
    ) -> None:
        """A text on one line, whose base line is at y (0: the present one)."""
        style = {"family": self.proportional, "ha": "left", **style}
        self.axes.text(
            x, y or self.y, text, size=size, color=colour, va="baseline", parse_math=False, **style
        )

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, alpha: float = 1
    ) -> None:
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y), width, height, color=colour, alpha=alpha, lw=0))

    def rule(self, kind: str, left: float, right: float) -> None:
        self.box(left, self.y, right - left, 2.2, COLOURS[kind])

    def figures(
        self, x: float, figures: tuple[tuple[str, str], ...], y: float = 0, step: float = 62
    ) -> None:
        """Names, and values below them, a step apart."""
        y = y or self.y
        for i, (name, value) in enumerate(figures):
            self.text(x + step * i, name, 7.5, FAINT, y=y)
            self.text(x + step * i, value, 9.5, y=y + 12.5, weight="bold")

    def bars(self, x: float, width: float, bars: tuple[Bar, ...], colour: str) -> None:
        """Tokens with bars and values, from 5 points below the present line on."""
        room = width - 78
        fitting = int(room / (ADVANCE * SIZE))
        for i, bar in enumerate(bars):
            y = self.y + 14 + i * 13.5
            shown = bar.text
            while cell_len(shown) > fitting:
                shown = shown[:-2] + "…" if shown.endswith("…") else shown[:-1] + "…"
            self.box(x, y - 8.5, cell_len(shown) * ADVANCE * SIZE + 4, 11, CHIP)
            self.text(x + 2, shown, SIZE, y=y, family=self.monospaced)
            self.box(x + width - 74, y - 5.5, 32 * bar.value, 5, colour)
            self.text(x + width, bar.shown, 7, FAINT, y=y, ha="right")

    def passage(self, left: float, right: float, passage: Passage) -> None:
        """A text with shaded tokens, broken before spaces, or inside what has none."""
        x, unit = left, ADVANCE * SIZE
        for word in _words(passage):
            whole = unit * sum(cell_len(text) for text, _ in word)
            if x + whole > right:
                x = self._next_line(left)
            for text, value in word if left + whole <= right else _characters(word):
                width = unit * cell_len(text)
                if x + width > right:
                    x = self._next_line(left)
                if value > 0:
                    shade = SHADES * min(1.0, value / passage.peak)
                    self.box(x, self.y - 8.8, width, 11.3, MARK, shade)
                self.text(x, text, SIZE, family=self.monospaced)
                x += width

    def _next_line(self, left: float) -> float:
        self.down(LINE)
        return left

    def save(self, path: Path) -> None:
        height = self.y + 14
        self.figure.set_size_inches(WIDTH / 72, height / 72)
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph", UserWarning)
            self.figure.savefig(path, dpi=200, format="png", metadata={"Software": "kronsae"})


_Word = list[tuple[str, float]]
"""Parts of a word that are of one token each, with their activations."""


def _words(passage: Passage) -> list[_Word]:
    """The words of a passage, each with the space before it."""
    words: list[_Word] = [[]]
    for text, value in passage.tokens:
        first, *others = re.split("(?= )", text)
        words[-1].append((first, value))
        words += [[(other, value)] for other in others]
    return words


def _characters(word: _Word) -> _Word:
    return [(character, value) for text, value in word for character in text]
