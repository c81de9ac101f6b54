"""What the explorer's page holds: facts, an index of all latents, and blocks of their details.

Letters: F latents, P pre-latents, N of either, s examples, w tokens of an example's window.

facts: JSON, read at once. index: arrays of all latents, for the walls, grids and lists. vocabulary:
the texts of all tokens that occur; everything else names tokens by their number in it. Details of
`facts["perBlock"]` heads (or groups of latents) lie in a block each, read when they are looked at.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kronsae.config import kind_of
from kronsae.data.token_text import token_texts
from kronsae.explore.blocks import encode, encode_json, rounded, smallest
from kronsae.explore.report import read_metrics
from kronsae.metrics.figures import MEANING
from kronsae.model.sae import SAE
from kronsae.properties import WINDOW, Examined, Examples, Stored, gates
from kronsae.properties.contexts import SAME_TOKENS, phrases
from kronsae.properties.summary import of_each

EXAMPLES = ((8, 8), (6, 4), (4, 2), (3, 1))
"""Strongest and sampled examples of each latent: the first that fits in EXAMPLE_BYTES."""

EXAMPLE_BYTES = 80 * 2**20
"""Examples before they are compressed."""

BLOCK_LATENTS = 64
"""At least so many latents a block, if there are."""

GROUP = 8
"""A dense encoder's latents are shown in squares of so many rows."""

INDEX_TOKENS = 4
CURVE_POINTS = 400


class Content(NamedTuple):
    """The page's data, as text."""

    facts: dict[str, Any]
    index: str
    vocabulary: str
    details: list[str]


class Grid(NamedTuple):
    """How latents are laid out: `heads` grids of m x n, the last of which may not be full."""

    heads: int
    m: int
    n: int
    kron: bool


def grid_of(sae: SAE) -> Grid:
    """Its heads, or for a dense encoder squares of neighbours by number."""
    config = sae.config
    if config.heads:
        return Grid(config.heads, config.m, config.n, True)
    return Grid(-(-config.dict_size // GROUP**2), GROUP, GROUP, False)


def make_content(run: Path, sae: SAE, stored: Stored, tokenizer: Any | None) -> Content:
    """The data of the page of a run. tokenizer: of its language model; None shows numbers."""
    found = stored.properties
    grid = grid_of(sae)
    groups = {"post": found.post} | ({"pre": found.pre} if found.pre is not None else {})
    tops, samples = _examples_shown(sum(len(each.count) for each in groups.values()), found.post)
    shown = {
        name: (_distinct(each.top, tops), _cut(each.sample, samples))
        for name, each in groups.items()
    }
    tokens = [each.top_tokens for each in groups.values()]
    tokens += [examples.tokens for pair in shown.values() for examples in pair]
    if stored.logits is not None:
        tokens += [stored.logits.raised.numpy(), stored.logits.lowered.numpy()]
    used = np.unique(np.concatenate([np.unique(each) for each in tokens]))
    vocabulary = Vocabulary(used[used >= 0])
    per_block = max(1, BLOCK_LATENTS // (grid.m * grid.n))
    facts = {
        **_facts(run, sae, stored),
        "grid": grid._asdict(),
        "perBlock": per_block,
        "latents": sae.dict_size,
        "window": WINDOW,
        "examples": [tops, samples],
    }
    details = [
        encode(arrays) for arrays in _details(stored, grid, shown, vocabulary, per_block, groups)
    ]
    return Content(
        facts,
        encode(_index(sae, stored, groups, vocabulary)),
        encode_json(vocabulary.texts(tokenizer)),
        details,
    )


class Vocabulary:
    """The tokens [u] that occur, numbered from 0."""

    def __init__(self, used: np.ndarray) -> None:
        self.used = used

    def numbers(self, tokens: np.ndarray) -> np.ndarray:
        """Numbers of tokens, as unsigned integers; the largest stands for no token."""
        found = np.searchsorted(self.used, tokens)
        # One type for all arrays of a page: by the size of the vocabulary.
        numbers = smallest(np.append(np.where(tokens < 0, -1, found), len(self.used)))
        return numbers[:-1].reshape(tokens.shape)

    def texts(self, tokenizer: Any | None) -> list[str]:
        """What each token adds to a text that has begun, on one line."""
        if tokenizer is None:
            return [f"[{token}]" for token in self.used]
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        return [
            "".join(token_texts([*anchor, int(token)], tokenizer)[len(anchor) :])
            for token in self.used
        ]


def _examples_shown(count: int, post: Examined) -> tuple[int, int]:
    """How many strongest and sampled examples of each of `count` latents the page holds."""
    fits = [pair for pair in EXAMPLES if count * sum(pair) * WINDOW * 3 <= EXAMPLE_BYTES]
    tops, samples = (fits or EXAMPLES[-1:])[0]
    return min(tops, post.top.scores.shape[1]), min(samples, post.sample.scores.shape[1])


class Shown(NamedTuple):
    """Examples of N latents on the page."""

    tokens: np.ndarray
    """[N, s, w]; -1: none."""
    values: np.ndarray
    """[N, s, w] activations."""


def _distinct(examples: Examples, size: int) -> Shown:
    """The strongest that do not repeat the text of a stronger one, up to their middle."""
    tokens, values = examples.tokens, examples.values
    middle = tokens.shape[2] // 2
    phrase = phrases(tokens[:, :, middle - SAME_TOKENS + 1 : middle + 1])  # [N, s]
    there = examples.places >= 0
    later = np.tri(phrase.shape[1], k=-1, dtype=bool)
    repeats = ((phrase[:, :, None] == phrase[:, None, :]) & later).any(2)
    order = np.argsort(repeats | ~there, 1, kind="stable")[:, :size]
    keep = np.take_along_axis(there & ~repeats, order, 1)[..., None]
    tokens, values = (np.take_along_axis(each, order[..., None], 1) for each in (tokens, values))
    return Shown(np.where(keep, tokens, -1), np.where(keep, values, 0))


def _cut(examples: Examples, size: int) -> Shown:
    return Shown(examples.tokens[:, :size], examples.values[:, :size])


def _index(
    sae: SAE, stored: Stored, groups: dict[str, Examined], vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """Arrays of all latents and pre-latents."""
    found = stored.properties
    arrays: dict[str, np.ndarray] = {}
    for name, each in groups.items():
        values = of_each(each, found.tokens)
        arrays |= {f"{name}.{key}": rounded(value) for key, value in values.items()}
        peak = each.top.scores[:, 0]
        arrays[f"{name}.max"] = rounded(np.where(np.isfinite(peak), peak, np.nan))
        arrays[f"{name}.tokens"] = vocabulary.numbers(each.top_tokens[:, :INDEX_TOKENS])
        arrays[f"{name}.shares"] = (255 * each.top_shares[:, :INDEX_TOKENS]).astype(np.uint8)
    if found.head_correlation is not None:
        arrays["post.headCorrelation"] = rounded(found.head_correlation)
    if found.other_correlation is not None:
        arrays["post.otherCorrelation"] = rounded(found.other_correlation)
    if found.both is not None:
        for key, value in gates(sae, found).items():
            arrays[f"post.{key}"] = rounded(value.ravel())
    return arrays


def _details(
    stored: Stored,
    grid: Grid,
    shown: dict[str, tuple[Shown, Shown]],
    vocabulary: Vocabulary,
    per_block: int,
    groups: dict[str, Examined],
) -> Iterator[dict[str, np.ndarray]]:
    """Arrays of the latents of `per_block` heads at a time, and of their pre-latents."""
    widths = {"post": grid.m * grid.n, "pre": grid.m + grid.n}
    for first in range(0, grid.heads, per_block):
        arrays: dict[str, np.ndarray] = {}
        for name, each in groups.items():
            part = slice(first * widths[name], (first + per_block) * widths[name])
            arrays |= {
                f"{name}.histogram": each.histogram[part].clip(max=2**32 - 1).astype(np.uint32),
                f"{name}.histogramTop": each.histogram_top[part].astype(np.float32),
                f"{name}.tokens": vocabulary.numbers(each.top_tokens[part]),
                f"{name}.shares": rounded(each.top_shares[part]),
            }
            for kind, examples in zip(("top", "sample"), shown[name], strict=True):
                values = examples.values[part]
                peak = np.maximum(values.max(2, initial=0), np.finfo(np.float32).tiny)
                shade = np.ceil(255 * (values / peak[..., None]).clip(0, 1))
                arrays[f"{name}.{kind}.tokens"] = vocabulary.numbers(examples.tokens[part])
                arrays[f"{name}.{kind}.values"] = shade.astype(np.uint8)
                arrays[f"{name}.{kind}.peaks"] = rounded(peak)
        part = slice(first * widths["post"], (first + per_block) * widths["post"])
        if stored.nearest is not None:
            arrays["nearest"] = smallest(stored.nearest.latents[part].numpy()).astype(np.uint32)
            arrays["cosines"] = rounded(stored.nearest.cosines[part].numpy())
        if stored.logits is not None:
            for name in ("raised", "lowered"):
                tokens = getattr(stored.logits, name)[part].numpy()
                arrays[name] = vocabulary.numbers(tokens)
                arrays[f"{name}By"] = rounded(getattr(stored.logits, f"{name}_by")[part].numpy())
        yield arrays


def _facts(run: Path, sae: SAE, stored: Stored) -> dict[str, Any]:
    """What the page says about the run as a whole."""
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
    data = settings["data"]
    records = read_metrics(run / "metrics.jsonl")
    last = [record for record in records if record["kind"] in ("heldout", "final")][-1:]
    figures = [
        [label, last[0][key], key, meaning]
        for key, (label, meaning) in MEANING.items()
        if last and key in last[0]
    ]
    found = stored.properties
    return {
        "run": run.resolve().name,
        "kind": kind_of(settings["sae"]),
        "active": sae.selection.describe(sae.config),
        "model": data["model"],
        "hookpoint": data["hookpoint"] or f"layer {data['layer']}",
        "target": data.get("target_hookpoint"),
        "dataset": stored.facts["text"]["dataset"],
        "tokens": found.tokens,
        "contexts": found.contexts,
        "trained": settings["train"]["tokens"],
        "figures": figures,
        "curves": {kind: _curve(records, kind) for kind in ("train", "heldout")},
        "summary": stored.facts["summary"],
        "exactEntropy": found.exact_entropy,
        "logits": None if stored.logits is None else {"norm": stored.logits.norm},
        "nearest": stored.nearest is not None,
    }


def _curve(records: list[dict[str, Any]], kind: str) -> list[list[float]]:
    """[tokens, explained variance] of the records of a kind, at most CURVE_POINTS of them."""
    kinds = ("heldout", "final") if kind == "heldout" else (kind,)
    points = [
        [record["tokens"], record["explained_variance"]]
        for record in records
        if record["kind"] in kinds and isinstance(record.get("explained_variance"), int | float)
    ]
    step = -(-len(points) // CURVE_POINTS) or 1
    return points[::step] + ([points[-1]] if points and (len(points) - 1) % step else [])
