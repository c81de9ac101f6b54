"""On which tokens a latent's activation lies: its token entropy, in bounded memory.

Letters: N latents, V tokens of the vocabulary, e events (a latent on a token), R registers.
"""

import numpy as np

TABLE_ENTRIES = 2**25
"""Largest table [V, N] that is kept (256 MiB)."""

PAIRS = 2**24
"""Pairs of a latent and a token that are kept where there is no table (256 MiB)."""

REGISTERS = 512
"""Registers of the sketch of a latent; its error is sqrt(3 / REGISTERS) = 0.077 nats."""


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
        """Whether all sums are kept; if not, entropies are estimates and `top` is unknown."""
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
            self.sketch = self.sketch or Sketch(self.count)
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
            self.sketch = Sketch(self.count)
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
        """The tokens with most mass, and their shares of it (`largest_shares`).

        Raises ValueError if the sums are not exact any more.
        """
        if not self.exact:
            raise ValueError("the sums by token are a sketch, which does not know the tokens")
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
    """Entropies from REGISTERS random projections of each latent's mass, whatever the vocabulary.

    Register r of a latent is sum_t m_t X_tr with X from the maximally skewed stable law of index 1,
    for which E exp(sum_t p_t X_tr) = prod_t p_t^p_t = exp(-entropy). [Clifford and Cosma 2013]
    """

    def __init__(self, count: int) -> None:
        self.registers = np.zeros((count, REGISTERS), np.float32)
        self.total = np.zeros(count)

    def add(self, latents: np.ndarray, tokens: np.ndarray, mass: np.ndarray) -> None:
        """Events [e]."""
        self.total += np.bincount(latents, mass, len(self.total))
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

    def entropy(self) -> np.ndarray:
        out = np.full(len(self.total), np.nan)
        some = self.total > 0
        shares = self.registers[some] / self.total[some, None]
        out[some] = -np.log(np.exp(shares).mean(1))
        return out.clip(min=0)


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
