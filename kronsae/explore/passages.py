"""Examples on the explorer's page: which of those measured, and the text in which they lie.

The page holds the text once, and of each example only its place there and its activations. So it
has room for several times as many examples as with the text of each, and for what is around them.

Letters: N latents, s examples of each, w tokens of an example's window, c contexts of L tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kronsae.properties import WINDOW, Examined, Examples
from kronsae.properties.contexts import SAME_TOKENS, phrases
from kronsae.properties.examples import INTERVALS, NO_TOKEN

MIDDLE = WINDOW // 2

ALIKE = 0.6
"""Share of a window's tokens that a stronger example has at the same places, if it repeats it."""

LOOKED_AT = 4
"""From so many times as many sampled examples as are shown those of other contexts are taken."""

CHUNK = 2**13
"""Latents whose examples are compared at a time."""


class Count(NamedTuple):
    """How many examples of each latent the page shows."""

    top: int
    interval: int
    """Of each of INTERVALS intervals."""
    sample: int

    @property
    def all(self) -> int:
        return self.top + INTERVALS * self.interval + self.sample


COUNTS = (Count(8, 3, 8), Count(8, 2, 4), Count(8, 1, 0), Count(4, 1, 0), Count(4, 0, 0))
"""The first that fits in EXAMPLE_BYTES, or the last."""

EXAMPLE_BYTES = 96 * 2**20

EXAMPLE_SIZE, WINDOW_SIZE = 16, 3 * WINDOW
"""Bytes of an example, about: as a place in the text; with the tokens of its window."""


class Shown(NamedTuple):
    """Examples of N latents."""

    places: np.ndarray
    """[N, s] in the text; -1: none."""
    tokens: np.ndarray
    """[N, s, w]"""
    values: np.ndarray
    """[N, s, w] the latent on each of them."""


def counts_for(latents: int, examined: Examined, has_text: bool) -> Count:
    """How many examples the page shows of `latents` latents and pre-latents."""
    size = EXAMPLE_SIZE if has_text else WINDOW_SIZE
    fits = [count for count in COUNTS if latents * count.all * size <= EXAMPLE_BYTES]
    top, interval, sample = (fits or COUNTS[-1:])[0]
    intervals = examined.intervals.scores.shape[1] if examined.intervals is not None else 0
    return Count(
        min(top, examined.top.scores.shape[1]),
        min(interval, intervals),
        min(sample, examined.sample.scores.shape[1]),
    )


def examples_of(examined: Examined, count: Count, length: int | None) -> dict[str, Shown]:
    """The examples that the page shows, by kind: "top", "intervals" if there are any, "sample".

    No two of a kind are of one context, and no strongest one repeats a stronger one's text.
    length: tokens of a context, if that is known.
    """
    kinds = {
        "top": lambda part: _strongest(examined.top, part, count.top),
        "sample": lambda part: _sampled(examined.sample, part, count.sample, length),
    }
    if count.interval and examined.intervals is not None:
        intervals = examined.intervals
        kinds["intervals"] = lambda part: _spread(intervals, part, count.interval, length)
    return {kind: _in_chunks(choose, len(examined.count)) for kind, choose in kinds.items()}


def in_text(text: np.ndarray | None, shown: Sequence[Shown]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The text [c, L] in which the examples lie, and the places in it of each.

    text: all that was read; None: a text is made of the windows, a context of each.
    """
    if text is not None:
        return text, [examples.places for examples in shown]
    windows = [examples.tokens[examples.places >= 0] for examples in shown]
    out, first = [], 0
    for examples in shown:
        there = examples.places >= 0
        numbers = first + np.cumsum(there).reshape(there.shape) - 1
        out.append(np.where(there, numbers * WINDOW + MIDDLE, -1))
        first += int(there.sum())
    return np.concatenate(windows), out


def _in_chunks(choose: Callable[[slice], Shown], count: int) -> Shown:
    parts = [choose(slice(start, start + CHUNK)) for start in range(0, count, CHUNK)]
    return Shown(*map(np.concatenate, zip(*parts, strict=True)))


def _strongest(examples: Examples, part: slice, size: int) -> Shown:
    tokens = examples.tokens[part]
    phrase = phrases(tokens[:, :, MIDDLE - SAME_TOKENS + 1 : MIDDLE + 1])
    return _chosen(examples, part, _repeats(phrase) | _alike(tokens), size)


def _sampled(examples: Examples, part: slice, size: int, length: int | None) -> Shown:
    few = examples.places[part, : LOOKED_AT * size]
    return _chosen(examples, part, _repeats(few // length if length else few), size)


def _spread(examples: Examples, part: slice, size: int, length: int | None) -> Shown:
    """`size` of each interval, lowest interval first: [n, INTERVALS size].

    Of two in one context that of the higher interval is kept.
    """
    rows = slice(part.start * INTERVALS, part.stop * INTERVALS)
    kept = examples.places.shape[1]
    places = examples.places[rows].reshape(-1, INTERVALS, kept)[:, ::-1]  # the highest first
    places = places.reshape(-1, INTERVALS * kept)
    repeats = _repeats(places // length if length else places)
    repeats = repeats.reshape(-1, INTERVALS, kept)[:, ::-1].reshape(-1, kept)
    shown = _chosen(examples, rows, repeats, size)
    return Shown(*(array.reshape(-1, INTERVALS * size, *array.shape[2:]) for array in shown))


def _chosen(examples: Examples, part: slice, unwanted: np.ndarray, size: int) -> Shown:
    """The first `size` that are there and not unwanted [n, s]."""
    kept = unwanted.shape[1]
    places = examples.places[part, :kept]
    keep = (places >= 0) & ~unwanted
    order = np.argsort(~keep, 1, kind="stable")[:, :size]
    keep = np.take_along_axis(keep, order, 1)
    at = order[..., None]
    tokens, values = examples.tokens[part, :kept], examples.values[part, :kept]
    return Shown(
        np.where(keep, np.take_along_axis(places, order, 1), -1),
        np.where(keep[..., None], np.take_along_axis(tokens, at, 1), NO_TOKEN),
        np.where(keep[..., None], np.take_along_axis(values, at, 1), 0),
    )


def _repeats(keys: np.ndarray) -> np.ndarray:
    """[n, s] whether an earlier one of a row has the same key."""
    later = np.tri(keys.shape[1], k=-1, dtype=bool)
    return ((keys[:, :, None] == keys[:, None, :]) & later).any(2)


def _alike(tokens: np.ndarray) -> np.ndarray:
    """[n, s] whether an earlier window [w] of a row has most tokens at the same places."""
    out = np.zeros(tokens.shape[:2], dtype=bool)
    for place in range(1, tokens.shape[1]):
        window = tokens[:, place, None]
        same = ((tokens[:, :place] == window) & (window != NO_TOKEN)).sum(2)
        out[:, place] = (same > ALIKE * (window != NO_TOKEN).sum(2)).any(1)
    return out
