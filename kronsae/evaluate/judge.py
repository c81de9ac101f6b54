"""Any number of SAEs judged while their language model reads text, in bounded memory.

Letters: b contexts, t tokens of each, n next tokens, d width, V tokens known.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kronsae.data import LanguageModel, split_target
from kronsae.data.language_model import LastStates
from kronsae.errors import InputError
from kronsae.metrics.figures import (
    FiringMetrics,
    ReconstructionMetrics,
    cross_entropy,
    cross_entropy_recovered,
    kl_divergence,
)
from kronsae.metrics.heldout import HeldoutText
from kronsae.metrics.splicing import Make, spliced
from kronsae.model.sae import SAE


class Judgement(NamedTuple):
    """What an SAE is worth on some text."""

    metrics: dict[str, float]
    """Figures named as in `kronsae.metrics.MEANING`; those of cross-entropy and KL divergence only
    if the model predicts next tokens."""
    counts: Tensor
    """[F] int64: tokens on which each latent fires."""
    tokens: int
    """Tokens on which the SAE stood for the activations."""


class _Candidate:
    """An SAE and its running sums; called, it reconstructs activations and adds them up."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.reconstruction = ReconstructionMetrics(sae.config.d_out)
        self.firing = FiringMetrics(sae.dict_size, sae.W_dec.device)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        x_hat, codes, _ = self.sae(x.to(self.sae.W_dec))
        self.reconstruction.update(y, x_hat)
        self.firing.update(codes.indices, self.sae.fired(codes))
        return x_hat


class _Losses:
    """Sums over next tokens of cross-entropy and of KL divergence from the clean model."""

    def __init__(self) -> None:
        self.cross_entropy = self.divergence = 0.0
        self.tokens = 0

    def update(self, model: LanguageModel, clean: LastStates, spliced: LastStates) -> None:
        targets = clean.ids[:, 1:].flatten()
        pairs = zip(model.next_token_logits(clean), model.next_token_logits(spliced), strict=True)
        for (rows, before), (_, after) in pairs:
            self.cross_entropy += cross_entropy(after, targets[rows]).sum().item()
            if spliced is not clean:
                self.divergence += kl_divergence(before, after).sum().item()
        self.tokens += len(targets)

    @property
    def means(self) -> tuple[float, float]:
        """Cross-entropy and KL divergence, in nats a token."""
        return self.cross_entropy / self.tokens, self.divergence / self.tokens


@torch.no_grad()
def judge(
    saes: Mapping[str, SAE],
    text: HeldoutText,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Judgement]:
    """Every figure of `kronsae.metrics.MEANING` for each SAE of raw activations, by name.

    The text is read twice: up to the hookpoint, for the mean that mean ablation puts in, and then
    in full, once as it is, and once for each ablation and SAE with that in the place of the
    activations (a transcoder: of its target). Tokens outside `text.mask` keep their activations.
    Memory: that of the model for a batch of contexts, and F counts an SAE; no activation is kept.
    on_batch: called after each batch of contexts, of both readings.
    Raises InputError if activations are not finite, or if nothing is in the mask.
    """
    model = text.model
    candidates = {name: _Candidate(sae) for name, sae in saes.items()}
    mean = _mean(text, on_batch)
    losses = {name: _Losses() for name in ("clean", "mean", "zero", *map(_of, candidates))}
    for ids, mask in text.batches():
        if not model.has_cross_entropy:
            x, y = split_target(model.activations(ids)[mask], model.d_target)
            for candidate in candidates.values():
                candidate(x, x if y is None else y)
            on_batch()
            continue
        clean = model.last_states(ids)
        losses["clean"].update(model, clean, clean)
        replacements: dict[str, Make] = {
            "mean": lambda _, y: mean.expand(y.shape),
            "zero": lambda _, y: torch.zeros_like(y),
            **{_of(name): candidate for name, candidate in candidates.items()},
        }
        for name, make in replacements.items():
            with spliced(model, make, mask):
                states = model.last_states(ids)
            losses[name].update(model, clean, states)
        on_batch()
    return {
        name: Judgement(
            {
                **candidate.reconstruction.compute(),
                **candidate.firing.compute(),
                **(_compared(losses, losses[_of(name)]) if model.has_cross_entropy else {}),
            },
            candidate.firing.counts.cpu(),
            candidate.firing.tokens,
        )
        for name, candidate in candidates.items()
    }


def _of(name: str) -> str:
    """Key of an SAE's losses: names of SAEs are free, and may be "zero"."""
    return f"SAE {name}"


def _compared(losses: dict[str, _Losses], spliced: _Losses) -> dict[str, float]:
    clean, _ = losses["clean"].means
    mean, kl_mean = losses["mean"].means
    zero, kl_zero = losses["zero"].means
    ours, kl = spliced.means
    return {
        "ce_clean": clean,
        "ce_spliced": ours,
        "ce_mean": mean,
        "ce_zero": zero,
        "ce_recovered": cross_entropy_recovered(clean, ours, zero),
        "ce_recovered_mean": cross_entropy_recovered(clean, ours, mean),
        "kl_spliced": kl,
        "kl_mean": kl_mean,
        "kl_zero": kl_zero,
    }


def _mean(text: HeldoutText, on_batch: Callable[[], None]) -> Tensor:
    """Mean [d] float64 of what SAEs stand for, over the tokens in the mask."""
    model, count = text.model, 0
    total = torch.zeros(model.d_target or model.d_model, dtype=torch.float64, device=model.device)
    for ids, mask in text.batches():
        x = model.activations(ids)[mask]
        if not torch.isfinite(x).all():
            raise InputError(
                f"{model.hookpoint} gave NaN or infinity on this text: try --model-dtype float32 "
                "or bfloat16"
            )
        total += x[:, -len(total) :].double().sum(0)
        count += len(x)
        on_batch()
    if not count:
        raise InputError("no token of the text is one that SAEs are trained on")
    return total / count
