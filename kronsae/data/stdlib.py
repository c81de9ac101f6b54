"""Text that every user has: the source of the Python standard library.

It feeds the embedded default, so that a first run needs neither a network nor an argument. The
same files trained the embedded language model, all but those that `is_heldout` names: those are
the text that neither that model nor a run with the default split has trained on.

Pure Python: importing this module does not import torch.
"""

from __future__ import annotations

import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path

HELDOUT_ONE_IN = 20
"""One file in so many is held out (about 5 %)."""

SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "lib-dynload"})
"""Not source of the standard library; `config-*` folders, which hold build settings, go too."""

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
"""Left out unless `include_tests`: two thirds of the text, in a style of its own."""

GENERATED_FILES = frozenset({"pydoc_data/topics.py", "html/entities.py"})
"""Tables that a script wrote."""

_CHARMAP_MARKS = ("decoding_table", "decoding_map")


def is_heldout(relative_path: str) -> bool:
    """Whether a file is kept out of training; depends on nothing but its path.

    relative_path: below the library's root, with forward slashes, e.g. "json/decoder.py".
    The same on every platform, Python version and run: crc32(path) % 20 == 0.
    """
    return zlib.crc32(relative_path.encode("utf-8")) % HELDOUT_ONE_IN == 0


def stdlib_root() -> Path:
    """The folder of the running Python's standard library, also from a virtual environment."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(root: Path | None = None, include_tests: bool = False) -> list[Path]:
    """The library's source files, sorted by their posix path below `root`.

    Skipped: installed packages, caches, generated tables, files that are empty or cannot be decoded
    (by their coding cookie, UTF-8 by default, as `tokenize.open` reads them), and the folders of
    tests unless `include_tests`.

    root: `stdlib_root()` by default.
    Raises FileNotFoundError if there is no such file, which names the folder searched.
    """
    root = stdlib_root() if root is None else Path(root)
    return [root / path for path, _ in _sources(root, include_tests)]


def stdlib_documents(
    root: Path | None = None, include_tests: bool = False, heldout: bool | None = None
) -> list[dict[str, str]]:
    """The files of `stdlib_files` as records with "text" and "path" (relative, forward slashes).

    heldout: True or False for the files on that side of `is_heldout`, None for all of them.
    Newlines are "\\n" on every platform.
    Raises FileNotFoundError as `stdlib_files` does.
    """
    root = stdlib_root() if root is None else Path(root)
    return [
        {"text": text, "path": path}
        for path, text in _sources(root, include_tests)
        if heldout is None or is_heldout(path) == heldout
    ]


def _sources(root: Path, include_tests: bool) -> list[tuple[str, str]]:
    """(relative posix path, text) of every source file kept, sorted by path."""
    sources = sorted(_walk(root, "", include_tests))
    if not sources:
        raise FileNotFoundError(
            f"no Python source files in {str(root)!r}, where the standard library of "
            f"{sys.executable or 'this Python'} should be (an embedded Python keeps it in a zip "
            "archive or only compiled). Give your own text with --dataset."
        )
    return sources


def _walk(folder: Path, prefix: str, include_tests: bool) -> Iterator[tuple[str, str]]:
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        path = prefix + entry.name
        if entry.is_dir():
            if _wanted_folder(entry.name, include_tests) and not entry.is_symlink():
                yield from _walk(entry, path + "/", include_tests)
        elif entry.suffix == ".py" and _wanted_file(path):
            text = _read(entry)
            if text.strip() and not _is_charmap(path, text):
                yield path, text


def _wanted_folder(name: str, include_tests: bool) -> bool:
    if name in SKIPPED_FOLDERS or name.startswith(("config-", ".")):
        return False
    return include_tests or name not in TEST_FOLDERS


def _wanted_file(path: str) -> bool:
    # _sysconfigdata_* holds the settings and folders of the machine that built this Python.
    return path not in GENERATED_FILES and not path.startswith("_sysconfigdata")


def _is_charmap(path: str, text: str) -> bool:
    return path.startswith("encodings/") and any(mark in text for mark in _CHARMAP_MARKS)


def _read(path: Path) -> str:
    """The file's text, or "" if it cannot be read: a library has a few broken files on purpose."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
