"""Sparse probing: how well a few latents tell the class of a text, as SAEBench measures it.

A document's latents are their means over its first tokens. For each class, the k latents whose mean
differs most between its documents and as many of other classes are the features of a logistic
regression; the figure is its accuracy on other documents, beside that of one on all coordinates of
the activations. [Gurnee et al. 2023; Karvonen et al. 2025]

Letters: n documents, c classes, d width, F latents, k latents of a probe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from kronsae.config import DataConfig
from kronsae.data.common import as_kept, is_finite
from kronsae.data.document import as_text
from kronsae.data.language_model import LanguageModel
from kronsae.data.text import STDLIB, IndexedText, open_text
from kronsae.errors import InputError
from kronsae.metrics.heldout import HeldoutText
from kronsae.metrics.logistic import logistic
from kronsae.model.sae import SAE
from kronsae.system.documents import shown

DOCUMENTS_AT_ONCE = 16
"""Documents whose latents are in memory with their zeros."""


@dataclass(frozen=True)
class Settings:
    """Settings of the measure. SAEBench's are documents=2500 (and texts of its own)."""

    ks: tuple[int, ...] = (1, 2, 5)
    """Numbers of latents of a probe."""
    documents: int = 120
    """Documents of each class; a class with fewer is left out."""
    context_length: int = 128
    """Tokens of a document that are read, from its beginning."""
    train_share: float = 0.8
    """Share of the documents on which probes are trained; the others are measured."""
    seed: int = 42

    @property
    def tests(self) -> int:
        """Documents of a class that are measured."""
        return self.documents - int(self.documents * self.train_share)


class Problem(NamedTuple):
    """A class against as many documents of the others."""

    train: Tensor
    """[n] int64: documents, those of the class first."""
    test: Tensor
    """[n] int64: likewise."""


class Probing(NamedTuple):
    """How well a few latents tell the class of a text."""

    metrics: dict[str, float]
    """Mean accuracies over the classes, by their names in `kronsae.metrics.MEANING`."""
    classes: dict[str, dict[str, Any]]
    """Accuracies of each class, and its latents."""


class ClassProbes:
    """Documents with classes, and their activations, to measure SAEs with.

    They depend on the model, its hookpoint and the text alone, so that SAEs share them.

    text: a document in each context.  labels: their classes. The first documents of a class are
        measured, and probes are trained on the others.
    Memory: the activations of all tokens in the text's mask.
    """

    def __init__(
        self,
        text: HeldoutText,
        labels: Sequence[str],
        settings: Settings = Settings(),
        *,
        on_read: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """on_read: called while it reads, with how many documents are done, and their total."""
        self.settings, self.counts = settings, torch.zeros(0, dtype=torch.int64)
        self.facts = text.facts
        self.problems = problems(labels, settings)
        parts = []
        for _, mask, x in text.read():
            parts.append(as_kept(x).cpu())
            self.counts = torch.cat([self.counts, mask.sum(1).cpu()])
            on_read(len(self.counts), len(labels))
        self.x = torch.cat(parts).split(self.counts.tolist())
        means = torch.stack([rows.double().sum(0) for rows in self.x])
        means /= self.counts.clamp(min=1)[:, None]
        self.of_all = {
            label: _accuracy(*_rotated(means[problem.train], means[problem.test]))
            for label, problem in self.problems.items()
        }
        """Accuracy of each class by all coordinates of the activations."""

    @torch.no_grad()
    def measure(self, sae: SAE) -> Probing:
        """Sparse probing of an SAE of raw activations of the same model and hookpoint.

        Memory: the latents of each document that are not 0.
        Raises InputError for another width, or if latents are not finite.
        """
        width = self.x[0].shape[1]
        if sae.config.d_model != width:
            raise InputError(f"probing: expected an SAE of width {width}, got {sae.config.d_model}")
        latents = self._mean_latents(sae)
        most = min(max(self.settings.ks), sae.dict_size)
        ranked = self._differences(latents).abs().topk(most, dim=0).indices.T  # [c, most]
        columns, places = ranked.unique(return_inverse=True)
        values = latents.index_select(1, columns).to_dense()
        classes = {}
        for (label, problem), place, row in zip(
            self.problems.items(), places, ranked.tolist(), strict=True
        ):
            x = values[:, place]
            accuracies = {
                str(k): _accuracy(x[problem.train][:, :k], x[problem.test][:, :k])
                for k in self.settings.ks
            }
            classes[label] = {**accuracies, "all": self.of_all[label], "latents": row}
        names = [*map(str, self.settings.ks), "all"]
        metrics = {
            f"class_accuracy_{name}": sum(one[name] for one in classes.values()) / len(classes)
            for name in names
        }
        return Probing(metrics, classes)

    def _mean_latents(self, sae: SAE) -> Tensor:
        """[n, F] sparse: means over the tokens of each document."""
        parts = []
        for first in range(0, len(self.x), DOCUMENTS_AT_ONCE):
            counts = self.counts[first : first + DOCUMENTS_AT_ONCE]
            rows = torch.cat(self.x[first : first + DOCUMENTS_AT_ONCE])
            values, indices = sae.encode(rows.to(sae.W_dec))
            if not is_finite(values):
                raise InputError("probing: the SAE's latents are not finite: leave it out")
            document = torch.arange(len(counts)).repeat_interleave(counts).to(indices.device)
            sums = torch.zeros(len(counts) * sae.dict_size, device=values.device)
            places = document[:, None] * sae.dict_size + indices
            sums.index_add_(0, places.flatten(), values.float().flatten())
            means = sums.view(len(counts), -1).cpu() / counts.clamp(min=1)[:, None]
            parts.append(means.to_sparse())
        return torch.cat(parts).coalesce()

    def _differences(self, latents: Tensor) -> Tensor:
        """[F, c]: means over the documents of each class to train on, less those of the others."""
        signs = torch.zeros(len(self.x), len(self.problems))
        for column, problem in zip(signs.T, self.problems.values(), strict=True):
            own, others = problem.train.chunk(2)
            column[own], column[others] = 1 / len(own), -1 / len(others)
        return torch.sparse.mm(latents.t(), signs)


def problems(labels: Sequence[str], settings: Settings) -> dict[str, Problem]:
    """A problem for each class, with as many documents of all others together, drawn evenly.

    The first `settings.tests` documents of a class are measured.
    Raises InputError unless there are two classes or more, each of `settings.documents` documents.
    """
    rows = {
        label: torch.tensor([row for row, one in enumerate(labels) if one == label])
        for label in sorted(set(labels))
    }
    sizes = {label: len(own) for label, own in rows.items()}
    if len(rows) < 2 or set(sizes.values()) != {settings.documents}:
        raise InputError(
            f"probing: expected two classes or more of {settings.documents} documents, "
            f"got {shown(sizes)}"
        )
    generator = torch.Generator().manual_seed(settings.seed)

    def against(label: str, side: slice) -> Tensor:
        own = rows[label][side]
        each = -(-len(own) // (len(rows) - 1))
        others = [
            _drawn(some[side], each, generator) for name, some in rows.items() if name != label
        ]
        return torch.cat([own, _drawn(torch.cat(others), len(own), generator)])

    sides = slice(settings.tests, None), slice(settings.tests)
    return {label: Problem(*(against(label, side) for side in sides)) for label in rows}


def _drawn(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _accuracy(train: Tensor, test: Tensor) -> float:
    """Accuracy of a logistic regression; in both halves [n, k] the class comes first."""

    def of_class(x: Tensor) -> Tensor:
        return torch.arange(len(x)) < len(x) // 2

    weights, biases = logistic(train[None], of_class(train)[None])
    right = (test.double() @ weights[0] + biases[0] > 0) == of_class(test)
    return right.double().mean().item()


def _rotated(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the coordinates that `train` spans, where a logistic regression is the same."""
    if len(train) >= train.shape[1]:
        return train, test
    _, _, basis = torch.linalg.svd(train, full_matrices=False)
    return train @ basis.T, test @ basis.T


def classes_of(data: DataConfig, column: str) -> list[str | None]:
    """What a column of a dataset says of each row: its class.

    Raises InputError unless the dataset has rows with a column of this name that holds text.
    """
    if data.image_column is not None or data.streaming or data.dataset == STDLIB:
        raise InputError(
            f"probing: expected a dataset whose rows have a column {column!r}, in files or from "
            f"the hub without --streaming, got {data.dataset!r}: give another --dataset"
        )
    named = replace(data, text_column=column, chat_roles="")
    try:
        rows = cast(IndexedText, open_text(named, seed=0)).documents
    except InputError as error:
        raise InputError(str(error).replace("--text-column", "--probe")) from error
    return [as_text(row) for row in rows]


def labelled_text(
    model: LanguageModel,
    data: DataConfig,
    column: str,
    held_out: int = 0,
    settings: Settings = Settings(),
) -> tuple[HeldoutText, list[str]]:
    """Documents of a text, each in a context of its own, and what `column` says of them.

    They are the first of each class in the order in which runs hold documents out, so that those
    that an SAE's run held out are measured before others; `facts` says how many of them are.
    Classes with fewer than `settings.documents` are left out.

    data: names the text, and how contexts begin.  held_out: number of documents that the run held
        out (`target_model.held_out_by_run`).
    Raises InputError unless the text has rows with a column of this name that holds text, and two
    such classes.
    """
    names = classes_of(data, column)
    text = cast(IndexedText, open_text(data, seed=0))
    chosen: dict[str, list[tuple[int, str]]] = {name: [] for name in names if name}
    for place, row in enumerate(text.rows.tolist()):
        of_class = chosen.get(names[row], [])
        if len(of_class) < settings.documents and (document := as_text(text.documents[row])):
            of_class.append((place, document))
    sizes = {name: len(some) for name, some in chosen.items()}
    chosen = {name: some for name, some in chosen.items() if len(some) == settings.documents}
    if len(chosen) < 2:
        raise InputError(
            f"probing: expected two classes or more with {settings.documents} documents in column "
            f"{column!r} of {data.dataset!r}, got {shown(sizes)}"
        )
    documents = [document for some in chosen.values() for _, document in some]
    tests = [place for some in chosen.values() for place, _ in some[: settings.tests]]
    whole = HeldoutText.of(model, documents, data.bos, data.exclude_tokens)
    length = settings.context_length
    facts = {
        "dataset": data.dataset,
        "column": column,
        "classes": list(chosen),
        "documents": len(documents),
        "measured": len(tests),
        "measured_of_heldout": sum(place < held_out for place in tests),
        "context_length": length,
    }
    text_of_classes = replace(
        whole, contexts=whole.contexts[:, :length], mask=whole.mask[:, :length], facts=facts
    )
    return text_of_classes, [name for name, some in chosen.items() for _ in some]
