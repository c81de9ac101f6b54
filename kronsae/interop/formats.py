"""`Format`, the base class of formats, which `kronsae.registry.FORMATS` registers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from posixpath import normpath
from typing import ClassVar

from torch import Tensor

from kronsae.errors import InputError
from kronsae.model.sae import SAE
from kronsae.registry import FORMATS

Reader = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x [t, d] -> number of active latents [t] and reconstruction [t, d_out]."""


class Format(ABC):
    """A format of folders that hold an SAE, recognised by the names of their files."""

    library: ClassVar[str]
    """The library's name, or the suite's."""
    package: ClassVar[str]
    """Name of the library's package on the index."""
    weights: ClassVar[str]
    config: ClassVar[str | None] = None
    """None if a folder needs no file beside its weights."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Other files that `read` looks into where they are, as paths from the folder."""
    pickle: ClassVar[bool] = False
    """Whether the weights are a pickle, which is only read on request."""
    written: ClassVar[bool] = True
    """Whether `kronsae export` offers the format."""
    how_to_load: ClassVar[str]
    """Python code that loads the folder {out} in the library."""

    @classmethod
    def holds(cls, path: Path) -> bool:
        """Whether a path has this format, by the names of its files."""
        return all((path / name).is_file() for name in (cls.weights, cls.config) if name)

    @classmethod
    def weights_of(cls, path: Path) -> Path:
        """The file of weights of a path that has this format."""
        return path / cls.weights

    @staticmethod
    @abstractmethod
    def read(folder: Path, /) -> SAE:
        """Read the SAE in a folder, or in a file of a `FileFormat`.

        Raises InputError if it is damaged or of an unknown kind.
        """

    @staticmethod
    @abstractmethod
    def write(sae: SAE, folder: str | Path) -> Path:
        """Write the folder. Raises InputError, with the reason, if the format cannot hold it."""

    @staticmethod
    def folder_of(sae: SAE, name: str) -> str:
        """Name of an SAE's folder in a suite, as the library's suites have it.

        name: that of the member in its sweep, which other suites keep.
        """
        return name

    @staticmethod
    def reader(folder: Path, sae: SAE) -> Reader:
        """The SAE as the library itself runs it, for --verify. Raises ImportError without it."""
        raise InputError("this format does not say how its library runs an SAE: leave out --verify")


class ReadOnlyFormat(Format):
    """A format that is read, but not written."""

    written = False

    @staticmethod
    def write(sae: SAE, folder: str | Path) -> Path:
        raise InputError("this format is only read: use --to kronsae or sae_lens")


class FileFormat(ReadOnlyFormat):
    """A format of single files, each of which holds an SAE; a folder may have many of them.

    weights: pattern of their names, as in a shell.  optional: paths from the file's folder.
    """

    @classmethod
    def holds(cls, path: Path) -> bool:
        return fnmatch(path.name, cls.weights) and path.is_file()

    @classmethod
    def weights_of(cls, path: Path) -> Path:
        return path


def recognise(path: Path) -> str | None:
    """Name of the format of a folder, or of a file that holds an SAE alone; None if it has none."""
    return next((name for name, form in FORMATS.items() if form.holds(path)), None)


def known() -> str:
    """The known formats and their files, for messages."""
    files = ((form.library, form.weights, form.config) for form in FORMATS.values())
    return "; ".join(f"{name} ({', '.join(filter(None, names))})" for name, *names in files)


def files_of(path: str, allow_pickle: bool) -> set[str]:
    """Files of a repository from which `path` there, a folder or a file, is loaded.

    Weights that are a pickle are only among them with `allow_pickle`.
    """
    folder, _, name = path.rpartition("/")
    files: set[str] = set()
    for form in FORMATS.values():
        wanted = not form.pickle or allow_pickle
        if not issubclass(form, FileFormat):
            names = (form.weights if wanted else None, form.config, *form.optional)
            files |= {normpath(f"{path or '.'}/{each}") for each in names if each}
        elif wanted and fnmatch(name, form.weights):
            files |= {normpath(f"{folder or '.'}/{each}") for each in (name, *form.optional)}
    return {each for each in files if not each.startswith("../")}
