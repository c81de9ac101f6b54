"""The text column of JSON, CSV, Parquet and Arrow files, whatever their other columns hold.

The builders of `datasets` read every column, and stop where one changes its type or is new.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pandas
import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet
from datasets.data_files import DataFilesDict, DataFilesList

from kronsae.data.common import reason
from kronsae.data.document import (
    IDS,
    MESSAGES,
    TEXT,
    Document,
    as_document,
    kind_of_value,
)
from kronsae.errors import InputError, warn

JSON_BYTES = 10 << 20
"""Bytes of JSON lines that are parsed at once; the last line is read to its end."""

JSON_BEGINNING = re.compile(r"[^ \t\r\n]")
JSON_ITEM = re.compile(r"[^ \t\r\n,]")

CSV_ROWS = 10_000
"""Rows of CSV that are parsed at once."""

STRING = pyarrow.large_string()

TYPES = {
    TEXT: STRING,
    IDS: pyarrow.large_list(pyarrow.int32()),
    MESSAGES: pyarrow.large_list(pyarrow.struct([("role", STRING), ("content", STRING)])),
}
"""Type of the column by the kind of its documents: its texts may sum to more than 2 GiB."""

TEXT_TYPES = ("string", "large_string", "string_view", "null")
"""Names of the types of `datasets` and Arrow that are text, or missing text."""

DECOMPRESSION: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}

ADVICE = "correct or remove it (--streaming finds such rows late, otherwise they are found first)"


@dataclass
class Settings(datasets.BuilderConfig):
    """Settings of a `TextColumn`, beside its files."""

    column: str = "text"
    kind: str = "json"
    separator: str = ","
    """What is between the columns of CSV."""
    documents: str = TEXT
    """Kind of the column's documents."""


class TextColumn(datasets.ArrowBasedBuilder):
    """Builder of a dataset of one column.

    Positions of its streams are those of the builders of `datasets`, so that a stream goes on that
    was begun with them: tables have the same sizes, and types are unknown where they were.
    """

    VERSION = datasets.Version("1.0.0")  # files are read again if it changes
    BUILDER_CONFIG_CLASS = Settings

    @classmethod
    def of(cls, files: Sequence[str], **settings: Any) -> "TextColumn":
        """The builder for these files.  settings: fields of `Settings`."""
        paths = [Path(file).resolve() for file in files]
        stats = [path.stat() for path in paths]
        changed = [(str(stat.st_mtime_ns), str(stat.st_size)) for stat in stats]
        listed = DataFilesList([str(path) for path in paths], changed)
        return cls(data_files=DataFilesDict(train=listed), **settings)

    def _info(self) -> datasets.DatasetInfo:
        kind, first = self.config.kind, Path(self.config.data_files["train"][0])
        if kind == "csv" or kind == "json" and _is_list(first):
            return datasets.DatasetInfo()
        schema = pyarrow.schema({self.config.column: TYPES[self.config.documents]})
        return datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        files = list(self.config.data_files["train"])
        return [datasets.SplitGenerator(datasets.Split.TRAIN, {"files": files})]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Any, pyarrow.Table]]:
        rows = empty = 0
        length = (
            pyarrow.compute.binary_length
            if self.config.documents == TEXT
            else pyarrow.compute.list_value_length
        )
        for number, path in enumerate(files):
            for batch, (column, _) in enumerate(read_column(Path(path), self.config)):
                has_text = pyarrow.compute.greater(length(column), 0)
                rows += len(column)
                empty += len(column) - (pyarrow.compute.sum(has_text).as_py() or 0)
                yield (number, batch), pyarrow.table({self.config.column: column})
        if not rows:
            nothing = pyarrow.array([], TYPES[self.config.documents])
            yield (0, 0), pyarrow.table({self.config.column: nothing})
        if empty:
            name = f"{files[0]} and {len(files) - 1:,} more" if len(files) > 1 else files[0]
            warn(
                f"{name}: {empty:,} of {rows:,} rows have no {self.config.documents} in the column "
                f"{self.config.column!r}, and are left out"
            )


def read_column(path: Path, settings: Settings) -> Iterator[tuple[pyarrow.Array, int]]:
    """The column of a file in parts of its type in TYPES, and the bytes of the file read so far.

    Raises InputError, which names the file, and the row if one is at fault.
    """
    rows = 0
    try:
        with open_file(path) as (file, stored):
            for column in READERS[settings.kind](file, path, settings):
                _check_encoding(column, path, rows)
                yield _cast(column, settings, path, rows), stored.tell()
                rows += len(column)
    except Exception as error:  # of Arrow, pandas, and what decompresses
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} could not be read as {settings.kind} after {rows:,} rows ({reason(error)})"
        ) from error


def _cast(column: pyarrow.Array, settings: Settings, path: Path, rows: int) -> pyarrow.Array:
    """A part of the column in its type.  rows: of the file that came before.

    Raises InputError for token ids and messages that are none.
    """
    to = TYPES[settings.documents]
    if column.type == to or settings.documents == TEXT:
        return column.cast(to)
    if settings.documents == IDS:
        try:
            whole = column.cast(to)
            if not whole.flatten().null_count:
                return whole
        except pyarrow.ArrowInvalid:
            pass  # the loop below says which row has it
    name, kind = settings.column, settings.documents
    values = [
        as_document(value, f"{path}, row {row}, column {name!r}", kind) or None
        for row, value in enumerate(column.to_pylist(), rows + 1)
    ]
    return pyarrow.array(values, to)


def size_of_column(column: pyarrow.ChunkedArray) -> int:
    """Bytes of a column's texts or messages, or the number of its token ids; about.

    The values are not read, unless a type of Arrow has no offsets.
    """
    kind = kind_of_type(column.type)
    if kind == TEXT:
        offset = {"string": 4, "large_string": 8, "string_view": 16}.get(str(column.type), 0)
        return max(0, column.nbytes - offset * len(column))
    if kind == IDS:
        return sum(len(chunk.flatten()) for chunk in column.chunks)
    messages = [chunk.flatten() for chunk in column.chunks]
    texts = (chunk.field(name) for chunk in messages for name in ("role", "content"))
    lengths = map(pyarrow.compute.binary_length, texts)
    return sum(pyarrow.compute.sum(length).as_py() or 0 for length in lengths)


def wrong_id(column: pyarrow.ChunkedArray, vocab_size: int) -> tuple[int, int] | None:
    """Row and value of a token id that is not in 0 to vocab_size - 1; None if there is none."""
    if kind_of_type(column.type) != IDS:
        return None
    before = 0
    for chunk in column.chunks:
        ids = chunk.flatten()
        extremes = pyarrow.compute.min_max(ids).as_py()
        wrong = next(
            (v for v in extremes.values() if v is not None and not 0 <= v < vocab_size), None
        )
        if wrong is not None:
            place = pyarrow.compute.index(ids, wrong).as_py()
            return before + pyarrow.compute.list_parent_indices(chunk)[place].as_py(), wrong
        before += len(chunk)
    return None


def kind_of_type(kind: pyarrow.DataType) -> str | None:
    """The kind of documents in a column of this type; None if they are none."""
    if str(kind) in TEXT_TYPES:
        return TEXT
    if pyarrow.types.is_dictionary(kind):
        return TEXT if str(kind.value_type) in TEXT_TYPES else None
    lists = ("is_list", "is_large_list", "is_fixed_size_list")
    if not any(getattr(pyarrow.types, name)(kind) for name in lists):
        return None
    item = kind.value_type
    if pyarrow.types.is_integer(item):
        return IDS
    if not pyarrow.types.is_struct(item):
        return None
    parts = {field.name: kind_of_type(field.type) for field in item}
    return MESSAGES if parts.get("role") == parts.get("content") == TEXT else None


def kind_of_column(path: Path, settings: Settings) -> str:
    """The kind of documents in the column of a file, by its type or its first value.

    TEXT if it is not known: then `read_column` says what is wrong.
    """
    name = settings.column
    try:
        with open_file(path) as (file, _):
            if settings.kind == "json":
                values = (row.get(name) for row in _first_json(file) if isinstance(row, dict))
                return next(filter(None, map(kind_of_value, values)), TEXT)
            if settings.kind == "csv":
                return TEXT
            if settings.kind == "parquet":
                schema = pyarrow.parquet.read_schema(file)
            else:
                schema, _ = _arrow_batches(file)
            return name in schema.names and kind_of_type(schema.field(name).type) or TEXT
    except Exception:  # of Arrow, and what decompresses
        return TEXT


def read_beginning(path: Path, settings: Settings) -> tuple[list[Document], float]:
    """Documents at the beginning of a file, and the share of the file that they are, about."""
    nothing = pyarrow.array([], TYPES[settings.documents])
    column, read = next(read_column(path, settings), (nothing, 0))
    share = read / path.stat().st_size
    if settings.kind == "parquet":  # its columns lie one after the other
        share = len(column) / max(1, pyarrow.parquet.read_metadata(path).num_rows)
    return [document for document in column.to_pylist() if document], share


def _check_encoding(column: pyarrow.Array, path: Path, rows: int) -> None:
    """Raise an error for text that is not UTF-8.  rows: of the file that came before."""
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:
        for row, value in enumerate(column, rows + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, row {row}: {reason(error)}: {ADVICE}") from error
        raise


@contextmanager
def open_file(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file, decompressed if its last suffix says so, and as it is stored.

    .zst needs the package zstandard.
    """
    with open(path, "rb") as stored:
        suffix = path.suffix.lower()
        if suffix == ".zst":
            import zstandard

            file = io.BufferedReader(zstandard.open(stored, "rb"))
        elif suffix in DECOMPRESSION:
            file = DECOMPRESSION[suffix](stored, "rb")
        else:
            file = stored
        with file:
            yield file, stored


def _no_column(path: Path, name: str, columns: Iterable[str]) -> InputError:
    return InputError(
        f"{path} has no column {name!r}: it has {list(columns)}; name one with --text-column"
    )


def _no_text(place: str, settings: Settings, got: str, columns: Iterable[str]) -> InputError:
    name, kind = settings.column, settings.documents
    others = [column for column in columns if column != name]
    advice = f"the other columns are {others}: name one with --text-column" if others else ADVICE
    return InputError(f"{place}, column {name!r}: expected {kind}, got {got}; {advice}")


# JSON


def _read_json(file: BinaryIO, path: Path, settings: Settings) -> Iterator[pyarrow.Array]:
    name = settings.column
    for batch, rows in enumerate(_json_rows(file, path)):
        texts = [_json_document(row, settings, path, place) for place, row in rows]
        if batch == 0 and rows and not any(name in row for _, row in rows):
            raise _no_column(path, name, dict.fromkeys(key for _, row in rows for key in row))
        if settings.documents == TEXT:
            yield pyarrow.array(texts, pyarrow.large_binary()).cast(STRING)
        else:
            yield pyarrow.array(texts, TYPES[settings.documents])


def _json_rows(file: BinaryIO, path: Path) -> Iterator[list[tuple[str, Any]]]:
    """Rows with their places ("line 3"), so many at once.

    A row is a line; an item, if the file begins with a list; an object, if the first one has
    several lines.
    """
    lines, number = _whole_lines(file).removeprefix(codecs.BOM_UTF8), 0
    first = lines.lstrip().split(b"\n", 1)[0].rstrip()
    if first.startswith(b"[") or first.endswith((b"{", b"[", b",", b":")):
        rows = _json_values((lines + file.read()).decode())
        yield [(f"row {row}", value) for row, value in enumerate(rows, 1)]
        return
    while lines:
        batch = []
        for line in io.BytesIO(lines):  # only \n ends one: \r may stand between values
            number += 1
            try:
                batch += [(f"line {number}", row) for row in _json_values(line.decode())]
            except ValueError as error:
                raise InputError(
                    f"{path}, line {number}: it is not JSON ({reason(error)}): {ADVICE}"
                ) from error
        yield batch
        lines = _whole_lines(file)


def _first_json(file: BinaryIO) -> Iterator[Any]:
    """The rows at the beginning of a file, as far as it is JSON."""
    text = _whole_lines(file).removeprefix(codecs.BOM_UTF8).decode(errors="replace")
    decoder, stop = json.JSONDecoder(), len(text) - len(text.lstrip().removeprefix("["))
    while begins := JSON_ITEM.search(text, stop):
        try:
            value, stop = decoder.raw_decode(text, begins.start())
        except ValueError:
            return
        yield value


def _is_list(path: Path) -> bool:
    """Whether a file of JSON is a list."""
    with open_file(path) as (file, _):
        return _whole_lines(file).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _whole_lines(file: BinaryIO) -> bytes:
    return file.read(JSON_BYTES) + file.readline()


def _json_values(text: str) -> Iterator[Any]:
    """The values in a text of JSON, and the items of its lists; {"text": …} for a string."""
    decoder, stop = json.JSONDecoder(), 0
    while begins := JSON_BEGINNING.search(text, stop):
        value, stop = decoder.raw_decode(text, begins.start())
        for item in value if isinstance(value, list) else [value]:
            yield {"text": item} if isinstance(item, str) else item


def _json_document(row: Any, settings: Settings, path: Path, place: str) -> Any:
    """The document of a row; a text in UTF-8.  place: of the row, for messages."""
    if not isinstance(row, dict):
        got = f"{type(row).__name__} {row!r:.40}"
        raise InputError(f"{path}, {place}: expected a JSON object, got {got}: {ADVICE}")
    text = row.get(settings.column)
    if text is None:
        return None
    if settings.documents != TEXT and isinstance(text, list):
        where = f"{path}, {place}, column {settings.column!r}"
        return as_document(text, where, settings.documents)
    if settings.documents != TEXT or not isinstance(text, str):
        raise _no_text(f"{path}, {place}", settings, f"{type(text).__name__} {text!r:.40}", row)
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # one half of a surrogate pair
        raise InputError(f"{path}, {place}: {reason(error)}: {ADVICE}") from error


# Other kinds of files


def _read_csv(file: BinaryIO, path: Path, settings: Settings) -> Iterator[pyarrow.Array]:
    name = settings.column
    # All columns as text: their types would be guessed anew for each part of the file.
    tables = pandas.read_csv(file, sep=settings.separator, dtype=str, chunksize=CSV_ROWS)
    for batch, table in enumerate(tables):
        if name not in table.columns:
            raise _no_column(path, name, table.columns)
        column = table[name]
        known = column.dropna()
        if batch == 0 and len(known) and pandas.to_numeric(known, errors="coerce").notna().all():
            raise _no_text(str(path), settings, "numbers", table.columns)
        yield pyarrow.array(column, STRING, from_pandas=True)


def _read_parquet(file: BinaryIO, path: Path, settings: Settings) -> Iterator[pyarrow.Array]:
    parquet = pyarrow.parquet.ParquetFile(file)
    _check_type(parquet.schema_arrow, path, settings)
    for group in range(parquet.num_row_groups):
        batches = parquet.iter_batches(
            parquet.metadata.row_group(0).num_rows, [group], [settings.column], use_threads=False
        )
        yield from (batch.column(0) for batch in batches)


def _read_arrow(file: BinaryIO, path: Path, settings: Settings) -> Iterator[pyarrow.Array]:
    schema, _ = _arrow_batches(file)
    column = _check_type(schema, path, settings)
    file.seek(0)
    _, batches = _arrow_batches(file, included_fields=[column])
    for batch in batches:
        batch.validate(full=True)
        yield batch.column(0)


def _arrow_batches(
    file: BinaryIO, **options: Any
) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    """Schema and batches of an Arrow stream or file."""
    read = pyarrow.ipc.IpcReadOptions(**options)
    try:
        stream = pyarrow.ipc.open_stream(file, options=read)
    except pyarrow.ArrowInvalid:
        opened = pyarrow.ipc.open_file(file, options=read)
        batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        return opened.schema, batches
    return stream.schema, iter(stream)


def _check_type(schema: pyarrow.Schema, path: Path, settings: Settings) -> int:
    """The number of the column. Raises InputError if there is none, or of other documents."""
    name = settings.column
    if name not in schema.names:
        raise _no_column(path, name, schema.names)
    number = schema.names.index(name)
    kind = schema.types[number]
    if kind_of_type(kind) != settings.documents:
        raise _no_text(str(path), settings, f"{kind}"[:80], schema.names)
    return number


READERS: dict[str, Callable[[BinaryIO, Path, Settings], Iterator[pyarrow.Array]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
