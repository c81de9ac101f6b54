"""SAEs in the formats and classes of other libraries.

stock.py                what stock formats can hold, and how an SAE fits in
lens_format.py          SAELens' folders          sparsify.py, dictionary_learning.py    theirs
sae_lens.py             KronSAE as an architecture of SAELens (imports sae_lens)
sae_bench.py            the adaptor for SAEBench (imports sae_bench)
verify.py               the same tokens through both libraries

Folders are read and written here without the libraries; `kronsae.load` and
`python -m kronsae.export` are the ways in.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Format(NamedTuple):
    """A kind of folder that holds an SAE."""

    weights: str
    config: str
    library: str
    module: str | None
    """What reads and writes it: `read(folder)`, `write(sae, folder)`. None for our own."""


FORMATS = {
    "kronsae": Format("sae.safetensors", "config.json", "kronsae", None),
    "sae_lens": Format(
        "sae_weights.safetensors", "cfg.json", "SAELens", "kronsae.interop.lens_format"
    ),
    "sparsify": Format("sae.safetensors", "cfg.json", "sparsify", "kronsae.interop.sparsify"),
    "dictionary_learning": Format(
        "ae.pt", "config.json", "dictionary_learning", "kronsae.interop.dictionary_learning"
    ),
}
"""By the name that `python -m kronsae.export --to` takes."""


def recognise(folder: Path) -> str | None:
    """Name of the format that a folder's files are of, or None."""
    for name, form in FORMATS.items():
        if all((folder / file).is_file() for file in (form.weights, form.config)):
            return name
    return None


def module_of(name: str) -> ModuleType:
    """The module that reads and writes a format other than our own."""
    return importlib.import_module(FORMATS[name].module)


def known() -> str:
    """The formats and their files, for messages."""
    return "; ".join(f"{f.library} ({f.weights}, {f.config})" for f in FORMATS.values())
