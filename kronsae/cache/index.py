"""What a cache of activations is: its index, its shards, and how both are checked.

A cache is a folder:

index.json                            what is in it, and how it was made (`CacheIndex`)
train-00000.tokens.safetensors        contexts [c, L] int32 token ids, mask [c, L] bool
train-00000.0.safetensors             activations [r, width] of the first hookpoint
train-00000.1.safetensors             ... of the second; and so on
heldout-00000.tokens.safetensors      text that is never trained on, in the same form

A shard is the files of one number: r rows, one for each token where the mask is True, in reading
order. Every file is safetensors, written beside its place and renamed. Shards of `train` lie in the
order of the stream: that in which live training reads the same text with the same seed.

Nothing in a cache is trusted: names and links cannot leave the folder, sizes and types are held to
the index before memory is asked for, and each file to its SHA-256 when it is first used.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.config import DTYPES, DataConfig, data_settings, from_dict
from kronsae.data.common import digest
from kronsae.errors import InputError
from kronsae.system.files import read_checksummed, write_file

FORMAT = "kronsae-activations"
FORMAT_VERSION = 1
INDEX_NAME = "index.json"
HARVEST_NAME = "harvest.json"
"""What a harvest was asked for."""
PROGRESS = "progress"
"""Folder of where a harvest stood after its last shards."""

SECTIONS = ("heldout", "train")
CODES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int32": "I32",
    "bool": "BOOL",
}
"""What safetensors calls a dtype."""

MAX_HEADER_BYTES = 2**16
MAX_WIDTH = 2**24
AT_ONCE = 2**20
"""Bytes that are read or written at a time, and hashed while they are in the processor's cache.
(Files that the system does not have in memory are read faster so than by one large call.)"""

DESCRIBED = data_settings(harvested=True)
"""Settings of `DataConfig` that a cache has decided."""

_FILE_NAME = re.compile(r"(heldout|train)-[0-9]{5,12}\.(tokens|[0-9]{1,4})\.safetensors")

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""For each tensor of a file its dtype and shape."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A file of a shard, and what tells whether it is whole."""

    file: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a cache: some contexts, and the activations of their masked tokens."""

    contexts: int
    rows: int
    tokens: Mark
    activations: tuple[Mark, ...]
    """One for each hookpoint of the cache."""

    @property
    def marks(self) -> tuple[Mark, ...]:
        return (self.tokens, *self.activations)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Shard":
        activations = tuple(Mark(**mark) for mark in values["activations"])
        return cls(**{**values, "tokens": Mark(**values["tokens"]), "activations": activations})


@dataclasses.dataclass(frozen=True)
class Hookpoint:
    """A module of the language model, and the width of its output."""

    name: str
    width: int
    layer: int | None = None
    """The block whose residual stream it is, if it was asked for as such."""


@dataclasses.dataclass(frozen=True)
class CacheIndex:
    """What a cache holds. `open` reads and checks one; `json` is what is written."""

    hookpoints: tuple[Hookpoint, ...]
    dtype: str
    """Of the activations as they are stored."""
    context_length: int
    data: DataConfig
    """Model and text, as a run from a cache records them."""
    model: dict[str, Any]
    """`LanguageModel.describe`, with the number of `parameters`."""
    tokenizer: str
    """Digest of the tokenizer's vocabulary."""
    text: str
    """Fingerprint of the dataset."""
    seed: int
    """The order of the documents was drawn from it."""
    heldout: tuple[Shard, ...]
    train: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: str | Path) -> "CacheIndex":
        """The index of the cache in `folder`. Raises InputError if there is none that is sound."""
        folder = Path(folder)
        path = folder / INDEX_NAME
        try:
            document = read_checksummed(path)
        except FileNotFoundError as error:
            if (folder / HARVEST_NAME).is_file():
                raise InputError(
                    f"{folder}: the harvest has not ended. Go on with it: {resume_command(folder)}"
                ) from error
            raise InputError(
                f"{folder} is no cache of activations: it has no {path.name}"
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); {_again(folder)}") from error
        version = document.get("format_version") if isinstance(document, dict) else None
        if version is None or document.get("format") != FORMAT:
            raise InputError(f"{path} is not one that a harvest wrote")
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: expected format version {FORMAT_VERSION}, got {version!r}")
        try:
            unknown = document["data"].keys() - set(DESCRIBED)
            _expect(not unknown, f"settings {sorted(unknown)}")
            index = cls(
                hookpoints=tuple(Hookpoint(**each) for each in document["hookpoints"]),
                data=from_dict(DataConfig, document["data"], str(path)),
                **{name: document[name] for name in _PLAIN},
                **{s: tuple(Shard.from_json(each) for each in document[s]) for s in SECTIONS},
            )
            index._check()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is damaged ({why}); {_again(folder)}") from error
        return index

    def json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["data"] = {name: values["data"][name] for name in DESCRIBED}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values}

    def _check(self) -> None:
        """Raise ValueError for what a harvest would not have written."""
        _expect(self.dtype in DTYPES, f"dtype {self.dtype!r}")
        _expect(_count(self.context_length) and self.context_length > 1, "context_length")
        _expect(_count(self.seed) and isinstance(self.text, str), "seed or text")
        _expect(_count(self.model.get("parameters")) and "weights" in self.model, "model")
        _expect(bool(self.hookpoints) and bool(self.train), "no hookpoint, or no shard")
        for hookpoint in self.hookpoints:
            _expect(isinstance(hookpoint.name, str), f"hookpoint {hookpoint.name!r}")
            _expect(_count(hookpoint.width) and 1 <= hookpoint.width <= MAX_WIDTH, "width")
            _expect(hookpoint.layer is None or _count(hookpoint.layer), "layer")
        seen: set[str] = set()
        for section in SECTIONS:
            for shard in getattr(self, section):
                self._check_shard(section, shard)
                seen.update(mark.file for mark in shard.marks)
        count = sum(len(shard.marks) for s in SECTIONS for shard in getattr(self, s))
        _expect(len(seen) == count, "a file is named twice")

    def _check_shard(self, section: str, shard: Shard) -> None:
        _expect(_count(shard.contexts) and _count(shard.rows), "counts of a shard")
        _expect(0 < shard.rows <= shard.contexts * self.context_length, "rows of a shard")
        _expect(len(shard.activations) == len(self.hookpoints), "files of a shard")
        for mark, layout in self.files(shard):
            name = _FILE_NAME.fullmatch(mark.file) if isinstance(mark.file, str) else None
            _expect(name is not None and name[1] == section, f"file name {mark.file!r}")
            _expect(
                isinstance(mark.sha256, str) and bool(re.fullmatch("[0-9a-f]{64}", mark.sha256)),
                f"sha256 of {mark.file}",
            )
            header = mark.bytes - payload(layout) if _count(mark.bytes) else 0
            _expect(8 < header <= 8 + MAX_HEADER_BYTES, f"bytes of {mark.file}")

    def files(self, shard: Shard) -> Iterator[tuple[Mark, Layout]]:
        """Each file of a shard, with what it holds."""
        yield shard.tokens, self.tokens_layout(shard)
        for place, mark in enumerate(shard.activations):
            yield mark, self.activations_layout(shard, place)

    def tokens_layout(self, shard: Shard) -> Layout:
        shape = (shard.contexts, self.context_length)
        return {"contexts": ("int32", shape), "mask": ("bool", shape)}

    def activations_layout(self, shard: Shard, place: int) -> Layout:
        """place: of the hookpoint."""
        return {"activations": (self.dtype, (shard.rows, self.hookpoints[place].width))}

    @property
    def train_rows(self) -> int:
        return sum(shard.rows for shard in self.train)

    @property
    def heldout_rows(self) -> int:
        return sum(shard.rows for shard in self.heldout)

    @property
    def bytes(self) -> int:
        """Of all files but the index."""
        return sum(m.bytes for s in SECTIONS for shard in getattr(self, s) for m in shard.marks)

    @property
    def fingerprint(self) -> str:
        """Identifies the activations, wherever the cache lies."""
        marks = (m for s in SECTIONS for shard in getattr(self, s) for m in shard.marks)
        return digest(*(mark.sha256 for mark in marks))

    def place_of(self, layer: int | None, hookpoint: str | None) -> int:
        """Which hookpoint this is: that of a layer or a name, or the only one.

        Raises InputError if it was not harvested, or none is named and there are several.
        """
        asked = f"layer {layer}" if layer is not None else f"hookpoint {hookpoint!r}"
        found = [
            place
            for place, each in enumerate(self.hookpoints)
            if each.name == hookpoint or (layer is not None and each.layer == layer)
        ]
        if layer is None and hookpoint is None:
            found, asked = list(range(len(self.hookpoints))), "which one?"
        if len(found) == 1:
            return found[0]
        held = ", ".join(
            each.name if each.layer is None else f"{each.name} (layer {each.layer})"
            for each in self.hookpoints
        )
        raise InputError(f"{asked}: the cache holds {held}; name one with --layer or --hookpoint")


_PLAIN = ("dtype", "context_length", "model", "tokenizer", "text", "seed")


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"unexpected {what}")


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def resume_command(folder: Path) -> str:
    return f"python -m kronsae.harvest --resume {folder}"


def _again(folder: Path) -> str:
    return f"remove {folder / INDEX_NAME}, and {resume_command(folder)} makes it anew"


# Files of a shard


def file_name(section: str, number: int, part: str | int) -> str:
    """part: "tokens", or the place of a hookpoint."""
    return f"{section}-{number:05d}.{part}.safetensors"


def payload(layout: Layout) -> int:
    """Bytes of the tensors alone."""
    return sum(
        math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in layout.values()
    )


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Mark:
    """Write a file of a shard, atomically, in the order given; hashed on the way, and never copied.

    The bytes are those of safetensors' own format, the same with every version of that library.
    tensors: contiguous, on the CPU. Raises InputError if the disk is full.
    """
    layout = {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    text = json.dumps(_header(layout), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little") + text, *map(_bytes, tensors.values())]
    hashed = hashlib.sha256()

    def write(beside: Path) -> None:
        with open(beside, "wb", buffering=0) as file:
            for part in map(memoryview, parts):
                for start in range(0, len(part), AT_ONCE):
                    block = part[start : start + AT_ONCE]
                    hashed.update(block)
                    while block:
                        block = block[file.write(block) :]

    write_file(path, write)
    return Mark(path.name, sum(map(len, parts)), hashed.hexdigest())


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
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class Damaged(InputError):
    """A file of a shard is missing, or is not what was harvested."""


def read_tensors(
    folder: Path,
    mark: Mark,
    layout: Layout,
    *,
    into: dict[str, Tensor] | None = None,
    verify: bool = True,
) -> dict[str, Tensor]:
    """The tensors of a file, read in one go, straight to where they stay.

    into: contiguous tensors of this layout, in its order, to read into (default: new ones).
    verify: also compare the SHA-256 of what was read.
    Raises Damaged, before memory is asked for if sizes or types are not those of the layout.
    """
    path = folder / mark.file
    hashed = hashlib.sha256() if verify else None
    try:
        _check_inside(path)
        with open(path, "rb", buffering=0) as file:
            _read_header(file, mark, layout, hashed)
            tensors = into or {
                name: torch.empty(shape, dtype=getattr(torch, dtype))
                for name, (dtype, shape) in layout.items()
            }
            for tensor in tensors.values():
                _fill(file, tensor, hashed)
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged ({error}); {_repair(folder)}") from error
    if hashed is not None and hashed.hexdigest() != mark.sha256:
        raise Damaged(
            f"{path} is damaged (its SHA-256 is not that of the index); {_repair(folder)}"
        )
    return tensors


def _repair(folder: Path) -> str:
    return f"{resume_command(folder)} makes what is damaged anew"


def _check_inside(path: Path) -> None:
    """Raise ValueError if a file of a cache is a link to what lies elsewhere."""
    if path.resolve().parent != path.parent.resolve():
        raise ValueError("it is a link out of the cache's folder")


def _read_header(file: Any, mark: Mark, layout: Layout, hashed: Any) -> None:
    """Raise ValueError unless the file holds these tensors, in this order, in this size.

    hashed: what to tell all bytes read, or None.
    """
    size = file.seek(0, 2)
    if size != mark.bytes:
        raise ValueError(f"it has {size:,} bytes, expected {mark.bytes:,}")
    file.seek(0)
    length_bytes = file.read(8)
    length = int.from_bytes(length_bytes, "little")
    if length != mark.bytes - payload(layout) - 8:
        raise ValueError("its header has not the length expected")
    text = file.read(length)
    if hashed is not None:
        hashed.update(length_bytes + text)
    header = json.loads(text)
    if header != _header(layout):
        raise ValueError(f"expected tensors {_header(layout)}, got {str(header)[:400]}")


def _fill(file: Any, tensor: Tensor, hashed: Any) -> None:
    """Read a tensor's bytes into it."""
    left = _bytes(tensor)
    while left:
        count = file.readinto(left[:AT_ONCE])
        if not count:
            raise ValueError("it ended early")
        if hashed is not None:
            hashed.update(left[:count])
        left = left[count:]


def check_sizes(folder: Path, index: CacheIndex) -> None:
    """Raise Damaged unless all files are there, in the sizes of the index; nothing is read."""
    for section in SECTIONS:
        for shard in getattr(index, section):
            for mark in shard.marks:
                path = folder / mark.file
                try:
                    _check_inside(path)
                    size = path.stat().st_size
                except OSError as error:
                    raise Damaged(f"{path} is missing ({error}); {_repair(folder)}") from error
                except ValueError as error:
                    raise Damaged(f"{path} is damaged ({error}); {_repair(folder)}") from error
                if size != mark.bytes:
                    raise Damaged(
                        f"{path} is damaged (it has {size:,} bytes, expected {mark.bytes:,}); "
                        f"{_repair(folder)}"
                    )


def damaged(
    folder: Path, index: CacheIndex, first: Mapping[str, int] | None = None
) -> list[tuple[str, int, str]]:
    """Section and number of each shard of which a file is damaged, and why. Reads everything.

    first: look at the first so many shards of each section alone.
    """
    found = []
    for section in SECTIONS:
        shards = getattr(index, section)
        for number, shard in enumerate(shards if first is None else shards[: first[section]]):
            for mark, layout in index.files(shard):
                try:
                    read_tensors(folder, mark, layout)
                except Damaged as error:
                    found.append((section, number, str(error)))
                    break
    return found
