"""How good an SAE is on activations set aside, as training measures it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kronsae.config import SAEConfig
from kronsae.data.common import is_finite
from kronsae.errors import InputError
from kronsae.metrics.figures import FiringMetrics, ReconstructionMetrics, cross_entropy_recovered
from kronsae.model.sae import SAE

BATCH_TOKENS = 4096
CONTEXTS_AT_ONCE = 16
"""That the language model reads for its losses."""


@dataclass(frozen=True)
class Heldout:
    """Activations set aside for evaluation, and where they came from (if a model made them)."""

    activations: Tensor
    """[t, d] raw activations of the tokens where `mask` is True, in reading order."""
    contexts: Tensor | None = None
    """[c, L] int64 token ids."""
    mask: Tensor | None = None
    """[c, L] bool: tokens that an SAE is trained on (no BOS, no padding, no first position)."""
    language_model: Any | None = None
    """The `kronsae.data.LanguageModel` that read the contexts."""
    targets: Tensor | None = None
    """[t, d_target] what a transcoder shall make of the activations; None for an autoencoder."""

    @cached_property
    def unspliced(self) -> dict[str, float]:
        """ce_clean and ce_zero, which no SAE takes part in: measured once for all of them."""
        return {
            "ce_clean": self.cross_entropy(None),
            "ce_zero": self.cross_entropy(lambda *read: torch.zeros_like(read[-1])),
        }

    @torch.no_grad()
    def cross_entropy(self, replace: Callable[..., Tensor] | None) -> float:
        """Mean next-token cross-entropy of the contexts, in nats.

        replace: called with the activations [b, t, d] and, for a transcoder, those of the target;
        what it gives takes the place of the last of them where the mask is True.
        """
        total, count = 0.0, 0
        parts = self.contexts.split(CONTEXTS_AT_ONCE), self.mask.split(CONTEXTS_AT_ONCE)
        for ids, mask in zip(*parts, strict=True):
            selected = mask[..., None].to(self.language_model.device)

            def replaced(*read: Tensor, selected: Tensor = selected) -> Tensor:
                return torch.where(selected, replace(*read).to(read[-1]), read[-1])

            losses = self.language_model.token_losses(ids, replace=replace and replaced)
            total += losses.double().sum().item()
            count += losses.numel()
        return total / count


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
    model = heldout.language_model
    if model is None or heldout.contexts is None or not model.has_cross_entropy:
        return {}
    # x is what the SAE reads; a transcoder is spliced in for its target, which comes last.
    limits = heldout.unspliced
    spliced = heldout.cross_entropy(lambda x, *_: sae(x.to(sae.W_dec)).x_hat)
    recovered = cross_entropy_recovered(limits["ce_clean"], spliced, limits["ce_zero"])
    return {
        "ce_clean": limits["ce_clean"],
        "ce_spliced": spliced,
        "ce_zero": limits["ce_zero"],
        "ce_recovered": recovered,
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
