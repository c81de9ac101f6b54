"""Checkpoints: the complete state of a run, atomic, checksummed, free of pickle.

A state is a nested dict of tensors and JSON values. On disk it is a folder with the tensors in
state.safetensors and the rest in state.json, which also holds the SHA-256 of the tensors' file, and
a checksum of its own. A run's checkpoints also have a copy of its config.json, whose values
state.json knows, so that neither can come from another run without being noticed.

Processes that divide an autoencoder's heads (`kronsae.system.parallel`) each write their own rows:
rank 0 to state.safetensors, beside all that is the same on all ranks, the next ones to
state-1.safetensors, ... File i of n has the i-th of n equal parts of the rows, so that any other
number of processes can read its own. (torch.distributed.checkpoint has a pickle for its index, or
one safetensors file for each tensor and no place for JSON values and checksums.)
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch as st
import torch
from safetensors import SafetensorError
from torch import Tensor

from kronsae.errors import InputError
from kronsae.system.files import (
    digest_of,
    read_checksummed,
    remove_directory,
    replace_directory,
    sha256,
    write_checksummed,
)
from kronsae.system.parallel import ALONE, Group, Mesh

FORMAT_VERSION = 2
SHARDED_VERSION = 3
"""The version of a checkpoint with several files of tensors."""
TENSORS_NAME = "state.safetensors"
VALUES_NAME = "state.json"
_TENSOR_KEY = "__tensor__"


def save_state(
    folder: Path,
    state: dict[str, Any],
    mesh: Mesh = ALONE,
    sharded: Collection[str] = (),
    copies: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Path:
    """Write `state` to `folder`, atomically. Raises InputError if the disk is full.

    sharded: ends of the names (keys, joined by dots) of tensors whose rows are divided among the
        processes along `mesh.heads`. All processes of the mesh call this, and see one folder.
    copies: checksummed JSON files to put beside the state, by name.
    """
    rank = mesh.heads.rank
    writes = mesh.data.rank == 0
    tensors: dict[str, Tensor] = {}
    values = _split(
        state, "", tensors, lambda name: writes and (rank == 0 or _is_sharded(name, sharded))
    )
    shard, digest = _shard_folder(folder, rank), None
    try:
        with mesh.world.together():
            if writes and rank:
                replace_directory(shard, lambda part: st.save_file(tensors, part / _file(rank)))
                digest = sha256(shard / _file(rank))
        # Ranks along `heads` are neighbours: those of the first group are the first of all.
        digests = mesh.world.exchange(digest)[1 : mesh.heads.size]
        with mesh.world.together():
            if mesh.first:
                replace_directory(
                    folder,
                    lambda part: _write_files(part, folder, values, tensors, digests, copies),
                )
    finally:
        shutil.rmtree(shard, ignore_errors=True)
    return folder


def _write_files(
    part: Path,
    folder: Path,
    values: Any,
    tensors: dict[str, Tensor],
    digests: list[str],
    copies: Mapping[str, dict[str, Any]],
) -> None:
    """Write the files of `folder` to `part`, and move those of other ranks there.

    digests: SHA-256 of the tensors' files of ranks 1, 2, ...
    """
    st.save_file(tensors, part / TENSORS_NAME)
    sums = {TENSORS_NAME: sha256(part / TENSORS_NAME)}
    for rank, digest in enumerate(digests, 1):
        name = _file(rank)
        os.rename(_shard_folder(folder, rank) / name, part / name)
        sums[name] = digest
    document = {
        "format_version": SHARDED_VERSION if digests else FORMAT_VERSION,
        "sha256": sums if digests else sums[TENSORS_NAME],
        "copies": {name: digest_of(copy) for name, copy in copies.items()},
        "state": values,
    }
    write_checksummed(part / VALUES_NAME, document)
    for name, copy in copies.items():
        write_checksummed(part / name, copy)


def state_of(owner: int, state: dict[str, Any] | None, group: Group) -> dict[str, Any]:
    """The state of rank `owner` of the group (tensors on the CPU), sent to all of its ranks.

    Rank 0 gets the tensors, too, on the CPU; other ranks get None in their place. All of them call
    this; `state` counts on the owner only.
    """
    tensors: dict[str, Tensor] = {}
    message = None
    if group.rank == owner:
        values = _split(state, "", tensors, lambda _: owner > 0)
        message = values, {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}
    values, shapes = group.exchange(message)[owner]
    if group.rank == 0:
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            for name, (dtype, *shape) in shapes.items()
        }
    for x in tensors.values():
        group.to_first(x, owner)
    if group.rank == owner and state is not None:
        return state
    return _join(values, "", lambda name: tensors.get(name))


def load_state(
    folder: Path,
    group: Group = ALONE.heads,
    sharded: Collection[str] = (),
    tensors: bool = True,
) -> dict[str, Any]:
    """The state in `folder`. Raises InputError if it is damaged or of another format version.

    group, sharded: as `mesh.heads` and `sharded` of `save_state`; the group may have another size.
        Each rank gets its own rows, and reads only files that have some of them.
    tensors: False leaves None in their place, and their files unread.
    """
    digests, values = _read_values(folder)
    shards = _Shards(folder, digests)

    def tensor(name: str) -> Tensor | None:
        if not tensors:
            return None
        return shards.rows(name, group) if _is_sharded(name, sharded) else shards[0][name]

    try:
        return _join(values, "", tensor)
    except (KeyError, SafetensorError) as error:  # undamaged, but not what `save_state` wrote
        raise damaged(folder, f"tensors: {error}") from error


def _read_values(folder: Path) -> tuple[dict[str, str], Any]:
    """The tensors' files with their SHA-256, and the values, from state.json."""
    try:
        document = read_checksummed(folder / VALUES_NAME)
        version, digests, values = (document[k] for k in ("format_version", "sha256", "state"))
        if version == FORMAT_VERSION:
            digests = {TENSORS_NAME: digests}
        files = [_file(rank) for rank in range(len(digests))]
        if version in (FORMAT_VERSION, SHARDED_VERSION) and list(digests) != files:
            raise ValueError(f"expected the files {files}, got {list(digests)}")
        for name, digest in document.get("copies", {}).items():
            copy = _copy(folder, name)
            if copy is not None and digest_of(copy) != digest:
                raise ValueError(f"it is of another checkpoint than {name} beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{VALUES_NAME}: {error}") from error
    if version not in (FORMAT_VERSION, SHARDED_VERSION):
        raise InputError(
            f"checkpoint {folder}: expected format version {FORMAT_VERSION} or {SHARDED_VERSION}, "
            f"got {version}"
        )
    return digests, values


class _Shards:
    """The tensors' files of a checkpoint, each checked and read when it is first needed."""

    def __init__(self, folder: Path, digests: dict[str, str]) -> None:
        self.folder = folder
        self.digests = digests
        self._read: dict[int, dict[str, Tensor]] = {}

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """The tensors of file `number`. Raises InputError if it is damaged."""
        if number not in self._read:
            path = self.folder / _file(number)
            if not path.is_file():
                raise damaged(self.folder, f"{path.name} is missing")
            if sha256(path) != self.digests[path.name]:
                raise damaged(
                    self.folder, f"{path.name} does not have the SHA-256 that {VALUES_NAME} names"
                )
            self._read[number] = st.load_file(path)
        return self._read[number]

    def rows(self, name: str, group: Group) -> Tensor:
        """This rank's rows of a tensor whose rows are divided among all files."""
        # In units of 1 / (files x ranks) of the rows, a file has `ranks` and a rank has `files`.
        ranks, rank, files = group.size, group.rank, len(self.digests)
        parts = []
        for number in range(rank * files // ranks, -(-(rank + 1) * files // ranks)):
            rows = self[number][name]
            first = max(0, rank * files - number * ranks) * len(rows) // ranks
            last = min(ranks, (rank + 1) * files - number * ranks) * len(rows) // ranks
            parts.append(rows[first:last])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def damaged(folder: Path, reason: str) -> InputError:
    """The error that a checkpoint cannot be gone on from, for this reason."""
    return InputError(f"checkpoint {folder} is damaged ({reason}); {without(folder)}")


def without(folder: Path) -> str:
    """What to do about a checkpoint that a run cannot go on from, in words."""
    oldest = list_checkpoints(folder.parent)[:1]
    if oldest not in ([], [folder]):
        return f"remove the folder {folder} to go on from the checkpoint before it"
    return f"remove the folder {folder} to begin again, as there is none before it"


def _file(rank: int) -> str:
    """Name of the file with a rank's tensors."""
    return f"state-{rank}.safetensors" if rank else TENSORS_NAME


def _shard_folder(folder: Path, rank: int) -> Path:
    """Where a rank's file waits until all are there (`files.remove_leftovers` knows the name)."""
    return folder.parent / f".{folder.name}.rank-{rank}.partial"


def _is_sharded(name: str, sharded: Collection[str]) -> bool:
    return any(name.endswith(f".{end}") for end in sharded)


def _split(
    value: Any, name: str, tensors: dict[str, Tensor], is_wanted: Callable[[str], bool]
) -> Any:
    """`value` with names in the place of tensors; the wanted ones are copied to `tensors`."""
    if isinstance(value, Tensor):
        if is_wanted(name):
            # Tensors that share memory (views, expanded ones) are saved each for itself.
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


def _join(value: Any, name: str, tensor: Callable[[str], Tensor | None]) -> Any:
    """The inverse of `_split`: `value` with tensors in the place of their names.

    Raises KeyError if another tensor's name is in the place of one.
    """
    if isinstance(value, dict):
        if set(value) == {_TENSOR_KEY}:
            if value[_TENSOR_KEY] != name:
                raise KeyError(f"{name} cannot be {value[_TENSOR_KEY]}")
            return tensor(name)
        return {key: _join(item, f"{name}.{key}", tensor) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, f"{name}.{i}", tensor) for i, item in enumerate(value)]
    return value


# The checkpoints of a run


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders step-NNNNNNNN, oldest first."""
    pattern = re.compile(r"step-\d{8,}")
    if not checkpoints.is_dir():
        return []
    folders = [path for path in checkpoints.iterdir() if pattern.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a folder step-NNNNNNNN."""
    return int(folder.name.removeprefix("step-"))


def copy_of(path: Path, checkpoints: Path) -> Path | None:
    """The newest undamaged copy of a file that `save_state` put into a checkpoint, or None."""
    folders = list(copies_of(path.name, checkpoints))
    return folders[-1] / path.name if folders else None


def copies_of(name: str, checkpoints: Path) -> dict[Path, dict[str, Any]]:
    """The undamaged copies of a file that `save_state` put into checkpoints, oldest first."""
    found = {folder: _copy(folder, name) for folder in list_checkpoints(checkpoints)}
    return {folder: copy for folder, copy in found.items() if copy is not None}


def _copy(folder: Path, name: str) -> dict[str, Any] | None:
    """The copy of a file in a checkpoint; None if it is missing or damaged."""
    try:
        copy = read_checksummed(folder / name)
    except (OSError, ValueError):
        return None
    return copy if isinstance(copy, dict) else None


def digest_of_copy(folder: Path, name: str) -> str | None:
    """What state.json says of the values of a file's copy in a checkpoint, if it can be read."""
    try:
        return read_checksummed(folder / VALUES_NAME)["copies"][name]
    except (OSError, ValueError, KeyError, TypeError):
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
