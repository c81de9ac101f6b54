"""Activations that all runs of an experiment share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.data import ActivationSource
from kronsae.errors import InputError


class Activations(NamedTuple):
    """A language model's activations: in memory, or streamed anew for each run."""

    heldout: Tensor
    """[t, d], raw; nothing trains on them."""
    x: Tensor | None
    """[N, d], for the longest training, if they fit in memory."""
    open_source: Callable[..., ActivationSource]
    """Called with `seed`."""
    facts: dict[str, Any] = {}
    """Settings and description of where they come from, for an SAE's metadata."""

    def training(self, tokens: int, seed: int) -> Tensor | ActivationSource:
        """Activations of so many tokens, for `fit`; in memory the seed only decides their order."""
        return self.open_source(seed=seed) if self.x is None else self.x[:tokens]


def collect(source: ActivationSource, tokens: int) -> Tensor:
    """The first activations [tokens, d]. Raises InputError if there are fewer."""
    x, filled = torch.empty(tokens, source.d_model), 0
    for batch in source:
        taken = min(batch.shape[0], tokens - filled)
        x[filled : filled + taken] = batch[:taken]
        filled += taken
        if filled == tokens:
            return x
    raise InputError(f"the text has {filled:,} tokens to train on, of {tokens:,}: give more text")
