"""Properties of latents and pre-latents, in one pass over a text. [KronSAE, sec. 5.3, App. D]

Letters: F latents, P = h (m + n) pre-latents, N either of them, b contexts of L tokens, t tokens
that the mask keeps, d width, e events: a latent on a token where it fires, V tokens known.

A latent fires where it is among a token's active latents; a pre-latent u fires where ReLU(u) > 0,
which is its activation, whatever the composition. (With experts: on the tokens of its expert.)
Memory does not depend on the length of the text.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kronsae.config import SAEConfig, check_values, setting
from kronsae.errors import InputError
from kronsae.model.sae import SAE
from kronsae.properties.correlation import active_codes, joined, mean_correlations
from kronsae.properties.examples import (
    INTERVALS,
    WINDOW,
    Examples,
    IndexedText,
    IntervalExamples,
    random_scores,
)
from kronsae.properties.histogram import Histograms
from kronsae.properties.token_mass import TokenMass
from kronsae_kernels import SparseCodes

PAPER_SAMPLE = 384
"""Examples of a latent that are sampled. [KronSAE, App. D]"""

SAMPLE_BYTES = 2**31
"""Most memory of the sampled examples, where their number is left open."""

INTERVAL_SAMPLE, INTERVAL_BYTES = 4, 2**30
"""Examples of each interval of a latent, and most memory of all, if their number is left open."""

TEXT_TOKENS = 2**23
"""Longest text that is kept whole, so that examples can be shown with more around them."""

CHUNK_TOKENS = 4096
CHUNK_SCORES = 2**24
"""Pre-latents times tokens that exist at a time."""

TOP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """How much of a text to read, and how much of it to keep."""

    tokens: int = setting(1_000_000, "tokens of text to read (embedded model: 200,000)", least=1)
    top: int = setting(16, "strongest examples of each latent to keep", least=1)
    sample: int = setting(
        0,
        "examples of each latent to sample (0: 384 as in the paper, or as many as fit in 2 GiB;"
        " embedded model: 32)",
    )
    intervals: int = setting(
        0,
        "examples of each latent to sample from each of 8 equal intervals of its activations, up to"
        " the power of two above the largest (0: 4, or as many as fit in 1 GiB)",
    )
    correlation_tokens: int = setting(65_536, "tokens, the first, over which to correlate latents")
    seed: int = setting(0, "of the sample")

    def __post_init__(self) -> None:
        check_values(self)


@dataclasses.dataclass(frozen=True)
class Examined:
    """Properties of N latents, or of N pre-latents."""

    count: np.ndarray
    """[N] int64: tokens on which each fires."""
    mean: np.ndarray
    """[N] mean activation where it fires; 0 if it never does."""
    entropy: np.ndarray
    """[N] token entropy in nats (`TokenMass.entropy`); nan for one that never fires."""
    multitoken: np.ndarray
    """[N] share of a context's tokens on which it fires, mean over the contexts where it does."""
    histogram: np.ndarray
    """[N, BINS] counts of activations in equal bins over [0, histogram_top)."""
    histogram_top: np.ndarray
    """[N]"""
    top_tokens: np.ndarray
    """[N, TOP_TOKENS] tokens that most of its activation lies on; -1 where there are fewer."""
    top_shares: np.ndarray
    """[N, TOP_TOKENS] how much of it."""
    top: Examples
    """The strongest examples, one a context."""
    sample: Examples
    """A uniform sample of the tokens where it fires."""
    intervals: Examples | None = None
    """[N INTERVALS] a uniform sample of each interval of a latent's activations, INTERVALS equal
    ones over [0, histogram_top); of latents alone, and not in what older versions measured."""


class Properties(NamedTuple):
    """Properties of all latents of an SAE on a text."""

    tokens: int
    """Read, of those that the mask keeps."""
    contexts: int
    post: Examined
    """The F latents."""
    pre: Examined | None
    """The P pre-latents, head by head: its m base, then its n extension; None: dense."""
    both: np.ndarray | None
    """[h, m, n] tokens on which a latent's base and extension both fire."""
    head_correlation: np.ndarray | None
    """[F] mean correlation of each latent with the others of its head; nan where it has none."""
    other_correlation: np.ndarray | None
    """[F] with all other latents. Both: None if correlation_tokens is 0."""
    exact_entropy: dict[str, bool]
    """Whether token entropies and the shares of top tokens are exact, or estimates of a sketch; by
    "post" and "pre"."""
    text: np.ndarray | None = None
    """[c, L] token ids of all contexts that were read (-1: padding), which examples' places number;
    None: it was longer than TEXT_TOKENS, or an older version measured this."""


@torch.no_grad()
def measure(
    sae: SAE,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    vocabulary: int,
    settings: MeasureConfig,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Properties:
    """Properties of an SAE of raw activations, over token ids [b, L], masks [b, L], rows [t, d].

    Whole contexts are read until there are settings.tokens, or no more; all need the same L.
    vocabulary: tokens that there are.  progress: told the number of tokens read, now and then.
    Deterministic; the same however contexts are grouped into batches, up to rounding of sums.
    Raises InputError if there is no text.
    """
    config = sae.config
    pre_count = config.heads * (config.m + config.n)
    sample = settings.sample or _sample_size(config.dict_size + pre_count)
    intervals = settings.intervals or _interval_size(config.dict_size)
    post = _Sums(config.dict_size, vocabulary, settings.top, sample, settings.seed, intervals)
    pre = _Sums(pre_count, vocabulary, settings.top, sample, settings.seed + 1)
    both = torch.zeros(config.heads, config.m, config.n, dtype=torch.float64)
    codes: list[SparseCodes] = []
    kept = KeptText()
    tokens = contexts = 0
    for ids, mask, rows in _read(batches, pre_count, settings.tokens):
        text = IndexedText(ids.cpu().numpy(), mask.cpu().numpy(), contexts)
        contexts += len(ids)
        kept.add(text.ids)
        if not len(rows):  # special tokens alone
            continue
        x = rows[:, : config.d_model].to(sae.W_dec)
        part = active_codes(sae, x)
        if tokens < settings.correlation_tokens:
            codes.append(SparseCodes(part.values.float(), part.indices.int()))
        row, slot = part.values.nonzero(as_tuple=True)
        latents = part.indices[row, slot].numpy()
        post.add(text, latents, row.numpy(), part.values[row, slot].double().numpy())
        if config.heads:
            dense = pre_latents(sae, x)
            pre.add_dense(text, dense.cpu().float().numpy())
            both += _both(config, dense > 0)
        tokens += len(x)
        progress(tokens)
    if not tokens:
        raise InputError("there is no text to read: no context of it is full")
    head, others = _correlations(sae, joined(codes)) if codes else (None, None)
    exact = {"post": post.mass.exact}
    if not config.heads:
        return Properties(
            tokens, contexts, post.result(), None, None, head, others, exact, kept.whole()
        )
    exact["pre"] = pre.mass.exact
    counts = both.long().numpy()
    return Properties(
        tokens,
        contexts,
        post.result(),
        pre.result(),
        counts,
        head,
        others,
        exact,
        kept.whole(),
    )


def _both(config: SAEConfig, fires: Tensor) -> Tensor:
    """[h, m, n] on how many tokens base and extension of a latent fire; fires: [t, P]."""
    of_heads = fires.float().view(-1, config.heads, config.m + config.n)
    return torch.einsum("thi,thj->hij", of_heads.split([config.m, config.n], 2)).cpu()


def _sample_size(count: int) -> int:
    """Examples to sample of each of `count` latents and pre-latents: as many as fit."""
    return max(1, min(PAPER_SAMPLE, SAMPLE_BYTES // (count * (8 * WINDOW + 16))))


def _interval_size(count: int) -> int:
    """Examples to sample of each interval of `count` latents: as many as fit."""
    each = count * INTERVALS * (8 * WINDOW + 16)
    return max(1, min(INTERVAL_SAMPLE, INTERVAL_BYTES // each))


class KeptText:
    """The contexts that were read, unless they are too many."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] | None = []
        self.tokens = 0

    def add(self, ids: np.ndarray) -> None:
        """Token ids [c, L] of the next contexts."""
        self.tokens += ids.size
        if self.tokens > TEXT_TOKENS:
            self.parts = None
        elif self.parts is not None:
            self.parts.append(ids.astype(np.int32))

    def whole(self) -> np.ndarray | None:
        """All contexts [c, L]; None if there are more than TEXT_TOKENS tokens."""
        return None if self.parts is None else np.concatenate(self.parts)


def pre_latents(sae: SAE, x: Tensor) -> Tensor:
    """ReLU of the pre-latents [t, P] of x [t, d]; with experts, 0 but for the token's own."""
    dense = torch.nn.functional.linear(x, sae.W_enc.flatten(0, -2), sae.b_enc.flatten()).relu()
    if sae.router is not None:
        own = torch.nn.functional.one_hot(sae.router(x).argmax(-1), sae.config.experts)
        dense = (dense.view(len(x), sae.config.experts, -1) * own[..., None]).flatten(1)
    return dense


def _read(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]], width: int, tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The text in chunks of whole contexts, until there are `tokens` tokens of it.

    A chunk has at least one context, and few enough for activations of `width` pre-latents.
    """
    for ids, mask, rows in batches:
        budget = min(CHUNK_TOKENS, CHUNK_SCORES // max(1, width))
        size = max(1, budget // ids.shape[1])
        parts = rows.split([int(part.sum()) for part in mask.split(size)])
        for some_ids, kept, x in zip(ids.split(size), mask.split(size), parts, strict=True):
            ends = kept.sum(1).cumsum(0)
            count = min(len(ends), int((ends < tokens).sum()) + 1)
            x = x[: ends[count - 1]]
            yield some_ids[:count], kept[:count], x
            tokens -= len(x)
            if tokens <= 0:
                return


class _Sums:
    """Running sums of N latents."""

    def __init__(
        self, count: int, vocabulary: int, top: int, sample: int, seed: int, intervals: int = 0
    ) -> None:
        self.seed = seed
        self.count = np.zeros(count, np.int64)
        self.sum = np.zeros(count)
        self.contexts = np.zeros(count, np.int64)
        self.shares = np.zeros(count)
        self.mass = TokenMass(count, vocabulary)
        self.histograms = Histograms(count)
        self.top, self.sample = Examples(count, top), Examples(count, sample)
        self.intervals = IntervalExamples(count, intervals) if intervals else None

    def add(
        self, text: IndexedText, latents: np.ndarray, rows: np.ndarray, values: np.ndarray
    ) -> None:
        """Events [e], by row: few of the latents fire on each."""
        size, contexts, tokens = len(self.count), len(text.ids), len(text.tokens)
        self.mass.add(latents, text.tokens[rows], values)
        self.count += np.bincount(latents, minlength=size)
        self.sum += np.bincount(latents, values, size)
        self.histograms.add(latents, values)
        pair = latents * contexts + text.context[rows]  # of a latent and a context
        fired = np.bincount(pair, minlength=size * contexts).reshape(size, contexts)
        self._add_contexts(fired.T, np.bincount(text.context, minlength=contexts))
        keys = latents * tokens + rows
        order = np.argsort(keys)
        sorted_keys, sorted_values = keys[order], values[order]

        def activations(latents: np.ndarray, rows: np.ndarray) -> np.ndarray:
            wanted = latents[:, None] * tokens + rows
            at = np.searchsorted(sorted_keys, wanted).clip(max=len(keys) - 1)
            return np.where((sorted_keys[at] == wanted) & (rows >= 0), sorted_values[at], 0)

        scores = random_scores(self.seed, latents, text.places(rows))
        self.sample.add(text, latents, rows, scores, activations)
        if self.intervals is not None:
            self.intervals.add(text, latents, rows, values, scores, activations)
        peak = np.full(size * contexts, -np.inf)
        np.maximum.at(peak, pair, values)
        highest = np.flatnonzero(values == peak[pair])
        _, first = np.unique(pair[highest], return_index=True)  # of equal ones the earliest
        best = np.sort(highest[first])
        self.top.add(text, latents[best], rows[best], values[best], activations)

    def add_dense(self, text: IndexedText, dense: np.ndarray) -> None:
        """Activations [t, N]; the same, where many fire on each token."""
        self.mass.add_dense(text.tokens, dense)
        fires = dense > 0
        self.count += fires.sum(0)
        self.sum += dense.sum(0, dtype=np.float64)
        self.histograms.add_dense(dense)
        _, starts = np.unique(text.context, return_index=True)
        ends = np.append(starts[1:], len(dense))
        fired = np.add.reduceat(fires, starts, 0, dtype=np.int64)
        self._add_contexts(fired, ends - starts)

        def activations(latents: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return np.where(rows >= 0, dense[rows, latents[:, None]], 0)

        # One number a token serves all latents: it leaves each a uniform sample, and most rows out.
        every = np.arange(len(dense))
        scores = random_scores(self.seed, np.zeros(1, np.int64), text.places(every))
        some = np.flatnonzero(scores > self.sample.floor.min())
        row, latents = (fires[some] & (scores[some, None] > self.sample.floor)).nonzero()
        rows = some[row]
        self.sample.add(text, latents, rows, scores[rows], activations)
        spans = zip(starts, ends, strict=True)
        best = np.stack([first + dense[first:end].argmax(0) for first, end in spans])  # [c, N]
        peak = np.take_along_axis(dense, best, 0)
        context, latents = ((peak > 0) & (peak > self.top.floor)).nonzero()
        rows = best[context, latents]
        self.top.add(text, latents, rows, dense[rows, latents], activations)

    def _add_contexts(self, fired: np.ndarray, lengths: np.ndarray) -> None:
        """fired: [c, N] tokens of contexts of `lengths` [c] tokens on which each latent fires."""
        self.contexts += (fired > 0).sum(0)
        self.shares += (fired / lengths.clip(min=1)[:, None]).sum(0)

    def result(self) -> Examined:
        tokens, shares = self.mass.top(TOP_TOKENS)
        return Examined(
            self.count,
            self.sum / self.count.clip(min=1),
            self.mass.entropy(),
            self.shares / self.contexts.clip(min=1),
            self.histograms.counts,
            self.histograms.top,
            tokens,
            shares,
            self.top.sort(),
            self.sample.sort(),
            None if self.intervals is None else self.intervals.examples.sort(),
        )


def _correlations(sae: SAE, codes: SparseCodes) -> tuple[np.ndarray | None, np.ndarray]:
    """Mean correlations [F] with a latent's head (None for a dense encoder) and with all others."""
    config = sae.config
    kron = config.heads > 0
    heads, size = (config.heads, config.m * config.n) if kron else (1, config.dict_size)
    means = mean_correlations(codes, heads, size)
    of_all = torch.full((2, config.dict_size), torch.nan, dtype=torch.float64)
    of_all[:, means.latents] = torch.stack([means.head, means.others])
    return of_all[0].numpy() if kron else None, of_all[1].numpy()
