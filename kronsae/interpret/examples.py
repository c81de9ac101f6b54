"""Where latents fire and where not: a bounded, fair sample of windows of text.

Letters: n tokens, F latents.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kronsae.metrics.figures import FiringMetrics
from kronsae.metrics.heldout import HeldoutText
from kronsae.model.sae import SAE

CONTEXT = 256
"""Tokens of a context; longer ones are cut. [KronSAE, App. D]"""

WINDOW = 31
"""Tokens of an example, with the strongest in its middle. [KronSAE, App. D]"""

BUFFER = 384
"""Examples that are kept of a latent, drawn from all by reservoir sampling. [KronSAE, App. D]"""

SILENT = 1024
"""Windows among which to find those where a latent is silent."""


class Example(NamedTuple):
    """Some tokens of a text, and a latent on each of them."""

    tokens: tuple[int, ...]
    activations: tuple[float, ...]
    """0 where the latent does not fire."""

    @property
    def peak(self) -> float:
        return max(self.activations)


class LatentExamples(NamedTuple):
    """A latent, and texts in which it fires and does not."""

    latent: int
    firing: list[Example]
    """In the order in which they were drawn: any part is a fair sample."""
    silent: list[Example]


@torch.no_grad()
def firing_counts(sae: SAE, text: HeldoutText) -> FiringMetrics:
    """How often each latent fires on the text."""
    counts = FiringMetrics(sae.dict_size, sae.W_dec.device)
    for ids, mask in text.batches():
        x = text.model.activations(ids)[..., : sae.d_model][mask]
        codes = sae.encode(x.to(sae.W_dec))
        counts.update(codes.indices, sae.fired(codes))
    return counts


@torch.no_grad()
def collect(
    sae: SAE, text: HeldoutText, latents: Sequence[int], seed: int = 0
) -> list[LatentExamples]:
    """Examples of some latents, in one pass over the text.

    One example a context in which a latent fires, around the token where it does most; BUFFER of
    them by reservoir sampling. What a latent gets does not depend on which others are asked for.
    Memory: BUFFER windows a latent, and SILENT in all.
    """
    buffers = {latent: _Reservoir(BUFFER, random.Random(f"{seed} {latent}")) for latent in latents}
    drawn = random.Random(f"{seed}")
    others = _Reservoir(SILENT, random.Random(f"{seed} silent"))
    wanted = torch.tensor(sorted(buffers), dtype=torch.int64, device=sae.W_dec.device)
    for ids, mask in text.batches():
        x = text.model.activations(ids)[..., : sae.d_model][mask]
        codes = sae.encode(x.to(sae.W_dec))
        kept = sae.fired(codes) & torch.isin(codes.indices, wanted)
        rows, slots = kept.nonzero(as_tuple=True)
        context, position = (part[rows].cpu().numpy() for part in mask.nonzero(as_tuple=True))
        fired = codes.indices[rows, slots].cpu().numpy()
        values = codes.values[rows, slots].double().cpu().numpy()
        tokens = ids.cpu().numpy()
        for start in range(0, tokens.shape[1], CONTEXT):
            stop = min(start + CONTEXT, tokens.shape[1])
            inside = (position >= start) & (position < stop)
            for row in range(len(tokens)):
                here = inside & (context == row)
                piece = tokens[row, start:stop]
                firing = _by_latent(fired[here], position[here] - start, values[here])
                for latent, (places, strengths) in firing.items():
                    middle = int(places[strengths.argmax()])
                    first = max(0, min(middle - WINDOW // 2, len(piece) - WINDOW))
                    window = _window(piece, first, places, strengths)
                    buffers[latent].offer(window)
                first = drawn.randrange(max(1, len(piece) - WINDOW + 1))
                window = tuple(piece[first : first + WINDOW].tolist())
                active = {
                    latent
                    for latent, (places, _) in firing.items()
                    if ((places >= first) & (places < first + WINDOW)).any()
                }
                others.offer((window, active))
    windows = [(Example(tokens, (0.0,) * len(tokens)), active) for tokens, active in others.kept]
    return [
        LatentExamples(
            latent,
            _shuffled(buffers[latent].kept, f"{seed} {latent} firing"),
            _shuffled([w for w, active in windows if latent not in active], f"{seed} {latent}"),
        )
        for latent in latents
    ]


class _Reservoir:
    """A uniform sample of everything offered. [Vitter 1985, algorithm R]"""

    def __init__(self, size: int, generator: random.Random) -> None:
        self.size, self.generator = size, generator
        self.kept: list = []
        self.seen = 0

    def offer(self, item: object) -> None:
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(item)
        elif (place := self.generator.randrange(self.seen)) < self.size:
            self.kept[place] = item


def _by_latent(
    latents: np.ndarray, places: np.ndarray, values: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Positions and values of each latent, in reading order."""
    if not len(latents):
        return {}
    order = np.argsort(latents, kind="stable")
    found, starts = np.unique(latents[order], return_index=True)
    parts = (np.split(each[order], starts[1:]) for each in (places, values))
    return dict(zip(found.tolist(), zip(*parts, strict=True), strict=True))


def _window(piece: np.ndarray, first: int, places: np.ndarray, values: np.ndarray) -> Example:
    tokens = piece[first : first + WINDOW]
    activations = np.zeros(len(tokens))
    inside = (places >= first) & (places < first + len(tokens))
    activations[places[inside] - first] = values[inside]
    return Example(tuple(tokens.tolist()), tuple(activations.tolist()))


def _shuffled(items: list, seed: str) -> list:
    items = list(items)
    random.Random(seed).shuffle(items)
    return items
