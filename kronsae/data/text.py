"""Text documents with an exact position: the standard library, local files, the hub."""

import glob
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from kronsae.config import DataConfig
from kronsae.data.stdlib import stdlib_documents
from kronsae.errors import InputError

STDLIB = "stdlib"
BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""`datasets` builder by a file's suffix (after .gz and the like); anything else is text."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


class TextSource(Protocol):
    """Documents to train on, in a seeded order, and those set aside."""

    def heldout(self) -> Iterator[str]:
        """Documents to evaluate on, in a fixed order; `hold_out` says how many are used."""

    def hold_out(self, count: int) -> None:
        """Keep the first `count` documents that `heldout` gave out of training."""

    def __iter__(self) -> Iterator[str]:
        """Documents to train on, from the current position."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def fingerprint(self) -> str:
        """Identifies the text (not its order)."""


class IndexedText:
    """Documents that can be looked up by number: shuffled anew each epoch, position in O(1).

    documents: texts to train on.  aside: texts to evaluate on; None takes them from the beginning
    of `documents`.
    """

    def __init__(
        self,
        documents: Sequence[str],
        aside: Sequence[str] | None,
        *,
        seed: int,
        epochs: int,
        fingerprint: str,
    ) -> None:
        self.documents, self.aside = documents, aside
        self.seed, self.epochs = seed, epochs
        self._fingerprint = fingerprint
        self.first = 0  # documents before it are held out
        self.epoch = self.position = 0

    def heldout(self) -> Iterator[str]:
        yield from _every(self.documents if self.aside is None else self.aside)

    def hold_out(self, count: int) -> None:
        if self.aside is None:
            self.first = count

    def __iter__(self) -> Iterator[str]:
        while self.epoch < self.epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            size = len(self.documents) - self.first
            order = torch.randperm(size, generator=generator)
            while self.position < size:
                document = self.documents[self.first + int(order[self.position])]
                self.position += 1
                yield document
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def fingerprint(self) -> str:
        return self._fingerprint


class StreamedText:
    """Documents of a streaming dataset, in its own order; the first ones are held out."""

    def __init__(self, dataset: Any, column: str, *, epochs: int, fingerprint: str) -> None:
        self.dataset, self.column, self.epochs = dataset, column, epochs
        self._fingerprint = fingerprint
        self.epoch, self.train = 0, dataset

    def heldout(self) -> Iterator[str]:
        for row in self.dataset:
            yield row[self.column]

    def hold_out(self, count: int) -> None:
        self.train = self.dataset.skip(count)
        self.start = self.train.state_dict()

    def __iter__(self) -> Iterator[str]:
        while self.epoch < self.epochs:
            for row in self.train:
                yield row[self.column]
            self.epoch += 1
            self.train.load_state_dict(self.start)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "stream": self.train.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.train.load_state_dict(state["stream"])

    def fingerprint(self) -> str:
        return self._fingerprint


class Column:
    """One column of a `datasets.Dataset` as a sequence of strings (memory-mapped)."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str:
        return self.dataset[index][self.name] or ""


def open_text(config: DataConfig, seed: int) -> TextSource:
    """The text that `config` names.

    "stdlib"; local files, folders and globs, separated by commas (.jsonl, .json, .parquet and
    .arrow hold one document a row; of .txt files each paragraph is a document, of other text files
    the whole file); else a dataset of the Hugging Face hub.
    Raises InputError if there is none, it is empty, or it has no such column.
    """
    if config.dataset == STDLIB:
        return _open_stdlib(config, seed)
    files = local_files(config.dataset)
    dataset = _open_files(files) if files else _open_hub(config)
    _check_column(dataset, config)
    if config.streaming:
        mark = _digest(config.dataset, config.dataset_config, config.split, config.text_column)
        return StreamedText(dataset, config.text_column, epochs=config.epochs, fingerprint=mark)
    if len(dataset) == 0:
        raise InputError(f"dataset {config.dataset!r} is empty")
    mark = (
        _digest(*((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files))
        if files
        else dataset._fingerprint
    )
    documents = Column(dataset, config.text_column)
    return IndexedText(documents, None, seed=seed, epochs=config.epochs, fingerprint=mark)


def local_files(dataset: str) -> list[Path]:
    """Files that a --dataset value names, or [] if it is the name of a hub dataset.

    Raises InputError if it can only be meant as files and there are none.
    """
    found: list[Path] = []
    for part in dataset.split(","):
        path = Path(part).expanduser()
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
        elif path.is_file():
            found.append(path)
        elif any(sign in part for sign in "*?["):
            matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
            if not matches:
                raise InputError(f"dataset: no file matches {part!r}")
            found += [p for p in matches if p.is_file()]
        elif "," in dataset or part.startswith((".", "/", "~")) or path.suffix in _SUFFIXES:
            raise InputError(f"dataset: no file or folder {part!r}")
    return found


_SUFFIXES = {*BUILDERS, *COMPRESSIONS, ".txt", ".md", ".py", ".csv"}


def _open_stdlib(config: DataConfig, seed: int) -> IndexedText:
    try:
        train, aside = (stdlib_documents(heldout=side) for side in (False, True))
    except FileNotFoundError as error:
        raise InputError(str(error)) from error
    # By a hash, so that the beginning of what is set aside is not one package alone.
    aside.sort(key=lambda document: zlib.crc32(document["path"].encode()))
    mark = _digest(*(f"{d['path']}:{len(d['text'])}" for d in train + aside))
    texts = [[d["text"] for d in side] for side in (train, aside)]
    return IndexedText(*texts, seed=seed, epochs=config.epochs, fingerprint=mark)


def _open_files(files: list[Path]) -> Any:
    load_dataset = _datasets().load_dataset
    kinds = {_builder(path) for path in files}
    if len(kinds) > 1:
        raise InputError(
            f"dataset: expected files of one kind, got {sorted(kind for kind, _ in kinds)}"
        )
    builder, options = kinds.pop()
    quiet = _datasets().disable_progress_bars
    quiet()
    try:
        return load_dataset(
            builder, data_files=[str(path) for path in files], split="train", **dict(options)
        )
    except Exception as error:  # `datasets` raises dozens of kinds
        raise InputError(
            f"dataset: {files[0]} and {len(files) - 1} other files could not be read as {builder} "
            f"({_reason(error)})"
        ) from error


def _builder(path: Path) -> tuple[str, tuple[tuple[str, str], ...]]:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    if suffix in BUILDERS:
        return BUILDERS[suffix], ()
    return "text", (("sample_by", "paragraph" if suffix == ".txt" else "document"),)


def _open_hub(config: DataConfig) -> Any:
    try:
        return _datasets().load_dataset(
            config.dataset, config.dataset_config, split=config.split, streaming=config.streaming
        )
    except Exception as error:  # `datasets` raises dozens of kinds
        raise InputError(
            f"dataset {config.dataset!r} is no local file or folder, and could not be opened from "
            f"the Hugging Face hub ({_reason(error)})"
        ) from error


def _check_column(dataset: Any, config: DataConfig) -> None:
    columns = dataset.column_names
    if columns is None:  # a stream that does not know them: look at its first row
        columns = list(next(iter(dataset), {}))
    if not columns:
        raise InputError(f"dataset {config.dataset!r} is empty")
    if config.text_column not in columns:
        raise InputError(
            f"dataset {config.dataset!r} has no column {config.text_column!r}: it has "
            f"{columns}; name one with --text-column"
        )
    feature = (dataset.features or {}).get(config.text_column)
    kind = getattr(feature, "dtype", "string")
    if kind not in ("string", "large_string", "null"):
        raise InputError(f"column {config.text_column!r}: expected text, got {kind}")


def _every(documents: Sequence[str]) -> Iterator[str]:
    return (documents[index] for index in range(len(documents)))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError("--dataset needs the package datasets: pip install datasets") from error
    return datasets


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
