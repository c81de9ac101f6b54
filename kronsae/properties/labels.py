"""Labels of latents: what a person, or `kronsae interpret`, says that each is about.

labels.json beside a run: {"format": "kronsae-labels", "format_version": 1, "sae_sha256": …,
"labels": {"12": {"text": "…", "by": "…", "detection": 0.9}}}; all but "text" may be missing. The
explorer's page makes such a file, too.
"""

from pathlib import Path
from typing import Any, NamedTuple

from kronsae.errors import InputError
from kronsae.system.documents import Keys, Number, part_of, read_json, typed
from kronsae.system.files import write_json

FILE = "labels.json"
FORMAT, FORMAT_VERSION = "kronsae-labels", 1
EXPLANATIONS, EXPLANATIONS_FILE = "kronsae-interpretation", "interpretation.json"
"""Format and name of what `kronsae interpret` writes into its --out."""

_DETECTION = Number(float, 0, 1, null=True)
_LABEL = Keys({"text": str}, {"by": str, "detection": _DETECTION})
_DOCUMENT = Keys({"labels": dict[str, Any]}, {"sae_sha256": str | None})
_EXPLANATION = Keys({"latent": int, "explanation": str | None})
_EXPLANATIONS = Keys({"latents": list[Any], "explainer": str})


class Label(NamedTuple):
    """What a latent is about."""

    text: str
    by: str = ""
    """The model that wrote it; "": a person."""
    detection: float | None = None
    """The label's detection score, if it has one."""


Labels = dict[int, Label]


def read_labels(path: Path, latents: int, digest: str | None) -> Labels:
    """The labels in a file, or in the folder of one: labels.json, or what `interpret` wrote.

    latents, digest: how many the SAE has, and the SHA-256 of its weights.
    Raises InputError if there is no such file, or if it is of another format or SAE.
    """
    if path.is_dir():
        names = [path / name for name in (EXPLANATIONS_FILE, FILE)]
        path = next((name for name in names if name.is_file()), names[0])
    try:
        document = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {error}; expected {FILE}, or the --out folder of a "
            f"kronsae interpret that has ended"
        ) from error
    return labels_of(document, str(path), latents, digest)


def labels_of(document: Any, path: str, latents: int, digest: str | None) -> Labels:
    """The labels in a document; see `read_labels`.  path: its name in messages."""
    kind = document.get("format") if isinstance(document, dict) else None
    if kind not in (FORMAT, EXPLANATIONS):
        raise InputError(f"{path}: expected format {FORMAT!r} or {EXPLANATIONS!r}, got {kind!r}")
    labels = _explanations(document, path) if kind == EXPLANATIONS else _labels(document, path)
    other = document.get("sae_sha256")
    if other is not None and digest is not None and other != digest:
        raise InputError(
            f"{path} has labels of another SAE (its weights' SHA-256 begins with {other[:8]}, this "
            f"one's with {digest[:8]}): move the file away, or give the SAE that it is of"
        )
    if beyond := [latent for latent in labels if not 0 <= latent < latents]:
        raise InputError(f"{path}: expected latents 0 to {latents - 1}, got {beyond[0]}")
    return labels


def labels_beside(folder: Path, latents: int, digest: str | None) -> Labels:
    """Labels of labels.json in a run's folder, {} without. Raises InputError as `read_labels`."""
    path = folder / FILE
    return read_labels(path, latents, digest) if path.is_file() else {}


def write_labels(labels: Labels, path: Path, digest: str | None) -> None:
    """Write labels.json. Raises InputError if it cannot be written."""
    write_json(
        path,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "sae_sha256": digest,
            "labels": plain(labels),
        },
    )


def plain(labels: Labels) -> dict[str, dict[str, Any]]:
    """Labels as JSON, by the latent's number."""
    return {
        str(latent): {k: v for k, v in label._asdict().items() if v not in ("", None)}
        for latent, label in sorted(labels.items())
    }


def _labels(document: Any, path: str) -> Labels:
    labels = typed(document, _DOCUMENT, path)["labels"]
    labels = {key: {"text": e} if isinstance(e, str) else e for key, e in labels.items()}
    labels = {key: typed(entry, _LABEL, f"{path}: {key}") for key, entry in labels.items()}
    if bad := [key for key in labels if not key.isdecimal()]:
        raise InputError(f"{path}: labels: expected numbers of latents, got {bad[0]!r}")
    return {
        int(key): Label(entry["text"], entry.get("by", ""), entry.get("detection"))
        for key, entry in labels.items()
        if entry["text"]
    }


def _explanations(document: Any, path: str) -> Labels:
    document = typed(document, _EXPLANATIONS, path)
    labels = {}
    for entry in document["latents"]:
        entry = typed(entry, _EXPLANATION, f"{path}: latents")
        score = part_of(entry, "detection").get("score")
        score = typed(score, _DETECTION, f"{path}: latent {entry['latent']}: score")
        if entry["explanation"]:
            labels[entry["latent"]] = Label(entry["explanation"], document["explainer"], score)
    return labels
