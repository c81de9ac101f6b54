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
from kronsae.errors import InputError, warn

JSON_BYTES = 10 << 20
"""Bytes of JSON lines that are parsed at once; the last line is read to its end."""

JSON_BEGINNING = re.compile(r"[^ \t\r\n]")

CSV_ROWS = 10_000
"""Rows of CSV that are parsed at once."""

TEXT = pyarrow.large_string()
"""Type of the column: its texts may sum to more than 2 GiB."""

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
        features = datasets.Features({self.config.column: datasets.Value(str(TEXT))})
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        files = list(self.config.data_files["train"])
        return [datasets.SplitGenerator(datasets.Split.TRAIN, {"files": files})]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[Any, pyarrow.Table]]:
        rows = empty = 0
        for number, path in enumerate(files):
            for batch, (column, _) in enumerate(read_column(Path(path), self.config)):
                has_text = pyarrow.compute.greater(pyarrow.compute.binary_length(column), 0)
                rows += len(column)
                empty += len(column) - (pyarrow.compute.sum(has_text).as_py() or 0)
                yield (number, batch), pyarrow.table({self.config.column: column})
        if not rows:
            yield (0, 0), pyarrow.table({self.config.column: pyarrow.array([], TEXT)})
        if empty:
            name = f"{files[0]} and {len(files) - 1:,} more" if len(files) > 1 else files[0]
            warn(
                f"{name}: {empty:,} of {rows:,} rows have no text in the column "
                f"{self.config.column!r}, and are left out"
            )


def read_column(path: Path, settings: Settings) -> Iterator[tuple[pyarrow.Array, int]]:
    """The column of a file in parts of type TEXT, and the bytes of the file that were read so far.

    Raises InputError, which names the file, and the row if one is at fault.
    """
    rows = 0
    try:
        with open_file(path) as (file, stored):
            for column in READERS[settings.kind](file, path, settings):
                _check_encoding(column, path, rows)
                yield column.cast(TEXT), stored.tell()
                rows += len(column)
    except Exception as error:  # of Arrow, pandas, and what decompresses
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} could not be read as {settings.kind} after {rows:,} rows ({reason(error)})"
        ) from error


def read_beginning(path: Path, settings: Settings) -> tuple[list[str], float]:
    """Texts at the beginning of a file, and the share of the file that they are, about."""
    column, read = next(read_column(path, settings), (pyarrow.array([], TEXT), 0))
    share = read / path.stat().st_size
    if settings.kind == "parquet":  # its columns lie one after the other
        share = len(column) / max(1, pyarrow.parquet.read_metadata(path).num_rows)
    return [text for text in column.to_pylist() if text], share


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


def _no_text(place: str, name: str, got: str, columns: Iterable[str]) -> InputError:
    others = [column for column in columns if column != name]
    advice = f"the other columns are {others}: name one with --text-column" if others else ADVICE
    return InputError(f"{place}, column {name!r}: expected text, got {got}; {advice}")


# JSON


def _read_json(file: BinaryIO, path: Path, settings: Settings) -> Iterator[pyarrow.Array]:
    name = settings.column
    for batch, rows in enumerate(_json_rows(file, path)):
        texts = [_json_text(row, name, path, place) for place, row in rows]
        if batch == 0 and rows and not any(name in row for _, row in rows):
            raise _no_column(path, name, dict.fromkeys(key for _, row in rows for key in row))
        yield pyarrow.array(texts, pyarrow.large_binary()).cast(TEXT)


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


def _json_text(row: Any, name: str, path: Path, place: str) -> bytes | None:
    """The text of a row, in UTF-8.  place: of the row, for messages."""
    if not isinstance(row, dict):
        got = f"{type(row).__name__} {row!r:.40}"
        raise InputError(f"{path}, {place}: expected a JSON object, got {got}: {ADVICE}")
    text = row.get(name)
    if text is None:
        return None
    if not isinstance(text, str):
        raise _no_text(f"{path}, {place}", name, f"{type(text).__name__} {text!r:.40}", row)
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
            raise _no_text(str(path), name, "numbers", table.columns)
        yield pyarrow.array(column, TEXT, from_pandas=True)


def _read_parquet(file: BinaryIO, path: Path, settings: Settings) -> Iterator[pyarrow.Array]:
    parquet = pyarrow.parquet.ParquetFile(file)
    _check_type(parquet.schema_arrow, path, settings.column)
    for group in range(parquet.num_row_groups):
        batches = parquet.iter_batches(
            parquet.metadata.row_group(0).num_rows, [group], [settings.column], use_threads=False
        )
        yield from (batch.column(0) for batch in batches)


def _read_arrow(file: BinaryIO, path: Path, settings: Settings) -> Iterator[pyarrow.Array]:
    schema, _ = _arrow_batches(file)
    column = _check_type(schema, path, settings.column)
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


def _check_type(schema: pyarrow.Schema, path: Path, name: str) -> int:
    """The number of the column. Raises InputError if there is none, or if it is no text."""
    if name not in schema.names:
        raise _no_column(path, name, schema.names)
    number = schema.names.index(name)
    kind = schema.types[number]
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(value) not in TEXT_TYPES:
        raise _no_text(str(path), name, f"{kind}"[:80], schema.names)
    return number


READERS: dict[str, Callable[[BinaryIO, Path, Settings], Iterator[pyarrow.Array]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
