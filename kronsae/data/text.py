"""Text documents from Python's standard library, local files or the Hugging Face hub.

`--dataset` names one of:

- `stdlib`: the source of Python's standard library. Each file is a document.
- Local files, folders and globs, separated by commas. In JSONL, JSON, Parquet, Arrow, CSV and TSV
  files each row is a document, whatever the other columns are. In a .txt file, or a single text
  file, each paragraph is one (each line, if there are no blank lines). Of several other text files
  each is one document.
  Compressed files are decompressed. A folder stands for all files in and below it with a suffix
  known here, except hidden ones.
- Anything else: a dataset of the Hugging Face hub. Each row is a document.

A document is a text, a list of token ids, or the messages of a conversation, as the column holds
(`kronsae.data.document`). Rows without text (null, empty, white space) are skipped.
"""

import glob
import hashlib
import os
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

from torch import Tensor

from kronsae.config import DataConfig, flag
from kronsae.data.common import digest
from kronsae.data.document import (
    MESSAGES,
    TEXT,
    Document,
    as_document,
    as_text,
    kind_of_value,
    sizes,
)
from kronsae.data.sampling import Beginning, drawn_rows, shuffled
from kronsae.data.stdlib import stdlib_documents
from kronsae.errors import InputError, require, warn
from kronsae.system.documents import Keys, Number, typed
from kronsae.system.files import usable_path

STDLIB = "stdlib"

KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
"""Kind of file by suffix (before .gz etc.); all other files are text."""

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py")
"""Suffixes of the text files of a folder; others have to be named or matched by a glob."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_FILES = (*IMAGE_SUFFIXES, ".parquet", ".arrow")
"""Suffixes of the files of a folder of images."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

METADATA = frozenset({"dataset_info.json", "state.json"})
"""Files of `Dataset.save_to_disk` that hold no documents."""

HASHED_WHOLE_BYTES = 2**26
"""The fingerprint of a larger file hashes its size and both ends, to save reading all of it."""

HASHED_END_BYTES = 2**20

STREAMED_ROWS = 16
"""The fingerprint of a streamed dataset hashes its first 16 rows."""

PEEK_CHARACTERS = 2**20
"""How much of a text file is searched for blank lines."""

BUFFER_CHARACTERS = 2**28
"""A buffer of documents with more characters than this holds no others."""

LOOKED_AT = 10_000
"""So many documents of a stream are looked at before training, to see whether it is sorted."""

ROWS_AT_ONCE = 1000
"""Rows that are read at once where all are read."""

REASON_CHARACTERS = 1000
"""Longest message quoted from another library's error."""


HUB_ADVICE = {
    "onfig name is missing": "; choose one with --dataset-config",
    "Couldn't cast": "; of local files the text column alone is read: download them (hf download "
    "--repo-type dataset NAME) and name them by a glob",
}
"""What to do about an error of `datasets`, by a part of its message."""


class TextSource(Protocol):
    """Documents to train on, in a seeded order, and held-out documents."""

    def heldout(self) -> Iterator[Document]:
        """Documents to evaluate on, in an order that is the same for every seed.

        "" stands for a row without text.
        """

    def check_ids(self, vocab_size: int) -> None:
        """Refuse token ids that a model with so many tokens does not have.

        Raises InputError at once for documents that are indexed; those of a stream are refused when
        they are read.
        """

    def hold_out(self, count: int) -> None:
        """Exclude the first `count` documents of `heldout` from training.

        Raises InputError if that leaves nothing to train on.
        """

    def __iter__(self) -> Iterator[Document]:
        """Documents to train on, from the current position; none is empty."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last document given out, JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def fingerprint(self) -> str:
        """Hash of the text, whatever its order and location."""


def _state(state: Any, epochs: int, hints: dict[str, Any]) -> dict[str, Any]:
    """A text's state, with its epoch and what `hints` names. Raises InputError for another one."""
    return typed(state, Keys({"epoch": Number(int, 0, epochs), **hints}), "source.text")


class IndexedText:
    """Documents of a sequence, shuffled anew in each epoch; it goes to any position in O(1).

    documents: those to train on.  aside: those to evaluate on; None takes them from `documents`, in
    `heldout_order` (see `drawn_rows`).  name: of the text in error messages.
    """

    def __init__(
        self,
        documents: "Sequence[Document | None] | Column",
        aside: Sequence[Document | None] | None,
        *,
        seed: int,
        epochs: int,
        fingerprint: str,
        name: str = "given",
        heldout_order: str = "first",
    ) -> None:
        self.documents, self.aside, self.name = documents, aside, name
        self.seed, self.epochs = seed, epochs
        self._fingerprint = fingerprint
        self.heldout_order = heldout_order
        self.held_out = 0  # documents
        self.drawn: Tensor | None = None  # `rows`, once it was asked for
        self.epoch = self.position = 0

    def heldout(self) -> Iterator[Document]:
        if self.aside is not None:
            return (checked_document(text, self.name) for text in self.aside)
        return (checked_document(self.documents[int(row)], self.name) for row in self.rows)

    @property
    def rows(self) -> Tensor:
        """Rows [n] of the documents, of which the first `held_out` are held out."""
        if self.drawn is None:
            self.drawn = drawn_rows(self.documents, self.heldout_order)
        return self.drawn

    def hold_out(self, count: int) -> None:
        if self.aside is None:
            self.held_out = count
        if self.held_out >= len(self.documents):
            raise _nothing_left(self.name, count)

    def check_ids(self, vocab_size: int) -> None:
        documents = self.documents
        column = documents if isinstance(documents, Column) else None
        rows = (as_document(row, f"dataset {self.name!r}") for row in documents)
        wrong = _wrong_id(rows, vocab_size) if column is None else column.wrong_id(vocab_size)
        if wrong is not None:
            row, token = wrong
            raise _unknown_id(f"{self.name!r}, row {row + 1:,}", token, vocab_size)

    def size(self) -> int:
        """Bytes of the documents to train on, about, or (`size_of`) their number of token ids."""
        documents = self.documents
        size = documents.size() if isinstance(documents, Column) else sizes(documents)
        return size * (len(documents) - self.held_out) // max(1, len(documents))

    def __iter__(self) -> Iterator[Document]:
        rows = self.rows[self.held_out :]
        drawn, order = None, rows
        while self.epoch < self.epochs:
            if self.position >= len(rows):
                self.epoch, self.position = self.epoch + 1, 0
                continue
            if drawn != self.epoch:
                drawn, order = self.epoch, shuffled(rows, self.seed, self.epoch)
            text = self.documents[int(order[self.position])]
            self.position += 1
            if text := checked_document(text, self.name):
                yield text

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        position = Number(int, 0, len(self.documents))
        state = _state(state, self.epochs, {"position": position})
        self.epoch, self.position = state["epoch"], state["position"]

    def fingerprint(self) -> str:
        return self._fingerprint


class StreamedText:
    """Documents of a `datasets.IterableDataset`, in its own order; the first ones are held out.

    It resumes as fast as the dataset can: at the right file, then row by row.
    """

    def __init__(
        self, dataset: Any, column: str, *, epochs: int, fingerprint: str, name: str = "given"
    ) -> None:
        self.dataset, self.column, self.epochs, self.name = dataset, column, epochs, name
        self._fingerprint = fingerprint
        self.vocab_size: int | None = None
        self.epoch = 0
        self.resumed_at: dict[str, Any] | None = None
        self.hold_out(0, check=False)

    def heldout(self) -> Iterator[Document]:
        return self._texts(self.dataset)

    def check_ids(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def hold_out(self, count: int, check: bool = True) -> None:
        self.train = self.dataset.skip(count)
        self.start = self.train.state_dict()
        if check and not any(self._texts(self.train)):
            raise _nothing_left(self.name, count)
        self._go_to(self.start)

    def __iter__(self) -> Iterator[Document]:
        while self.epoch < self.epochs:
            for text in self._texts(self.train):
                self.resumed_at = None
                if text:
                    yield text
            self.epoch += 1
            self._go_to(self.start)

    def _go_to(self, position: dict[str, Any]) -> None:
        self.train.load_state_dict(position)
        # The dataset itself reports a loaded position only after its next row.
        self.resumed_at = position

    def _texts(self, dataset: Any) -> Iterator[Document]:
        with reading(f"dataset {self.name!r}: reading on failed"):
            for row in dataset:
                yield checked_document(row[self.column], self.name, self.vocab_size)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "stream": self.resumed_at or self.train.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = _state(state, self.epochs, {"stream": dict[str, Any]})
        self.epoch = state["epoch"]
        self._go_to(state["stream"])

    def fingerprint(self) -> str:
        return self._fingerprint


class BufferedText:
    """Documents of a `datasets.IterableDataset`, shuffled among so many at a time.

    A buffer is filled with the next documents, and gives them in an order that the seed draws
    before it is filled again. Hence a position is the place in the dataset where the buffer was
    filled, and a number in it. Held-out documents are drawn from the first buffer, and from those
    that follow if it has too few tokens. A warning says if later documents are of other kinds.

    size: documents in the buffer, or fewer, if they reach BUFFER_CHARACTERS.
    """

    def __init__(
        self,
        dataset: Any,
        column: str,
        *,
        size: int,
        heldout_order: str,
        seed: int,
        epochs: int,
        fingerprint: str,
        name: str = "given",
    ) -> None:
        self.dataset = dataset.skip(0)  # another one, which stands at its beginning
        self.column, self.name = column, name
        self.size, self.heldout_order = size, heldout_order
        self.seed, self.epochs = seed, epochs
        self._fingerprint = fingerprint
        self.held_out = 0  # documents
        self.beginning: dict[str, Any] = self.dataset.state_dict()
        self.rows, self.read_to = iter(self.dataset), self.beginning
        self.buffer: list[Document] = []
        self.vocab_size: int | None = None
        self.filled_at: dict[str, Any] | None = None
        self.profile: Beginning | None = None
        self.warned = False
        self._go_to_epoch(0)

    def _go_to_epoch(self, epoch: int) -> None:
        self.epoch, self.start = epoch, self.beginning
        self.before = 0  # documents of the dataset before the buffer
        self.position = 0  # documents given out of the buffer

    def check_ids(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.filled_at = None

    def heldout(self) -> Iterator[Document]:
        texts, end = self._fill(self.beginning)
        while texts:
            yield from (texts[row] for row in drawn_rows(texts, self.heldout_order))
            texts, end = self._fill(end)

    def hold_out(self, count: int) -> None:
        self.held_out = count
        self._go_to_epoch(0)
        if next(iter(self), None) is None:
            raise _nothing_left(self.name, count)
        self._go_to_epoch(0)
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Compare the first documents with those that follow, LOOKED_AT of them in all."""
        texts, end = self._fill(self.beginning)
        before = len(texts)
        while texts and before < LOOKED_AT:
            texts, end = self._fill(end)
            self._compare(texts, before)
            before += len(texts)

    def __iter__(self) -> Iterator[Document]:
        while self.epoch < self.epochs:
            texts, end = self._fill(self.start)
            if not texts:
                self._go_to_epoch(self.epoch + 1)
                continue
            self._compare(texts, self.before)
            order = self._order(texts)
            while self.position < len(order):
                text = texts[order[self.position]]
                self.position += 1
                if text:
                    yield text
            self.start, self.before, self.position = end, self.before + len(texts), 0

    def _fill(self, start: dict[str, Any]) -> tuple[list[Document], dict[str, Any]]:
        """The documents from a place in the dataset on that fill the buffer, and where they end."""
        if start == self.filled_at:
            return self.buffer, self.read_to
        with reading(f"dataset {self.name!r}: reading on failed"):
            if start != self.read_to:
                self.dataset.load_state_dict(start)
                self.rows = iter(self.dataset)
            self.filled_at, self.read_to = None, {}  # until it is filled
            self.buffer, characters = [], 0
            for row in islice(self.rows, self.size):
                self.buffer.append(checked_document(row[self.column], self.name, self.vocab_size))
                characters += len(as_text(self.buffer[-1]) or self.buffer[-1])
                if characters >= BUFFER_CHARACTERS:
                    break
            # The dataset reports a loaded position only after its next row.
            self.read_to = self.dataset.state_dict() if self.buffer else start
        self.filled_at = start
        return self.buffer, self.read_to

    def _order(self, texts: list[Document]) -> list[int]:
        """Rows of the buffer that are trained on, in their order."""
        rows = drawn_rows(texts, self.heldout_order)[max(0, self.held_out - self.before) :]
        return shuffled(rows, self.seed, self.epoch, self.before).tolist()

    def _compare(self, texts: list[Document], before: int) -> None:
        """Warn, once, if documents are of other kinds than those in the first buffer.

        before: documents of the dataset before them.
        """
        if self.profile is None:  # they are the first ones
            self.profile = Beginning(texts)
        difference = None if self.warned else self.profile.difference(texts)
        if difference is None:
            return
        self.warned = True
        warn(
            f"dataset {self.name!r} seems to be sorted: its documents {before + 1:,} to "
            f"{before + len(texts):,} differ from the first {self.profile.documents:,} "
            f"({difference}). Held-out text and the scale of activations come from the first ones, "
            "which are no sample of it: shuffle the text, leave --streaming out, or raise "
            f"--shuffle-documents (now {self.size:,})"
        )

    def state_dict(self) -> dict[str, Any]:
        names = ("epoch", "start", "before", "position")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        hints = {"start": dict[str, Any], "before": Number(int), "position": Number(int)}
        state = _state(state, self.epochs, hints)
        for name in ("epoch", "start", "before", "position"):
            setattr(self, name, state[name])

    def fingerprint(self) -> str:
        return self._fingerprint


class Column:
    """One column of a `datasets.Dataset` as a sequence of its values (memory-mapped)."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset.select_columns([name]).with_format(None), name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Document | None:
        return self.dataset[index][self.name]

    def __iter__(self) -> Iterator[Document | None]:
        for rows in self.dataset.iter(ROWS_AT_ONCE):
            yield from rows[self.name]

    def size(self) -> int:
        """Bytes of all values, about, or the number of token ids; it does not read them."""
        from kronsae.data.columns import size_of_column

        column = self.dataset.data.column(self.name)
        # `dataset` may be a selection of these rows.
        return size_of_column(column) * len(self) // max(1, len(column))

    def wrong_id(self, vocab_size: int) -> tuple[int, int] | None:
        """Row and value of a token id that is not below `vocab_size`; None if there is none."""
        from kronsae.data.columns import wrong_id

        return wrong_id(self.dataset.data.column(self.name), vocab_size)


def open_text(config: DataConfig, seed: int) -> TextSource:
    """The text that `config.dataset` names (see the module), in the order that `seed` draws.

    Raises InputError if it cannot be read, is empty, lacks the column, or if a setting has no
    effect on it.
    """
    files = check_text(config)
    if config.dataset == STDLIB:
        return _open_stdlib(config, seed)
    dataset = _open_files(files, config) if files else open_hub(config)
    kind = _check_rows(dataset, config)
    check_roles(config, kind)
    fingerprint = _fingerprint(dataset, files, config)
    name, epochs = config.dataset, config.epochs
    common: dict[str, Any] = {"epochs": epochs, "fingerprint": fingerprint, "name": name}
    if config.streaming and not config.shuffle_documents:
        return StreamedText(dataset, config.text_column, **common)
    common |= {"seed": seed, "heldout_order": config.heldout_order}
    if config.streaming:
        return BufferedText(dataset, config.text_column, size=config.shuffle_documents, **common)
    return IndexedText(Column(dataset, config.text_column), None, **common)


def check_roles(config: DataConfig, kind: str | None) -> None:
    """Raise InputError if --chat-roles has no effect on a column with this kind of documents."""
    if config.chat_roles and kind != MESSAGES:
        raise InputError(
            f"--chat-roles {config.chat_roles} has no effect: column {config.text_column!r} holds "
            f"{kind}, not messages: leave it out, or name another with --text-column"
        )


def _fingerprint(dataset: Any, files: list[Path], config: DataConfig) -> str:
    """Hash of a text from files or the hub, whatever its order."""
    if files:
        return digest(config.text_column, *map(kind_of_file, files), *map(content_hash, files))
    if not config.streaming:
        return dataset._fingerprint
    with reading(f"dataset {config.dataset!r} could not be read"):
        first = [row[config.text_column] for row in islice(dataset, STREAMED_ROWS)]
    return digest(config.dataset, config.dataset_config, config.split, config.text_column, *first)


def check_text(config: DataConfig) -> list[Path]:
    """Check `config` without reading the text; the files that it names ([] for stdlib, the hub).

    Raises InputError as `open_text` does.
    """
    if config.dataset == STDLIB:
        return []
    files = local_files(config.dataset, images=config.image_column is not None)
    if not files:
        return []
    for name in ("split", "dataset_config"):
        value = getattr(config, name)
        if value != getattr(DataConfig(), name):
            raise InputError(f"{flag(name)} {value} has no effect on local files: leave it out")
    kinds: dict[str, list[Path]] = {}
    for path in files:
        kinds.setdefault(kind_of_file(path), []).append(path)
    if len(kinds) > 1:
        counts = ", ".join(f"{len(x)} {kind} ({x[0].name}, ...)" for kind, x in kinds.items())
        raise InputError(
            f"dataset {config.dataset!r}: expected files of one kind, got {counts}; "
            "choose some with a glob, such as 'folder/**/*.parquet'"
        )
    if not any(path.stat().st_size for path in files):
        raise InputError(f"dataset {config.dataset!r} is empty: there is nothing in its files")
    if any(path.suffix.lower() == ".zst" for path in files):
        require("zstandard", f"dataset {config.dataset!r}")
    return files


def local_files(dataset: str, images: bool = False) -> list[Path]:
    """The files that a --dataset value names, each once, or [] if it names a hub dataset.

    images: of a folder those that hold images.
    Raises InputError if it can only mean files and there are none.
    """
    is_path = os.path.exists(os.path.expanduser(dataset))  # even with a comma in its name
    parts = [dataset] if is_path else [part.strip() for part in dataset.split(",")]
    files = [path for part in parts for path in _files_of(part, len(parts) == 1, images)]
    return list({path.resolve(): path for path in files}.values())


def _files_of(part: str, alone: bool, images: bool) -> list[Path]:
    path = usable_path(os.path.expanduser(part), "dataset")
    if path.is_dir():
        return _files_in(path, IMAGE_FILES if images else (*KINDS, *TEXT_SUFFIXES))
    if path.is_file():
        return [path]
    if any(sign in part for sign in "*?["):
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            raise InputError(f"dataset: no file matches {part!r}")
        return files
    looks_local = part.startswith((".", "/", "~")) or part.count("/") > 1
    if not alone or looks_local or path.suffix in (*KINDS, *COMPRESSIONS, *TEXT_SUFFIXES):
        raise InputError(f"dataset: there is no file or folder {part!r}")
    return []


def _files_in(folder: Path, known: tuple[str, ...]) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise InputError(
            f"dataset: {folder} holds several splits, {splits}: name the folder of one"
        )
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and _suffix(path) in known
        and path.name not in METADATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(
            f"dataset: no file in the folder {folder} ends in one of {', '.join(known)} "
            "(name others by a glob, such as 'folder/*.c')"
        )
    return files


def _suffix(path: Path) -> str:
    """The suffix in lower case, before that of a compression."""
    compressed = path.suffix.lower() in COMPRESSIONS
    return (path.with_suffix("") if compressed else path).suffix.lower()


def kind_of_file(path: Path) -> str:
    suffix = _suffix(path)
    return "image" if suffix in IMAGE_SUFFIXES else KINDS.get(suffix, "text")


def _open_stdlib(config: DataConfig, seed: int) -> IndexedText:
    try:
        train, aside = (stdlib_documents(heldout=side) for side in (False, True))
    except FileNotFoundError as error:
        raise InputError(str(error)) from error
    # By a hash, so that the first held-out documents are not all of one package.
    aside.sort(key=lambda document: zlib.crc32(document["path"].encode()))
    fingerprint = digest(*(document["text"] for document in train + aside))
    texts = [[document["text"] for document in side] for side in (train, aside)]
    return IndexedText(
        *texts, seed=seed, epochs=config.epochs, fingerprint=fingerprint, name=STDLIB
    )


def _open_files(files: list[Path], config: DataConfig) -> Any:
    """All rows of the files, as a Dataset or an IterableDataset."""
    import datasets

    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    kind = kind_of_file(files[0])
    with reading(f"dataset {config.dataset!r}: its {kind} files could not be read"), no_bars():
        for path in files:
            groups.setdefault(options_of_file(path, alone=len(files) == 1), []).append(str(path))
        parts = [_open_group(names, kind, dict(o), config) for o, names in groups.items()]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _open_group(names: list[str], kind: str, options: dict[str, str], config: DataConfig) -> Any:
    """All rows of files that are read with the same options."""
    import datasets

    from kronsae.data.columns import TextColumn

    if kind == "text":
        builder = datasets.load_dataset_builder(kind, data_files=names, **options)
    else:
        builder = TextColumn.of(names, **settings_of_files(names, config, options))
    if config.streaming:
        # Not those of an index, where there is one: positions of the stream would differ.
        builder.info.features = builder._info().features
        return builder.as_streaming_dataset("train")
    builder.download_and_prepare()
    if not builder.info.splits["train"].num_examples:
        raise InputError(f"dataset {config.dataset!r} is empty: there are no rows in its files")
    return builder.as_dataset("train")


def settings_of_files(
    files: Sequence[str | Path], config: DataConfig, options: Mapping[str, str]
) -> dict[str, str]:
    """`columns.Settings` to read the column of files with; the first one says what it holds."""
    from kronsae.data.columns import Settings, kind_of_column

    first = Path(files[0])
    settings = {"column": config.text_column, "kind": kind_of_file(first), **options}
    return {**settings, "documents": kind_of_column(first, Settings(**settings))}


def options_of_file(path: Path, alone: bool) -> tuple[tuple[str, str], ...]:
    """Options to read this file with."""
    suffix = _suffix(path)
    if suffix == ".tsv":
        return (("separator", "\t"),)
    if suffix in KINDS:
        return ()
    if suffix != ".txt" and not alone:
        return (("sample_by", "document"),)
    from kronsae.data.columns import open_file

    with open_file(path) as (file, _):
        beginning = TextIOWrapper(file, "utf-8").read(PEEK_CHARACTERS).strip()
    return (("sample_by", "paragraph" if "\n\n" in beginning else "line"),)


def open_hub(config: DataConfig) -> Any:
    import datasets

    with reading(
        f"dataset {config.dataset!r} is no local file or folder, and could not be opened from "
        "the Hugging Face hub"
    ):
        return datasets.load_dataset(
            config.dataset, config.dataset_config, split=config.split, streaming=config.streaming
        )


def _check_rows(dataset: Any, config: DataConfig) -> str:
    """The kind of the documents in the column.

    Raises InputError if there are no rows, or if the column is missing or holds no documents.
    """
    from kronsae.data.columns import kind_of_type

    first: dict[str, Any]
    name, features = config.text_column, dataset.features
    if config.streaming:
        with reading(f"dataset {config.dataset!r} could not be read"):
            first = next(iter(dataset), {})
    else:
        first = dict.fromkeys(dataset.column_names) if len(dataset) else {}
    if not first:
        raise InputError(f"dataset {config.dataset!r} is empty")
    if name not in first:
        raise InputError(
            f"dataset {config.dataset!r} has no column {name!r}: it has {list(first)}; "
            "name one with --text-column"
        )
    if features and name in features:
        of_column = features.arrow_schema.field(name).type
        kind, got = kind_of_type(of_column), str(of_column)[:80]
    else:  # not every stream knows its types
        value = first[name]
        kind, got = TEXT if value is None else kind_of_value(value), type(value).__name__
    if kind is None:
        raise InputError(
            f"dataset {config.dataset!r}, column {name!r}: expected text, token ids or messages, "
            f"got {got}; the columns are {list(first)}: name another with --text-column"
        )
    return kind


def checked_document(document: Any, name: str, vocab_size: int | None = None) -> Document:
    """The document, or "" if it is null or white space.

    Raises InputError if it is none, or for token ids that are not below `vocab_size`.
    """
    document = as_document(document, f"dataset {name!r}")
    if vocab_size is not None and (wrong := _wrong_id([document], vocab_size)):
        raise _unknown_id(repr(name), wrong[1], vocab_size)
    return document


def _wrong_id(documents: Iterable[Document | None], vocab_size: int) -> tuple[int, int] | None:
    """Row and value of a token id that is not in 0 to vocab_size - 1; None if there is none."""
    for row, document in enumerate(documents):
        if document and isinstance(document, array):
            wrong = (x for x in (min(document), max(document)) if not 0 <= x < vocab_size)
            if (token := next(wrong, None)) is not None:
                return row, token
    return None


def _unknown_id(where: str, token: int, vocab_size: int) -> InputError:
    return InputError(
        f"dataset {where}: token id {token} is not one of the model's, which are 0 to "
        f"{vocab_size - 1:,}: was the text tokenised for another model?"
    )


def _nothing_left(name: str, count: int) -> InputError:
    return InputError(
        f"dataset {name!r}: {count} documents are held out, and there is nothing left to train on: "
        "give more text (or more documents), or fewer --heldout-tokens"
    )


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide progress bars of `datasets`."""
    import datasets

    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


@contextmanager
def reading(problem: str) -> Iterator[None]:
    """Turn any error of `datasets` (there are dozens of types) into an InputError.

    One of ours that `datasets` has wrapped is raised again.
    """
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except Exception as error:
        first = _first(error)
        if isinstance(first, InputError):
            raise first from error
        raise InputError(f"{problem} ({_reason(first)})") from error


def _first(error: BaseException) -> BaseException:
    """The first error of a chain, or our own."""
    while error.__cause__ is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """Type and message of an error, in one line of a readable length, and what to do."""
    message = shorten(str(error), REASON_CHARACTERS, placeholder=" ...")
    advice = next((advice for part, advice in HUB_ADVICE.items() if part in str(error)), "")
    return f"{type(error).__name__}: {message}{advice}"


def content_hash(path: Path) -> str:
    """Hash of a file's content."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= HASHED_WHOLE_BYTES:
            return hashlib.sha256(file.read()).hexdigest()
        hashed = hashlib.sha256(f"{size} ".encode() + file.read(HASHED_END_BYTES))
        file.seek(size - HASHED_END_BYTES)
        hashed.update(file.read())
        return hashed.hexdigest()
