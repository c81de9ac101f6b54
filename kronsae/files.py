"""Files that are never seen half-written: written beside their place, synced, then renamed."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from kronsae.errors import InputError


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically. NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically. Raises InputError if it cannot be written."""
    write_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write(beside)` write a new file, then put it in `path`'s place, on the disk.

    Raises InputError if the disk is full, or `path` cannot be written; it is then as it was.
    """
    beside = _beside(path)
    try:
        write(beside)
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _cannot_write(path, error) from error
        raise


def replace_directory(path: Path, write: Callable[[Path], None]) -> Path:
    """Let `write(folder)` fill a new folder, then put it in `path`'s place.

    Until everything is on the disk `path` stays as it was (missing, or its old contents). What an
    interrupted call leaves behind starts with a dot; `remove_leftovers` clears it away, and puts an
    old folder back if the call ended between moving it away and putting the new one in its place.
    Raises InputError if the disk is full, `path` cannot be written, or holds files that `write`
    does not: somebody else's work is never removed.
    """
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        write(beside)
        for file in beside.iterdir():
            _sync(file)
        _sync(beside)
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
        _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _cannot_write(path, error) from error
        raise
    return path


_OLD = ".replaced"


def _check_replaceable(path: Path, new: Path) -> None:
    others = (
        {p.name for p in path.iterdir()} - {p.name for p in new.iterdir()}
        if (path.is_dir())
        else {path.name}
    )
    if others:
        raise InputError(
            f"{path} holds {sorted(others)[:5]}, which would be lost: choose another folder"
        )


def remove_leftovers(folder: Path) -> None:
    """Clear away what interrupted writes left in `folder`; see `replace_directory`."""
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for old in folder.glob(f".*{_OLD}"):
        place = folder / old.name[1:].removesuffix(_OLD).rpartition(".")[0]
        shutil.rmtree(old) if place.exists() else os.rename(old, place)


def lock(path: Path, problem: str) -> IO[str] | None:
    """Keep other processes that lock this file waiting outside, until what is given is closed.

    Raises InputError, with `problem`, if one of them holds it. (Windows has no flock: None.)
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = open(path, encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(problem) from error
    return file


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} could not be written ({error}); nothing was left in its place")
