"""Text documents with an exact position: the standard library, local files, the hub.

What `--dataset` can name, and what is one document of it:

- `stdlib`: the source text of Python's standard library; a file is a document.
- Local files, folders and globs, separated by commas. Of JSONL, JSON, Parquet, Arrow, CSV and TSV
  files a row is a document. Of a .txt file, and of a text file that is alone, a paragraph is one
  (a line, if nothing in it is set off by blank lines); each other text file is one as a whole.
  Compressed files are read as what is in them. A folder means the files in it, and below, that
  end in a suffix known here, hidden ones left out.
- Anything else: a dataset of the Hugging Face hub; a row is a document.

Rows without text (null, empty, white space) are passed over.
"""

import glob
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from kronsae.config import DataConfig
from kronsae.data.common import digest
from kronsae.data.stdlib import stdlib_documents
from kronsae.errors import InputError

STDLIB = "stdlib"

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
"""`datasets` builder by a file's suffix (before .gz and the like); anything else is text."""

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py")
"""Text files that a folder is searched for; others can be named or matched by a glob."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

METADATA = frozenset({"dataset_info.json", "state.json"})
"""Files of `Dataset.save_to_disk` that hold no documents."""

HASHED_WHOLE_BYTES = 2**26
"""Of larger files the fingerprint has the size and both ends: reading all takes minutes a TB."""

HASHED_END_BYTES = 2**20

STREAMED_ROWS = 16
"""First rows by which the fingerprint tells a stream from the hub from what it was before."""

PEEK_CHARACTERS = 2**20
"""How much of a text file is searched for blank lines."""

REASON_CHARACTERS = 1000
"""Longest message quoted from another library's error."""


class TextSource(Protocol):
    """Documents to train on, in a seeded order, and those set aside."""

    def heldout(self) -> Iterator[str]:
        """Documents to evaluate on, in a fixed order ("" where a row holds no text)."""

    def hold_out(self, count: int) -> None:
        """Keep the first `count` documents that `heldout` gave out of training.

        Raises InputError if that leaves nothing to train on.
        """

    def __iter__(self) -> Iterator[str]:
        """Documents to train on, from the current position; none is empty."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last document given out, JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def fingerprint(self) -> str:
        """Identifies the text: not its order, and not where it lies."""


class IndexedText:
    """Documents that can be looked up by number: shuffled anew each epoch, position in O(1).

    documents: texts to train on.  aside: texts to evaluate on; None takes them from the beginning
    of `documents`.  name: what errors call the text.
    """

    def __init__(
        self,
        documents: Sequence[str | None],
        aside: Sequence[str | None] | None,
        *,
        seed: int,
        epochs: int,
        fingerprint: str,
        name: str = "given",
    ) -> None:
        self.documents, self.aside, self.name = documents, aside, name
        self.seed, self.epochs = seed, epochs
        self._fingerprint = fingerprint
        self.first = 0  # documents before it are held out
        self.epoch = self.position = 0

    def heldout(self) -> Iterator[str]:
        documents = self.documents if self.aside is None else self.aside
        return (_clean(documents[row], self.name) for row in range(len(documents)))

    def hold_out(self, count: int) -> None:
        if self.aside is None:
            self.first = count
        if self.first >= len(self.documents):
            raise _nothing_left(self.name, count)

    def __iter__(self) -> Iterator[str]:
        shuffled, order = None, torch.empty(0)
        size = len(self.documents) - self.first
        while self.epoch < self.epochs:
            if self.position >= size:
                self.epoch, self.position = self.epoch + 1, 0
                continue
            if shuffled != self.epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
                shuffled, order = self.epoch, torch.randperm(size, generator=generator)
            text = self.documents[self.first + int(order[self.position])]
            self.position += 1
            if text := _clean(text, self.name):
                yield text

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]

    def fingerprint(self) -> str:
        return self._fingerprint


class StreamedText:
    """Documents of a `datasets.IterableDataset`, in its own order; the first ones are held out.

    It goes to a position as well as the dataset can: to the right file at once, then row by row.
    """

    def __init__(
        self, dataset: Any, column: str, *, epochs: int, fingerprint: str, name: str = "given"
    ) -> None:
        self.dataset, self.column, self.epochs, self.name = dataset, column, epochs, name
        self._fingerprint = fingerprint
        self.epoch = 0
        self.hold_out(0, check=False)

    def heldout(self) -> Iterator[str]:
        return self._texts(self.dataset)

    def hold_out(self, count: int, check: bool = True) -> None:
        self.train = self.dataset.skip(count)
        self.start = self.train.state_dict()
        if check and not any(self._texts(self.train)):
            raise _nothing_left(self.name, count)
        self._go_to(self.start)

    def __iter__(self) -> Iterator[str]:
        while self.epoch < self.epochs:
            for text in self._texts(self.train):
                self.waiting = None
                if text:
                    yield text
            self.epoch += 1
            self._go_to(self.start)

    def _go_to(self, position: dict[str, Any]) -> None:
        self.train.load_state_dict(position)
        # The dataset itself reports it only from the next row on.
        self.waiting: dict[str, Any] | None = position

    def _texts(self, dataset: Any) -> Iterator[str]:
        with _reading(f"dataset {self.name!r}: reading on failed"):
            for row in dataset:
                yield _clean(row[self.column], self.name)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "stream": self.waiting or self.train.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self._go_to(state["stream"])

    def fingerprint(self) -> str:
        return self._fingerprint


class Column:
    """One column of a `datasets.Dataset` as a sequence of its values (memory-mapped)."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset.select_columns([name]).with_format(None), name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str | None:
        return self.dataset[index][self.name]


def open_text(config: DataConfig, seed: int) -> TextSource:
    """The text that `config.dataset` names (see above), in the order of `seed`.

    Raises InputError if there is none, it is empty, it has no such column of text, or a setting
    has no effect on it.
    """
    files = check_text(config)
    if config.dataset == STDLIB:
        return _open_stdlib(config, seed)
    dataset = _open_files(files, config) if files else _open_hub(config)
    _check_column(dataset, config)
    source = {"epochs": config.epochs, "name": config.dataset}
    if files:
        mark = digest(config.text_column, *map(_kind_name, files), *map(_contents, files))
    elif config.streaming:
        name = [config.dataset, config.dataset_config, config.split, config.text_column]
        with _reading(f"dataset {config.dataset!r} could not be read"):
            first = [row[config.text_column] for row in islice(dataset, STREAMED_ROWS)]
        mark = digest(*name, *first)
    else:
        mark = dataset._fingerprint
    if config.streaming:
        return StreamedText(dataset, config.text_column, fingerprint=mark, **source)
    if len(dataset) == 0:
        raise InputError(f"dataset {config.dataset!r} is empty")
    column = Column(dataset, config.text_column)
    return IndexedText(column, None, seed=seed, fingerprint=mark, **source)


def check_text(config: DataConfig) -> list[Path]:
    """The files that `config.dataset` names ([] for stdlib and the hub), after all cheap checks.

    Raises InputError as `open_text` does, for what can be seen without reading the text.
    """
    if config.dataset == STDLIB:
        _refuse(config, "the standard library", "split", "text_column")
        return []
    files = local_files(config.dataset)
    if not files:
        return []
    _refuse(config, "local files", "split", "dataset_config")
    kinds: dict[str, list[Path]] = {}
    for path in files:
        kinds.setdefault(_kind_name(path), []).append(path)
    if len(kinds) > 1:
        counts = ", ".join(f"{len(x)} {kind} ({x[0].name}, ...)" for kind, x in kinds.items())
        raise InputError(
            f"dataset {config.dataset!r}: expected files of one kind, got {counts}; "
            "choose some with a glob, such as 'folder/**/*.parquet'"
        )
    if not any(path.stat().st_size for path in files):
        raise InputError(f"dataset {config.dataset!r} is empty: there is nothing in its files")
    return files


def _refuse(config: DataConfig, what: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value != getattr(DataConfig(), name):
            raise InputError(
                f"--{name.replace('_', '-')} {value} has no effect on {what}: leave it out"
            )


def local_files(dataset: str) -> list[Path]:
    """Files that a --dataset value names, each once, or [] if it is the name of a hub dataset.

    Raises InputError if it can only be meant as files and there are none.
    """
    whole = Path(dataset).expanduser().exists()  # also with a comma in its name
    parts = [dataset] if whole else [part.strip() for part in dataset.split(",")]
    found = [path for part in parts for path in _files_of(part, alone=len(parts) == 1)]
    return list({path.resolve(): path for path in found}.values())


def _files_of(part: str, alone: bool) -> list[Path]:
    path = Path(part).expanduser()
    if path.is_dir():
        return _files_in(path)
    if path.is_file():
        return [path]
    if any(sign in part for sign in "*?["):
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            raise InputError(f"dataset: no file matches {part!r}")
        return files
    looks_local = part.startswith((".", "/", "~")) or part.count("/") > 1
    if not alone or looks_local or path.suffix in (*BUILDERS, *COMPRESSIONS, *TEXT_SUFFIXES):
        raise InputError(f"dataset: there is no file or folder {part!r}")
    return []


def _files_in(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise InputError(
            f"dataset: {folder} holds several splits, {splits}: name the folder of one"
        )
    known = (*BUILDERS, *TEXT_SUFFIXES)
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
    """The suffix in lower case; of a compressed file, the one before."""
    compressed = path.suffix.lower() in COMPRESSIONS
    return (path.with_suffix("") if compressed else path).suffix.lower()


def _kind_name(path: Path) -> str:
    return BUILDERS.get(_suffix(path), "text")


def _open_stdlib(config: DataConfig, seed: int) -> IndexedText:
    try:
        train, aside = (stdlib_documents(heldout=side) for side in (False, True))
    except FileNotFoundError as error:
        raise InputError(str(error)) from error
    # By a hash, so that the beginning of what is set aside is not one package alone.
    aside.sort(key=lambda document: zlib.crc32(document["path"].encode()))
    mark = digest(*(document["text"] for document in train + aside))
    texts = [[document["text"] for document in side] for side in (train, aside)]
    return IndexedText(*texts, seed=seed, epochs=config.epochs, fingerprint=mark, name=STDLIB)


def _open_files(files: list[Path], config: DataConfig) -> Any:
    """All rows of the files, in their order of reading: a Dataset, or an IterableDataset."""
    datasets = _datasets()
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    parts = []
    builder = _kind_name(files[0])
    what = f"dataset {config.dataset!r}: its {builder} files could not be read"
    with _reading(what), _no_bars():
        for path in files:
            groups.setdefault(_options(path, alone=len(files) == 1), []).append(str(path))
        for options, names in groups.items():
            parts.append(
                datasets.load_dataset(
                    builder,
                    data_files=names,
                    split="train",
                    streaming=config.streaming,
                    **dict(options),
                )
            )
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _options(path: Path, alone: bool) -> tuple[tuple[str, str], ...]:
    """What the file's builder has to be told."""
    suffix = _suffix(path)
    if suffix == ".tsv":
        return (("sep", "\t"),)
    if suffix in BUILDERS:
        return ()
    if suffix != ".txt" and not alone:
        return (("sample_by", "document"),)
    import fsspec  # `datasets` needs it too

    with fsspec.open(str(path), "rt", compression="infer", encoding="utf-8") as file:
        beginning = file.read(PEEK_CHARACTERS).strip()
    return (("sample_by", "paragraph" if "\n\n" in beginning else "line"),)


def _open_hub(config: DataConfig) -> Any:
    with _reading(
        f"dataset {config.dataset!r} is no local file or folder, and could not be opened from "
        "the Hugging Face hub"
    ):
        return _datasets().load_dataset(
            config.dataset, config.dataset_config, split=config.split, streaming=config.streaming
        )


def _check_column(dataset: Any, config: DataConfig) -> None:
    name, columns, features = config.text_column, dataset.column_names, dataset.features or {}
    first: dict[str, Any] = {}
    if columns is None:  # a stream that does not know them: look at its first row
        with _reading(f"dataset {config.dataset!r} could not be read"):
            first = next(iter(dataset), {})
        columns = list(first)
    if not columns:
        raise InputError(f"dataset {config.dataset!r} is empty")
    if name not in columns:
        raise InputError(
            f"dataset {config.dataset!r} has no column {name!r}: it has {columns}; "
            "name one with --text-column"
        )
    if name in features:
        # Structs and lists are not of one dtype.
        kind = getattr(features[name], "dtype", None) or "nested values"
    else:
        kind = "string" if isinstance(first[name], str | None) else type(first[name]).__name__
    if kind not in ("string", "large_string", "null"):
        raise InputError(
            f"dataset {config.dataset!r}, column {name!r}: expected text, got {kind}; the columns "
            f"are {columns}: name another with --text-column"
        )


def _clean(text: Any, name: str) -> str:
    """The document, or "" if there is nothing in it."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"dataset {name!r}: expected text, got {type(text).__name__} {text!r:.40}")
    return "" if text.isspace() else text


def _nothing_left(name: str, count: int) -> InputError:
    return InputError(
        f"dataset {name!r}: the first {count} documents are held out, and after them there is "
        "nothing to train on: give more text (or more documents), or fewer --heldout-tokens"
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of `datasets` for the while (local files take moments)."""
    datasets = _datasets()
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


@contextmanager
def _reading(problem: str) -> Iterator[None]:
    """Makes an InputError of whatever `datasets` raises, which is of dozens of kinds."""
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except Exception as error:
        raise InputError(f"{problem} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """Kind and message of the error that began it all, in one line of a readable length."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    advice = "; choose one with --dataset-config" if "onfig name is missing" in lines else ""
    if len(lines) > REASON_CHARACTERS:
        lines = lines[:REASON_CHARACTERS] + " ..."
    return f"{type(error).__name__}: {lines}{advice}"


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError("--dataset needs the package datasets: pip install datasets") from error
    return datasets


def _contents(path: Path) -> str:
    """Identifies what is in a file, wherever it lies."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= HASHED_WHOLE_BYTES:
            return hashlib.sha256(file.read()).hexdigest()
        hashed = hashlib.sha256(f"{size} ".encode() + file.read(HASHED_END_BYTES))
        file.seek(size - HASHED_END_BYTES)
        hashed.update(file.read())
        return hashed.hexdigest()
