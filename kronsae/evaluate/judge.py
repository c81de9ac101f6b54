"""Evaluation of several SAEs in one pass of their language model over a text.

Letters: b contexts, t tokens of each, n next tokens, d width, V vocabulary size.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae.data import LanguageModel, split_target
from kronsae.data.common import is_finite
from kronsae.data.language_model import LastStates
from kronsae.errors import InputError
from kronsae.metrics.figures import (
    cross_entropy_recovered,
    divergence,
    log_probabilities,
)
from kronsae.metrics.heldout import HeldoutText, SAEMetrics
from kronsae.metrics.splicing import ForwardPasses, Make
from kronsae.model.sae import SAE
from kronsae.system.devices import as_double, of_doubles

STATES_AT_ONCE = 8
"""SAEs whose last hidden states are held together, so that the clean model's predictions are
computed once for all of them."""


class Judgement(NamedTuple):
    """Metrics of an SAE on a text."""

    metrics: dict[str, float]
    """Metrics by their names in `kronsae.metrics.MEANING`; those of cross-entropy and KL divergence
    only if the model predicts next tokens."""
    counts: Tensor
    """[F] int64: tokens on which each latent fires."""
    tokens: int
    """Number of tokens whose activations the SAE reconstructed."""


class _Losses:
    """Sums over next tokens of cross-entropy and of KL divergence from the clean model."""

    def __init__(self) -> None:
        self.cross_entropy = self.divergence = 0.0
        self.tokens = 0

    def update(self, clean: Tensor, spliced: Tensor, targets: Tensor) -> None:
        """clean, spliced: log-probabilities [n, V].  targets: [n], the next tokens."""
        self.cross_entropy -= spliced.gather(1, targets[:, None].to(spliced.device)).sum().item()
        self.divergence += divergence(clean, spliced).sum().item()
        self.tokens += len(targets)

    @property
    def means(self) -> tuple[float, float]:
        """Cross-entropy and KL divergence, in nats per token."""
        return self.cross_entropy / self.tokens, self.divergence / self.tokens


@torch.no_grad()
def judge(
    saes: Mapping[str, SAE],
    text: HeldoutText,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Judgement]:
    """Compute every metric of `kronsae.metrics.MEANING` for SAEs of raw activations.

    The text is read twice: up to the hookpoint, for the mean of the activations; then in full, once
    unchanged, and from the hookpoint's block on for each ablation and SAE, which replaces the
    activations (a transcoder: its target). Tokens outside `text.mask`, and massive ones, keep their
    activations.
    Memory: the model's for a batch of contexts, STATES_AT_ONCE last hidden states, and F counts
    per SAE.
    on_batch: called after each batch of contexts, in both readings.
    Raises InputError if activations are not finite, or if the mask is empty.
    """
    model = text.model
    candidates = {name: SAEMetrics(sae, text.massive, text.counted) for name, sae in saes.items()}
    mean = _mean(text, on_batch)
    losses = {name: _Losses() for name in ("clean", "mean", "zero", *map(_of, candidates))}
    if not model.has_cross_entropy:
        for _, _, rows in text.rows():
            x, y = split_target(rows, model.d_target)
            for candidate in candidates.values():
                candidate.update(x, x if y is None else y)
            on_batch()
    for ids, mask in text.batches() if model.has_cross_entropy else ():
        passes = ForwardPasses(model, ids)
        replacements: dict[str, Make] = {
            "mean": lambda _, y: mean.expand(y.shape),
            "zero": lambda _, y: torch.zeros_like(y),
            **{_of(name): candidate.update for name, candidate in candidates.items()},
        }
        _add(losses, model, passes.clean, {"clean": passes.clean})
        # Where the model gives all logits at once, those of one SAE at a time are held.
        at_once = STATES_AT_ONCE if passes.clean.logits is None else 1
        names = list(replacements)
        for start in range(0, len(names), at_once):
            states = {
                name: passes.spliced(replacements[name], mask, text.massive)
                for name in names[start : start + at_once]
            }
            _add(losses, model, passes.clean, states)
        on_batch()
    return {
        name: Judgement(
            {
                **candidate.compute(),
                **(_compared(losses, losses[_of(name)]) if model.has_cross_entropy else {}),
            },
            candidate.firing.counts.cpu(),
            candidate.firing.tokens,
        )
        for name, candidate in candidates.items()
    }


def _add(
    losses: Mapping[str, _Losses],
    model: LanguageModel,
    clean: LastStates,
    spliced: Mapping[str, LastStates],
) -> None:
    """Add a batch's losses, by name of what was spliced."""
    targets = clean.ids[:, 1:].flatten()
    logits = {name: model.next_token_logits(states) for name, states in spliced.items()}
    for rows, clean_logits in model.next_token_logits(clean):
        before, wanted = log_probabilities(clean_logits), targets[rows]
        for name, chunks in logits.items():
            losses[name].update(before, log_probabilities(next(chunks)[1]), wanted)


def _of(name: str) -> str:
    """Key of an SAE's losses; the prefix keeps an SAE called "zero" apart."""
    return f"SAE {name}"


def _compared(losses: dict[str, _Losses], spliced: _Losses) -> dict[str, float]:
    clean, _ = losses["clean"].means
    mean, kl_mean = losses["mean"].means
    zero, kl_zero = losses["zero"].means
    reconstructed, kl = spliced.means
    return {
        "ce_clean": clean,
        "ce_spliced": reconstructed,
        "ce_mean": mean,
        "ce_zero": zero,
        "ce_recovered": cross_entropy_recovered(clean, reconstructed, zero),
        "ce_recovered_mean": cross_entropy_recovered(clean, reconstructed, mean),
        "kl_spliced": kl,
        "kl_mean": kl_mean,
        "kl_zero": kl_zero,
    }


def _mean(text: HeldoutText, on_batch: Callable[[], None]) -> Tensor:
    """Mean [d] float64 of the activations that SAEs reconstruct, over tokens that are replaced."""
    model, count = text.model, 0
    device = of_doubles(model.device)
    total = torch.zeros(model.d_target or model.d_model, dtype=torch.float64, device=device)
    for _, _, x in text.rows():
        if not is_finite(x):
            raise InputError(
                f"{model.hookpoint} gave NaN or infinity on this text: try --model-dtype float32 "
                "or bfloat16"
            )
        if text.massive is not None:
            x = x[~text.massive(*split_target(x, model.d_target))]
        total += as_double(x[:, -len(total) :]).sum(0)
        count += len(x)
        on_batch()
    if not count:
        raise InputError("SAEs are trained on no token of this text")
    return total / count
