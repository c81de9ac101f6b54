"""Where latents fire and where not: a bounded, fair sample of windows of text.

Letters: b contexts of t tokens, n of which the mask keeps, k active latents a token.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kronsae.metrics.figures import FiringMetrics
from kronsae.metrics.heldout import HeldoutText
from kronsae.model.sae import SAE
from kronsae.properties.examples import WINDOW

CONTEXT = 256
"""Tokens of a context; longer ones are cut. [KronSAE, App. D]"""

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
    """Examples in the order in which they were drawn, so that any part is a fair sample."""
    silent: list[Example]


@torch.no_grad()
def firing_counts(sae: SAE, text: HeldoutText) -> FiringMetrics:
    """How often each latent fires on the text."""
    counts = FiringMetrics(sae.dict_size, sae.W_dec.device)
    for _, _, x in text.read():
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
    Memory: BUFFER windows a latent, SILENT in all, and the latents' activations on a batch.
    """
    firing = {latent: _Reservoir(BUFFER, random.Random(f"{seed} {latent}")) for latent in latents}
    generator = random.Random(f"{seed}")
    anywhere = _Reservoir(SILENT, random.Random(f"{seed} silent"))
    wanted = np.array(sorted(firing), np.int64)
    for ids, mask, x in text.read():
        activations = _activations(sae, mask, x, torch.from_numpy(wanted))
        tokens = ids.cpu().numpy()
        for start in range(0, tokens.shape[1], CONTEXT):
            part = slice(start, start + CONTEXT)
            for context, values in zip(tokens[:, part], activations[:, part], strict=True):
                last = max(0, len(context) - WINDOW)  # where the last window starts
                for column in values.any(0).nonzero()[0]:
                    middle = int(values[:, column].argmax())
                    first = max(0, min(middle - WINDOW // 2, last))
                    firing[int(wanted[column])].offer(_window(context, values[:, column], first))
                first = generator.randrange(last + 1)
                window = _window(context, np.zeros(len(context)), first)
                active = set(wanted[values[first : first + WINDOW].any(0)].tolist())
                anywhere.offer((window, active))

    def silent(latent: int) -> list[Example]:
        return [window for window, active in anywhere.kept if latent not in active]

    return [
        LatentExamples(
            latent,
            _shuffled(firing[latent].kept, f"{seed} {latent} firing"),
            _shuffled(silent(latent), f"{seed} {latent}"),
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
        elif (slot := self.generator.randrange(self.seen)) < self.size:
            self.kept[slot] = item


def _activations(sae: SAE, mask: Tensor, x: Tensor, latents: Tensor) -> np.ndarray:
    """Activations [b, t, c] of c latents, in ascending order; 0 where they do not fire.

    x: [n, d], of the tokens in the mask [b, t].
    """
    codes = sae.encode(x.to(sae.W_dec))
    latents = latents.to(codes.indices.device)
    columns = torch.searchsorted(latents, codes.indices.long()).clamp(max=len(latents) - 1)
    wanted = sae.fired(codes) & (latents[columns] == codes.indices)
    of_tokens = torch.zeros(len(columns), len(latents), device=columns.device)
    of_tokens.scatter_add_(1, columns, codes.values.float() * wanted)
    out = of_tokens.new_zeros(*mask.shape, len(latents))
    out[mask] = of_tokens
    return out.cpu().numpy()


def _window(context: np.ndarray, values: np.ndarray, first: int) -> Example:
    part = slice(first, first + WINDOW)
    return Example(tuple(context[part].tolist()), tuple(values[part].tolist()))


def _shuffled(items: list, seed: str) -> list:
    items = list(items)
    random.Random(seed).shuffle(items)
    return items
