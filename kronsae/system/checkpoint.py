"""Checkpoints: the complete state of a run, atomic, checksummed, free of pickle.

A state is a nested dict of tensors and JSON values. On disk it is a folder with the tensors in
state.safetensors and the rest in state.json, which also holds the SHA-256 of the tensors' file, and
a checksum of its own. A run's checkpoints also have a copy of its config.json.

Of several processes that hold an autoencoder's heads together (`kronsae.system.parallel`) each
writes its own rows: rank 0 to state.safetensors, beside all that is the same on all ranks, the next
ones to state-1.safetensors, ... File i of n has the i-th of n equal parts of the rows, so that any
other number of processes finds its own. torch.distributed.checkpoint would shard as well, but its
index is a pickle, and its safetensors form is one file for each of a model's tensors, with no room
for the JSON values and checksums that make a checkpoint whole.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError

from kronsae.errors import InputError
from kronsae.system.files import (
    read_checksummed,
    remove_directory,
    replace_directory,
    sha256,
    write_checksummed,
)
from kronsae.system.parallel import ALONE, Group, Mesh

FORMAT_VERSION = 2
SHARDED_VERSION = 3
"""Of a checkpoint with several files of tensors; else it is as in FORMAT_VERSION."""
TENSORS_NAME = "state.safetensors"
VALUES_NAME = "state.json"
_TENSOR_KEY = "__tensor__"


def save_state(
    folder: Path,
    state: dict[str, Any],
    mesh: Mesh = ALONE,
    held: Collection[str] = (),
    copies: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Path:
    """Write `state` to `folder`, atomically. Raises InputError if the disk is full.

    held: ends of the names (keys, joined by dots) of tensors that have a part of their rows on each
        process along `mesh.heads`. All processes of the mesh call this, and see one folder.
    copies: checksummed JSON files to put beside the state, by name.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    rank, file = mesh.heads.rank, _file(mesh.heads.rank)

    def is_mine(name: str) -> bool:
        return mesh.data.rank == 0 and (rank == 0 or _is_held(name, held))

    values = _split(state, "", tensors, is_mine)
    own, digest = _beside(folder, rank), None
    try:
        with mesh.world.together():
            if mesh.data.rank == 0 and rank:
                replace_directory(own, lambda partial: save_file(tensors, partial / file))
                digest = sha256(own / file)
        # Ranks along `heads` are neighbours: those of the first group are the first of all.
        others = mesh.world.exchange(digest)[1 : mesh.heads.size]

        def write(partial: Path) -> None:
            save_file(tensors, partial / TENSORS_NAME)
            digests = {TENSORS_NAME: sha256(partial / TENSORS_NAME)}
            for number, other in enumerate(others, 1):
                name = _file(number)
                os.rename(
                    own.parent / f".{folder.name}.rank-{number}.partial" / name, partial / name
                )
                digests[name] = other
            document = {
                "format_version": SHARDED_VERSION if others else FORMAT_VERSION,
                "sha256": digests if others else digests[TENSORS_NAME],
                "state": values,
            }
            write_checksummed(partial / VALUES_NAME, document)
            for name, copy in copies.items():
                write_checksummed(partial / name, copy)

        with mesh.world.together():
            if mesh.first:
                replace_directory(folder, write)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return folder


def state_of(owner: int, state: dict[str, Any] | None, group: Group) -> dict[str, Any]:
    """The state that rank `owner` of the group (tensors on the CPU) gives, on all of its ranks.

    Rank 0 gets the tensors, too, on the CPU; other ranks get None in their place. All of them have
    to call this; what others than the owner give does not count.
    """
    tensors: dict[str, torch.Tensor] = {}
    told = None
    if group.rank == owner:
        values = _split(state, "", tensors, lambda _: owner > 0)
        kinds = {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}
        told = values, kinds
    values, kinds = group.exchange(told)[owner]
    if group.rank == 0:
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            for name, (dtype, *shape) in kinds.items()
        }
    for x in tensors.values():
        group.to_first(x, owner)
    return state if group.rank == owner else _join(values, tensors.get)


def load_state(
    folder: Path,
    group: Group = ALONE.heads,
    held: Collection[str] = (),
    tensors: bool = True,
) -> dict[str, Any]:
    """The state in `folder`. Raises InputError if it is damaged or of another format version.

    group, held: as `mesh.heads` and `held` of `save_state`, whatever they were when it was saved.
        A rank of the group gets its own rows, and reads only files that have some of them.
    tensors: False leaves None in their place, and their files unread.
    """
    advice = f"remove the folder {folder} to go on from the checkpoint before it"
    try:
        document = read_checksummed(folder / VALUES_NAME)
        version, digests, values = (document[k] for k in ("format_version", "sha256", "state"))
        if version == FORMAT_VERSION:
            digests = {TENSORS_NAME: digests}
        files = [_file(number) for number in range(len(digests))]
        if version in (FORMAT_VERSION, SHARDED_VERSION) and list(digests) != files:
            raise ValueError(f"expected the files {files}, got {list(digests)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"checkpoint {folder} is damaged ({VALUES_NAME}: {error}); {advice}"
        ) from error
    if version not in (FORMAT_VERSION, SHARDED_VERSION):
        raise InputError(
            f"checkpoint {folder}: expected format version {FORMAT_VERSION} or {SHARDED_VERSION}, "
            f"got {version}"
        )
    parts: dict[int, dict[str, torch.Tensor]] = {}

    def part(number: int) -> dict[str, torch.Tensor]:
        """The tensors of a file, which are read from the disk when they are looked at."""
        from safetensors.torch import load_file

        if number not in parts:
            path = folder / files[number]
            if not path.is_file():
                raise InputError(
                    f"checkpoint {folder} is damaged ({path.name} is missing); {advice}"
                )
            if sha256(path) != digests[path.name]:
                raise InputError(
                    f"checkpoint {folder} is damaged ({path.name} does not have the SHA-256 "
                    f"that {VALUES_NAME} names); {advice}"
                )
            parts[number] = load_file(path)
        return parts[number]

    def tensor(name: str) -> torch.Tensor:
        if not _is_held(name, held):
            return part(0)[name]
        # In units of 1 / (files x ranks) of the rows a file has `ranks`, and a rank `files`.
        ranks, rank, count = group.size, group.rank, len(files)
        found = []
        for number in range(rank * count // ranks, -(-(rank + 1) * count // ranks)):
            rows = part(number)[name]
            first = max(0, rank * count - number * ranks) * len(rows) // ranks
            last = min(ranks, (rank + 1) * count - number * ranks) * len(rows) // ranks
            found.append(rows[first:last])
        return found[0] if len(found) == 1 else torch.cat(found)

    try:
        return _join(values, tensor if tensors else lambda _: None)
    except (KeyError, SafetensorError) as error:  # whole, but not what `save_state` wrote
        raise InputError(f"checkpoint {folder} is damaged (tensors: {error}); {advice}") from error


def _file(rank: int) -> str:
    """Where a rank's tensors are."""
    return f"state-{rank}.safetensors" if rank else TENSORS_NAME


def _beside(folder: Path, rank: int) -> Path:
    """Where a rank's file waits until all are there (`files.remove_leftovers` knows the name)."""
    return folder.parent / f".{folder.name}.rank-{rank}.partial"


def _is_held(name: str, held: Collection[str]) -> bool:
    return any(name.endswith(f".{end}") for end in held)


def _split(
    value: Any, name: str, tensors: dict[str, torch.Tensor], is_wanted: Callable[[str], bool]
) -> Any:
    """`value` with each wanted tensor moved to `tensors`, and the names of all in their place."""
    if isinstance(value, torch.Tensor):
        if is_wanted(name):
            # A copy: tensors that share memory (views, expanded ones) are saved each for itself.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR_KEY: name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"state keys must be strings, got {key!r} in {name or 'the root'}")
        return {
            key: _split(item, f"{name}.{key}", tensors, is_wanted) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{name}.{i}", tensors, is_wanted) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a state holds tensors and JSON values, got {type(value)} at {name}")


def _join(value: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR_KEY}:
            return tensor(value[_TENSOR_KEY])
        return {key: _join(item, tensor) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensor) for item in value]
    return value


# The checkpoints of a run


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders step-NNNNNNNN, oldest first."""
    pattern = re.compile(r"step-\d{8,}")
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if pattern.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a folder step-NNNNNNNN."""
    return int(folder.name.removeprefix("step-"))


def copy_of(path: Path, checkpoints: Path) -> Path | None:
    """The newest whole copy of a file that `save_state` put into a checkpoint, or None."""
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            read_checksummed(folder / path.name)
            return folder / path.name
        except (OSError, ValueError):
            continue
    return None


def drop_after(checkpoints: Path, step: int) -> None:
    """Remove all checkpoints of steps after `step`."""
    for path in list_checkpoints(checkpoints):
        if step_of(path) > step:
            remove_directory(path)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in list_checkpoints(checkpoints)[:-keep]:
        remove_directory(path)
