"""On which tokens a latent's activation lies: its token entropy, in bounded memory.

Letters: N latents, V tokens of the vocabulary, e events (a latent on a token).
"""

import numpy as np

TABLE_ENTRIES = 2**25
"""Largest table [V, N] that is kept (256 MiB)."""

PAIRS = 2**24
"""Pairs of a latent and a token that are kept where there is no table (256 MiB)."""

REGISTERS = 512
"""Registers of the sketch of a latent; its error is sqrt(3 / REGISTERS) = 0.077 nats."""

TABLES, BUCKETS = 4, 128
"""Tables in which a sketch sums a latent's mass by token, and the least number of sums in each."""

CANDIDATES = 2**28
"""Pairs of a latent and a token, at most, among which a sketch looks for the top tokens."""


class TokenMass:
    """Sums of activations by latent and token, and the entropy of each latent's shares.

    Exact while they fit: in a table [V, N], or else as the pairs that occur. When there are more
    than `PAIRS` of those, a sketch takes their place (`Sketch`), which is linear in the mass: what
    was exact so far enters it, and nothing is lost. `exact` says which.
    Negative activations count as 0.
    """

    def __init__(self, count: int, vocabulary: int) -> None:
        self.count, self.vocabulary = count, vocabulary
        table = count * vocabulary <= TABLE_ENTRIES
        self.table = np.zeros((vocabulary, count)) if table else None
        self.pairs = np.zeros(0, np.int64)  # latent * V + token, ascending
        self.mass: np.ndarray = np.zeros(0)
        self.waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self.sketch: Sketch | None = None

    @property
    def exact(self) -> bool:
        """Whether all sums are kept; if not, entropies and shares are estimates of a sketch."""
        if self.waiting:
            self._merge()
        return self.sketch is None

    def add(self, latents: np.ndarray, tokens: np.ndarray, values: np.ndarray) -> None:
        """Events [e]: a latent, the token that it fires on, its activation."""
        keys, of_event = np.unique(latents * self.vocabulary + tokens, return_inverse=True)
        mass = np.bincount(of_event, values.clip(min=0), len(keys))
        if self.table is not None:
            latents, tokens = np.divmod(keys, self.vocabulary)
            self.table[tokens, latents] += mass
        elif self.sketch is not None:
            self.sketch.add(*np.divmod(keys, self.vocabulary), mass)
        else:
            self.waiting.append((keys, mass))
            if sum(len(keys) for keys, _ in self.waiting) > max(len(self.pairs), PAIRS // 4):
                self._merge()

    def add_dense(self, tokens: np.ndarray, values: np.ndarray) -> None:
        """values [t, N] of all latents on tokens [t]; without a table they enter the sketch, as
        pre-latents fire on too many tokens for pairs."""
        if self.table is None:
            self.sketch = self.sketch or Sketch(self.count, self.vocabulary)
            self.sketch.add_dense(tokens, values)
            return
        for token, row in zip(tokens, values.clip(min=0), strict=True):
            self.table[token] += row

    def _merge(self) -> None:
        parts = [(self.pairs, self.mass), *self.waiting]
        keys, mass = (np.concatenate(column) for column in zip(*parts, strict=True))
        self.pairs, of_entry = np.unique(keys, return_inverse=True)
        self.mass, self.waiting = np.bincount(of_entry, mass, len(self.pairs)), []
        if len(self.pairs) > PAIRS:
            self.sketch = Sketch(self.count, self.vocabulary)
            self.sketch.add(*np.divmod(self.pairs, self.vocabulary), self.mass)
            self.pairs, self.mass = self.pairs[:0], self.mass[:0]

    def entropy(self) -> np.ndarray:
        """-sum_t p_t log p_t [N] in nats, p_t the share of a latent's mass that lies on token t.

        nan for a latent without mass. [KronSAE, App. D]
        """
        if not self.exact and self.sketch is not None:
            return self.sketch.entropy()
        latents, _, mass = self._entries()
        some = np.bincount(latents, minlength=self.count) > 0
        return np.where(some, entropy(latents, mass, self.count), np.nan)

    def top(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [N, size] with most mass, and their shares; -1 and 0 where there are fewer.

        If the sums are not exact any more, a share is an estimate (`Sketch.top`).
        """
        if not self.exact and self.sketch is not None:
            return self.sketch.top(size)
        return largest_shares(*self._entries(), self.count, size)

    def _entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latent, token and mass of all sums that are not 0, by latent."""
        if self.table is not None:
            latents, tokens = self.table.T.nonzero()
            return latents, tokens, self.table[tokens, latents]
        some = self.mass > 0
        return *np.divmod(self.pairs[some], self.vocabulary), self.mass[some]


def largest_shares(
    latents: np.ndarray, tokens: np.ndarray, mass: np.ndarray, count: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [count, size] with most of each latent's mass, and their shares of it.

    latents, tokens, mass: [e], each pair once. -1 and 0 where there are fewer tokens.
    """
    order = np.lexsort((-mass, latents))
    ranks = rank(latents[order])
    order, ranks = order[ranks < size], ranks[ranks < size]
    total = np.bincount(latents, mass, count)
    largest, shares = np.full((count, size), -1), np.zeros((count, size))
    largest[latents[order], ranks] = tokens[order]
    shares[latents[order], ranks] = mass[order] / total[latents[order]]
    return largest, shares


def entropy(groups: np.ndarray, mass: np.ndarray, count: int) -> np.ndarray:
    """-sum p log p [count] in nats of each group's shares p of its mass. groups, mass: [e]."""
    total = np.bincount(groups, mass, count)
    share = mass / total[groups]
    return np.bincount(groups, -share * np.log(share), count)


def rank(groups: np.ndarray) -> np.ndarray:
    """Place of each entry within its group, from 0. groups: sorted."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


class Sketch:
    """Entropies and top tokens of each latent's mass, in the same memory for any vocabulary.

    Entropies are from REGISTERS random projections. Register r of a latent is sum_t m_t X_tr, X
    from the maximally skewed stable law of index 1, for which
    E exp(sum_t p_t X_tr) = prod_t p_t^p_t = exp(-entropy). [Clifford and Cosma 2013]
    Top tokens are from a count-min sketch: TABLES tables of sums over the tokens that have the same
    hash, another one in each table. [Cormode and Muthukrishnan 2005]
    """

    def __init__(self, count: int, vocabulary: int) -> None:
        self.registers = np.zeros((count, REGISTERS), np.float32)
        self.total = np.zeros(count)
        width = max(BUCKETS, TABLE_ENTRIES // (TABLES * count))
        self.buckets = np.zeros((TABLES, width, count), np.float32)
        cells = np.arange(TABLES * vocabulary).reshape(TABLES, vocabulary)
        self.bucket_of = (uniform(3, cells) * width).astype(np.int64)
        self.of_token = np.zeros(vocabulary)
        """Mass of each token, of all latents."""

    def add(self, latents: np.ndarray, tokens: np.ndarray, mass: np.ndarray) -> None:
        """Events [e]."""
        self.total += np.bincount(latents, mass, len(self.total))
        self.of_token += np.bincount(tokens, mass, len(self.of_token))
        for table, bucket in zip(self.buckets, self.bucket_of[:, tokens], strict=True):
            np.add.at(table, (bucket, latents), mass)
        for start in range(0, len(latents), 2**15):
            part = slice(start, start + 2**15)
            seen, of_event = np.unique(tokens[part], return_inverse=True)
            drawn = _skewed_stable(seen)[of_event] * mass[part, None]
            order = np.argsort(latents[part], kind="stable")
            touched, starts = np.unique(latents[part][order], return_index=True)
            self.registers[touched] += np.add.reduceat(drawn[order], starts)

    def add_dense(self, tokens: np.ndarray, values: np.ndarray) -> None:
        """values [t, N] of all latents on tokens [t]."""
        values = values.clip(min=0)
        self.total += values.sum(0, dtype=np.float64)
        seen, of_token = np.unique(tokens, return_inverse=True)
        self.registers += values.T @ _skewed_stable(seen)[of_token]
        self.of_token += np.bincount(tokens, values.sum(1), len(self.of_token))
        for table, buckets in zip(self.buckets, self.bucket_of[:, tokens], strict=True):
            for bucket, row in zip(buckets, values, strict=True):
                table[bucket] += row

    def entropy(self) -> np.ndarray:
        out = np.full(len(self.total), np.nan)
        some = self.total > 0
        shares = self.registers[some] / self.total[some, None]
        out[some] = -np.log(np.exp(shares).mean(1))
        return out.clip(min=0)

    def top(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """As `TokenMass.top`, of estimates: what the other tokens of a bucket have is subtracted.

        Only the tokens with most mass of all latents are candidates, and shares of less than one in
        as many as there are buckets are left out.
        """
        width, count = self.buckets.shape[1:]
        most = min(np.count_nonzero(self.of_token), max(2**12, CANDIDATES // count))
        candidates = np.argsort(-self.of_token, kind="stable")[:most]
        largest, shares = np.full((count, size), -1), np.zeros((count, size))
        step = max(1, 2**22 // count)
        for tokens in np.split(candidates, range(step, len(candidates), step)):
            sums = zip(self.buckets, self.bucket_of[:, tokens], strict=True)
            found = np.minimum.reduce([table[bucket] for table, bucket in sums])
            found -= (self.total - found) / (width - 1)
            found = np.where(found * width < self.total, 0, found / self.total.clip(min=1e-300)).T
            both = np.concatenate([shares, found], axis=1)
            order = np.argsort(-both, axis=1, kind="stable")[:, :size]
            names = np.concatenate([largest, np.broadcast_to(tokens, found.shape)], axis=1)
            shares = np.take_along_axis(both, order, 1)
            largest = np.where(shares > 0, np.take_along_axis(names, order, 1), -1)
        return largest, shares


def _skewed_stable(tokens: np.ndarray) -> np.ndarray:
    """X [u, REGISTERS] float32 of tokens [u], the same whenever it is asked for."""
    cells = tokens[:, None] * np.int64(REGISTERS) + np.arange(REGISTERS)
    first, second = uniform(1, cells), uniform(2, cells)
    angle = np.pi * (first - 0.5)
    rest = np.pi / 2 - angle
    drawn = np.tan(angle) * rest + np.log(-np.log(second) * np.cos(angle) / rest)
    return drawn.astype(np.float32)


def uniform(seed: int, cells: np.ndarray) -> np.ndarray:
    """Numbers in (0, 1) that depend on `seed` and on each cell's number alone (SplitMix64)."""
    x = cells.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
