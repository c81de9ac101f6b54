"""Held-out text and activations, and the evaluation of an SAE on them during training."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kronsae.config import SAEConfig
from kronsae.data import LanguageModel, split_target
from kronsae.data.common import is_finite
from kronsae.data.language_model import LastStates
from kronsae.data.packing import PADDING, context_begin, left_out_ids, prompt_ids, token_mask
from kronsae.data.token_text import token_texts
from kronsae.errors import InputError
from kronsae.metrics.figures import (
    FiringMetrics,
    ReconstructionMetrics,
    cross_entropy_recovered,
)
from kronsae.metrics.figures import massive_warning as massive_in_figures
from kronsae.metrics.splicing import ForwardPasses, Make
from kronsae.model.massive import MassiveTokens, without
from kronsae.model.sae import SAE
from kronsae.system.devices import as_double
from kronsae.system.documents import typed
from kronsae.system.tensors import as_values

BATCH_TOKENS = 4096
"""Tokens per batch of an evaluation."""
CONTEXTS_AT_ONCE = 16
"""Contexts per forward pass of the language model for its losses."""


@dataclass(frozen=True)
class HeldoutText:
    """Text that an SAE was not trained on, and the language model that reads it."""

    model: LanguageModel
    contexts: Tensor
    """[c, L] int64 token ids; PADDING where a document does not fill its context."""
    mask: Tensor
    """[c, L] bool: tokens whose activations are replaced. BOS, other special tokens and the first
    position of each context keep their activations."""
    contexts_per_batch: int = CONTEXTS_AT_ONCE
    facts: dict[str, Any] = field(default_factory=dict)
    """Description of the text (JSON-able)."""
    massive: MassiveTokens | None = None
    """The rule for tokens in the mask that keep their activations nevertheless."""
    counted: MassiveTokens | None = None
    """The rule by which massive tokens are counted, if they are not left out."""
    stored: Callable[[int, int], Tensor] | None = None
    """Activations [n, d_model + d_target] of the masked tokens of contexts [first, last), from a
    cache; None reads them with the model."""

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids [b, L] and mask [b, L], on the model's device."""
        device, size = self.model.device, self.contexts_per_batch
        for ids, mask in zip(self.contexts.split(size), self.mask.split(size), strict=True):
            yield ids.to(device), mask.to(device)

    @torch.no_grad()
    def rows(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Token ids [b, L], mask [b, L], and activations [n, d_model + d_target] of its tokens."""
        first = 0
        for ids, mask in self.batches():
            if self.stored is None:
                yield ids, mask, self.model.activations(ids)[mask]
            else:
                yield ids, mask, self.stored(first, first + len(ids)).to(self.model.device)
            first += len(ids)

    @torch.no_grad()
    def read(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Token ids [b, L], mask [b, L] without massive tokens, and their activations [n, d]."""
        for ids, mask, x, _ in self.pairs():
            yield ids, mask, x

    @torch.no_grad()
    def pairs(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """`read`, and the activations [n, d_out] that SAEs reconstruct: of a transcoder, others."""
        for ids, mask, rows in self.rows():
            x, target = split_target(rows, self.model.d_target)
            y = x if target is None else target
            if self.massive is not None:
                massive = self.massive(x, target)
                x, y, mask = x[~massive], y[~massive], without(mask, massive)
            yield ids, mask, x, y

    def first(self, tokens: int) -> "HeldoutText":
        """The first contexts, at least one, that together hold at most `tokens` tokens."""
        count = max(1, int((self.mask.sum(1).cumsum(0) <= tokens).sum()))
        return replace(self, contexts=self.contexts[:count], mask=self.mask[:count])

    @classmethod
    def of(
        cls, model: LanguageModel, texts: Sequence[str], bos: str = "auto", excluded: str = ""
    ) -> "HeldoutText":
        """Texts, each in a context of its own, cut where the model reads no more.

        bos: how they begin (`context_begin`).  excluded: tokens to leave out (`left_out_ids`).
        Raises InputError if no token is left in the mask.
        """
        each = [prompt_ids(model.tokenizer, text, bos)[: model.max_context] for text in texts]
        length = max(map(len, each), default=0)
        ids = torch.tensor([some + [PADDING] * (length - len(some)) for some in each])
        begin = len(context_begin(model.tokenizer, bos))
        left_out = left_out_ids(model.tokenizer, excluded)
        mask = token_mask(ids, model.tokenizer, left_out, begin) if length else ids.bool()
        if not mask.any():
            raise InputError("SAEs are trained on none of the tokens of this text")
        return cls(model, ids, mask, facts={"tokens": int(mask.sum())})

    def massive_ids(self) -> Tensor:
        """Token ids [n] of the massive tokens, left out or counted."""
        rule, none = self.massive or self.counted, torch.empty(0, dtype=torch.int64)
        if rule is None:
            return none
        found = [
            ids[mask][rule(*split_target(rows, self.model.d_target))].cpu()
            for ids, mask, rows in self.rows()
        ]
        return torch.cat([none, *found])

    @torch.no_grad()
    def cross_entropies(
        self,
        makes: Mapping[str, Callable[[], Make]],
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, float]:
        """Mean next-token cross-entropy in nats with replacements: of each of `makes`, and "clean".

        A replacement is made anew for each batch, so that one of them is in memory at a time.
        on_batch: called after each batch of contexts with how many are done, and their total.
        """
        totals = dict.fromkeys(("clean", *makes), 0.0)
        count = 0
        batches = -(-len(self.contexts) // self.contexts_per_batch)
        for done, (ids, mask) in enumerate(self.batches(), 1):
            passes = ForwardPasses(self.model, ids)
            totals["clean"] += self._sum_of_losses(passes.clean)
            passes.forget()
            for name, make in makes.items():
                totals[name] += self._sum_of_losses(passes.spliced(make(), mask, self.massive))
            count += int((ids[:, 1:] != PADDING).sum())
            on_batch(done, batches)
        return {name: total / count for name, total in totals.items()}

    def _sum_of_losses(self, states: LastStates) -> float:
        targets = states.ids[:, 1:].flatten()
        total = 0.0
        for rows, logits in self.model.next_token_logits(states):
            losses = cross_entropy(logits.float(), targets[rows], reduction="none")
            total += as_double(losses).sum().item()
        return total


@dataclass(frozen=True)
class Heldout:
    """Held-out activations, and their text if there is one."""

    activations: Tensor
    """[t, d] raw activations of the tokens in the text's mask, in reading order."""
    targets: Tensor | None = None
    """[t, d_target] targets of a transcoder; None for an autoencoder."""
    text: HeldoutText | None = None
    massive: MassiveTokens | None = None
    """The rule for tokens that figures leave out; None: no token is."""
    counted: MassiveTokens | None = None
    """The rule by which massive tokens are counted, if they are not left out."""

    def leaving_out(
        self, massive: MassiveTokens | None, counted: MassiveTokens | None = None
    ) -> "Heldout":
        """The same with these rules for massive tokens."""
        text = self.text and replace(self.text, massive=massive, counted=counted)
        return replace(self, text=text, massive=massive, counted=counted)

    def first(self, tokens: int) -> "Heldout":
        """The first contexts, as many as hold `tokens` tokens; without text, the first tokens."""
        if len(self.activations) <= tokens:
            return self
        text = self.text
        if text is not None:
            text = text.first(tokens)
            tokens = int(text.mask.sum())
        targets = None if self.targets is None else self.targets[:tokens]
        return replace(self, activations=self.activations[:tokens], targets=targets, text=text)

    def massive_rows(self) -> Tensor:
        """Mask [t] of massive tokens, left out or counted."""
        rule = self.massive or self.counted
        if rule is None:
            return torch.zeros(len(self.activations), dtype=torch.bool)
        return rule(self.activations, self.targets)

    def massive_ids(self) -> Tensor:
        """Token ids [n] of the massive tokens; none without text."""
        if self.text is None:
            return torch.empty(0, dtype=torch.int64)
        return self.text.contexts[self.text.mask][self.massive_rows().cpu()]

    def ordinary(self) -> "Heldout":
        """The same without tokens that are left out, in the activations and in the text's mask."""
        massive = self.massive_rows()
        if self.massive is None or not massive.any():
            return self
        targets = None if self.targets is None else self.targets[~massive]
        text = self.text and replace(self.text, mask=without(self.text.mask, massive))
        return replace(self, activations=self.activations[~massive], targets=targets, text=text)


class SAEMetrics:
    """Streaming figures of an SAE of raw activations: `MEANING` without cross-entropy.

    massive: the rule for tokens that all but `explained_variance_all` leave out.
    counted: the rule by which massive tokens are counted, if none is left out.
    """

    def __init__(
        self,
        sae: SAE,
        massive: MassiveTokens | None = None,
        counted: MassiveTokens | None = None,
    ) -> None:
        self.sae, self.massive, self.rule = sae, massive, massive or counted
        self.ordinary, self.of_massive = (ReconstructionMetrics(sae.config.d_out) for _ in "12")
        self.firing = FiringMetrics(sae.dict_size, sae.W_dec.device)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """Count activations x [n, d] and those to predict, y [n, d_out]; their reconstruction."""
        x_hat, codes, _ = self.sae(x.to(self.sae.W_dec))
        fired = self.sae.fired(codes)
        keep: Any = slice(None)
        if self.rule is not None:
            massive = self.rule(x, y if self.sae.config.d_target else None)
            self.of_massive.update(y[massive], x_hat[massive])
            keep = ~massive
        self.ordinary.update(y[keep], x_hat[keep])
        keep = slice(None) if self.massive is None else keep
        self.firing.update(codes.indices[keep], fired[keep])
        return x_hat

    def compute(self) -> dict[str, float]:
        """The figures by name. Raises InputError if there is no token that is not massive."""
        if self.rule is None:
            return {**self.ordinary.compute(), **self.firing.compute()}
        every = self.ordinary.with_tokens_of(self.of_massive)
        if self.massive is not None and every.tokens and self.ordinary.tokens < 2:
            raise InputError(
                f"held-out text: {self.of_massive.tokens:,} of {every.tokens:,} tokens are farther "
                f"from the mean than {self.massive.multiple:g} times the median distance in the "
                "first tokens of training. Is this text of another kind? With "
                "--massive-multiple 0 no token is left out"
            )
        of_all = every.compute()
        figures = of_all
        if self.massive is not None:
            both = {"explained_variance_all": of_all["explained_variance"]}
            figures = self.ordinary.compute() | both
        return {
            **figures,
            "massive_share": self.of_massive.tokens / every.tokens,
            "massive_variance_share": 1 - self.ordinary.variance / every.variance,
            **self.firing.compute(),
        }


NAMED_TOKENS = 4
"""Kinds of massive tokens that a warning names."""


def massive_warning(metrics: Mapping[str, float], heldout: Heldout | HeldoutText) -> str | None:
    """`figures.massive_warning` with the commonest of the massive tokens."""
    if massive_in_figures(metrics) is None:
        return None
    text = heldout if isinstance(heldout, HeldoutText) else heldout.text
    tokenizer = None if text is None else text.model.tokenizer
    ids = [] if tokenizer is None else heldout.massive_ids().tolist()
    common = [token for token, _ in Counter(ids).most_common(NAMED_TOKENS)]
    return massive_in_figures(metrics, [token_texts([token], tokenizer)[0] for token in common])


def as_heldout(heldout: Any) -> Heldout:
    """Held-out activations from a tensor [t, d] or an array of numpy, or from a pair of these.

    A pair is for a transcoder. Raises InputError for anything else.
    """
    if isinstance(heldout, Heldout):
        return heldout
    pair = isinstance(heldout, tuple) and len(heldout) == 2
    parts = [as_values(x, "heldout", "[t, d]") for x in (heldout if pair else [heldout])]
    x, *target = (x.detach().reshape(-1, *x.shape[-1:]) for x in parts)
    return Heldout(x, targets=target[0] if target else None)


@torch.no_grad()
def evaluate(sae: SAE, heldout: Heldout | Tensor | tuple[Tensor, Tensor]) -> dict[str, float]:
    """`SAEMetrics` of an SAE of raw activations.

    A transcoder is evaluated on its prediction of `heldout.targets`.
    heldout: also what `as_heldout` takes. Raises ValueError if there are no tokens.
    """
    typed(sae, SAE, "sae")
    if not isinstance(heldout, Heldout):
        heldout = as_heldout(heldout)
        check_heldout(heldout, sae.config)
    metrics = SAEMetrics(sae, heldout.massive, heldout.counted)
    for x, target in _batches(heldout, sae):
        metrics.update(x, target)
    return metrics.compute()


def evaluate_cross_entropy(
    saes: Mapping[str, Callable[[], SAE]],
    heldout: Heldout,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Cross-entropy of the language model when the reconstruction replaces the activations.

    (A transcoder's prediction replaces its target.) saes: by name, each made when it is needed.
    ce_clean, ce_spliced, ce_zero: mean next-token cross-entropy in nats with unchanged,
    reconstructed and zeroed activations; ce_recovered = (zero - spliced) / (zero - clean). Only
    tokens in the mask that are not massive are replaced. Empty without a language model that
    predicts next tokens.
    on_batch: see `HeldoutText.cross_entropies`.
    """
    text = heldout.text
    if text is None or not text.model.has_cross_entropy:
        return {name: {} for name in saes}

    def reconstructing(made: Callable[[], SAE]) -> Make:
        sae = made()
        return lambda x, _: sae(x.to(sae.W_dec)).x_hat

    # A prefix keeps an SAE called "zero" apart.
    makes = {f"SAE {name}": partial(reconstructing, made) for name, made in saes.items()}
    losses = text.cross_entropies({"zero": lambda: _zeros, **makes}, on_batch)
    clean, zero = losses["clean"], losses["zero"]
    return {
        name: {
            "ce_clean": clean,
            "ce_spliced": losses[f"SAE {name}"],
            "ce_zero": zero,
            "ce_recovered": cross_entropy_recovered(clean, losses[f"SAE {name}"], zero),
        }
        for name in saes
    }


def _zeros(_: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(y)


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
