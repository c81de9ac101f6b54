"""Caches of activations in object stores: their files are fetched when they are first read.

`kronsae train --activations s3://bucket/cache` reads any URL that fsspec knows (s3://, gs://, hf://,
https://, ...). What was fetched stays in a folder of this machine, `KRONSAE_CACHE` (default:
~/.cache/kronsae/activations). If it grows beyond `KRONSAE_CACHE_GB` gigabytes (default: 100), the
files that were not read for longest are removed.
"""

import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kronsae.data.common import digest, reason
from kronsae.errors import InputError, require
from kronsae.system.files import write_file

FOLDER_VARIABLE = "KRONSAE_CACHE"
SIZE_VARIABLE = "KRONSAE_CACHE_GB"
DEFAULT_GB = 100.0
BLOCK_BYTES = 2**22
"""Bytes fetched at a time."""

_in_use: Counter[Path] = Counter()
_lock = threading.Lock()


def is_url(path: Any) -> bool:
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.:-]*://", str(path)) is not None


class Remote:
    """A folder at a URL, whose files are fetched one by one.

    Raises InputError if fsspec, or its package for this kind of URL, is missing.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        require("fsspec", f"activations {url!r}")
        import fsspec

        try:
            self.system, self.path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise InputError(f"activations {url!r} cannot be read: {reason(error)}") from error
        self.folder = _root() / digest(self.url)
        self.files: dict[str, tuple[int, str]] = {}
        """Size and SHA-256 of each file."""

    def __str__(self) -> str:
        return self.url

    def read_bytes(self, name: str, most: int) -> bytes:
        """The content of a file of at most so many bytes. Raises FileNotFoundError, InputError."""
        content = bytearray()
        for block in self._blocks(name):
            content += block
            if len(content) > most:
                raise InputError(f"{self.url}/{name} has more than {most:,} bytes")
        return bytes(content)

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """The path of one of `files` on this machine, which stays until the end of the context.

        If the context raises a ValueError, the file is damaged, and fetched again next time.
        Raises InputError if it cannot be fetched, ValueError if it has another size or SHA-256.
        """
        path = self.folder / name
        with _lock:
            _in_use[path] += 1
        try:
            with suppress(FileNotFoundError):
                os.utime(path)  # when it was last read
            if not path.exists() or path.stat().st_size != self.files[name][0]:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_file(path, lambda beside: self._fetch(name, beside))
                _evict()
            yield path
        except ValueError as error:
            if not isinstance(error, InputError):
                path.unlink(missing_ok=True)
            raise
        finally:
            with _lock:
                _in_use[path] -= 1

    def _fetch(self, name: str, path: Path) -> None:
        size, sha256 = self.files[name]
        hashed, count = hashlib.sha256(), 0
        with open(path, "wb") as file:
            try:
                for block in self._blocks(name):
                    count += len(block)
                    if count > size:
                        break
                    hashed.update(block)
                    file.write(block)
            except FileNotFoundError as error:
                raise ValueError("there is no such file") from error
        if count != size:
            raise ValueError(f"it does not have the {size:,} bytes expected")
        if hashed.hexdigest() != sha256:
            raise ValueError("its SHA-256 is not that of the index")

    def _blocks(self, name: str) -> Iterator[bytes]:
        try:
            with self.system.open(f"{self.path}/{name}", "rb") as stream:
                while block := stream.read(BLOCK_BYTES):
                    yield block
        except FileNotFoundError:
            raise
        except Exception as error:  # each kind of store has its own
            raise InputError(f"{self.url}/{name} cannot be read: {reason(error)}") from error


def _root() -> Path:
    default = Path("~/.cache/kronsae/activations")
    return Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser()


def _most_bytes() -> float:
    text = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_GB)
    try:
        gigabytes = float(text)
    except ValueError as error:
        raise InputError(f"{SIZE_VARIABLE}: expected a number, got {text!r}") from error
    return gigabytes * 1e9


def _evict() -> None:
    """Remove the files that were not read for longest until the rest fits, but none in use."""
    most = _most_bytes()
    with _lock:
        files = []
        for path in _root().glob("*/*"):
            with suppress(FileNotFoundError):  # another process removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        left = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if left <= most:
                break
            if not _in_use[path]:
                path.unlink(missing_ok=True)
                left -= size
