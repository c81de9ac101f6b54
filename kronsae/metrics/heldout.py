"""Held-out text and activations, and how good an SAE is on them, as training measures it."""

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
CONTEXTS_AT_ONCE = 16
"""That the language model reads for its losses."""


@dataclass(frozen=True)
class HeldoutText:
    """Text that an SAE was never trained on, and the language model that reads it."""

    model: LanguageModel
    contexts: Tensor
    """[c, L] int64 token ids."""
    mask: Tensor
    """[c, L] bool: tokens on which an SAE stands for the activations. BOS, other special tokens
    and the first position of each context are not among them: they pass unchanged."""
    contexts_per_batch: int = CONTEXTS_AT_ONCE
    facts: dict[str, Any] = field(default_factory=dict)
    """What text it is (JSON-able)."""

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids [b, L] and mask [b, L], on the model's device."""
        device, size = self.model.device, self.contexts_per_batch
        for ids, mask in zip(self.contexts.split(size), self.mask.split(size), strict=True):
            yield ids.to(device), mask.to(device)

    @cached_property
    def unspliced(self) -> dict[str, float]:
        """ce_clean and ce_zero, which no SAE takes part in: measured once for all of them."""
        return {
            "ce_clean": self.cross_entropy(None),
            "ce_zero": self.cross_entropy(lambda _, y: torch.zeros_like(y)),
        }

    @torch.no_grad()
    def cross_entropy(self, make: Make | None) -> float:
        """Mean next-token cross-entropy of the contexts, in nats, with `make` spliced in."""
        total, count = 0.0, 0
        for ids, mask in self.batches():
            with spliced(self.model, make, mask) if make else nullcontext():
                losses = self.model.token_losses(ids)
            total += losses.double().sum().item()
            count += losses.numel()
        return total / count


@dataclass(frozen=True)
class Heldout:
    """Activations set aside for evaluation, and the text that they are of, if there is one."""

    activations: Tensor
    """[t, d] raw activations of the tokens where the text's mask is True, in reading order."""
    targets: Tensor | None = None
    """[t, d_target] what a transcoder shall make of the activations; None for an autoencoder."""
    text: HeldoutText | None = None


@torch.no_grad()
def evaluate(sae: SAE, heldout: Heldout) -> dict[str, float]:
    """Figures of merit of an SAE of raw activations; definitions in `kronsae.metrics`.

    A transcoder is judged by how well it predicts `heldout.targets`.
    Those of `ReconstructionMetrics` and `FiringMetrics`. Raises ValueError if there are no tokens.
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
    """What the language model loses when the SAE's reconstruction takes the activations' place.

    (A transcoder's takes the place of its target.)
    ce_clean, ce_spliced, ce_zero: mean next-token cross-entropy in nats with the activations as
    they are, reconstructed, and zeroed; ce_recovered = (zero - spliced) / (zero - clean). Only
    tokens in the mask are replaced. Empty if no model (or one without a language head) is there.
    """
    text = heldout.text
    if text is None or not text.model.has_cross_entropy:
        return {}
    clean, zero = text.unspliced.values()
    ours = text.cross_entropy(lambda x, _: sae(x.to(sae.W_dec)).x_hat)
    return {
        "ce_clean": clean,
        "ce_spliced": ours,
        "ce_zero": zero,
        "ce_recovered": cross_entropy_recovered(clean, ours, zero),
    }


def _batches(heldout: Heldout, sae: SAE) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, which for an autoencoder are the same."""
    targets = heldout.activations if heldout.targets is None else heldout.targets
    for start in range(0, len(targets), BATCH_TOKENS):
        span = slice(start, start + BATCH_TOKENS)
        yield heldout.activations[span].to(sae.W_dec), targets[span].to(sae.W_dec)


def check_heldout(heldout: Heldout, config: SAEConfig) -> None:
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
