"""What other libraries show of a latent, from the properties of its SAE.

`Dashboard` is the base class of their formats, which `kronsae.registry.DASHBOARDS` registers: a
subclass writes a folder of `Latent`s. None of them holds the SAE itself.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import GenericAlias
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from kronsae.config import kind_of
from kronsae.data.hookpoints import Site
from kronsae.data.token_text import continued_texts
from kronsae.errors import InputError
from kronsae.model.origin import Origin
from kronsae.properties import WINDOW, Examples, Stored
from kronsae.properties.labels import Labels
from kronsae.properties.run import Opened
from kronsae.system.documents import Keys, read_json, typed

INTERVALS = 5
"""Equal intervals of activations, from each of which examples are drawn."""

SAMPLED = 5
"""Examples of an interval."""

ALIGNED = 3
"""Coordinates of the decoder row that are named: the largest ones."""

PART_OF_HOOK = {"resid": "res", "mlp": "mlp", "attn": "att"}
"""Short names of what is read, as Neuronpedia's sets of sources have them."""

LENS_NAMES = {"gpt2": "gpt2-small"}
"""TransformerLens' names of models, where they are not the end of the name on the hub."""

_SCORE = Keys({"score": float | None}, null=True)
_EXPLAINED = Keys(
    {"latent": int, "explanation": str | None, "detection": _SCORE, "fuzzing": _SCORE}
)
_EXPLANATIONS = Keys({"explainer": str, "latents": GenericAlias(list, (_EXPLAINED,))})


class Passage(NamedTuple):
    """An example: its tokens, the latent on each of them, and which one it was chosen for."""

    tokens: list[int]
    values: list[float]
    chosen: int


class Group(NamedTuple):
    """Examples whose activations are between low and high."""

    low: float
    high: float
    share: float | None
    """Of all tokens, how many have such an activation; None: they are the strongest."""
    passages: list[Passage]


class Explained(NamedTuple):
    """What a language model, or a person, said of a latent, and how well that predicts."""

    text: str
    model: str
    """ "": a person."""
    scores: dict[str, float]


class Latent(NamedTuple):
    """What is shown of a latent."""

    id: int
    density: float
    maximum: float
    centres: list[float]
    """Middles of the histogram's bins."""
    counts: list[int]
    groups: list[Group]
    raised: list[tuple[int, float]]
    """Tokens whose logits it raises most, and by how much."""
    lowered: list[tuple[int, float]]
    aligned: list[tuple[int, float, float]]
    """Largest coordinates of its decoder row: which, value, share of the sum of all magnitudes."""
    nearest: list[tuple[int, float]]
    """Latents with the nearest decoder rows, and cosines."""
    explained: Explained | None


class Dashboard(ABC):
    """A format of folders that hold what is shown of latents."""

    library: ClassVar[str]
    """The name of what reads it."""
    how_to_load: ClassVar[str]
    """How the folder {out} gets there."""
    has_explanations: ClassVar[bool] = True
    """Whether its files hold explanations of latents."""

    @staticmethod
    @abstractmethod
    def write(subject: "Subject", folder: Path) -> Path:
        """Write into a folder, and return the part of it that is this SAE's."""


@dataclass(frozen=True)
class Names:
    """Names under which an SAE is shown; None: those that follow from its run."""

    model: str | None = None
    source_set: str | None = None
    creator: str = "kronsae"
    suffix: str = ""
    """What tells it from others at the same hookpoint."""


@dataclass(frozen=True)
class Subject:
    """An SAE whose latents are shown."""

    opened: Opened
    names: Names
    latents: Sequence[int] | None
    """Which ones; None: all."""
    explained: dict[int, Explained]
    member: str = ""
    """Its name in a sweep."""

    @cached_property
    def origin(self) -> Origin:
        return Origin.of(self.opened.sae.metadata)

    @property
    def stored(self) -> Stored:
        return self.opened.stored

    @property
    def site(self) -> Site:
        """Where its activations are read. Raises InputError if that is no site of a block."""
        if self.origin.site is None:
            raise InputError(
                f"{self.origin.hookpoint or 'the hookpoint'} is no site of a block that "
                "TransformerLens knows, as dashboards need it"
            )
        return self.origin.site

    @property
    def model(self) -> str:
        """The model's id: TransformerLens' name, in small letters."""
        name = self.opened.data.model.rstrip("/").rpartition("/")[2].lower()
        return self.names.model or LENS_NAMES.get(name, name)

    @property
    def source_set(self) -> str:
        """The name of the SAEs of which this is one, for instance "kronsae-res-4k"."""
        config = self.opened.sae.config
        part = "transcoder" if config.d_target else self.site.name.partition("_")[0]
        size = config.dict_size
        width = f"{size // 1024}k" if size % 1024 == 0 else str(size)
        return self.names.source_set or f"kronsae-{PART_OF_HOOK.get(part, part)}-{width}"

    @property
    def source(self) -> str:
        """The SAE's own name: its layer, its set, and a suffix."""
        suffix = self.names.suffix and f"__{self.names.suffix}"
        return f"{self.site.layer}-{self.source_set}{suffix}"

    @property
    def context_length(self) -> int:
        """Tokens of a context."""
        return self.origin.context_length or self.opened.data.context_length

    @property
    def title(self) -> str:
        config = self.opened.sae.config
        return f"{kind_of(vars(config))}, {config.dict_size:,} latents, {self.site.lens}"

    @cached_property
    def text_of(self) -> Callable[[int], str]:
        """The text of a token, in which a line break is one."""
        known: dict[int, str] = {}

        def text(token: int) -> str:
            if token not in known:
                [known[token]] = continued_texts([token], self.opened.tokenizer, one_line=False)
            return known[token]

        return text

    def __iter__(self) -> Iterator[Latent]:
        count = self.opened.sae.dict_size
        return map(self.latent, range(count) if self.latents is None else self.latents)

    def batches(self, size: int) -> Iterator[list[Latent]]:
        """Its latents, `size` at a time."""
        latents = iter(self)
        while batch := list(islice(latents, size)):
            yield batch

    def latent(self, index: int) -> Latent:
        post, tokens = self.stored.properties.post, self.stored.properties.tokens
        counts = np.trim_zeros(post.histogram[index], "b")
        step = float(post.histogram_top[index]) / post.histogram.shape[1]
        peak = float(post.top.scores[index, 0])
        effects, nearest = self.stored.logits, self.stored.nearest
        raised, lowered = (
            [] if effects is None else _pairs(effects, name, index)
            for name in ("raised", "lowered")
        )
        return Latent(
            index,
            float(post.count[index]) / tokens,
            peak if np.isfinite(peak) else 0.0,
            [(place + 0.5) * step for place in range(len(counts))],
            counts.tolist(),
            [*_strongest(post.top, index), *_intervals(post.sample, index, counts, step, tokens)],
            raised,
            lowered,
            self._aligned(index),
            [] if nearest is None else _zipped(nearest.latents[index], nearest.cosines[index]),
            self.explained.get(index),
        )

    def _aligned(self, index: int) -> list[tuple[int, float, float]]:
        row = self.opened.sae.W_dec[index].detach().float().cpu()
        total = row.abs().sum().item() or 1.0
        largest = torch.topk(row.abs(), min(ALIGNED, len(row))).indices.tolist()
        return [(i, row[i].item(), abs(row[i].item()) / total) for i in largest]


def read_explanations(path: Path) -> dict[int, Explained]:
    """Explanations in a folder that `kronsae interpret` wrote, or in its interpretation.json."""
    path = path / "interpretation.json" if path.is_dir() else path
    try:
        document = typed(read_json(path), _EXPLANATIONS, "")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected what kronsae interpret wrote: {error}") from error
    return {
        latent["latent"]: Explained(
            latent["explanation"],
            document["explainer"],
            {
                name: latent[name]["score"]
                for name in ("detection", "fuzzing")
                if latent[name] and latent[name]["score"] is not None
            },
        )
        for latent in document["latents"]
        if latent["explanation"]
    }


def with_labels(explained: dict[int, Explained], labels: Labels) -> dict[int, Explained]:
    """Explanations, and a run's labels: a person's own in place of one that a model wrote."""
    new = {
        latent: Explained(
            label.text,
            label.by,
            {} if label.detection is None else {"detection": label.detection},
        )
        for latent, label in labels.items()
        if not label.by or latent not in explained
    }
    return explained | new


def number(value: float) -> float:
    """A value with five digits, which keeps files short."""
    return float(f"{value:.5g}")


def identity(*parts: object) -> str:
    """An id of 25 letters and digits for a row of a table, the same in each export."""
    text = "\0".join(map(str, parts))
    return "k" + hashlib.sha256(text.encode()).hexdigest()[:24]


def one_name(text: str) -> str:
    """A text as part of a name: letters, digits, dots and dashes."""
    return re.sub("[^a-zA-Z0-9.]+", "-", text).strip("-")


def _pairs(effects: Any, name: str, index: int) -> list[tuple[int, float]]:
    return _zipped(getattr(effects, name)[index], getattr(effects, f"{name}_by")[index])


def _zipped(keys: np.ndarray, values: np.ndarray) -> list[tuple[int, float]]:
    return list(zip(keys.tolist(), values.tolist(), strict=True))


def _passages(examples: Examples, index: int) -> list[Passage]:
    """All examples of a latent."""
    there = examples.places[index] >= 0
    passages = []
    for tokens, values in zip(
        examples.tokens[index, there], examples.values[index, there], strict=True
    ):
        inside = tokens >= 0
        chosen = int(inside[: WINDOW // 2].sum())
        passages.append(Passage(tokens[inside].tolist(), values[inside].tolist(), chosen))
    return passages


def _strongest(top: Examples, index: int) -> list[Group]:
    passages = _passages(top, index)
    return [Group(-1, float(top.scores[index, 0]), None, passages)] if passages else []


def _intervals(
    sample: Examples, index: int, counts: np.ndarray, step: float, tokens: int
) -> list[Group]:
    """Sampled examples by their activation, the highest interval first; none that is empty."""
    edges = np.unique(np.linspace(0, len(counts), INTERVALS + 1).round().astype(int))
    passages = _passages(sample, index)
    groups = []
    for first, last in reversed(list(zip(edges[:-1], edges[1:], strict=True))):
        low, high = first * step, last * step
        inside = [p for p in passages if low <= p.values[p.chosen] < high][:SAMPLED]
        if inside:
            groups.append(Group(low, high, float(counts[first:last].sum()) / tokens, inside))
    return groups
