"""Feature absorption: where the latents of a first letter are silent, and others stand in.

A latent may seem to mean "begins with S", and yet be silent on some of these words, because a
latent of the word itself carries the letter's direction, too: it is absorbed. [Chanin et al. 2024,
A is for Absorption] This measures it as SAEBench does (0.6.0; Karvonen et al. 2025):

1. A linear probe for each letter reads it from the activations of a word, in a prompt with other
   words and their first letters.
2. A letter's latents are the k on which a probe with an L1 penalty puts most weight. They are as
   many as raise the F1 of a logistic regression on them by `f1_jump` each.
3. Of the test words on which the letter's probe is right, absorption is the share of the probe's
   direction that other latents, along that direction, hold in place of the letter's latents.

Letters: n words, d width, F latents, k active latents of a word.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from string import ascii_lowercase
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    embedding_bag,
    normalize,
    one_hot,
    pad,
)

from kronsae.data import LanguageModel, split_target
from kronsae.data.common import is_finite
from kronsae.data.packing import PADDING, context_begin, special_ids
from kronsae.errors import InputError, warn
from kronsae.metrics.heldout import BATCH_TOKENS, CONTEXTS_AT_ONCE
from kronsae.metrics.logistic import logistic
from kronsae.metrics.usual import values_of
from kronsae.model.sae import SAE
from kronsae_kernels import SparseCodes

ANSWER = " has the first letter:"
EPOCHS = 50
LR, LR_FINAL = 1e-2, 1e-5
PROBE_BATCH, PROBE_DECAY = 64, 1e-4
L1, L1_DECAY = 0.01, 1e-6
"""How SAEBench trains its probes on activations, and those with an L1 penalty on latents."""

COSINE, COSINE_OF_ONE = 0.1, 0.025
"""Least cosine of an absorbing latent with the probe; of the only one where absorption is full."""
PROPORTION = 0.4
"""Least share of the probe's projection that absorbing latents hold."""
ABSORBING = 3
"""Most latents that absorb together."""
LETTERS = 20
"""Letters with a probe of `least_f1` without which SAEBench measures nothing."""


@dataclass(frozen=True)
class Settings:
    """Settings of the measure. SAEBench's are words=0, words_per_prompt=1, l1_batch=4096."""

    words: int = 6000
    """Words to draw from the vocabulary; 0 takes all."""
    words_per_prompt: int = 32
    """Words that are read in a prompt one after another, each after the examples and the words
    before it. A prompt for each word costs ten times as much."""
    examples: int = 10
    """Other words with their first letters before the words of a prompt."""
    train_share: float = 0.8
    """Share of the words on which probes are trained; the others are measured."""
    seed: int = 42
    l1_batch: int = 1024
    """Words of a step of the probe with an L1 penalty."""
    most_latents: int = 10
    """Most latents of a letter."""
    f1_jump: float = 0.03
    """Gain in F1 with which one more latent counts as one of the letter's."""
    least_f1: float = 0.6
    """F1 of a probe on activations without which its letter is left out."""


@dataclass(frozen=True)
class Words:
    """Activations of words, and their first letters."""

    x: Tensor
    """[n, d]."""
    letters: Tensor
    """[n] int64: 0 for a to 25 for z."""
    trained: Tensor
    """[n] bool: words that probes are trained on."""
    names: list[str] = field(default_factory=list)


class LetterAbsorption(TypedDict):
    """Absorption of a letter."""

    probe_f1: float
    """F1 of the probe on activations, on test words."""
    latents: list[int]
    """Those of the letter, the one with the largest weight first."""
    f1: float
    """F1 of a logistic regression on them, on test words."""
    words: int
    """Test words on which the probe is right."""
    absorbed: float
    """Mean share of the probe's direction that other latents hold on them."""
    fully_absorbed: float
    """Share of them on which none of the letter's latents fires, and one other stands in."""


class Absorption(NamedTuple):
    """Absorption in an SAE."""

    metrics: dict[str, float]
    """Means over the letters, by their names in `kronsae.metrics.MEANING`."""
    letters: dict[str, LetterAbsorption]


OnRead = Callable[[int, int], None]
"""Called with how many are done, and their total."""


class FirstLetters:
    """Words of a model's vocabulary and probes for their first letters, to measure SAEs with.

    Words and probes depend on the model and its hookpoint alone, so that SAEs share them.
    Raises InputError if no probe reaches `settings.least_f1`; a warning says if few do.
    """

    def __init__(self, words: Words, settings: Settings = Settings()) -> None:
        self.words, self.settings = words, settings
        self.facts: dict[str, Any] = {**asdict(settings), "words": len(words.letters)}
        """How it is measured (JSON-able)."""
        self.one_hot = one_hot(words.letters, len(ascii_lowercase)).bool()
        x, y = words.x[words.trained].float(), self.one_hot[words.trained]
        weight, bias = _train(
            lambda rows, weight: x[rows] @ weight,
            x.shape[1],
            y,
            (PROBE_BATCH, settings.seed),
            decay=PROBE_DECAY,
        )
        self.directions = normalize(weight, dim=0)
        """[d, 26]: unit vectors along which the probes read the letters."""
        self.right = (words.x.float() @ weight + bias > 0) & self.one_hot
        self.f1 = f1(words.x[~words.trained].float() @ weight + bias, self.one_hot[~words.trained])
        found = int((self.f1 > settings.least_f1).sum())
        if not found:
            raise InputError(
                f"absorption: no probe reads a first letter from the activations with an F1 above "
                f"{settings.least_f1} (the best reaches {self.f1.max():.2f}): choose another layer "
                "or model"
            )
        if found < LETTERS:
            warn(
                f"absorption: probes read only {found} of 26 first letters from the activations. "
                f"SAEBench measures none where they are fewer than {LETTERS}"
            )

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        settings: Settings = Settings(),
        bos: str = "auto",
        *,
        on_read: OnRead = lambda done, total: None,
    ) -> "FirstLetters":
        """The words of a model, read at its hookpoint; prompts begin as `context_begin` says.

        on_read: called while it reads, with how many words are done, and their total.
        """
        return cls(read_words(model, settings, bos, on_read), settings)

    @torch.no_grad()
    def measure(self, sae: SAE) -> Absorption:
        """Absorption in an SAE of raw activations of the same model and hookpoint.

        Memory: the active latents of each word, and a few numbers for each of F latents and 26
        letters. Raises InputError for a transcoder, or for another width.
        """
        _check(sae, self.words.x.shape[1])
        codes = active_codes(sae, self.words.x)
        norms = sae.decoder_norms().float()
        along = sae.W_dec.float() @ self.directions.to(norms.device)
        cosines = along / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
        lengths = SparseCodes(codes.values * norms[codes.indices], codes.indices)
        letters: dict[str, LetterAbsorption] = {}
        for number, latents, score in self._latents_of_letters(lengths, sae.dict_size):
            rows = (self.right[:, number] & ~self.words.trained).nonzero()[:, 0]
            values, indices = of_letter = codes_of(codes, rows)
            absorbed, fully = absorbed_shares(
                SparseCodes(values * along[indices, number], indices),
                cosines[indices, number],
                sae.fired(of_letter),
                (self.words.x[rows].float() @ self.directions[:, number]).to(norms.device),
                latents,
            )
            letters[ascii_lowercase[number]] = {
                "probe_f1": self.f1[number].item(),
                "latents": latents,
                "f1": score,
                "words": len(rows),
                "absorbed": absorbed.mean().item(),
                "fully_absorbed": fully.float().mean().item(),
            }
        return Absorption(_means(letters), letters)

    def _latents_of_letters(
        self, codes: SparseCodes, dict_size: int
    ) -> Iterator[tuple[int, list[int], float]]:
        """Each letter that a probe reads, its latents, and the F1 of a logistic regression."""
        numbers = (self.f1 > self.settings.least_f1).nonzero()[:, 0]
        ranked = self._ranked(codes, dict_size)[numbers]
        columns, places = ranked.unique(return_inverse=True)
        values = values_of(codes, columns.tolist(), dict_size).cpu()[:, places]  # [n, letters, k]
        (x, y), (x_test, y_test) = (
            (values[side].transpose(0, 1), self.one_hot[side][:, numbers])
            for side in (self.words.trained, ~self.words.trained)
        )
        best, counts = torch.full((len(numbers),), -torch.inf), torch.zeros_like(numbers)
        growing = torch.ones_like(numbers, dtype=torch.bool)
        for count in range(1, ranked.shape[1] + 1):
            weights, biases = logistic(x[..., :count], y.T)
            scores = (x_test[..., :count].double() @ weights[..., None])[..., 0] + biases[:, None]
            reached = f1(scores.T, y_test)
            growing &= reached > best + self.settings.f1_jump
            best, counts = torch.where(growing, reached, best), torch.where(growing, count, counts)
            if not growing.any():
                break
        for number, row, count, score in zip(numbers, ranked, counts, best, strict=True):
            yield int(number), row[:count].tolist(), score.item()

    def _ranked(self, codes: SparseCodes, dict_size: int) -> Tensor:
        """[26, most_latents]: the latents with most weight in a probe with an L1 penalty."""
        values, indices = codes_of(codes, self.words.trained)
        weight, _ = _train(
            lambda rows, weight: embedding_bag(
                indices[rows], weight, per_sample_weights=values[rows], mode="sum"
            ),
            dict_size,
            self.one_hot[self.words.trained].to(values.device),
            (self.settings.l1_batch, self.settings.seed),
            decay=L1_DECAY,
            l1=L1,
        )
        return weight.topk(min(self.settings.most_latents, dict_size), dim=0).indices.T.cpu()


def _means(letters: Mapping[str, LetterAbsorption]) -> dict[str, float]:
    """The mean of each figure over letters."""
    figures = [
        {
            "absorbed_share": one["absorbed"],
            "fully_absorbed_share": one["fully_absorbed"],
            "letter_latents": len(one["latents"]),
            "letter_f1": one["f1"],
            "letter_f1_probe": one["probe_f1"],
        }
        for one in letters.values()
    ]
    return {name: sum(one[name] for one in figures) / len(figures) for name in figures[0]}


def absorbed_shares(
    projections: SparseCodes, cosines: Tensor, fired: Tensor, whole: Tensor, latents: list[int]
) -> tuple[Tensor, Tensor]:
    """The share [n] of a direction that other latents than `latents` hold, and whether they do so
    where none of these fires [n] bool.

    projections: on the direction, of the active latents of each word [n, k], in place of values.
    cosines: [n, k] of their decoder rows with it.  fired: [n, k] bool.
    whole: [n] projections of the activations.
    """
    values, indices = projections
    own = torch.isin(indices, torch.tensor(latents, device=indices.device))
    by_own = (values * own).sum(1)
    others = torch.where(~own & (cosines >= COSINE), values.clamp(min=0), 0)
    by_others = others.topk(min(ABSORBING, others.shape[1])).values.sum(1)
    held = torch.minimum(by_others, whole - by_own)
    share = torch.where(by_own <= 0, 1, held / (held + by_own))
    none = (by_own >= whole) | (by_others / whole < PROPORTION)
    largest, place = values.max(1)
    aligned = cosines.gather(1, place[:, None])[:, 0] >= COSINE_OF_ONE
    full = ~(own & fired).any(1) & aligned & (whole >= 0) & (largest / whole >= PROPORTION)
    return torch.where(none, 0, share), full


def f1(scores: Tensor, y: Tensor) -> Tensor:
    """F1 [l] of the predictions scores > 0 [n, l] of y [n, l] bool; 0 if nothing is right."""
    right = ((scores > 0) & y).sum(0)
    return 2 * right / ((scores > 0).sum(0) + y.sum(0)).clamp(min=1)


def codes_of(codes: SparseCodes, rows: Tensor) -> SparseCodes:
    """The codes of some rows."""
    return SparseCodes(*(part[rows.to(part.device)] for part in codes))


def active_codes(sae: SAE, x: Tensor) -> SparseCodes:
    """Codes [n, k] of x [n, d], with k the most active latents of a row; unused slots hold 0.

    Raises InputError if they are not finite.
    """
    parts = []
    for rows in x.split(BATCH_TOKENS):
        values, indices = sae.encode(rows.to(sae.W_dec))
        if not is_finite(values):
            raise InputError("absorption: the SAE's latents are not finite: leave it out")
        places = values.abs().topk(max(1, int((values != 0).sum(1).max()))).indices
        parts.append((values.gather(1, places), indices.gather(1, places)))
    width = max(values.shape[1] for values, _ in parts)
    values, indices = (
        torch.cat([pad(part, (0, width - part.shape[1])) for part in side])
        for side in zip(*parts, strict=True)
    )
    return SparseCodes(values.float(), indices)


def _check(sae: SAE, width: int) -> None:
    """Raise InputError unless the SAE reconstructs activations of this width."""
    if sae.config.d_target:
        raise InputError("absorption: expected an autoencoder, got a transcoder")
    if sae.config.d_model != width:
        raise InputError(f"absorption: expected an SAE of width {width}, got {sae.config.d_model}")


@torch.enable_grad()
def _train(
    scores: Callable[[Tensor, Tensor], Tensor],
    width: int,
    y: Tensor,
    batch_and_seed: tuple[int, int],
    *,
    decay: float,
    l1: float = 0,
) -> tuple[Tensor, Tensor]:
    """Weight [width, 26] and bias [26] of linear probes for y [n, 26] bool, by Adam.

    scores: without the bias, [b, 26] of rows [b], for a weight. Both answers of a probe weigh the
    same.
    """
    batch, seed = batch_and_seed
    weight = torch.zeros(width, y.shape[1], device=y.device, requires_grad=True)
    bias = torch.zeros(y.shape[1], device=y.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], LR, weight_decay=decay)
    slower = torch.optim.lr_scheduler.ExponentialLR(optimizer, (LR_FINAL / LR) ** (1 / EPOCHS))
    generator = torch.Generator().manual_seed(seed)
    count = y.sum(0)
    balance = (len(y) - count) / count.clamp(min=1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=generator).to(y.device).split(batch):
            loss = binary_cross_entropy_with_logits(
                scores(rows, weight) + bias, y[rows].float(), pos_weight=balance
            )
            optimizer.zero_grad()
            (loss + l1 * weight.abs().sum(0).mean()).backward()
            optimizer.step()
        slower.step()
    return weight.detach(), bias.detach()


# Words


def vocabulary_words(model: LanguageModel) -> list[tuple[int, str]]:
    """Ids and texts of the tokens that are ASCII letters alone, perhaps after a space, by id."""
    tokenizer = model.tokenizer
    texts = {
        id: " " + token[1:] if token[0] == "▁" else tokenizer.convert_tokens_to_string([token])
        for token, id in tokenizer.get_vocab().items()
        if isinstance(token, str) and token and id < model.vocab_size
    }
    special = set(special_ids(tokenizer).tolist())
    return [
        (id, text)
        for id, text in sorted(texts.items())
        if (word := text.removeprefix(" ")).isascii() and word.isalpha() and id not in special
    ]


def read_words(
    model: LanguageModel,
    settings: Settings = Settings(),
    bos: str = "auto",
    on_read: OnRead = lambda done, total: None,
) -> Words:
    """Words of the vocabulary and their activations, each at its token in a prompt.

    on_read: see `FirstLetters.of`.
    Raises InputError for a model that reads both ways, that has no tokenizer, or fewer words than a
    prompt needs.
    """
    if model.tokenizer is None or not model.has_cross_entropy:
        reason = model.no_cross_entropy or f"{model.name} has no tokenizer"
        raise InputError(f"absorption: expected a model that predicts the next token: {reason}")
    generator = torch.Generator().manual_seed(settings.seed)
    words = vocabulary_words(model)
    order = torch.randperm(len(words), generator=generator)[: settings.words or len(words)]
    drawn = [words[place] for place in order.tolist()]
    count = int(len(drawn) * settings.train_share)
    prompts = Prompts(model, settings, bos)
    parts = [
        prompts.read(side, generator, partial(_report, on_read, before, len(drawn)))
        for before, side in ((0, drawn[:count]), (count, drawn[count:]))
    ]
    names = [text for _, text in drawn]
    return Words(
        torch.cat(parts),
        torch.tensor([_letter(text) for text in names]),
        torch.arange(len(names)) < count,
        names,
    )


def _report(on_read: OnRead, before: int, total: int, done: int) -> None:
    on_read(before + done, total)


def _letter(text: str) -> int:
    return ascii_lowercase.index(text.strip()[0].lower())


class Prompts:
    """Prompts that name words and their first letters: "\n word has the first letter: W" for each.

    A prompt holds `settings.examples`, and then the words that are read: as many as
    `settings.words_per_prompt`, if the model reads so much.
    """

    def __init__(self, model: LanguageModel, settings: Settings, bos: str) -> None:
        def ids(text: str) -> list[int]:
            return model.tokenizer(text, add_special_tokens=False)["input_ids"]

        self.model, self.examples = model, settings.examples
        self.begin, self.separator = context_begin(model.tokenizer, bos), ids("\n")
        self.answers = [ids(f"{ANSWER} {letter.upper()}") for letter in ascii_lowercase]
        longest = len(self.separator) + 1 + max(map(len, self.answers))
        room = ((model.max_context or 10**9) - len(self.begin)) // longest - settings.examples
        self.count = min(settings.words_per_prompt, room)
        if self.count < 1:
            raise InputError(
                f"absorption: {settings.examples} examples leave no room for a word in the "
                f"{model.max_context} tokens that {model.name} reads: give fewer"
            )

    def read(
        self,
        words: list[tuple[int, str]],
        generator: torch.Generator,
        on_read: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """Activations [n, d] of words, with others of them as examples.

        on_read: called with how many of them are done.
        """
        if len(words) < self.examples + self.count:
            raise InputError(
                f"absorption: expected at least {self.examples + self.count} words to train probes "
                f"on, and as many to measure, got {len(words)}: give more words, or fewer examples"
            )
        parts = []
        prompts = [
            self._prompt(words, start, generator) for start in range(0, len(words), self.count)
        ]
        for first in range(0, len(prompts), CONTEXTS_AT_ONCE):
            batch = prompts[first : first + CONTEXTS_AT_ONCE]
            length = max(len(ids) for ids, _ in batch)
            contexts = [ids + [PADDING] * (length - len(ids)) for ids, _ in batch]
            rows = [row for row, (_, places) in enumerate(batch) for _ in places]
            columns = [place for _, places in batch for place in places]
            outputs = self.model.activations(torch.tensor(contexts))[rows, columns]
            x, _ = split_target(outputs, self.model.d_target)
            parts.append(x.float().cpu())
            on_read(min(len(words), (first + len(batch)) * self.count))
        return torch.cat(parts)

    def _prompt(
        self, words: list[tuple[int, str]], start: int, generator: torch.Generator
    ) -> tuple[list[int], list[int]]:
        """Token ids of a prompt for the words from `start` on, and the words' places in it."""
        group = range(start, min(start + self.count, len(words)))
        drawn = torch.randperm(len(words), generator=generator).tolist()
        examples = [place for place in drawn if place not in group][: self.examples]
        ids, places = [*self.begin], []
        for token, text in (words[place] for place in (*examples, *group)):
            ids += [*self.separator, token]
            places.append(len(ids) - 1)
            ids += self.answers[_letter(text)]
        return ids, places[len(examples) :]
