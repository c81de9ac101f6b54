"""SAEs of SAELens' registry, loaded by that library and converted: "sae_lens:RELEASE/ID"."""

import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kronsae.data.common import reason
from kronsae.errors import InputError
from kronsae.interop.lens_format import made_by_lens
from kronsae.model.sae import SAE

REGISTRY = "sae_lens:"
"""What names of such SAEs begin with."""


def of_registry(name: str) -> SAE:
    """The SAE "sae_lens:RELEASE/ID". RELEASE is one of the registry, or a repository of the hub.

    SAELens downloads the files and reads them.
    Raises InputError without the library, for a name that it does not have, and for an SAE that has
    no counterpart here.
    """
    try:
        import sae_lens
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError as error:
        raise InputError(
            f"{name}: this needs SAELens 6 ({error}): pip install sae-lens, or load the suite's "
            "own files, with kronsae.load('owner/name', subfolder=...)"
        ) from error
    release, sae_id = _parted(name, get_pretrained_saes_directory())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a factor that it lacks is an error here
            theirs: Any = sae_lens.SAE.from_pretrained(release, sae_id)
    except Exception as error:  # the library and the hub's client raise dozens of types
        raise InputError(f"{name}: SAELens cannot load it ({reason(error)})") from error
    settings = theirs.cfg.to_dict() | {"architecture": theirs.cfg.architecture()}
    settings["metadata"] = {k: v for k, v in settings["metadata"].items() if v is not None}
    return made_by_lens(settings, theirs.state_dict(), Path(release, sae_id, "sae_weights"))


def _parted(name: str, registry: dict[str, Any]) -> tuple[str, str]:
    """Release and id of a name."""
    release, _, sae_id = name.removeprefix(REGISTRY).partition("/")
    if release not in registry and "/" in sae_id:  # a repository has an owner
        owner, (release, _, sae_id) = release, sae_id.partition("/")
        return f"{owner}/{release}", sae_id
    if release not in registry:
        near = ", ".join(get_close_matches(release, registry))
        raise InputError(
            f"{name}: SAELens has no release {release!r}{f' (it has {near})' if near else ''}"
        )
    ids = registry[release].saes_map
    if sae_id not in ids:
        near = ", ".join(get_close_matches(sae_id, ids, cutoff=0)[:3])
        raise InputError(f"{name}: release {release!r} has no {sae_id!r}; it has {near}, …")
    return release, sae_id
