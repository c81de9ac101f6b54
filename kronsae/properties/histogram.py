"""Histograms of streams whose range nobody knows beforehand."""

import numpy as np

BINS = 32


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
        needed = np.where(peak > 0, np.ldexp(1.0, np.frexp(peak)[1]), 0.0)
        grow = np.flatnonzero((needed > self.top) & (self.top > 0))
        while len(grow):
            joined = self.counts[grow].reshape(-1, BINS // 2, 2).sum(2)
            self.counts[grow] = np.pad(joined, ((0, 0), (0, BINS // 2)))
            self.top[grow] *= 2
            grow = grow[needed[grow] > self.top[grow]]
        self.top = np.maximum(self.top, needed)
        top = np.where(self.top > 0, self.top, 1)[latents]
        bins = (values / top * BINS).astype(np.int64).clip(0, BINS - 1)
        flat = np.bincount(latents * BINS + bins, minlength=self.counts.size)
        self.counts += flat.reshape(self.counts.shape)
