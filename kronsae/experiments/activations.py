"""Activations that all runs of an experiment share."""

from collections.abc import Callable

import torch
from torch import Tensor

from kronsae.data import ActivationSource
from kronsae.errors import InputError


class Activations:
    """A language model's activations: in memory if they fit, else streamed anew for each run.

    heldout: [t, d] raw activations that nothing trains on.
    """

    def __init__(self, open_source: Callable[..., ActivationSource], memory_gib: float) -> None:
        """open_source: called with `seed`.  memory_gib: what may be held."""
        self.open_source = open_source
        self.memory_gib = memory_gib
        self.x: Tensor | None = None
        self.first = open_source(seed=0)
        self.d_model = self.first.d_model
        self.heldout = self.first.heldout_activations()

    def hold(self, tokens: int) -> "Activations":
        """Compute so many activations once, for all runs, if they fit in memory; returns self."""
        if tokens * self.d_model * 4 <= self.memory_gib * 2**30:
            self.x = collect(self.first, tokens)
        del self.first  # and the language model with it
        return self

    def training(self, tokens: int, seed: int) -> Tensor | ActivationSource:
        """What `fit` takes for so many tokens; in memory the seed is that of their order alone."""
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
