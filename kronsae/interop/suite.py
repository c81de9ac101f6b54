"""Suites: folders and repositories with an SAE for each of several hookpoints."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from kronsae.data.common import reason
from kronsae.data.hookpoints import Site
from kronsae.errors import InputError
from kronsae.interop.formats import FileFormat, recognise
from kronsae.registry import FORMATS
from kronsae.system.documents import part_of, read_json, typed

INDEX_NAME = "sweep.json"
"""The file of our own suites that names their members."""

_LAYER = re.compile(
    r"(?:^|[._/-])(?:(?:layers?|blocks?|h)[._-]?(\d+)|L(\d+)(?:R|A|M|TC))(?=$|[._/-])"
)
"""The number of a layer in a name such as layers.6, blocks.6.hook_resid_post, layer_6, L6R."""


class Place(NamedTuple):
    """Where an SAE of a suite is, and what it reads."""

    folder: str
    layer: int | None
    hookpoint: str | None


def subfolder_of(
    source: str | Path, layer: int | None, hookpoint: str | None, revision: str | None
) -> str:
    """The folder in a suite of the SAE at a layer or hookpoint; see `subfolders_of`.

    Raises InputError if there is none, or if there are several.
    """
    wanted, folders = subfolders_of(source, layer, hookpoint, revision)
    if len(folders) == 1:
        return folders[0]
    raise InputError(
        f"{source} has {len(folders)} SAEs at {wanted}: {', '.join(folders)}; choose one by "
        f"subfolder={folders[0]!r}"
    )


def member_of(source: str, *, layer: int | None = None, hookpoint: str | None = None) -> str | None:
    """The folder of the SAE at a layer or hookpoint, if `source` is a suite; None if it is one SAE.

    Of both, the hookpoint counts. None, too, for what cannot be listed: `load` says why.
    Raises InputError if a suite has none there, or several.
    """
    path = Path(source)
    if path.is_file() or recognise(path) or recognise(path / "sae"):
        return None
    try:
        places = places_of(path) if path.is_dir() else _on_hub(source, None)
    except InputError:
        return None
    if [place.folder for place in places] in ([], ["sae"]):
        return None
    return subfolder_of(source, None if hookpoint is not None else layer, hookpoint, None)


def subfolders_of(
    source: str | Path, layer: int | None, hookpoint: str | None, revision: str | None = None
) -> tuple[str, list[str]]:
    """A layer or hookpoint in words, and the folders in a suite of the SAEs there.

    source: a sweep's folder, a folder of any known format's folders, or such a repository on the
    hub. Layers are those of our own index, or the numbers in the names of folders.
    Raises InputError if there is none.
    """
    if (layer is None) == (hookpoint is None):
        raise InputError(f"expected layer or hookpoint, got layer {layer}, hookpoint {hookpoint!r}")
    places = places_of(Path(source)) if Path(source).is_dir() else _on_hub(str(source), revision)
    if hookpoint is not None:
        wanted = f"hookpoint {hookpoint!r}"
        found = [place for place in places if hookpoint in (place.hookpoint, place.folder)]
        site = Site.of(hookpoint)
        if not found and site is not None and site.name == "resid_post":
            found = [place for place in places if place[1:] == (site.layer, None)]
    else:
        wanted = f"layer {layer}"
        # The residual stream counts before other modules of the block.
        found = [place for place in places if place.layer == layer and place.hookpoint is None]
        found = found or [place for place in places if place.layer == layer]
    if not found and [place.folder for place in places] == ["sae"]:
        raise InputError(f"{source} holds one SAE, and not a suite: leave out layer and hookpoint")
    if not found:
        there = ", ".join(place.folder for place in places[:20]) or "no SAE"
        raise InputError(f"{source} has no SAE at {wanted}; it has {there}")
    return wanted, [place.folder for place in found]


def places_of(folder: Path) -> list[Place]:
    """The SAEs of a suite in a folder."""
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            places = _of_index(read_json(index))
            return [place for place in places if (folder / place.folder).is_dir()]
        except (OSError, ValueError) as error:
            raise InputError(f"{index} cannot be read: {error}") from error
    return _of_files(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _on_hub(repo_id: str, revision: str | None) -> list[Place]:
    """The SAEs of a suite on the hub, of which only the list of files, or the index, is read."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        files = HfApi().list_repo_files(repo_id, revision=revision)
        if INDEX_NAME in files:
            index = hf_hub_download(repo_id, INDEX_NAME, revision=revision)
            return _of_index(read_json(Path(index)))
    except Exception as error:  # the hub client raises dozens of types
        raise InputError(
            f"{repo_id}: neither a local folder nor a repository that the Hugging Face hub could "
            f"list ({reason(error)})"
        ) from error
    return _of_files(files)


def _of_index(document: Any) -> list[Place]:
    """The members of one of our own suites that did not diverge, from its index."""
    members = typed(document, dict, INDEX_NAME).get("members")
    places = []
    for name, entry in typed(members, dict[str, dict[str, Any]], f"{INDEX_NAME}: members").items():
        if entry.get("failed"):
            continue
        data = part_of(entry, "config", "data")
        layer, hookpoint = data.get("layer"), data.get("hookpoint")
        places.append(
            Place(
                name,
                layer if isinstance(layer, int) else _layer_in(str(hookpoint)),
                hookpoint if isinstance(hookpoint, str) else None,
            )
        )
    return places


def _of_files(files: Iterable[str]) -> list[Place]:
    """The folders, and files, among these that hold weights of a known format."""
    folders: set[str] = set()
    alone: set[str] = set()
    for path in map(PurePosixPath, files):
        for form in FORMATS.values():
            if issubclass(form, FileFormat):
                alone |= {str(path)} if fnmatch(path.name, form.weights) else set()
            elif path.match(f"?*/{form.weights}"):
                folders.add(str(path).removesuffix(f"/{form.weights}"))
    places = []
    for name in sorted(
        folders | {file for file in alone if str(PurePosixPath(file).parent) not in folders}
    ):
        layer = _layer_in(name)
        rest = _LAYER.sub("", name).strip("._-/")
        # What follows a layer's number names a part of the block, but for its residual stream.
        is_residual = rest in ("", "sae", "sae.pt", *_RESIDUAL)
        places.append(Place(name, layer, None if is_residual else PurePosixPath(name).name))
    return places


_RESIDUAL = ("hook_resid_post", "resid_post", "res", "residual")
"""Names of the residual stream after a block, as others give them."""


def _layer_in(name: str) -> int | None:
    if (site := Site.of(name)) is not None:
        return site.layer
    found = _LAYER.findall(name)
    return int("".join(found[-1])) if found else None
