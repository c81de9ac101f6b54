"""Data of the explorer's page: facts, an index of all latents, and blocks of their details.

Letters: F latents, P pre-latents, N of either, s examples, w tokens of an example's window.

facts: JSON, read at once. index: arrays of all latents, for the walls, grids and lists. vocabulary:
the texts of all tokens that occur; everything else names tokens by their number in it. Details of
`facts["perBlock"]` heads (or groups of latents) lie in a block each, read when they are looked at.
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
from kronsae.explore.report import last_evaluation, read_metrics
from kronsae.metrics.figures import MEANING, massive_warning
from kronsae.model.sae import SAE
from kronsae.properties import WINDOW, Examined, Examples, Properties, Stored, gates
from kronsae.properties.contexts import SAME_TOKENS, phrases
from kronsae.properties.summary import of_each
from kronsae.runs.folder import read_run

EXAMPLES = ((8, 8), (6, 4), (4, 2), (3, 1))
"""Strongest and sampled examples of each latent: the first that fits in EXAMPLE_BYTES."""

EXAMPLE_BYTES = 80 * 2**20
"""Examples before they are compressed."""

BLOCK_LATENTS = 64
"""At least so many latents a block, if there are."""

GROUP = 8
"""A dense encoder's latents are shown in squares of so many rows."""

INDEX_TOKENS = 4
"""Tokens of each latent in the index: those that most of its activation lies on."""

PART = re.compile("⟨[0-9A-F]{2}(?: [0-9A-F]{2})*⟩")
"""Bytes in a token's text that are no character of their own."""

Shown = tuple[np.ndarray, np.ndarray]
"""Examples of N latents: their tokens [N, s, w], or these by number, and activations [N, s, w]."""


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
) -> dict[str, Any]:
    """The data of the page of a run, by the names that its template has for them.

    tokenizer: of its language model; None shows numbers.
    activations: of an SAE that is no run, `run` being where it was loaded from.
    """
    properties = stored.properties
    grid = grid_of(sae)
    groups = {"post": properties.post} | ({"pre": properties.pre} if properties.pre else {})
    latents = sum(len(examined.count) for examined in groups.values())
    tops, samples = _examples_shown(latents, properties.post)
    lists = [examined.top_tokens for examined in groups.values()]
    if stored.logits is not None:
        lists += [stored.logits.raised, stored.logits.lowered]
    chosen = {
        f"{name}.{kind}": examples
        for name, examined in groups.items()
        for kind, examples in (
            ("top", _distinct(examined.top, tops)),
            ("sample", (examined.sample.tokens[:, :samples], examined.sample.values[:, :samples])),
        )
    }
    vocabulary = Vocabulary([*lists, *(tokens for tokens, _ in chosen.values())], tokenizer)
    shown = {
        name: (vocabulary.in_context(tokens, values), values)
        for name, (tokens, values) in chosen.items()
    }
    per_block = max(1, BLOCK_LATENTS // (grid.m * grid.n))
    facts = {
        **_facts(run, sae, stored, activations),
        "grid": grid._asdict(),
        "perBlock": per_block,
        "latents": sae.dict_size,
        "window": WINDOW,
        "examples": [tops, samples],
    }
    return {
        "facts": facts,
        "index": encode(_index(sae, properties, groups, vocabulary)),
        "vocabulary": encode_json(vocabulary.texts),
        "details": [
            encode(_details(stored, grid, first, per_block, groups, shown, vocabulary))
            for first in range(0, grid.heads, per_block)
        ],
    }


class Vocabulary:
    """The texts that occur, numbered from 0: first those of tokens by themselves."""

    def __init__(self, tokens: Iterable[np.ndarray], tokenizer: Any | None) -> None:
        used = np.unique(np.concatenate([np.unique(some) for some in tokens]))
        self.used, self.tokenizer = used[used >= 0], tokenizer
        self.texts = [self._texts([int(token)])[0] for token in self.used]
        """The text that each token adds to one that has begun, on one line; later, others, too."""
        self.known = {text: number for number, text in enumerate(self.texts)}
        self.partial = np.array([bool(PART.search(text)) for text in self.texts])

    def _texts(self, tokens: list[int], fires: Sequence[float] | None = None) -> list[str]:
        return continued_texts(tokens, self.tokenizer, fires)

    def numbers(self, tokens: np.ndarray) -> np.ndarray:
        """Numbers of tokens by themselves, packed."""
        return self.packed(self._numbers(tokens))

    def _numbers(self, tokens: np.ndarray) -> np.ndarray:
        return np.where(tokens < 0, -1, np.searchsorted(self.used, tokens))

    def in_context(self, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Numbers of the tokens of windows [N, s, w], of which several may spell one character.

        -1: no token.  values: activations, by which a part of a character is shown as bytes.
        """
        numbers = self._numbers(tokens)
        windows = ((numbers >= 0) & self.partial[numbers]).any(-1)
        for window in zip(*windows.nonzero(), strict=True):
            there = numbers[window] >= 0
            texts = self._texts(tokens[window][there].tolist(), values[window][there].tolist())
            numbers[window][there] = [self._number(text) for text in texts]
        return numbers

    def _number(self, text: str) -> int:
        if text not in self.known:
            self.known[text] = len(self.texts)
            self.texts.append(text)
        return self.known[text]

    def packed(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers as unsigned integers of one type, whose largest stands for no token."""
        return smallest(np.append(numbers, len(self.texts)))[:-1].reshape(numbers.shape)


def _examples_shown(count: int, post: Examined) -> tuple[int, int]:
    """How many strongest and sampled examples of each of `count` latents the page holds."""
    fits = [pair for pair in EXAMPLES if count * sum(pair) * WINDOW * 3 <= EXAMPLE_BYTES]
    tops, samples = (fits or EXAMPLES[-1:])[0]
    return min(tops, post.top.scores.shape[1]), min(samples, post.sample.scores.shape[1])


def _distinct(examples: Examples, size: int) -> Shown:
    """The strongest that do not repeat the text of a stronger one, up to their middle.

    Their tokens; -1: none.
    """
    middle = WINDOW // 2
    phrase = phrases(examples.tokens[:, :, middle - SAME_TOKENS + 1 : middle + 1])  # [N, s]
    present = examples.places >= 0
    later = np.tri(phrase.shape[1], k=-1, dtype=bool)
    repeats = ((phrase[:, :, None] == phrase[:, None, :]) & later).any(2)
    order = np.argsort(repeats | ~present, 1, kind="stable")[:, :size]
    keep = np.take_along_axis(present & ~repeats, order, 1)[..., None]
    return (
        np.where(keep, np.take_along_axis(examples.tokens, order[..., None], 1), -1),
        np.where(keep, np.take_along_axis(examples.values, order[..., None], 1), 0),
    )


def _index(
    sae: SAE, properties: Properties, groups: dict[str, Examined], vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """Arrays of all latents and pre-latents."""
    arrays: dict[str, np.ndarray] = {}
    for name, examined in groups.items():
        peak = examined.top.scores[:, 0]
        values = of_each(examined, properties.tokens)
        values["max"] = np.where(np.isfinite(peak), peak, np.nan)
        arrays |= {f"{name}.{key}": rounded(value) for key, value in values.items()}
        arrays[f"{name}.tokens"] = vocabulary.numbers(examined.top_tokens[:, :INDEX_TOKENS])
        arrays[f"{name}.shares"] = (255 * examined.top_shares[:, :INDEX_TOKENS]).astype(np.uint8)
    relations = {
        "headCorrelation": properties.head_correlation,
        "otherCorrelation": properties.other_correlation,
        **(gates(sae, properties) if properties.both is not None else {}),
    }
    return arrays | {
        f"post.{key}": rounded(value.ravel())
        for key, value in relations.items()
        if value is not None
    }


def _details(
    stored: Stored,
    grid: Grid,
    first: int,
    count: int,
    groups: dict[str, Examined],
    shown: dict[str, Shown],
    vocabulary: Vocabulary,
) -> dict[str, np.ndarray]:
    """Arrays of the latents of `count` heads from `first` on, and of their pre-latents."""
    rows = {
        name: slice(first * width, (first + count) * width)
        for name, width in (("post", grid.m * grid.n), ("pre", grid.m + grid.n))
    }
    arrays: dict[str, np.ndarray] = {}
    for name, examined in groups.items():
        part = rows[name]
        arrays |= {
            f"{name}.histogram": examined.histogram[part].clip(max=2**32 - 1).astype(np.uint32),
            f"{name}.histogramTop": examined.histogram_top[part].astype(np.float32),
            f"{name}.tokens": vocabulary.numbers(examined.top_tokens[part]),
            f"{name}.shares": rounded(examined.top_shares[part]),
        }
        for kind in ("top", "sample"):
            numbers, values = (array[part] for array in shown[f"{name}.{kind}"])
            peak = np.maximum(values.max(2, initial=0), np.finfo(np.float32).tiny)
            shade = np.ceil(255 * (values / peak[..., None]).clip(0, 1))
            arrays[f"{name}.{kind}.tokens"] = vocabulary.packed(numbers)
            arrays[f"{name}.{kind}.values"] = shade.astype(np.uint8)
            arrays[f"{name}.{kind}.peaks"] = rounded(peak)
    part = rows["post"]
    if stored.nearest is not None:
        arrays["nearest"] = stored.nearest.latents[part].astype(np.uint32)
        arrays["cosines"] = rounded(stored.nearest.cosines[part])
    if stored.logits is not None:
        for name in ("raised", "lowered"):
            arrays[name] = vocabulary.numbers(getattr(stored.logits, name)[part])
            arrays[f"{name}By"] = rounded(getattr(stored.logits, f"{name}_by")[part])
    return arrays


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
        "run": run.resolve().name,
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
