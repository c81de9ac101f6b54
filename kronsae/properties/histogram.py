"""Histograms of streams whose range nobody knows beforehand."""

from collections.abc import Iterator

import numpy as np

BINS = 32


def doublings(top: np.ndarray, peak: np.ndarray) -> Iterator[np.ndarray]:
    """Raise `top` [N] in place to the smallest powers of two above `peak` [N].

    Yields, for each time that the range of some latents doubles, which ones; not for those whose
    range was 0.
    """
    needed = np.where(peak > 0, np.ldexp(1.0, np.frexp(peak)[1]), 0.0)
    grow = np.flatnonzero((needed > top) & (top > 0))
    while len(grow):
        yield grow
        top[grow] *= 2
        grow = grow[needed[grow] > top[grow]]
    np.maximum(top, needed, out=top)


class Histograms:
    """Counts [N, BINS] of each latent's activations, in equal bins over [0, top[i]).

    top is the smallest power of two above everything seen: when a larger value comes it doubles,
    and pairs of bins are joined, so that the counts are those of one pass that knew the end.
    Activations below 0 are counted in the first bin.
    """

    def __init__(self, count: int) -> None:
        self.counts = np.zeros((count, BINS), np.int64)
        self.top = np.zeros(count)

    def add(self, latents: np.ndarray, values: np.ndarray) -> None:
        """Events [e]."""
        peak = np.zeros(len(self.top))
        np.maximum.at(peak, latents, values)
        self._grow(peak)
        top = np.where(self.top > 0, self.top, 1)[latents]
        bins = (values / top * BINS).astype(np.int64).clip(0, BINS - 1)
        self._count(latents * BINS + bins)

    def add_dense(self, values: np.ndarray) -> None:
        """Activations [t, N], of which those above 0 count."""
        self._grow(values.max(0, initial=0).astype(np.float64))
        scale = BINS / np.where(self.top > 0, self.top, 1)  # a power of two: no rounding
        bins = (values * scale.astype(values.dtype)).astype(np.int64)
        self._count((bins + BINS * np.arange(len(self.top))).ravel())
        self.counts[:, 0] -= (values <= 0).sum(0)

    def _grow(self, peak: np.ndarray) -> None:
        """Make room for values up to peak [N]."""
        for grow in doublings(self.top, peak):
            joined = self.counts[grow].reshape(-1, BINS // 2, 2).sum(2)
            self.counts[grow] = np.pad(joined, ((0, 0), (0, BINS // 2)))

    def _count(self, cells: np.ndarray) -> None:
        flat = np.bincount(cells, minlength=self.counts.size)
        self.counts += flat.reshape(self.counts.shape)
