"""Where latents fire most in held-out text: the first look at what an SAE has learned.

Letters: t tokens, c contexts, L tokens a context, k active latents a token, F latents.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text
from torch import Tensor

from kronsae.data.token_text import token_texts
from kronsae.metrics.heldout import BATCH_TOKENS, Heldout
from kronsae.model.sae import SAE
from kronsae.properties.examples import NO_TOKEN, IndexedText
from kronsae.properties.token_mass import entropy, rank

LEFT, RIGHT = 12, 4
"""Tokens of a window before and after the one where the latent fires most."""

SAME_TOKENS = 8
"""A window that repeats so many tokens of a stronger one, up to its peak, is left out."""

KEPT_CONTEXTS = 16
"""Strongest contexts of a latent among which to choose, and by which latents are chosen."""

MAX_DENSITY = 0.02
"""A latent that fires on a larger share of tokens says little about any of them."""


class Window(NamedTuple):
    """The tokens around the one where a latent fires most in a context."""

    context: int
    """Row of `HeldoutText.contexts`."""
    position: int
    """Place in its context of the token where the latent fires most."""
    start: int
    """Position of the window's first token in its context."""
    activation: float
    """The latent at `position`, in the units of the raw activations."""
    tokens: tuple[int, ...]
    """Token ids of the window."""
    activations: tuple[float, ...]
    """The latent on each of them; 0 where it is not among the k active ones."""


class LatentContexts(NamedTuple):
    """A latent, how often it fires, and where it fires most."""

    latent: int
    head: int | None
    """Head, base and extension of the latent; None for a dense encoder."""
    base: int | None
    extension: int | None
    density: float
    """Share of held-out tokens on which it fires."""
    windows: tuple[Window, ...]
    """Strongest first; one a context, and none that repeats another's text."""


def as_contexts(latent: Sequence[Any]) -> LatentContexts:
    """A latent with its contexts, from the lists that JSON makes of them."""
    made = LatentContexts(*latent)
    windows = (Window(*window) for window in made.windows)
    return made._replace(
        windows=tuple(
            w._replace(tokens=tuple(w.tokens), activations=tuple(w.activations)) for w in windows
        )
    )


@torch.no_grad()
def top_contexts(
    sae: SAE,
    heldout: Heldout,
    latents: Sequence[int] | None = None,
    *,
    num_latents: int = 6,
    num_contexts: int = 4,
) -> list[LatentContexts]:
    """The `num_contexts` contexts in which each latent fires most, in one pass over the text.

    Massive tokens, which `heldout` has the rule for, are left out.
    latents: which ones; by default `num_latents` that are easy to understand (see `_choose`).
    sae: of raw activations. Ties go to the earlier context, then to the earlier position.
    Memory: O(BATCH_TOKENS k + F KEPT_CONTEXTS), never [t, F]. Deterministic.
    Empty if the activations came without text. Raises InputError for a latent outside [0, F).
    """
    sae.check_latents(latents or ())
    heldout = heldout.ordinary()
    read = heldout.text
    if read is None or not len(heldout.activations):
        return []
    text = IndexedText(read.contexts.cpu().numpy(), read.mask.cpu().numpy())
    keep = max(num_contexts, KEPT_CONTEXTS)
    counts, peaks = _scan(sae, heldout.activations, text, latents, keep)
    peaks = _without_repeats(peaks, text)
    density = counts / len(text.tokens)
    if latents is None:
        latents = _choose(sae, peaks, density, text, num_latents, num_contexts)
    chosen = []
    for latent in latents:
        strongest = np.flatnonzero(peaks.latents == latent)[:num_contexts]
        windows = tuple(
            _window(sae, heldout.activations, text, latent, int(peaks.rows[i]), peaks.values[i])
            for i in strongest
        )
        head = base = extension = None
        if sae.config.heads:
            m, n = sae.config.m, sae.config.n
            head, base, extension = latent // (m * n), latent // n % m, latent % n
        share = float(density[latent])
        chosen.append(LatentContexts(latent, head, base, extension, share, windows))
    return chosen


class _Peaks(NamedTuple):
    """The strongest token of each latent in each context; by latent, strongest first."""

    latents: np.ndarray
    rows: np.ndarray
    """Tokens, as rows of the activations [t, d]."""
    values: np.ndarray


def _scan(
    sae: SAE, activations: Tensor, text: IndexedText, latents: Sequence[int] | None, keep: int
) -> tuple[np.ndarray, _Peaks]:
    """How many tokens each latent fires on [F], and its peaks in its `keep` strongest contexts."""
    counts = np.zeros(sae.dict_size, dtype=np.int64)
    peaks = _Peaks(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    for start in range(0, len(activations), BATCH_TOKENS):
        fired = _fired(sae, activations[start : start + BATCH_TOKENS])
        counts += np.bincount(fired.latents, minlength=sae.dict_size)
        fired = fired._replace(rows=fired.rows + start)
        if latents is not None:
            fired = _Peaks(*(part[np.isin(fired.latents, list(latents))] for part in fired))
        peaks = _Peaks(*(np.concatenate(parts) for parts in zip(peaks, fired, strict=True)))
        peaks = _strongest(peaks, text, keep)
    return counts, peaks


def _fired(sae: SAE, x: Tensor) -> _Peaks:
    """Everything that fires on x [B, d], in the order of its rows."""
    codes = sae.encode(x.to(sae.W_dec))
    rows, slots = sae.fired(codes).nonzero(as_tuple=True)
    parts = codes.indices[rows, slots], rows, codes.values[rows, slots].double()
    return _Peaks(*(part.cpu().numpy() for part in parts))


def _strongest(peaks: _Peaks, text: IndexedText, keep: int) -> _Peaks:
    """The best of each latent and context, then the `keep` best contexts of each latent.

    Sorting is stable: of equal values the one that came first, of equal contexts the lower.
    """
    pairs = peaks.latents * len(text.ids) + text.context[peaks.rows]
    order = np.lexsort((-peaks.values, pairs))
    order = order[rank(pairs[order]) == 0]
    order = order[np.lexsort((-peaks.values[order], peaks.latents[order]))]
    order = order[rank(peaks.latents[order]) < keep]
    return _Peaks(*(part[order] for part in peaks))


def _without_repeats(peaks: _Peaks, text: IndexedText) -> _Peaks:
    """peaks without those of a latent whose last SAME_TOKENS tokens a stronger one has too."""
    context = text.context[peaks.rows, None]
    position = text.position[peaks.rows, None] - np.arange(SAME_TOKENS)
    phrase = phrases(np.where(position >= 0, text.ids[context, position.clip(0)], -1))
    order = np.lexsort((phrase, peaks.latents))
    new = np.ones(len(order), dtype=bool)
    new[1:] = np.diff(peaks.latents[order]).astype(bool) | (np.diff(phrase[order]) != 0)
    first = np.sort(order[new])
    return _Peaks(*(part[first] for part in peaks))


def phrases(tokens: np.ndarray) -> np.ndarray:
    """A hash [...] uint64 of the tokens [..., s] of each phrase."""
    out = np.zeros(tokens.shape[:-1], dtype=np.uint64)
    for token in np.moveaxis(tokens, -1, 0):
        out = out * np.uint64(0x9E3779B97F4A7C15) + token.astype(np.uint64)
    return out


def _choose(
    sae: SAE,
    peaks: _Peaks,
    density: np.ndarray,
    text: IndexedText,
    num_latents: int,
    num_contexts: int,
) -> list[int]:
    """Latents that a newcomer understands at a glance, best first.

    Score: mean peak, over the number of tokens that the peaks are effectively about: exp of the
    entropy of their mass over tokens [KronSAE, App. D], for the token itself or the one before,
    whichever is fewer. First come latents that have num_contexts contexts and fire on at most
    MAX_DENSITY of the tokens, from different heads and each about another token; those about
    themselves ("def") and about what is before them (the name after "def") in turns.
    """
    alive, first, contexts = np.unique(peaks.latents, return_index=True, return_counts=True)
    group = np.repeat(np.arange(len(alive)), contexts)
    mass = peaks.values.clip(min=np.finfo(float).tiny)
    context, position = text.context[peaks.rows], text.position[peaks.rows]
    itself = text.tokens[peaks.rows]
    before = np.where(position > 0, text.ids[context, position - 1], -1)
    spread = np.stack([_effective_number(tokens, group, mass) for tokens in (itself, before)])
    score = np.bincount(group, mass, len(alive)) / contexts / spread.min(0)
    usual = (contexts >= num_contexts) & (density[alive] <= MAX_DENSITY)
    about_before = spread[1] < spread[0]
    subject = np.where(about_before, before[first], itself[first])
    head = alive // (sae.config.m * sae.config.n or 1)
    chosen: list[int] = []  # indices of `alive`
    for turn in range(min(num_latents, len(alive))):
        left = ~np.isin(np.arange(len(alive)), chosen)
        fresh = usual & ~np.isin(head, head[chosen]) & ~np.isin(subject, subject[chosen])
        for options in (fresh & (about_before == turn % 2), fresh, usual & left, left):
            if options.any():
                chosen.append(int(np.where(options, score, -np.inf).argmax()))
                break
    return alive[chosen].tolist()


def _effective_number(tokens: np.ndarray, group: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """exp of the entropy of each group's mass over its tokens: how many share it, in effect."""
    width = tokens.max(initial=0) + 2
    pairs, of_entry = np.unique(group * width + tokens + 1, return_inverse=True)
    of_pair = pairs // width
    return np.exp(entropy(of_pair, np.bincount(of_entry, mass), group.max(initial=-1) + 1))


def _window(
    sae: SAE, activations: Tensor, text: IndexedText, latent: int, row: int, value: float
) -> Window:
    """The window around a row of the activations, whose few tokens are encoded once more."""
    context, position = int(text.context[row]), int(text.position[row])
    length = int((text.ids[context] != NO_TOKEN).sum())
    start, stop = max(0, position - LEFT), min(length, position + RIGHT + 1)
    inside = text.row[context, start:stop]
    inside = inside[inside >= 0]
    fired = _fired(sae, activations[inside[0] : inside[-1] + 1])
    here = fired.latents == latent
    on_tokens = np.zeros(stop - start)
    on_tokens[text.position[inside[fired.rows[here]]] - start] = fired.values[here]
    on_tokens[position - start] = value
    return Window(
        context=context,
        position=position,
        start=start,
        activation=float(value),
        tokens=tuple(text.ids[context, start:stop].tolist()),
        activations=tuple(on_tokens.tolist()),
    )


def short(value: float) -> str:
    """value to three digits, as in 0.0123, 1.20, 45.6 and 789."""
    return f"{value:#.3g}".rstrip(".")


def title(latent: LatentContexts) -> str:
    """A line as `latent 9 = head 1 (base 0 × extension 1) · fires on 0.4 % of tokens`."""
    name = f"latent {latent.latent}"
    if latent.head is not None:
        name += f" = head {latent.head} (base {latent.base} × extension {latent.extension})"
    if not latent.windows:
        return f"{name} · never fires on the held-out tokens"
    return f"{name} · fires on {100 * latent.density:.2g} % of tokens"


def render(
    latents: Sequence[LatentContexts], tokenizer: Any | None, console: Console | None = None
) -> list[Text]:
    """Lines to print: a title for each latent, a line for each context, cut to the console.

    The strongest tokens stand below each other, in «marks».
    """
    width = 100 if console is None else console.width
    room = max(20, width - 12)  # without the activation and the marks
    texts = {
        w: token_texts(w.tokens, tokenizer, w.activations)
        for latent in latents
        for w in latent.windows
    }
    lefts = {w: "".join(texts[w][: w.position - w.start]) for w in texts}
    column = min(room * 6 // 10, max(map(cell_len, lefts.values()), default=0))
    lines = []
    for latent in latents:
        lines.append(Text(title(latent), style="bold"))
        for window in latent.windows:
            left = set_cell_size(lefts[window][::-1], column)[::-1]
            peak, *right = texts[window][window.position - window.start :]
            peak = set_cell_size(peak, min(cell_len(peak), room * 3 // 10))
            line = f"{short(window.activation):>7}  {left}«{peak}»{''.join(right)}"
            lines.append(Text(line, no_wrap=True, overflow="ellipsis"))
    return lines
