"""From examples of a latent to its explanation, and to how well that predicts.

A reply that does not hold what was asked for is discarded, and counted.
"""

import json
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from kronsae.data.token_text import token_texts
from kronsae.interpret.chat import Answers, Messages, one_line
from kronsae.interpret.examples import Example, LatentExamples

SHOWN = 16
"""Examples that an explanation is made from, above the median activation. [KronSAE, App. D]"""

TESTED = 64
"""At most so many examples of each kind are judged. [KronSAE, App. D]"""

AT_ONCE = 8
"""Examples of a prompt that asks for judgements. [KronSAE, App. D]"""

EXPLANATION_TOKENS, JUDGEMENT_TOKENS = 400, 100
"""Longest answers."""

_NOTE = (
    "In the texts ↵ stands for a line break, ⇥ for a tab or four spaces, and ⟨E2 80⟩ for two bytes "
    "of a longer character."
)

_FORM = "what makes the unit active"

_EXPLAIN = f"""\
You study a unit inside a language model. You get excerpts of texts in which it is active; the \
tokens on which it is active stand between << and >>, and below each excerpt they are listed with \
their strength, from 1 to 9. {_NOTE}
Say in one sentence, as specifically as the excerpts allow, what makes the unit active: the marked \
tokens, what comes before them, their meaning or their grammar. Do not list the excerpts.
End your answer with a line of this form:
EXPLANATION: {_FORM}"""

_DETECT = f"""\
A unit inside a language model is described in one sentence. You get numbered excerpts of texts. \
For each of them decide whether the unit is active somewhere in it, if the description is right. \
{_NOTE}
Answer with a JSON list alone, with 1 (active) or 0 (not active) for each excerpt in order, as \
[1, 0, 0]."""

_FUZZ = f"""\
A unit inside a language model is described in one sentence. You get numbered excerpts of texts, \
with some tokens between << and >>. For each of them decide whether the marked tokens are those on \
which the unit is active, if the description is right. {_NOTE}
Answer with a JSON list alone, with 1 (marked rightly) or 0 (not) for each excerpt in order, as \
[1, 0, 0]."""

INSTRUCTIONS = {"detection": _DETECT, "fuzzing": _FUZZ}


class Score(NamedTuple):
    """How well an explanation tells examples apart."""

    score: float | None
    """Mean of the true-positive and the true-negative rate; None without examples of both."""
    true_positive_rate: float | None
    true_negative_rate: float | None
    judged: int
    """Examples with an answer."""
    discarded: int
    """Replies that could not be read; their examples do not count."""


class Interpretation(NamedTuple):
    """A latent, what it is said to be, and how far that is right."""

    latent: int
    explanation: str | None
    """None if it never fired, or if the reply could not be read."""
    detection: Score | None
    fuzzing: Score | None
    firing: int
    """Examples that there were."""


def interpret(
    examples: LatentExamples, tokenizer: Any, answers: Answers, seed: int = 0
) -> Interpretation:
    """Explain a latent and score the explanation. Deterministic, if the model is."""
    latent, count = examples.latent, len(examples.firing)
    shown, firing = split(examples.firing)
    explanation = None
    if shown:
        prompt = explanation_prompt(shown, tokenizer)
        reply = answers.ask(prompt, EXPLANATION_TOKENS, latent=latent, task="explanation")
        explanation = parse_explanation(reply)
    if explanation is None:
        return Interpretation(latent, None, None, None, count)
    scores = {}
    for task in INSTRUCTIONS:
        marked = task == "fuzzing"
        generator = random.Random(f"{seed} {latent} {task}")
        silent = examples.silent[:TESTED]
        if marked:
            marks = _mean_firing(firing)
            silent = [_marked_at_random(example, marks, generator) for example in silent]
        items = [(render(example, tokenizer, marked), True) for example in firing]
        items += [(render(example, tokenizer, marked), False) for example in silent]
        generator.shuffle(items)
        judgements: list[tuple[bool, bool]] = []
        discarded = 0
        for start in range(0, len(items), AT_ONCE):
            part = items[start : start + AT_ONCE]
            messages = judgement_prompt(task, explanation, [text for text, _ in part])
            reply = answers.ask(messages, JUDGEMENT_TOKENS, latent=latent, task=task)
            verdicts = parse_judgements(reply, len(part))
            if verdicts is None:
                discarded += 1
            else:
                judgements += zip((truth for _, truth in part), verdicts, strict=True)
        scores[task] = score(judgements, discarded)
    return Interpretation(latent, explanation, scores["detection"], scores["fuzzing"], count)


def split(firing: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """SHOWN examples above the median activation to explain by, and up to TESTED others."""
    peaks = sorted(example.peak for example in firing)
    middle = len(peaks) // 2
    median = (peaks[middle] + peaks[~middle]) / 2 if peaks else 0.0
    # Where all are equal none is above.
    strong = [i for i, example in enumerate(firing) if example.peak > median]
    shown = (strong or list(range(len(firing))))[:SHOWN]
    others = [example for i, example in enumerate(firing) if i not in shown]
    return [firing[i] for i in shown], others[:TESTED]


def score(judgements: Sequence[tuple[bool, bool]], discarded: int) -> Score:
    """judgements: (whether the latent fires, whether the model says so)."""
    positive, negative = (_recall(judgements, truth) for truth in (True, False))
    whole = None if positive is None or negative is None else (positive + negative) / 2
    return Score(whole, positive, negative, len(judgements), discarded)


def _recall(judgements: Sequence[tuple[bool, bool]], truth: bool) -> float | None:
    """Share of the examples with this truth on which the model agrees; None without any."""
    verdicts = [verdict for true, verdict in judgements if true is truth]
    return verdicts.count(truth) / len(verdicts) if verdicts else None


# Prompts and replies


def render(example: Example, tokenizer: Any, marked: bool) -> str:
    """An example on one line; if marked, with << >> around tokens on which the latent fires."""
    if not marked:
        return "".join(token_texts(example.tokens, tokenizer))
    texts = token_texts(example.tokens, tokenizer, example.activations)
    out, inside = [], False
    for text, activation in zip(texts, example.activations, strict=True):
        fires = activation > 0
        if fires != inside:
            out.append("<<" if fires else ">>")
        inside = fires
        out.append(text)
    return "".join(out) + (">>" if inside else "")


def explanation_prompt(shown: Sequence[Example], tokenizer: Any) -> Messages:
    largest = max(example.peak for example in shown)
    lines = []
    for number, example in enumerate(shown, 1):
        texts = token_texts(example.tokens, tokenizer, example.activations)
        strengths = ", ".join(
            f"{text!r} {max(1, round(9 * value / largest))}"
            for text, value in zip(texts, example.activations, strict=True)
            if value > 0
        )
        lines.append(
            f"{number}. {render(example, tokenizer, marked=True)}\n   Strength: {strengths}"
        )
    return _messages(_EXPLAIN, "\n".join(lines))


def judgement_prompt(task: str, explanation: str, texts: Sequence[str]) -> Messages:
    lines = [f"{number}. {text}" for number, text in enumerate(texts, 1)]
    excerpts = "\n".join(lines)
    return _messages(INSTRUCTIONS[task], f"Description: {explanation}\n\nExcerpts:\n{excerpts}")


def _messages(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def parse_explanation(reply: str) -> str | None:
    """The text after the last EXPLANATION: on its line; None if that is nothing, or the form."""
    lines = re.findall(r"explanation\**:[ \t*]*(\S.*)", reply, flags=re.IGNORECASE)
    explanation = one_line(lines[-1]).rstrip("*").strip() if lines else ""
    return None if explanation.rstrip(".").lower() in ("", _FORM) else explanation


def parse_judgements(reply: str, count: int) -> list[bool] | None:
    """The last list in a reply if it holds `count` numbers, all of them 0 or 1; else None."""
    lists = re.findall(r"\[[^\[\]]*\]", reply)
    try:
        verdicts = json.loads(lists[-1])
    except (IndexError, ValueError):
        return None
    if len(verdicts) != count or any(type(v) is not int or v not in (0, 1) for v in verdicts):
        return None
    return [bool(verdict) for verdict in verdicts]


def _mean_firing(firing: Sequence[Example]) -> int:
    """On how many tokens of an example a latent fires, on average, rounded up."""
    counts = [sum(value > 0 for value in example.activations) for example in firing]
    return -(-sum(counts) // len(counts)) if counts else 1


def _marked_at_random(example: Example, count: int, generator: random.Random) -> Example:
    size = len(example.tokens)
    chosen = set(generator.sample(range(size), min(count, size)))
    return example._replace(activations=tuple(float(i in chosen) for i in range(size)))
