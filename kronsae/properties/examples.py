"""Examples of where latents fire: the strongest, or a uniform sample, a fixed number of each.

Letters: c contexts of L tokens, t tokens with activations, N latents, s examples of each, e events
(a latent on a token), w tokens of a window.
"""

from collections.abc import Callable

import numpy as np

from kronsae.properties.histogram import doublings
from kronsae.properties.token_mass import rank, uniform

WINDOW = 31
"""Tokens of an example, the event's in their middle. [KronSAE, App. D]"""

NO_TOKEN = -1
"""Where a window reaches beyond its context, and where a context is padded."""

EMPTY = {"scores": -np.inf, "places": -1, "tokens": NO_TOKEN, "values": 0}
"""Arrays of `Examples`, as they are stored, and what stands in them where there is no example."""

PARTS = tuple(EMPTY)

INTERVALS = 8
"""Intervals of a latent's activations from which `IntervalExamples` samples."""

JOINED = 4096
"""Latents whose intervals are joined at a time."""


class IndexedText:
    """Contexts of token ids [c, L], and which of their tokens the rows [t] of activations are.

    mask: [c, L] tokens that have a row.  first: number of the first context in the whole stream.
    """

    def __init__(self, ids: np.ndarray, mask: np.ndarray, first: int = 0) -> None:
        self.ids, self.first = np.where(ids < 0, NO_TOKEN, ids), first
        self.context, self.position = mask.nonzero()
        """[t] each: where a row is."""
        self.tokens = ids[mask]
        """[t]"""
        self.row = np.full(ids.shape, -1)
        """[c, L]; -1: a token without a row."""
        self.row[mask] = np.arange(len(self.tokens))

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of tokens in the whole stream."""
        return (self.first + self.context[rows]) * self.ids.shape[1] + self.position[rows]

    def windows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [e, WINDOW] around rows [e], and the rows of each of them (-1: none)."""
        length = self.ids.shape[1]
        position = self.position[rows, None] + np.arange(WINDOW) - WINDOW // 2
        inside = (position >= 0) & (position < length)
        at = self.context[rows, None], position.clip(0, length - 1)
        return np.where(inside, self.ids[at], NO_TOKEN), np.where(inside, self.row[at], -1)


class Examples:
    """For each latent the `size` events of highest score, with the text around each.

    With its activation as an event's score they are its strongest; with a random number
    (`random_scores`) a uniform sample without replacement of all its events, as reservoir sampling
    gives: which one does not depend on how the stream is cut into batches.
    Of equal scores the earlier event's is kept. Memory: N s (8 w + 16) bytes.
    """

    def __init__(self, count: int, size: int) -> None:
        self.scores = np.full((count, size), -np.inf)
        self.places = np.full((count, size), -1, np.int64)
        """Number of the event's token in the whole stream of contexts; -1: no example."""
        self.tokens = np.full((count, size, WINDOW), NO_TOKEN, np.int32)
        self.values = np.zeros((count, size, WINDOW), np.float32)
        """The latent on each of the tokens."""
        self.floor = np.full(count, -np.inf)

    def add(
        self,
        text: IndexedText,
        latents: np.ndarray,
        rows: np.ndarray,
        scores: np.ndarray,
        activations: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        """Events [e] on rows of a text, in the order of the stream.

        activations: values [f, w] of latents [f] on rows [f, w] (-1: none), for those kept.
        """
        size = self.scores.shape[1]
        good = np.flatnonzero(scores > self.floor[latents]) if size else ()
        if not len(good):
            return
        touched, of_event = np.unique(latents[good], return_inverse=True)
        kept = len(touched) * size  # entries up to here are examples that are there already
        owner = np.concatenate([np.repeat(np.arange(len(touched)), size), of_event])
        score = np.concatenate([self.scores[touched].ravel(), scores[good]])
        order = np.lexsort((-score, owner))
        inside = rank(owner[order]) < size
        # Both by latent, and as many new ones as old ones that go.
        new, gone = order[inside & (order >= kept)], order[~inside & (order < kept)]
        slots = touched[gone // size], gone % size
        events = good[new - kept]
        self.scores[slots], self.places[slots] = scores[events], text.places(rows[events])
        self.tokens[slots], window = text.windows(rows[events])
        self.values[slots] = activations(latents[events], window)
        self.floor[touched] = self.scores[touched].min(1)

    def sort(self) -> "Examples":
        """Order each latent's examples, highest score first, then the earlier; returns itself."""
        order = np.lexsort((self.places, -self.scores))
        for name in PARTS:
            values = getattr(self, name)
            at = order if values.ndim == 2 else order[..., None]
            setattr(self, name, np.take_along_axis(values, at, 1))
        return self


class IntervalExamples:
    """For each latent a uniform sample of its events in each of INTERVALS equal intervals.

    The intervals lie over [0, top), as the bins of `Histograms` do: when a larger activation comes,
    top doubles and pairs of intervals are joined, which leaves a uniform sample of both.
    Memory: that of `Examples(count * INTERVALS, size)`.
    """

    def __init__(self, count: int, size: int) -> None:
        self.top = np.zeros(count)
        self.examples = Examples(count * INTERVALS, size)
        """A row for each latent and interval, latent by latent."""

    def add(
        self,
        text: IndexedText,
        latents: np.ndarray,
        rows: np.ndarray,
        values: np.ndarray,
        scores: np.ndarray,
        activations: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        """Events [e] with their activations and `random_scores`; the rest as for `Examples`."""
        peak = np.zeros(len(self.top))
        np.maximum.at(peak, latents, values)
        for grow in doublings(self.top, peak):
            for start in range(0, len(grow), JOINED):
                self._join(grow[start : start + JOINED])
        share = values / np.where(self.top > 0, self.top, 1)[latents]
        intervals = (share * INTERVALS).astype(np.int64).clip(0, INTERVALS - 1)
        self.examples.add(
            text,
            latents * INTERVALS + intervals,
            rows,
            scores,
            lambda owners, window: activations(owners // INTERVALS, window),
        )

    def _join(self, latents: np.ndarray) -> None:
        """Join pairs of intervals of some latents."""
        half, size = INTERVALS // 2, self.examples.scores.shape[1]
        rows = latents[:, None] * INTERVALS + np.arange(INTERVALS)
        low, high = rows[:, :half], rows[:, half:]
        joined = self.examples.scores[rows].reshape(len(latents), half, 2 * size)
        order = np.argsort(-joined, 2, kind="stable")[..., :size]
        for name, empty in EMPTY.items():
            values = getattr(self.examples, name)
            both = values[rows].reshape(len(latents), half, 2 * size, *values.shape[2:])
            at = order if both.ndim == 3 else order[..., None]
            values[low], values[high] = np.take_along_axis(both, at, 2), empty
        self.examples.floor[rows] = self.examples.scores[rows].min(2, initial=np.inf)


def random_scores(seed: int, latents: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A number in (0, 1) for each event [e], drawn anew for each latent and place."""
    return uniform(seed, latents.astype(np.int64) * 2**40 + places)
