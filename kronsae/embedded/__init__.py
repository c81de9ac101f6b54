"""The language model that ships with the package, so that a first run needs no network."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_MODEL: str = "embedded"
"""The name that stands for the shipped model wherever a model's name is asked for."""

_FOLDER = "stdlib-4m"


def embedded_model_path() -> Path:
    """The folder of the shipped model, for `from_pretrained` of transformers' Auto classes.

    Raises FileNotFoundError if the package was installed without its data files.
    """
    path = Path(__file__).resolve().parent / _FOLDER
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"the embedded model is missing from {str(path)!r}: reinstall")
    return path
