"""The format of a cache of activations: its index, its shards, and how both are checked.

A cache is a folder:

index.json                            the `CacheIndex`: contents and origin (while a harvest is
                                      incomplete, it is in the newest state in progress/)
train-00000.tokens.safetensors        contexts [c, L] int32 token ids (PADDING: none), mask
                                      [c, L] bool of the tokens that have activations
train-00000.0.safetensors             activations [r, width] of the first hookpoint; if they are
                                      int8, also scales [r] float32 to multiply them by
train-00000.1.safetensors             ... of the second; and so on
heldout-00000.tokens.safetensors      text that is never trained on, in the same form

A shard is the files of one number: r rows, one for each token whose mask is True, in reading order.
Files are written under a temporary name and renamed. Shards of `train` are in the order in which
live training with the same seed reads the text.

A cache is not trusted: file names and links cannot leave its folder, sizes and types are checked
against the index before memory is allocated, and each file against its SHA-256 at its first use.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.cache.remote import Remote, is_url
from kronsae.config import DTYPES, DataConfig, data_settings, from_dict, stored
from kronsae.data.common import digest
from kronsae.data.hookpoints import Site
from kronsae.errors import InputError
from kronsae.registry import command_line
from kronsae.system import checkpoint
from kronsae.system.documents import parse_json, part_of, typed
from kronsae.system.files import checked, read_checksummed, usable_path, write_file

FORMAT = "kronsae-activations"
FORMAT_VERSION = 1
INDEX_NAME = "index.json"
HARVEST_NAME = "harvest.json"
"""The harvest's settings."""
PROGRESS = "progress"
"""Folder of the harvest's state after its last shards."""

SECTIONS = ("heldout", "train")
CODES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int8": "I8",
    "int32": "I32",
    "bool": "BOOL",
}
"""Names of dtypes in safetensors."""

STORED = (*DTYPES, "int8")
"""Dtypes that activations are stored in."""

MAX_INDEX_BYTES = 2**30
MAX_HEADER_BYTES = 2**16
MAX_WIDTH = 2**24
BLOCK_BYTES = 2**20
"""Bytes read or written per call, and hashed while they are in the processor's cache. (One large
call reads files slower that the system has not cached.)"""

DESCRIBED = data_settings(harvested=True)
"""Settings of `DataConfig` that a cache fixes."""

_FILE_NAME = re.compile(r"(heldout|train)-[0-9]{5,12}\.(tokens|[0-9]{1,4})\.safetensors")

Folder = Path | Remote
"""Where the files of a cache are."""

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""dtype and shape of each tensor of a file."""


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A file of a shard, with its size and SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a cache: contexts, and the activations of their masked tokens."""

    contexts: int
    rows: int
    tokens: ShardFile
    activations: tuple[ShardFile, ...]
    """One for each hookpoint of the cache."""

    @property
    def files(self) -> tuple[ShardFile, ...]:
        return (self.tokens, *self.activations)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Shard":
        tokens, *files = (
            from_dict(ShardFile, file, "a shard")
            for file in (values["tokens"], *values["activations"])
        )
        return cls(**{**values, "tokens": tokens, "activations": tuple(files)})


@dataclasses.dataclass(frozen=True)
class Hookpoint:
    """A hookpoint of the language model, and its width."""

    name: str
    width: int
    layer: int | None = None
    """The block, if the hookpoint was given as the residual stream after it."""
    site: str | None = dataclasses.field(default=None, compare=False)  # earlier versions had none
    """What it is to a block, such as `6.attn_z`, if that is known."""


@dataclasses.dataclass(frozen=True)
class CacheIndex:
    """Contents and origin of a cache. `open` reads and checks it; `json` is written."""

    hookpoints: tuple[Hookpoint, ...]
    dtype: str
    """Stored dtype of the activations."""
    context_length: int
    data: DataConfig
    """Settings of model and text, which a run from the cache records as its own."""
    model: dict[str, Any]
    """`LanguageModel.describe` and the number of `parameters`."""
    tokenizer: str
    """Hash of the tokenizer's vocabulary."""
    text: str
    """Fingerprint of the dataset."""
    seed: int
    """Seed of the order of the documents."""
    heldout: tuple[Shard, ...]
    train: tuple[Shard, ...]
    begin: dict[str, Any] = dataclasses.field(default_factory=dict)
    """`kronsae.data.activations.describe_begin`; empty in caches of earlier versions."""
    planned: int | None = None
    """Training tokens that a harvest will have that is incomplete (0: all of the text). No file
    has it."""

    @classmethod
    def open(cls, folder: str | Path) -> "CacheIndex":
        """The index of the cache in `folder`; of an incomplete harvest, of its shards so far.

        folder: or a URL (`kronsae.cache.remote`), with a complete cache.
        Raises InputError if there is no valid one.
        """
        if is_url(folder):
            return cls._at(Remote(str(folder)))
        folder = usable_path(folder, "activations")
        path = folder / INDEX_NAME
        try:
            document = read_checksummed(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            if (folder / HARVEST_NAME).is_file():
                return cls._so_far(folder)
            if folder.is_dir():
                problem = f"it has no {path.name}"
            else:
                problem = "it is a file" if folder.exists() else "there is no such folder"
            raise InputError(f"{folder} is not a cache of activations: {problem}") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); {_rewrite(folder)}") from error
        return cls.from_json(document, path, _rewrite(folder))

    @classmethod
    def _at(cls, remote: Remote) -> "CacheIndex":
        """The index of a cache at a URL."""
        path = f"{remote}/{INDEX_NAME}"
        try:
            document = checked(parse_json(remote.read_bytes(INDEX_NAME, MAX_INDEX_BYTES)))
        except FileNotFoundError as error:
            problem = f"there is no {path}"
            raise InputError(
                f"{remote} is not a complete cache of activations: {problem}"
            ) from error
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}): upload it again") from error
        return cls.from_json(document, path, "upload it again")

    @classmethod
    def _so_far(cls, folder: Path) -> "CacheIndex":
        """The index of an incomplete harvest, from the newest state that can be read.

        Raises InputError if no shard to train on is complete.
        """
        hint = f"resume it: {resume_command(folder)}"
        for place in reversed(checkpoint.list_checkpoints(folder / PROGRESS)):
            try:
                state = checkpoint.load_state(place, tensors=False)
                tokens = part_of(read_checksummed(folder / HARVEST_NAME), "config").get("tokens")
                _expect(_count(tokens), "tokens")
            except (OSError, ValueError):
                continue  # damaged, or gone since it was listed: the harvest may be running
            if part_of(state, "index").get("train"):
                index = cls.from_json(state["index"], place, hint)
                return dataclasses.replace(index, planned=tokens)
        raise InputError(f"{folder}: the harvest is incomplete, without a shard so far; {hint}")

    @classmethod
    def from_json(
        cls, document: Any, path: Path | str, hint: str, check: bool = True
    ) -> "CacheIndex":
        """The inverse of `json`.

        path: of the document, for messages.  hint: what to do if it is damaged.
        check: False accepts an index without shards.  Raises InputError if it is invalid.
        """
        version = document.get("format_version") if isinstance(document, dict) else None
        if version is None or document.get("format") != FORMAT:
            raise InputError(f"{path} was not written by a harvest")
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: expected format version {FORMAT_VERSION}, got {version!r}")
        try:
            index = cls(
                hookpoints=tuple(
                    from_dict(Hookpoint, h, "hookpoints") for h in document["hookpoints"]
                ),
                data=source_of_file(document["data"], str(path)),
                heldout=tuple(map(Shard.from_json, document["heldout"])),
                train=tuple(map(Shard.from_json, document["train"])),
                begin=document.get("begin", {}),
                **{name: document[name] for name in _PLAIN},
            )
            if check:
                index._check()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is damaged ({reason}); {hint}") from error
        return index

    def json(self) -> dict[str, Any]:
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        values = {**head, **dataclasses.asdict(self), "data": described(self.data)}
        del values["planned"]
        return values

    def first(self, rows: int, folder: Folder) -> "CacheIndex":
        """The index of the first `rows` rows to train on, as it was when there were no more.

        It has the fingerprint of that time, if they end with a forward pass of the language model.
        Where they end within a shard, that shard is read.
        folder: of the cache.  Raises InputError if there are fewer, Damaged if the shard is.
        """
        if rows > self.train_rows:
            hint = "" if self.planned is None else f". Resume it: {resume_command(folder)}"
            raise InputError(
                f"activations_tokens: {folder} has {self.train_rows:,} tokens to train on"
                f"{so_far(self)}, not {rows:,}{hint}"
            )
        shards: list[Shard] = []
        for shard in self.train:
            if rows > 0:
                whole = shard.rows <= rows
                shards.append(shard if whole else self._cut(shard, rows, folder))
                rows -= shard.rows
        return dataclasses.replace(self, train=tuple(shards))

    def _cut(self, shard: Shard, rows: int, folder: Folder) -> Shard:
        """The shard as it was written when it had no more than the passes of its first rows."""
        tokens = read_tensors(folder, shard.tokens, self.tokens_layout(shard))
        seen = tokens["mask"].sum(1).cumsum(0)
        size = self.data.contexts_per_batch
        needed = int((seen < rows).sum()) + 1
        contexts = min(-(-needed // size) * size, shard.contexts)
        files = []
        for number, file in enumerate(shard.activations):
            tensors = read_tensors(folder, file, self.activations_layout(shard, number))
            files.append(_mark(file.file, {name: x[:rows] for name, x in tensors.items()}))
        cut = _mark(shard.tokens.file, {name: x[:contexts] for name, x in tokens.items()})
        return Shard(contexts, rows, cut, tuple(files))

    def _check(self) -> None:
        """Raise ValueError for anything that a harvest would not write."""
        _expect(self.dtype in STORED, f"dtype {self.dtype!r}")
        _expect(_count(self.context_length) and self.context_length > 1, "context_length")
        _expect(_count(self.seed) and isinstance(self.text, str), "seed or text")
        _expect(_count(self.model.get("parameters")) and "weights" in self.model, "model")
        _expect(isinstance(self.begin, dict) and self.begin.keys() <= _BEGIN, "begin")
        _expect(bool(self.hookpoints) and bool(self.train), "no hookpoint, or no shard")
        for hookpoint in self.hookpoints:
            _expect(1 <= hookpoint.width <= MAX_WIDTH, "width")
            _expect(0 <= (hookpoint.layer or 0) < 2**53, "layer")
        for section in SECTIONS:
            for shard in self.shards(section):
                self._check_shard(section, shard)
        names = [file.file for file in self.all_files()]
        _expect(len(set(names)) == len(names), "a file is named twice")

    def _check_shard(self, section: str, shard: Shard) -> None:
        _expect(_count(shard.contexts) and _count(shard.rows), "counts of a shard")
        _expect(0 < shard.rows <= shard.contexts * self.context_length, "rows of a shard")
        _expect(len(shard.activations) == len(self.hookpoints), "files of a shard")
        for file, layout in self.layouts(shard):
            name = _FILE_NAME.fullmatch(file.file)
            _expect(name is not None and name[1] == section, f"file name {file.file!r}")
            hexadecimal = re.fullmatch("[0-9a-f]{64}", file.sha256)
            _expect(hexadecimal is not None, f"sha256 of {file.file}")
            header = file.bytes - payload(layout)
            _expect(8 < header <= 8 + MAX_HEADER_BYTES, f"bytes of {file.file}")

    def shards(self, section: str) -> tuple[Shard, ...]:
        return self.train if section == "train" else self.heldout

    def all_files(self) -> list[ShardFile]:
        """The files of all shards."""
        return [file for shard in self.heldout + self.train for file in shard.files]

    def layouts(self, shard: Shard) -> Iterator[tuple[ShardFile, Layout]]:
        """Each file of a shard, with its tensors' dtypes and shapes."""
        yield shard.tokens, self.tokens_layout(shard)
        for number, file in enumerate(shard.activations):
            yield file, self.activations_layout(shard, number)

    def tokens_layout(self, shard: Shard) -> Layout:
        shape = (shard.contexts, self.context_length)
        return {"contexts": ("int32", shape), "mask": ("bool", shape)}

    def activations_layout(self, shard: Shard, number: int) -> Layout:
        """number: of the hookpoint."""
        shape = (shard.rows, self.hookpoints[number].width)
        rows: Layout = {"activations": (self.dtype, shape)}
        return rows if self.dtype != "int8" else {"scales": ("float32", (shard.rows,)), **rows}

    @property
    def dtype_in_memory(self) -> torch.dtype:
        """int8 becomes bfloat16, whose rounding is small beside that of int8."""
        return torch.bfloat16 if self.dtype == "int8" else getattr(torch, self.dtype)

    @property
    def train_rows(self) -> int:
        return sum(shard.rows for shard in self.train)

    @property
    def heldout_rows(self) -> int:
        return sum(shard.rows for shard in self.heldout)

    @property
    def bytes(self) -> int:
        """Size of all files except the index."""
        return sum(file.bytes for file in self.all_files())

    @property
    def fingerprint(self) -> str:
        """Hash of the activations."""
        return digest(*(file.sha256 for file in self.all_files()))

    def number_of(self, layer: int | None, hookpoint: str | None) -> int:
        """The index among `hookpoints` of a layer or a name; without either, of the only one.

        Raises InputError if it was not harvested, or none is named and there are several.
        """
        wanted = f"layer {layer}" if layer is not None else f"hookpoint {hookpoint!r}"
        site = Site.of(hookpoint)
        numbers = [
            number
            for number, known in enumerate(self.hookpoints)
            if known.name == hookpoint
            or (layer is not None and known.layer == layer)
            or (site is not None and known.site == str(site))
        ]
        if layer is None and hookpoint is None:
            numbers, wanted = list(range(len(self.hookpoints))), "which one?"
        if len(numbers) == 1:
            return numbers[0]
        names = ", ".join(
            known.name if known.layer is None else f"{known.name} (layer {known.layer})"
            for known in self.hookpoints
        )
        raise InputError(f"{wanted}: the cache has {names}; choose by --layer or --hookpoint")


_BEGIN = {"context_begin", "prepend_bos"}
_PLAIN = ("dtype", "context_length", "model", "tokenizer", "text", "seed")


def described(data: DataConfig) -> dict[str, Any]:
    """The settings of model and text that a cache fixes, for its files."""
    return {name: getattr(data, name) for name in DESCRIBED}


def source_of_file(values: Any, where: str) -> DataConfig:
    """The inverse of `described`. Raises InputError for other settings, or invalid ones."""
    values = typed(values, dict, where)
    unknown = sorted(values.keys() - set(DESCRIBED))
    if unknown:
        raise InputError(f"{where}: unknown settings {unknown}")
    return from_dict(DataConfig, stored(DataConfig, values), where)


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"unexpected {what}")


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def so_far(index: CacheIndex) -> str:
    """That a harvest is incomplete, in words to follow its number of tokens; "" if it is not."""
    if index.planned is None:
        return ""
    planned = f"{index.planned:,}" if index.planned else "all of the text"
    return f" so far (of {planned}: the harvest is incomplete)"


def resume_command(folder: Folder) -> str:
    return command_line("harvest", "--resume", str(folder))


def _rewrite(folder: Path) -> str:
    return f"remove {folder / INDEX_NAME}, and {resume_command(folder)} writes it again"


# Files of a shard


def file_name(section: str, number: int, part: str | int) -> str:
    """part: "tokens", or the number of a hookpoint."""
    return f"{section}-{number:05d}.{part}.safetensors"


def payload(layout: Layout) -> int:
    """Bytes of the tensors, without the header."""
    return sum(
        math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in layout.values()
    )


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> ShardFile:
    """Write tensors to a safetensors file, atomically and without a copy.

    The bytes do not depend on the version of the safetensors library.
    tensors: contiguous, on the CPU. Raises InputError if the disk is full.
    """
    hashed = hashlib.sha256()
    parts = _parts(tensors)

    def write(beside: Path) -> None:
        with open(beside, "wb", buffering=0) as file:
            for part in parts:
                for start in range(0, len(part), BLOCK_BYTES):
                    block = part[start : start + BLOCK_BYTES]
                    hashed.update(block)
                    while block:
                        block = block[file.write(block) :]

    write_file(path, write)
    return ShardFile(path.name, sum(map(len, parts)), hashed.hexdigest())


def _mark(name: str, tensors: dict[str, Tensor]) -> ShardFile:
    """What `write_tensors` gives, without writing."""
    parts = _parts(tensors)
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return ShardFile(name, sum(map(len, parts)), hashed.hexdigest())


def _parts(tensors: dict[str, Tensor]) -> list[memoryview]:
    """The bytes of a file of these tensors: the header, and the memory of each tensor."""
    layout = {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    return [memoryview(_header_bytes(layout)), *map(_bytes, tensors.values())]


def _header_bytes(layout: Layout) -> bytes:
    """The header of a file, with its length before it."""
    text = json.dumps(_header(layout), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header(layout: Layout) -> dict[str, Any]:
    header, start = {}, 0
    for name, (dtype, shape) in layout.items():
        stop = start + payload({name: (dtype, shape)})
        offsets = [start, stop]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets}
        start = stop
    return header


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class Damaged(InputError):
    """A file of a shard is missing or differs from the harvested one."""


def read_tensors(
    folder: Folder,
    file: ShardFile,
    layout: Layout,
    *,
    into: dict[str, Tensor] | None = None,
    verify: bool = True,
    grown: bool = False,
) -> dict[str, Tensor]:
    """Read the tensors of a file.

    into: contiguous tensors of this layout, in its order, to read into (default: new ones).
    verify: also check the file's SHA-256.
    grown: the harvest may have written the file again, with more rows after these.
    Raises Damaged; for sizes or types other than the layout's before memory is allocated.
    """
    hashed = hashlib.sha256() if verify else None
    with _file_of(folder, file) as path, open(path, "rb", buffering=0) as stream:
        starts = _read_header(stream, file, layout, hashed, grown)
        tensors = into or {
            name: torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (dtype, shape) in layout.items()
        }
        for start, tensor in zip(starts, tensors.values(), strict=True):
            stream.seek(start)
            _fill(stream, tensor, hashed)
        if hashed is not None and hashed.hexdigest() != file.sha256:
            raise ValueError("its SHA-256 is not that of the index")
    return tensors


@contextmanager
def _file_of(folder: Folder, file: ShardFile) -> Iterator[Path]:
    """The path of a file, which must not be a link out of its folder.

    Turns OSError and ValueError inside into Damaged.
    """
    if isinstance(folder, Remote):
        try:
            with folder.fetched(file.file) as path:
                yield path
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise Damaged(f"{folder}/{file.file} cannot be used ({error})") from error
        return
    path = folder / file.file
    try:
        if path.resolve().parent != path.parent.resolve():
            raise ValueError("it is a link out of the cache's folder")
        yield path
    except (OSError, ValueError) as error:
        state = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        command = resume_command(folder)
        raise Damaged(
            f"{path} is {state} ({error}); {command} writes damaged shards again"
        ) from error


def _read_header(
    stream: Any, file: ShardFile, layout: Layout, hashed: Any, grown: bool
) -> list[int]:
    """Where each tensor begins. Raises ValueError unless the file holds these, in this order.

    hashed: a hash to update with the header of this layout, or None.
    grown: tensors may have more rows.
    """
    size = stream.seek(0, 2)
    _check_size(size, file, grown)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size == file.bytes and length != size - payload(layout) - 8 or length > MAX_HEADER_BYTES:
        raise ValueError("its header does not have the length expected")
    text = stream.read(length)
    header, expected = parse_json(text), _header(layout)
    if size > file.bytes:
        expected = _header(_with_rows_of(header, layout))
    if header != expected:
        raise ValueError(f"expected tensors {expected}, got {str(header)[:400]}")
    if hashed is not None:
        as_written = length.to_bytes(8, "little") + text
        hashed.update(as_written if size == file.bytes else _header_bytes(layout))
    return [8 + length + entry["data_offsets"][0] for entry in header.values()]


def _with_rows_of(header: Any, layout: Layout) -> Layout:
    """The layout with as many rows as a header has. Raises ValueError if these are fewer."""
    grown = {}
    for name, (dtype, shape) in layout.items():
        try:
            rows = header[name]["shape"][0]
        except (TypeError, KeyError, IndexError) as error:
            raise ValueError(f"it has no tensor {name!r}") from error
        if not _count(rows) or rows < shape[0]:
            raise ValueError(f"{name} has {rows} rows, expected {shape[0]} or more")
        grown[name] = (dtype, (rows, *shape[1:]))
    return grown


def _fill(stream: Any, tensor: Tensor, hashed: Any) -> None:
    """Read a tensor's bytes into it."""
    left = _bytes(tensor)
    while left:
        count = stream.readinto(left[:BLOCK_BYTES])
        if not count:
            raise ValueError("it ended early")
        if hashed is not None:
            hashed.update(left[:count])
        left = left[count:]


def check_sizes(folder: Path, index: CacheIndex) -> None:
    """Raise Damaged unless all files exist in the sizes of the index; nothing is read."""
    for file in index.all_files():
        with _file_of(folder, file) as path:
            _check_size(path.stat().st_size, file)


def _check_size(size: int, file: ShardFile, grown: bool = False) -> None:
    if size != file.bytes and not (grown and size > file.bytes):
        raise ValueError(f"it has {size:,} bytes, expected {file.bytes:,}")


def damaged(
    folder: Path,
    index: CacheIndex,
    first: Mapping[str, int] | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[tuple[str, int, str]]:
    """Section and number of each damaged shard, and the reason. Reads all files.

    first: how many shards of each section to check, from its start (default: all).
    share: (i, n) to check the i-th shard of every n.
    """
    all_shards = [
        (section, number, shard)
        for section in SECTIONS
        for number, shard in enumerate(index.shards(section))
        if first is None or number < first[section]
    ]
    problems = []
    for section, number, shard in all_shards[share[0] :: share[1]]:
        try:
            for file, layout in index.layouts(shard):
                read_tensors(folder, file, layout)
        except Damaged as error:
            problems.append((section, number, str(error)))
    return problems
