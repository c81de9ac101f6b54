"""Data of the explorer's page: facts, and blocks of arrays or JSON.

Letters: F latents, P pre-latents, N of either, s examples, w tokens of an example's window.

facts: JSON, read at once. Blocks: "index", figures of all latents, for the first view;
"vocabulary", the texts of all tokens that occur, by whose numbers everything else names tokens;
"lists", the tokens of all latents, for the table and the search; "labels"; "text", in which
examples lie; "details-0" and on, the rest of `facts["perBlock"]` heads (or groups of latents) each.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kronsae.config import DataConfig, kind_of
from kronsae.data.token_text import continued_texts
from kronsae.explore.blocks import encode, encode_json, rounded, smallest
from kronsae.explore.charts import figure_text
from kronsae.explore.passages import counts_for, examples_of, in_text
from kronsae.explore.report import last_evaluation, read_metrics
from kronsae.interop.suite import INDEX_NAME
from kronsae.metrics.figures import MEANING, massive_warning
from kronsae.model.sae import SAE
from kronsae.properties import WINDOW, Examined, Properties, Stored, gates
from kronsae.properties.examples import INTERVALS
from kronsae.properties.labels import Labels, plain
from kronsae.properties.summary import of_each
from kronsae.runs.folder import read_run

BLOCK_LATENTS = 64
"""At least so many latents a block, if there are."""

GROUP = 8
"""A dense encoder's latents are shown in squares of so many rows."""

LISTED_EFFECTS = 4
"""Tokens that a latent makes more, and less, likely, in the lists of all latents."""

PART = re.compile("⟨[0-9A-F]{2}(?: [0-9A-F]{2})*⟩")
"""Bytes in a token's text that are no character of their own."""


class Grid(NamedTuple):
    """How latents are laid out: `heads` grids of m x n, the last of which may not be full."""

    heads: int
    m: int
    n: int
    kron: bool


def grid_of(sae: SAE) -> Grid:
    """The heads of the SAE; of a dense encoder squares of latents with neighbouring numbers."""
    config = sae.config
    if config.heads:
        return Grid(config.heads, config.m, config.n, True)
    return Grid(-(-config.dict_size // GROUP**2), GROUP, GROUP, False)


def make_content(
    run: Path,
    sae: SAE,
    stored: Stored,
    tokenizer: Any | None,
    activations: DataConfig | None = None,
    labels: Labels | None = None,
) -> dict[str, Any]:
    """The data of the page of a run: `facts`, and `blocks` by name, in the order of their use.

    tokenizer: of its language model; None shows numbers.
    activations: of an SAE that is no run, `run` being where it was loaded from.
    """
    properties = stored.properties
    grid = grid_of(sae)
    groups = {"post": properties.post} | ({"pre": properties.pre} if properties.pre else {})
    latents = sum(len(examined.count) for examined in groups.values())
    text = properties.text
    count = counts_for(latents, properties.post, text is not None)
    shown = {
        f"{name}.{kind}": examples
        for name, examined in groups.items()
        for kind, examples in examples_of(
            examined, count, None if text is None else text.shape[1]
        ).items()
    }
    contexts, places = in_text(text, list(shown.values()))
    lists = [examined.top_tokens for examined in groups.values()]
    if stored.logits is not None:
        lists += [stored.logits.raised, stored.logits.lowered]
    vocabulary = Vocabulary([*lists, contexts], tokenizer)
    text_block = encode(vocabulary.in_context(contexts))
    placed = {name: (at, shown[name].values) for name, at in zip(shown, places, strict=True)}
    relations = _relations(sae, properties)
    per_block = max(1, BLOCK_LATENTS // (grid.m * grid.n))
    facts = {
        **_facts(run, sae, stored, activations),
        "grid": grid._asdict(),
        "perBlock": per_block,
        "latents": sae.dict_size,
        "window": WINDOW,
        "contextTokens": contexts.shape[1],
        "wholeText": text is not None,
        "intervals": INTERVALS if count.interval else 0,
        "examples": count._asdict(),
        "sae": stored.facts.get("sae_sha256"),
    }
    blocks = {
        "index": encode(_index(properties, groups)),
        "vocabulary": encode_json(vocabulary.texts),
        "lists": encode(_lists(stored, groups, vocabulary, contexts if text is not None else None)),
        "labels": encode_json({} if labels is None else plain(labels)),
        "text": text_block,
    }
    for number, first in enumerate(range(0, grid.heads, per_block)):
        rows = {
            name: slice(first * width, (first + per_block) * width)
            for name, width in (("post", grid.m * grid.n), ("pre", grid.m + grid.n))
        }
        details = _details(rows, stored, groups, relations, placed, vocabulary)
        blocks[f"details-{number}"] = encode(details)
    return {"facts": facts, "blocks": blocks}


class Vocabulary:
    """The texts that occur, numbered from 0: first those of tokens by themselves."""

    def __init__(self, tokens: Iterable[np.ndarray], tokenizer: Any | None) -> None:
        used = np.unique(np.concatenate([np.unique(some) for some in tokens]))
        self.used, self.tokenizer = used[used >= 0], tokenizer
        self.texts = [self._texts([int(token)])[0] for token in self.used]
        """The text that each token adds to one that has begun, on one line; then bytes, and
        characters of several tokens."""
        self.known = {text: number for number, text in enumerate(self.texts)}
        self.partial = np.array([bool(PART.search(text)) for text in self.texts])

    def _texts(self, tokens: Sequence[int], fires: Sequence[float] | None = None) -> list[str]:
        return continued_texts(tokens, self.tokenizer, fires)

    def numbers(self, tokens: np.ndarray) -> np.ndarray:
        """Numbers of tokens by themselves, packed."""
        return self.packed(self._numbers(tokens))

    def _numbers(self, tokens: np.ndarray) -> np.ndarray:
        return np.where(tokens < 0, -1, np.searchsorted(self.used, tokens))

    def in_context(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Numbers of the tokens [c, L] of contexts, of which several may spell one character.

        Such a character is the last one's text; "hiddenAt" are the places of the others, and
        "hidden" their texts where a latent fires on them, which are bytes.
        """
        numbers = self._numbers(tokens)
        firing = numbers.copy()
        partial = np.append(self.partial, False)[numbers]  # -1: no token
        edges = np.diff(np.pad(partial, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        starts, ends = (edges > 0).nonzero(), (edges < 0).nonzero()
        seen: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
        for context, start, end in zip(*starts, ends[1], strict=True):
            run = tuple(tokens[context, start:end].tolist())
            if run not in seen:
                plain, bytewise = self._texts(run), self._texts(run, [1.0] * len(run))
                seen[run] = [*map(self._number, plain)], [*map(self._number, bytewise)]
            numbers[context, start:end], firing[context, start:end] = seen[run]
        hidden = np.flatnonzero(firing != numbers)
        return {
            "tokens": self.packed(numbers),
            "hiddenAt": hidden.astype(np.uint32),
            "hidden": self.packed(firing.ravel()[hidden]),
        }

    def _number(self, text: str) -> int:
        if text not in self.known:
            self.known[text] = len(self.texts)
            self.texts.append(text)
        return self.known[text]

    def packed(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers as unsigned integers of one type, whose largest stands for no token."""
        return smallest(np.append(numbers, len(self.texts)))[:-1].reshape(numbers.shape)


def _index(properties: Properties, groups: dict[str, Examined]) -> dict[str, np.ndarray]:
    """Figures of all latents and pre-latents."""
    arrays: dict[str, np.ndarray] = {}
    for name, examined in groups.items():
        peak = examined.top.scores[:, 0]
        values = of_each(examined, properties.tokens)
        values["max"] = np.where(np.isfinite(peak), peak, np.nan)
        arrays |= {f"{name}.{key}": rounded(value) for key, value in values.items()}
    return arrays


def _lists(
    stored: Stored,
    groups: dict[str, Examined],
    vocabulary: Vocabulary,
    text: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Tokens of all latents and pre-latents, and how often each token is in the text."""
    arrays: dict[str, np.ndarray] = {}
    for name, examined in groups.items():
        arrays[f"{name}.tokens"] = vocabulary.numbers(examined.top_tokens)
        arrays[f"{name}.shares"] = np.ceil(65535 * examined.top_shares).astype(np.uint16)
    if stored.logits is not None:
        for name in ("raised", "lowered"):
            tokens, by = (getattr(stored.logits, key) for key in (name, f"{name}_by"))
            arrays[name] = vocabulary.numbers(tokens[:, :LISTED_EFFECTS])
            arrays[f"{name}By"] = rounded(by[:, :LISTED_EFFECTS])
    if text is not None:
        used = np.searchsorted(vocabulary.used, text[text >= 0])
        arrays["counts"] = np.bincount(used, minlength=len(vocabulary.used)).astype(np.uint32)
    return arrays


def _relations(sae: SAE, properties: Properties) -> dict[str, np.ndarray]:
    """What is known of each latent [F] and others: its head, all others, its base and extension."""
    relations = {
        "headCorrelation": properties.head_correlation,
        "otherCorrelation": properties.other_correlation,
        **(gates(sae, properties) if properties.both is not None else {}),
    }
    return {name: value.ravel() for name, value in relations.items() if value is not None}


def _details(
    rows: dict[str, slice],
    stored: Stored,
    groups: dict[str, Examined],
    relations: dict[str, np.ndarray],
    shown: dict[str, tuple[np.ndarray, np.ndarray]],
    vocabulary: Vocabulary,
) -> dict[str, np.ndarray]:
    """Arrays of some rows of latents ("post") and of pre-latents ("pre").

    shown: places [N, s] and activations [N, s, w] of examples.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, examined in groups.items():
        part = rows[name]
        histogram = examined.histogram[part].clip(max=2**32 - 1)
        arrays[f"{name}.histogram"] = histogram.astype(np.uint32)
        arrays[f"{name}.histogramTop"] = examined.histogram_top[part].astype(np.float32)
    for name, (places, values) in shown.items():
        part = rows[name.partition(".")[0]]
        peak = np.maximum(values[part].max(2, initial=0), np.finfo(np.float32).tiny)
        shade = np.ceil(255 * (values[part] / peak[..., None]).clip(0, 1))
        arrays[f"{name}.places"] = places[part].astype(np.uint32)  # -1: the largest
        arrays[f"{name}.values"] = shade.astype(np.uint8)
        arrays[f"{name}.peaks"] = rounded(peak)
    part = rows["post"]
    arrays |= {name: rounded(value[part]) for name, value in relations.items()}
    if stored.nearest is not None:
        arrays["nearest"] = stored.nearest.latents[part].astype(np.uint32)
        arrays["cosines"] = rounded(stored.nearest.cosines[part])
    if stored.logits is not None:
        for name in ("raised", "lowered"):
            arrays[name] = vocabulary.numbers(getattr(stored.logits, name)[part])
            arrays[f"{name}By"] = rounded(getattr(stored.logits, f"{name}_by")[part])
    return arrays


def _name(run: Path) -> str:
    """A run's name, with that of its sweep or suite before it."""
    in_suite = (run.parent / INDEX_NAME).is_file()
    return f"{run.parent.name}/{run.name}" if in_suite else run.name


def _facts(run: Path, sae: SAE, stored: Stored, activations: DataConfig | None) -> dict[str, Any]:
    """The run as a whole: where it comes from, its figures, its curves."""
    trained, evaluation = None, {}
    if activations is None:
        settings = read_run(run)["config"]
        data, trained = settings["data"], settings["train"]["tokens"]
        evaluation = last_evaluation(read_metrics(run / "metrics.jsonl")[0])
    else:
        data = vars(activations)
    properties = stored.properties
    return {
        "run": _name(run.resolve()),
        "kind": kind_of(vars(sae.config)),
        "active": sae.selection.describe(sae.config),
        "model": data["model"],
        "hookpoint": data["hookpoint"] or f"layer {data['layer']}",
        "target": data.get("target_hookpoint"),
        "dataset": stored.facts["text"]["dataset"],
        "tokens": properties.tokens,
        "massive": stored.facts.get("massive_tokens", 0),
        "trained": trained,
        "figures": [
            (label, figure_text(key, evaluation[key]), meaning)
            for key, (label, meaning) in MEANING.items()
            if key in evaluation
        ],
        "warning": massive_warning(evaluation),
        "summary": stored.facts["summary"],
        "exactEntropy": properties.exact_entropy,
        "logits": None if stored.logits is None else {"norm": stored.logits.norm},
    }
