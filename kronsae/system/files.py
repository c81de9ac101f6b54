"""Files that are never seen half-written: written beside their place, synced, then renamed."""

import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kronsae.errors import InputError
from kronsae.system.documents import read_json, shown, to_json, typed


def usable_path(path: Any, name: str) -> Path:
    """The path that `name` gives. Raises InputError if there can be none: NUL, or too long."""
    path = Path(typed(path, str, name))
    try:
        path.exists()
    except OSError as error:
        problem = f"{shown(str(path))} cannot be looked up: {error.strerror}"
        raise InputError(f"{name}: {problem}") from error
    return path


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. Raises InputError for NaN, infinity and other values."""
    write_text(path, to_json(value, str(path)) + "\n")


def check_writable(folder: Path) -> None:
    """Raise InputError if no file can be written in a folder, before the work that is for it.

    Of a folder that is not there yet, the first one above it that exists is tried.
    """
    try:
        places = (folder, *folder.absolute().parents)
        there = next(place for place in places if place.exists())
        with tempfile.TemporaryFile(dir=there, buffering=0) as file:
            file.write(bytes(4096))  # a full disk may take a file without contents
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error}") from error


NOT_FINITE = "not_finite"


def finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as strict JSON: None for NaN and infinity, and NOT_FINITE says which they were."""
    wrong = {k: v for k, v in figures.items() if isinstance(v, float) and not math.isfinite(v)}
    if not wrong:
        return dict(figures)
    said = [figures.get(NOT_FINITE), *(f"{name} is {value}" for name, value in wrong.items())]
    return {**figures, **dict.fromkeys(wrong), NOT_FINITE: ", ".join(filter(None, said))}


_CHECKSUM = "checksum"


def write_checksummed(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON object, atomically, with a checksum of its values: see `read_checksummed`."""
    write_json(path, {**document, _CHECKSUM: digest_of(document)})


def read_checksummed(path: Path) -> Any:
    """The JSON value in a file, without its checksum.

    An object without one is taken as it is: people write such files, too, and older versions did.
    Raises OSError or ValueError if it cannot be read, or if the checksum is of other values.
    """
    return checked(read_json(path))


def checked(document: Any) -> Any:
    """A JSON value without its checksum. Raises ValueError if that is of other values."""
    if isinstance(document, dict) and _CHECKSUM in document:
        if document.pop(_CHECKSUM) != digest_of(document):
            raise ValueError(
                f"its values are not those that its {_CHECKSUM!r} was made of; if you changed them "
                f"on purpose, take the {_CHECKSUM!r} out"
            )
    return document


def digest_of(document: dict[str, Any]) -> str:
    """SHA-256 of a document's values, in whichever order and form they are written."""
    text = json.dumps(json.loads(to_json(document, "the document", None)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


_CRC = "crc32"
"""Key of a line's checksum, its last one."""


def log_line(record: Mapping[str, Any]) -> str:
    """A record as a line of a JSONL log, with a checksum. NaN and infinity are refused."""
    crc = zlib.crc32(json.dumps(record, allow_nan=False).encode())
    return json.dumps({**record, _CRC: f"{crc:08x}"}) + "\n"


def log_lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each whole line of a log, and its record without the checksum; None if it is damaged.

    A line is damaged if it is no JSON object, or not the one that its checksum was made of. Those
    before the first one with a checksum may have none, as earlier versions wrote them. What follows
    the last newline, as a kill leaves it, is no line.
    """
    has_checksums = False
    for line in content.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
            crc = record.pop(_CRC, None)
            has_checksums |= crc is not None
            if has_checksums and crc != f"{zlib.crc32(json.dumps(record).encode()):08x}":
                raise ValueError("it was altered")
        except (ValueError, AttributeError, TypeError, RecursionError):
            record = None
        yield line + b"\n", record


def read_log(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a log, without checksums, and the numbers of its damaged lines."""
    lines = list(log_lines(path.read_bytes())) if path.exists() else []
    records = [record for _, record in lines if record is not None]
    return records, [number for number, (_, record) in enumerate(lines, 1) if record is None]


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically. Raises InputError if it cannot be written."""
    write_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write(beside)` write a new file, then put it in `path`'s place, on the disk.

    Raises InputError if the disk is full, or `path` cannot be written; it is then as it was.
    """
    with _replacing(path) as beside:
        write(beside)
        sync(beside)
        os.replace(beside, path)


def replace_directory(path: Path, write: Callable[[Path], None]) -> Path:
    """Let `write(folder)` fill a new folder, then put it in `path`'s place.

    Until everything is on the disk `path` stays as it was (missing, or its old contents). What an
    interrupted call leaves behind starts with a dot; `remove_leftovers` clears it away, and puts an
    old folder back if the call ended between moving it away and putting the new one in its place.
    Raises InputError if the disk is full, `path` cannot be written, or holds files that `write`
    does not: somebody else's work is never removed.
    """
    with _replacing(path) as beside:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        write(beside)
        mode = beside.stat().st_mode & 0o666
        for entry in beside.rglob("*"):
            with suppress(OSError):  # a file system without modes
                if not entry.is_dir():
                    entry.chmod(mode)  # as umask asks: safetensors lets the owner alone read
            sync(entry)
        sync(beside)
        if path.exists():
            _check_replaceable(path, beside)
            old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}{_OLD}"
            os.rename(path, old)
            try:
                os.rename(beside, path)
            except BaseException:
                os.rename(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.rename(beside, path)
    return path


_OLD = ".replaced"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives where to write what takes the place of `path`; removed again if that fails.

    Raises InputError for an error of the disk.
    """
    beside = usable_path(_beside(path), str(path))
    try:
        yield beside
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):  # if the file system became read-only: the first error counts
            shutil.rmtree(beside) if beside.is_dir() else beside.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError)):
            problem = f"{path} could not be written ({error}); nothing was left in its place"
            raise InputError(problem) from error
        raise


def _check_replaceable(path: Path, new: Path) -> None:
    others = {path.name}
    if path.is_dir():
        theirs, ours = ({str(p.relative_to(f)) for p in f.rglob("*")} for f in (path, new))
        others = theirs - ours
    if others:
        raise InputError(
            f"{path} holds {sorted(others)[:5]}, which would be lost: choose another folder"
        )


def remove_directory(path: Path) -> None:
    """Remove a folder so that an interruption leaves none that is half there under its name.

    Raises InputError if it cannot be removed.
    """
    beside = _beside(path)
    try:
        os.rename(path, beside)
        shutil.rmtree(beside)
    except OSError as error:
        raise InputError(f"{path} cannot be removed: {error}") from error


def remove_leftovers(folder: Path) -> None:
    """Clear away what interrupted writes left in `folder`; see `replace_directory`."""
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for old in folder.glob(f".*{_OLD}"):
        target = folder / old.name[1:].removesuffix(_OLD).rpartition(".")[0]
        shutil.rmtree(old) if target.exists() else os.rename(old, target)


LOCK_NAME = ".lock"
"""Name of the empty file in a folder that is locked."""


def lock(folder: Path, problem: str) -> FileLock:
    """Keep other processes that lock this folder out, until `release` of what is given.

    Raises InputError, with `problem`, if one of them has it, or if it cannot be written to.
    """
    file_lock = FileLock(folder / LOCK_NAME, blocking=False, thread_local=False)
    try:
        file_lock.acquire()
    except Timeout as error:
        raise InputError(problem) from error
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error}") from error
    return file_lock


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises InputError if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
