"""Checkpoints: the complete state of a run, atomic, checksummed, free of pickle.

A state is a nested dict of tensors and JSON values. On disk it is a folder with the tensors in
state.safetensors and the rest in state.json, which also holds the SHA-256 of the tensors' file.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from kronsae.errors import InputError
from kronsae.files import replace_directory, sha256, write_json

FORMAT_VERSION = 2
TENSORS_NAME = "state.safetensors"
VALUES_NAME = "state.json"
_TENSOR_KEY = "__tensor__"


def save_state(folder: Path, state: dict[str, Any]) -> Path:
    """Write `state` to `folder`, atomically. Raises InputError if the disk is full."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    values = _split(state, "", tensors)

    def write(partial: Path) -> None:
        save_file(tensors, partial / TENSORS_NAME)
        write_json(
            partial / VALUES_NAME,
            {
                "format_version": FORMAT_VERSION,
                "sha256": sha256(partial / TENSORS_NAME),
                "state": values,
            },
        )

    return replace_directory(folder, write)


def load_state(folder: Path) -> dict[str, Any]:
    """The state in `folder`. Raises InputError if it is damaged or of another format version."""
    from safetensors.torch import load_file

    advice = f"remove the folder {folder} to go on from the checkpoint before it"
    try:
        document = json.loads((folder / VALUES_NAME).read_text(encoding="utf-8"))
        version, digest, values = (document[k] for k in ("format_version", "sha256", "state"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"checkpoint {folder} is damaged ({VALUES_NAME}: {error}); {advice}"
        ) from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"checkpoint {folder}: expected format version {FORMAT_VERSION}, got {version}"
        )
    path = folder / TENSORS_NAME
    if not path.is_file():
        raise InputError(f"checkpoint {folder} is damaged ({TENSORS_NAME} is missing); {advice}")
    if sha256(path) != digest:
        raise InputError(
            f"checkpoint {folder} is damaged ({TENSORS_NAME} does not have the SHA-256 "
            f"that {VALUES_NAME} names); {advice}"
        )
    return _join(values, load_file(path))


def _split(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` with each tensor moved to `tensors` and its name left in its place."""
    if isinstance(value, torch.Tensor):
        # A copy: tensors that share memory (views, expanded ones) are saved each for itself.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR_KEY: name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"state keys must be strings, got {key!r} in {name or 'the root'}")
        return {key: _split(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a state holds tensors and JSON values, got {type(value)} at {name}")


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR_KEY}:
            return tensors[value[_TENSOR_KEY]]
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
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


def drop_after(checkpoints: Path, step: int) -> None:
    """Remove all checkpoints of steps after `step`."""
    for path in list_checkpoints(checkpoints):
        if step_of(path) > step:
            shutil.rmtree(path)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in list_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(path)
