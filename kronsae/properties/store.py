"""RUN/properties/: the properties of a run's latents as files.

properties.safetensors   every array, by name: "post.count", "pre.top.tokens", "nearest.latents", …
properties.json          the text, the settings, a summary, and the checksum of the former
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kronsae.errors import InputError
from kronsae.properties.examples import Examples
from kronsae.properties.gather import Examined, Properties
from kronsae.properties.geometry import LogitEffects, Nearest
from kronsae.system.files import replace_directory, sha256, write_json

FOLDER = "properties"
FORMAT_VERSION = 1
_ARRAYS, _FACTS = "properties.safetensors", "properties.json"


class Stored(NamedTuple):
    """All that a properties folder holds."""

    properties: Properties
    nearest: Nearest | None
    logits: LogitEffects | None
    facts: dict[str, Any]
    """sae_sha256, text, settings and summary."""


def save_properties(stored: Stored, folder: Path) -> Path:
    """Write `folder`, replacing it at once. Raises InputError if it cannot be written."""
    from safetensors.numpy import save_file

    found = stored.properties
    arrays: dict[str, np.ndarray] = {}
    for name in ("post", "pre"):
        if getattr(found, name) is not None:
            arrays |= _flattened(name, getattr(found, name))
    for name in ("both", "head_correlation", "other_correlation"):
        if getattr(found, name) is not None:
            arrays[name] = getattr(found, name)
    for name in ("nearest", "logits"):
        part = getattr(stored, name)
        fields = {} if part is None else part._asdict()
        arrays |= {f"{name}.{k}": v.numpy() for k, v in fields.items() if k != "norm"}

    def write(beside: Path) -> None:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, beside / _ARRAYS)
        document = {
            "format": "kronsae-properties",
            "format_version": FORMAT_VERSION,
            "sha256": sha256(beside / _ARRAYS),
            "tokens": found.tokens,
            "contexts": found.contexts,
            "exact_entropy": found.exact_entropy,
            "logits_norm": None if stored.logits is None else stored.logits.norm,
            **stored.facts,
        }
        write_json(beside / _FACTS, document)

    return replace_directory(folder, write)


def load_properties(folder: Path) -> Stored:
    """What `save_properties` wrote. Raises InputError if it is missing, damaged or another's."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        document = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / _FACTS} cannot be read: {error}") from error
    kind = (
        (document.get("format"), document.get("format_version"))
        if isinstance(document, dict)
        else None
    )
    if kind != ("kronsae-properties", FORMAT_VERSION):
        raise InputError(
            f"{folder / _FACTS}: expected format 'kronsae-properties', version {FORMAT_VERSION}, "
            f"got {kind}"
        )
    path = folder / _ARRAYS
    if not path.is_file() or sha256(path) != document["sha256"]:
        raise InputError(f"{path} is missing or damaged: its SHA-256 is not the one in {_FACTS}")
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    properties = Properties(
        document["tokens"],
        document["contexts"],
        _unflattened("post", arrays),
        _unflattened("pre", arrays) if "pre.count" in arrays else None,
        arrays.get("both"),
        arrays.get("head_correlation"),
        arrays.get("other_correlation"),
        document["exact_entropy"],
    )
    nearest, logits = (
        _tensors(name, kind, arrays)
        for name, kind in (("nearest", Nearest), ("logits", LogitEffects))
    )
    if logits is not None:
        logits = LogitEffects(*logits, document["logits_norm"])
    return Stored(properties, nearest and Nearest(*nearest), logits, document)


_EXAMPLES = ("scores", "places", "tokens", "values")


def _flattened(name: str, examined: Examined) -> dict[str, np.ndarray]:
    out = {}
    for key, value in examined._asdict().items():
        if isinstance(value, Examples):
            out |= {f"{name}.{key}.{part}": getattr(value, part) for part in _EXAMPLES}
        else:
            out[f"{name}.{key}"] = value
    return out


def _unflattened(name: str, arrays: dict[str, np.ndarray]) -> Examined:
    fields: dict[str, Any] = {}
    for key in Examined._fields:
        if f"{name}.{key}" in arrays:
            fields[key] = arrays[f"{name}.{key}"]
            continue
        examples = Examples(0, 0)
        for part in _EXAMPLES:
            setattr(examples, part, arrays[f"{name}.{key}.{part}"])
        fields[key] = examples
    return Examined(**fields)


def _tensors(name: str, kind: Any, arrays: dict[str, np.ndarray]) -> list[Any] | None:
    import torch

    fields = [f"{name}.{key}" for key in kind._fields if key != "norm"]
    if fields[0] not in arrays:
        return None
    return [torch.from_numpy(arrays[field]) for field in fields]
