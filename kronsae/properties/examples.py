"""Examples of where latents fire: the strongest, or a uniform sample, a fixed number of each.

Letters: N latents, s examples of each, e events (a latent on a token), w tokens of a window.
"""

from collections.abc import Callable

import numpy as np

from kronsae.properties.token_mass import rank, uniform

WINDOW = 31
"""Tokens of an example, the event's in their middle. [KronSAE, App. D]"""

NO_TOKEN = -1
"""Where a window reaches beyond its context."""


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
        latents: np.ndarray,
        scores: np.ndarray,
        places: np.ndarray,
        window: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ) -> None:
        """Events [e], in the order of the stream; `window` gives tokens and values [f, w] of some.

        window: called with the numbers [f] of the events that are kept.
        """
        size = self.scores.shape[1]
        if not size:
            return
        good = np.flatnonzero(scores > self.floor[latents])
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
        self.scores[slots], self.places[slots] = scores[events], places[events]
        self.tokens[slots], self.values[slots] = window(events)
        self.floor[touched] = self.scores[touched].min(1)

    def sort(self) -> "Examples":
        """Put each latent's examples in order: highest score first, then the earlier; returns
        itself."""
        order = np.lexsort((self.places, -self.scores))
        for name in ("scores", "places", "tokens", "values"):
            every = getattr(self, name)
            at = order if every.ndim == 2 else order[..., None]
            setattr(self, name, np.take_along_axis(every, at, 1))
        return self


def random_scores(seed: int, latents: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A number in (0, 1) for each event [e], drawn anew for each latent and place."""
    return uniform(seed, latents.astype(np.int64) * 2**40 + places)
