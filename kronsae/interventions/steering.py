"""How strongly to steer, judged by the text that comes out, and a baseline to steer by.

    usual = usual_values(sae, text, [17])[17]  # where it fires, its largest value
    best = calibrated(
        model,
        prompt_ids(model.tokenizer, "My dog"),
        lambda strength: intervene(model, sae, [steer(17, strength)]),
        budget=1.5,
        usual=usual.maximum,
    )
    best.strength, best.after.perplexity, best.after.texts(model.tokenizer)

Letters: s samples, t tokens of a prompt, r new tokens, d width.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kronsae.data import LanguageModel
from kronsae.data.packing import PADDING
from kronsae.errors import InputError, warn
from kronsae.interventions.hooks import SENSIBLE
from kronsae.metrics.heldout import HeldoutText
from kronsae.metrics.usual import values_of
from kronsae.model.sae import SAE
from kronsae.system.devices import as_double, of_doubles
from kronsae.system.documents import Number, typed

DOUBLINGS, HALVINGS, BISECTIONS = 5, 6, 3
"""Of the usual strength, until one is within the budget and its double is not; and between them."""

LEAST_DISTINCT = 0.5
"""Least share of the distinct pairs of tokens of unsteered text that fluent text has."""

Change = Callable[[float], AbstractContextManager[None]]
"""A change of the model by a strength, such as `intervene` with a steered latent."""


class Continuations(NamedTuple):
    """Sampled texts after a prompt, and how fluent they are to the unchanged model."""

    ids: Tensor
    """[s, r] int64 of the new tokens; PADDING after the end of a text."""
    perplexity: float
    """Of the new tokens after the prompt; 1 is what the model expects without doubt."""
    distinct: float
    """Share of the pairs of adjacent new tokens that their text has once only, or first."""

    def texts(self, tokenizer: Any) -> list[str]:
        return [tokenizer.decode(row[row != PADDING], skip_special_tokens=True) for row in self.ids]


class Calibration(NamedTuple):
    """The largest strength whose text is fluent enough."""

    strength: float
    after: Continuations
    before: Continuations
    """Without the change."""
    tried: list[tuple[float, float]]
    """Strengths in the order in which they were tried, and their perplexities over that before."""

    @property
    def ratio(self) -> float:
        """Perplexity over that without the change."""
        return self.after.perplexity / self.before.perplexity


def check_numbers(logits: Tensor) -> Tensor:
    """The logits. Raises InputError if some are NaN."""
    if logits.isnan().any():
        raise InputError(
            "the model's logits are NaN: if a latent is changed, its value is too large to compute "
            f"with ({SENSIBLE})"
        )
    return logits


@torch.no_grad()
def generated(model: LanguageModel, ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """Token ids [s, t + r] of the prompts [s, t] and what `generate` adds; greedy by default.

    options: of `generate`, such as do_sample=True.
    Raises InputError if that is more than the model reads, and if logits are NaN.
    """
    length = ids.shape[1] + typed(new_tokens, Number(int, 1), "new tokens")
    if model.max_context and length > model.max_context:
        raise InputError(
            f"{ids.shape[1]:,} tokens of the prompt and {new_tokens:,} new ones are more than the "
            f"{model.max_context:,} that {model.name} reads: generate fewer, or cut the prompt"
        )
    tokenizer, generate = model.tokenizer, cast(Any, model.model).generate
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not options.get("do_sample"):  # what the model's own settings may have for sampling
        options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | options
    ids = ids.to(model.device)
    given = options.pop("logits_processor", None) or []
    return generate(
        ids,
        logits_processor=[lambda _ids, logits: check_numbers(logits), *given],
        attention_mask=torch.ones_like(ids),
        pad_token_id=pad,
        max_new_tokens=new_tokens,
        use_cache=True,
        **options,
    )


@torch.no_grad()
def perplexity(model: LanguageModel, ids: Tensor, first: int = 1) -> float:
    """exp of the mean cross-entropy, in nats, of tokens ids[:, first:] by the model as it is now.

    ids: [b, t] int64; PADDING does not count.  first: at least 1, as nothing predicts the first.
    Outside of `intervene` it is the unchanged model's, whoever wrote the text.
    Raises InputError without such tokens, or if the model predicts no next token.
    """
    count = int((ids[:, first:] != PADDING).sum())
    if first < 1 or not count:
        raise InputError(f"perplexity: expected tokens from position {max(1, first)} on, got none")
    return math.exp(model.token_losses(ids)[:, first - 1 :].sum().item() / count)


def continuations(
    model: LanguageModel,
    prompt: Sequence[int],
    change: AbstractContextManager[None] | None = None,
    *,
    new_tokens: int = 40,
    samples: int = 8,
    seed: int = 0,
) -> Continuations:
    """Texts drawn after a prompt at temperature 1, with a change of the model; see `Continuations`.

    prompt: [t] token ids, two at least, as the first is never changed.
    change: open while the text is drawn, and not while it is judged.
    seed: the random numbers are the same for every change.
    Raises InputError for a prompt of fewer tokens.
    """
    if len(prompt) < 2:
        raise InputError(f"prompt: expected two tokens at least, got {len(prompt)}")
    ids = torch.tensor([list(prompt)] * samples)
    cards = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(cards), change or nullcontext():
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        whole = generated(model, ids, new_tokens, **sampling)
    whole[:, len(prompt) :] = _until_the_end(model, whole[:, len(prompt) :])
    new = whole[:, len(prompt) :].cpu()
    return Continuations(new, perplexity(model, whole, len(prompt)), _distinct_pairs(new))


def _until_the_end(model: LanguageModel, ids: Tensor) -> Tensor:
    """New tokens [s, r] with PADDING after the first that ends a text."""
    ends = cast(Any, model.model).generation_config.eos_token_id
    ends = [model.tokenizer.eos_token_id] if ends is None else ends
    ended = torch.isin(ids, torch.tensor(ends if isinstance(ends, list) else [ends]).to(ids))
    return ids.masked_fill(ended.cumsum(1) - ended.long() > 0, PADDING)


def _distinct_pairs(ids: Tensor) -> float:
    """Share of the pairs of adjacent tokens of each text [r] that are distinct, over all texts."""
    pairs = [
        list(zip(row, row[1:], strict=False))
        for row in ([token for token in each if token != PADDING] for each in ids.tolist())
    ]
    return sum(len(set(each)) for each in pairs) / max(1, sum(map(len, pairs)))


def calibrated(
    model: LanguageModel,
    prompt: Sequence[int],
    change: Change,
    budget: float,
    *,
    usual: float = 1.0,
    before: Continuations | None = None,
    **draw: Any,
) -> Calibration:
    """The largest strength of a change whose text is fluent: see `Continuations`.

    Its perplexity is at most `budget` (> 1) times that without the change. As repeated text has a
    low perplexity, it also has at least LEAST_DISTINCT of the distinct pairs of tokens.
    The usual strength is doubled until its text is not fluent (or halved until it is), and then
    the space between is bisected on a logarithmic scale, to about 9 %: at most 11 drawings.

    usual: the strength to begin with, > 0.
    before: the texts without the change, if they are drawn already.
    draw: of `continuations`: new_tokens, samples, seed.
    A Notice says if even the largest strength is fluent (32 times the usual one).
    Raises InputError for a budget of at most 1, or if even the smallest strength is not fluent.
    """
    if not 1 < budget < math.inf:
        raise InputError(f"fluency: expected a factor of the perplexity above 1, got {budget:g}")
    if not 0 < usual < math.inf:
        raise InputError(f"usual: expected a strength above 0, got {usual:g}")
    before = before or continuations(model, prompt, **draw)
    tried: dict[float, Continuations] = {}

    def fluent(times: float) -> bool:
        after = tried[times] = continuations(model, prompt, change(times * usual), **draw)
        repeats = after.distinct < LEAST_DISTINCT * before.distinct
        return after.perplexity <= budget * before.perplexity and not repeats

    times = _largest(fluent)
    if times == 2.0**DOUBLINGS:
        warn(f"even {times:g} times the usual strength is within the fluency budget {budget:g}")
    if not times:
        raise InputError(
            f"fluency: no strength down to {2.0**-HALVINGS:g} times the usual one keeps the "
            f"perplexity within {budget:g} times that of unsteered text: give a larger budget, or "
            "more samples"
        )
    ratios = [(t * usual, a.perplexity / before.perplexity) for t, a in tried.items()]
    return Calibration(times * usual, tried[times], before, ratios)


def _largest(fluent: Callable[[float], bool]) -> float:
    """The largest factor that is fluent, searched as `calibrated` says; 0 if none is."""
    good, bad = 0.0, 1.0
    if fluent(1.0):
        good, bad = 1.0, 2.0
        while fluent(bad):
            good, bad = bad, 2 * bad
            if good == 2.0**DOUBLINGS:
                return good
    else:
        for halvings in range(1, HALVINGS + 1):
            if fluent(2.0**-halvings):
                good, bad = 2.0**-halvings, 2.0 ** (1 - halvings)
                break
        else:
            return 0.0
    for _ in range(BISECTIONS):
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if fluent(middle) else (good, middle)
    return good


@torch.no_grad()
def mean_difference(sae: SAE, text: HeldoutText, latents: Sequence[int]) -> Tensor:
    """Mean activation [d_out] on tokens where one of the latents fires, minus that on all others.

    A direction of the activations that the SAE reconstructs, float32 on the SAE's device, which
    `displace` can steer by: a baseline that takes nothing of the SAE but which tokens are meant.
    Raises InputError for a latent outside [0, F), or if none or all of the tokens are such.
    """
    sae.check_latents(latents)
    chosen = list(dict.fromkeys(latents))
    sums, counts = _sums(text, 2, sae.config.d_out)
    for _, _, x, y in text.pairs():
        values = values_of(sae.encode(x.to(sae.W_dec)), chosen, sae.dict_size)
        fires = (values.abs() > sae.silent_value).any(1).long()
        sums.index_add_(0, fires.to(sums.device), as_double(y))
        counts += fires.bincount(minlength=2).to(counts)
    if not counts.all():
        raise InputError(
            f"mean difference: the latents fire on {int(counts[1]):,} of {int(counts.sum()):,} "
            "tokens, so there is nothing to compare: read more text, or give two sets of texts"
        )
    means = sums / counts[:, None]
    return (means[1] - means[0]).to(sae.W_dec)


def difference_of_texts(text: HeldoutText, other: HeldoutText) -> Tensor:
    """Mean activation [d_out] of a text minus that of another, float32 on the model's device.

    Of the activations that an SAE at the model's hookpoint reconstructs. `HeldoutText.of` makes
    such texts of strings. Raises InputError for a text without tokens.
    """
    return (_mean(text) - _mean(other)).float().to(text.model.device)


@torch.no_grad()
def _mean(text: HeldoutText) -> Tensor:
    sums, counts = _sums(text, 1, text.model.d_target or text.model.d_model)
    for *_, y in text.pairs():
        sums += as_double(y).sum(0)
        counts += len(y)
    if not counts:
        raise InputError("mean difference: a text has no token on which SAEs are trained")
    return sums[0] / counts


def _sums(text: HeldoutText, groups: int, width: int) -> tuple[Tensor, Tensor]:
    """Zeros for sums of activations [g, d] float64 and counts [g] of groups of tokens."""
    device = of_doubles(text.model.device)
    sums = torch.zeros(groups, width, dtype=torch.float64, device=device)
    return sums, torch.zeros(groups, device=device)
