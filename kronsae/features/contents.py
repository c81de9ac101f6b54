"""What a latent's card holds, before it is drawn."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Bar(NamedTuple):
    """A token of a list, with the length of its bar."""

    text: str
    value: float
    shown: str
    """The value for people."""


class Passage(NamedTuple):
    """The text around a token on which a latent fires."""

    peak: float
    """Its activation on that token."""
    tokens: tuple[tuple[str, float], ...]
    """Texts and activations; 0 where it does not fire."""


class Parent(NamedTuple):
    """The base or the extension of a latent, by itself."""

    kind: str
    number: int
    figures: tuple[tuple[str, str], ...]
    tokens: tuple[Bar, ...]


@dataclass(frozen=True)
class Contents:
    """What is known of a latent, in the words and figures of its card."""

    latent: int
    place: str
    """Its head, base and extension; this and the next two are empty for a dense encoder."""
    parents: tuple[Parent, ...]
    """Base and extension."""
    gate: str
    """How they decide on it."""
    label: str | None
    text: str
    """What the figures are of."""
    figures: tuple[tuple[str, str], ...]
    counts: tuple[int, ...]
    """Histogram of its activations, in equal bins from 0 to `end`."""
    end: float
    passages: tuple[Passage, ...]
    lists: tuple[tuple[str, str, tuple[Bar, ...]], ...]
    """Title, name and tokens of each list: "share", "raised", "lowered"."""

    @property
    def heights(self) -> list[float]:
        """Heights of the histogram's bars, from 0 to 1: roots of the counts."""
        return np.sqrt(np.array(self.counts) / max(1, *self.counts)).tolist()
