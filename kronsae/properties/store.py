"""RUN/properties/: the properties of a run's latents as files.

properties.safetensors   every array, by name: "post.count", "pre.top.tokens", "nearest.latents", …
properties.json          the text, the settings, a summary, and checksums of both files
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kronsae.errors import InputError, warn
from kronsae.metrics.usual import Usual
from kronsae.properties.examples import PARTS, Examples
from kronsae.properties.gather import Examined, Properties
from kronsae.properties.geometry import LogitEffects, Nearest
from kronsae.system.documents import Keys, typed
from kronsae.system.files import read_checksummed, replace_directory, sha256, write_checksummed

FOLDER = "properties"
FORMAT_VERSION = 3
READ_VERSIONS = (1, 2, FORMAT_VERSION)
"""Version 1 has neither examples by interval nor the text. Before version 3, where sums by token
did not fit in memory, top tokens are those of the strongest examples alone: they are left out."""
_ARRAYS, _FACTS = "properties.safetensors", "properties.json"
_DOCUMENT = Keys(
    {
        **{"format": str, "format_version": int, "sha256": str, "tokens": int, "contexts": int},
        **{"exact_entropy": dict[str, bool], "logits_norm": str | None},
    }
)
_EXAMINED = Keys(
    {
        **{"sae_sha256": str, "settings": Keys({"tokens": int}), "summary": dict[str, Any]},
        "text": Keys({"dataset": str}),
    },
    {"massive_tokens": int},
)


class Stored(NamedTuple):
    """All that a properties folder holds."""

    properties: Properties
    nearest: Nearest | None
    logits: LogitEffects | None
    facts: dict[str, Any]
    """sae_sha256, text, settings and summary."""

    def usual(self, latents: Sequence[int]) -> dict[int, Usual]:
        """What is usual for latents of the SAE on the text that was read, by latent."""
        post, read = self.properties.post, self.properties.tokens
        return {
            latent: Usual(
                int(post.count[latent]),
                read,
                float(post.mean[latent]),
                max(0.0, float(post.top.scores[latent].max())),
            )
            for latent in latents
        }

    @property
    def examined(self) -> dict[str, Any]:
        """The facts that `examine` wrote. Raises InputError for others."""
        return typed(self.facts, _EXAMINED, f"{FOLDER}/{_FACTS}")


def save_properties(stored: Stored, folder: Path) -> Path:
    """Write `folder`, replacing it at once. Raises InputError if it cannot be written."""
    from safetensors.numpy import save_file

    properties = stored.properties
    arrays: dict[str, np.ndarray] = {}
    for name in ("post", "pre", "both", "head_correlation", "other_correlation", "text"):
        arrays |= _arrays(name, getattr(properties, name))
    arrays |= _arrays("nearest", stored.nearest) | _arrays("logits", stored.logits)

    def write(beside: Path) -> None:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, beside / _ARRAYS)
        document = {
            "format": "kronsae-properties",
            "format_version": FORMAT_VERSION,
            "sha256": sha256(beside / _ARRAYS),
            "tokens": properties.tokens,
            "contexts": properties.contexts,
            "exact_entropy": properties.exact_entropy,
            "logits_norm": None if stored.logits is None else stored.logits.norm,
            **stored.facts,
        }
        write_checksummed(beside / _FACTS, document)

    return replace_directory(folder, write)


def load_properties(folder: Path) -> Stored:
    """Read what `save_properties` wrote.

    Raises InputError if it is missing, damaged or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        document = typed(read_checksummed(folder / _FACTS), _DOCUMENT, "")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / _FACTS} cannot be read: {error}") from error
    kind, version = document["format"], document["format_version"]
    if kind != "kronsae-properties" or version not in READ_VERSIONS:
        raise InputError(
            f"{folder / _FACTS}: expected format 'kronsae-properties', version "
            f"{' or '.join(map(str, READ_VERSIONS))}, got {(kind, version)}"
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
        _examined("post", arrays),
        _examined("pre", arrays) if "pre.count" in arrays else None,
        arrays.get("both"),
        arrays.get("head_correlation"),
        arrays.get("other_correlation"),
        document["exact_entropy"],
        arrays.get("text"),
    )
    if version < 3 and not all(document["exact_entropy"].values()):
        properties = _without_false_shares(properties)
        warn(
            f"{folder}: an older version measured some top tokens on the strongest examples "
            "alone: they are left out until you measure again"
        )
    nearest, logits = _fields("nearest", arrays), _fields("logits", arrays)
    return Stored(
        properties,
        Nearest(**nearest) if nearest else None,
        LogitEffects(**logits, norm=document["logits_norm"]) if logits else None,
        document,
    )


def _arrays(name: str, value: Any) -> dict[str, np.ndarray]:
    """The arrays inside a value, by their names joined with dots."""
    if isinstance(value, np.ndarray):
        return {name: value}
    if isinstance(value, Examples):
        return {f"{name}.{part}": getattr(value, part) for part in PARTS}
    if isinstance(value, Nearest | LogitEffects):
        value = value._asdict()
    fields = vars(value) if isinstance(value, Examined) else value
    if not isinstance(fields, dict):  # None, or the name of a norm
        return {}
    return {k: v for field in fields for k, v in _arrays(f"{name}.{field}", fields[field]).items()}


def _without_false_shares(properties: Properties) -> Properties:
    """Without top tokens where they are not exact."""
    empty: dict[str, Examined] = {}
    for name, exact in properties.exact_entropy.items():
        group: Examined = getattr(properties, name)
        if not exact:
            tokens, shares = np.full_like(group.top_tokens, -1), np.zeros_like(group.top_shares)
            empty[name] = dataclasses.replace(group, top_tokens=tokens, top_shares=shares)
    return properties._replace(**empty)  # type: ignore[arg-type]


def _examined(name: str, arrays: dict[str, np.ndarray]) -> Examined:
    fields: dict[str, Any] = _fields(name, arrays)
    for kind in ("top", "sample", "intervals"):
        if f"{kind}.scores" not in fields:
            continue
        fields[kind] = examples = Examples(0, 0)
        for part in PARTS:
            setattr(examples, part, fields.pop(f"{kind}.{part}"))
    return Examined(**fields)


def _fields(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names begin with `name`, by the rest of theirs."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
