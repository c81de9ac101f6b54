"""Held-out text and activations, and the evaluation of an SAE on them during training."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig
from kronsae.data import LanguageModel
from kronsae.data.common import is_finite
from kronsae.errors import InputError
from kronsae.metrics.figures import FiringMetrics, ReconstructionMetrics, cross_entropy_recovered
from kronsae.metrics.splicing import Make, spliced
from kronsae.model.sae import SAE

BATCH_TOKENS = 4096
"""Tokens per batch of an evaluation."""
CONTEXTS_AT_ONCE = 16
"""Contexts per forward pass of the language model for its losses."""


@dataclass(frozen=True)
class HeldoutText:
    """Text that an SAE was not trained on, and the language model that reads it."""

    model: LanguageModel
    contexts: Tensor
    """[c, L] int64 token ids."""
    mask: Tensor
    """[c, L] bool: tokens whose activations are replaced. BOS, other special tokens and the first
    position of each context keep their activations."""
    contexts_per_batch: int = CONTEXTS_AT_ONCE
    facts: dict[str, Any] = field(default_factory=dict)
    """Description of the text (JSON-able)."""

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids [b, L] and mask [b, L], on the model's device."""
        device, size = self.model.device, self.contexts_per_batch
        for ids, mask in zip(self.contexts.split(size), self.mask.split(size), strict=True):
            yield ids.to(device), mask.to(device)

    @cached_property
    def unspliced(self) -> dict[str, float]:
        """ce_clean and ce_zero, which do not depend on an SAE."""
        return {
            "ce_clean": self.cross_entropy(None),
            "ce_zero": self.cross_entropy(lambda _, y: torch.zeros_like(y)),
        }

    @torch.no_grad()
    def cross_entropy(self, make: Make | None) -> float:
        """Mean next-token cross-entropy of the contexts in nats, with replacements by `make`."""
        total, count = 0.0, 0
        for ids, mask in self.batches():
            with spliced(self.model, make, mask) if make else nullcontext():
                losses = self.model.token_losses(ids)
            total += losses.double().sum().item()
            count += losses.numel()
        return total / count


@dataclass(frozen=True)
class Heldout:
    """Held-out activations, and their text if there is one."""

    activations: Tensor
    """[t, d] raw activations of the tokens in the text's mask, in reading order."""
    targets: Tensor | None = None
    """[t, d_target] targets of a transcoder; None for an autoencoder."""
    text: HeldoutText | None = None


@torch.no_grad()
def evaluate(sae: SAE, heldout: Heldout) -> dict[str, float]:
    """`ReconstructionMetrics` and `FiringMetrics` of an SAE of raw activations.

    A transcoder is evaluated on its prediction of `heldout.targets`.
    Raises ValueError if there are no tokens.
    """
    metrics = ReconstructionMetrics(sae.config.d_out)
    firing = FiringMetrics(sae.dict_size, sae.W_dec.device)
    for x, target in _batches(heldout, sae):
        x_hat, codes, _ = sae(x)
        metrics.update(target, x_hat)
        firing.update(codes.indices, sae.fired(codes))
    return metrics.compute() | firing.compute()


@torch.no_grad()
def evaluate_cross_entropy(sae: SAE, heldout: Heldout) -> dict[str, float]:
    """Cross-entropy of the language model when the reconstruction replaces the activations.

    (A transcoder's prediction replaces its target.)
    ce_clean, ce_spliced, ce_zero: mean next-token cross-entropy in nats with unchanged,
    reconstructed and zeroed activations; ce_recovered = (zero - spliced) / (zero - clean). Only
    tokens in the mask are replaced. Empty without a language model that predicts next tokens.
    """
    text = heldout.text
    if text is None or not text.model.has_cross_entropy:
        return {}
    clean, zero = text.unspliced.values()
    reconstructed = text.cross_entropy(lambda x, _: sae(x.to(sae.W_dec)).x_hat)
    return {
        "ce_clean": clean,
        "ce_spliced": reconstructed,
        "ce_zero": zero,
        "ce_recovered": cross_entropy_recovered(clean, reconstructed, zero),
    }


def _batches(heldout: Heldout, sae: SAE) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of inputs and targets, which are the same for an autoencoder."""
    targets = heldout.activations if heldout.targets is None else heldout.targets
    for start in range(0, len(targets), BATCH_TOKENS):
        span = slice(start, start + BATCH_TOKENS)
        yield heldout.activations[span].to(sae.W_dec), targets[span].to(sae.W_dec)


def check_heldout(heldout: Heldout, config: SAEConfig) -> None:
    """Raise InputError if an SAE of this config cannot be evaluated on the activations."""
    if (heldout.targets is None) != (config.d_target == 0):
        raise InputError(
            "heldout: expected inputs with their targets, as in training"
            if config.d_target
            else "heldout: expected no targets, as training has none"
        )
    widths = {"activations": (heldout.activations, config.d_model)}
    if heldout.targets is not None:
        widths["targets"] = heldout.targets, config.d_target
        if len(heldout.targets) != len(heldout.activations):
            raise InputError(
                f"heldout: expected a target for each of {len(heldout.activations)} activations, "
                f"got {len(heldout.targets)}"
            )
    for name, (x, width) in widths.items():
        if x.ndim != 2 or x.shape[1] != width or x.shape[0] < 2 or not x.is_floating_point():
            raise InputError(
                f"heldout: expected floating {name} [t, {width}], at least two of them, got "
                f"{list(x.shape)} {x.dtype}"
            )
        if not is_finite(x):
            raise InputError(f"heldout: some {name} are NaN or infinite")
        if (x == x[0]).all():
            raise InputError(f"heldout: all {name} are equal, so nothing can be explained")
