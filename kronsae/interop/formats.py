"""`Format`, the base class of folder formats, which `kronsae.registry.FORMATS` registers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from kronsae.errors import InputError
from kronsae.model.sae import SAE
from kronsae.registry import FORMATS

Reader = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x [t, d] -> number of active latents [t] and reconstruction [t, d_out]."""


class Format(ABC):
    """A format of folders that hold an SAE, recognised by the names of their two files."""

    library: ClassVar[str]
    """The library's name."""
    package: ClassVar[str]
    """Name of the library's package on the index."""
    weights: ClassVar[str]
    config: ClassVar[str]
    pickle: ClassVar[bool] = False
    """Whether the weights are a pickle, which is only read on request."""
    how_to_load: ClassVar[str]
    """Python code that loads the folder {out} in the library."""

    @staticmethod
    @abstractmethod
    def read(folder: Path) -> SAE:
        """Read the SAE in a folder. Raises InputError if it is damaged or of an unknown kind."""

    @staticmethod
    @abstractmethod
    def write(sae: SAE, folder: str | Path) -> Path:
        """Write the folder. Raises InputError, with the reason, if the format cannot hold it."""

    @staticmethod
    def reader(folder: Path, sae: SAE) -> Reader:
        """The SAE as the library itself runs it, for --verify. Raises ImportError without it."""
        raise InputError("this format does not say how its library runs an SAE: leave out --verify")


def recognise(folder: Path) -> str | None:
    """Name of a folder's format, or None."""
    for name, form in FORMATS.items():
        if all((folder / file).is_file() for file in (form.weights, form.config)):
            return name
    return None


def known() -> str:
    """The known formats and their files, for messages."""
    return "; ".join(f"{f.library} ({f.weights}, {f.config})" for f in FORMATS.values())
