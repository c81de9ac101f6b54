"""What a format of SAE folders is: a class that is registered in `kronsae.registry.FORMATS`."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from kronsae.model.sae import SAE
from kronsae.registry import FORMATS

Reader = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x [t, d] -> number of active latents [t] and reconstruction [t, d_out]."""


class Format:
    """A kind of folder that holds an SAE, recognised by the names of its two files."""

    library: ClassVar[str]
    """What its users call it."""
    package: ClassVar[str]
    """Name on the package index of what loads it."""
    weights: ClassVar[str]
    config: ClassVar[str]
    pickle: ClassVar[bool] = False
    """Whether the weights are a pickle, which is read on request alone."""
    how_to_load: ClassVar[str]
    """Python that loads the folder {out} in the library."""

    @staticmethod
    def read(folder: Path) -> SAE:
        """The SAE in a folder. Raises InputError if it is damaged, or of a kind that is unknown."""
        raise NotImplementedError

    @staticmethod
    def write(sae: SAE, folder: str | Path) -> Path:
        """Write the folder. Raises InputError, with the reason, if the format cannot hold it."""
        raise NotImplementedError

    @staticmethod
    def reader(folder: Path, sae: SAE) -> Reader:
        """The SAE as the library itself loads it, for --verify. Raises ImportError without it."""
        raise NotImplementedError


def recognise(folder: Path) -> str | None:
    """Name of the format that a folder's files are of, or None."""
    for name, form in FORMATS.items():
        if all((folder / file).is_file() for file in (form.weights, form.config)):
            return name
    return None


def known() -> str:
    """The formats and their files, for messages."""
    return "; ".join(f"{f.library} ({f.weights}, {f.config})" for f in FORMATS.values())
