"""Formats of Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors), a folder an SAE.

Both hold JumpReLU SAEs and transcoders: x W_enc + b_enc where it is above its threshold, else 0.
Names of folders say the model and where it is read, as in
`gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`.
"""

import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kronsae.errors import InputError
from kronsae.interop.formats import ReadOnlyFormat
from kronsae.interop.stock import Stock, read_object, source_metadata, take
from kronsae.model.origin import layer_of
from kronsae.model.sae import SAE
from kronsae.registry import FORMATS
from kronsae.system.documents import Keys, shown, typed
from kronsae.system.files import read_tensors
from kronsae.system.tensors import check_room

ARRAYS_NAME = "params.npz"
WEIGHTS_NAME = "params.safetensors"
CONFIG_NAME = "config.json"

_MOST_COMPRESSED = 20
"""Times its size that a file of arrays may take in memory; weights can hardly be compressed."""
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_HOOKS = ("hf_hook_point_in", "hf_hook_point_out")
_TEXTS = dict.fromkeys(("model_name", "architecture", *_HOOKS), str | None)
_CONFIG = Keys({}, {**_TEXTS, "l0": float | None})


_DAMAGED = (
    *(OSError, ValueError, TypeError, EOFError, OverflowError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What reading a file of arrays raises, as they are damaged, encrypted, or of other types."""


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Tensors of an .npz file. Raises InputError if it is damaged, or would take too much memory.

    Nothing is unpickled: arrays of objects are refused.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_arrays(archive, path)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except _DAMAGED as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _check_arrays(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise an error unless each array is as long as it says, and all of them fit the memory."""
    total = sum(member.file_size for member in archive.infolist())
    if total > _MOST_COMPRESSED * path.stat().st_size:
        raise InputError(f"{path}: {total:,} bytes come of a file of {path.stat().st_size:,}")
    check_room(math.ceil(total / 4), "cpu", f"{path}: its arrays", "use a machine with more")
    for member in archive.infolist():
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            if version not in read_header:
                raise ValueError(f"{member.filename} has version {version} of the npy format")
            shape, _, dtype = read_header[version](file)
            if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                raise ValueError(f"{member.filename} does not hold an array {list(shape)} {dtype}")


def read(folder: Path) -> SAE:
    """Read an SAE or transcoder of Gemma Scope. Raises InputError if it is damaged."""
    path, where = folder / ARRAYS_NAME, folder.absolute().as_posix()
    arrays = read_arrays(path)
    arrays = {name.replace("w_", "W_"): array for name, array in arrays.items()}  # transcoders'
    fields = take(arrays, {name: name for name in _NAMES}, path, ("W_enc",), others=())
    release = _RELEASE.search(where)
    transcoder = release is not None and release[3] == "transcoders"
    l0 = re.search(r"/average_l0_([0-9]{1,6})$", where)
    stock = Stock(**fields, k=_k(int(l0[1]) if l0 else None, fields), transcoder=transcoder)
    return stock.to_sae(None, source_metadata("gemma_scope", {}, **_origin(where)))


def read_second(folder: Path) -> SAE:
    """Read an SAE or transcoder of Gemma Scope 2.

    Raises InputError if it is damaged, or a crosscoder or cross-layer transcoder.
    """
    config, path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    settings = typed(read_object(config) if config.is_file() else {}, _CONFIG, str(config))
    architecture = settings.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise InputError(f"{config}: expected architecture 'jump_relu', got {shown(architecture)}")
    tensors = read_tensors(path)
    if any(tensors[name].ndim > 2 for name in ("w_enc", "w_dec") if name in tensors):
        raise InputError(
            f"{path}: it reads or writes several layers; crosscoders and cross-layer transcoders "
            "have no counterpart here"
        )
    names = {ours: ours.lower() for ours in _NAMES}
    if "affine_skip_connection" in tensors:
        names["W_skip"] = "affine_skip_connection"
    fields = take(tensors, names, path, names.keys() & {"W_enc", "W_skip"}, others=())
    data = _second_origin(settings, folder.absolute().as_posix())
    transcoder = "W_skip" in fields or data.get("target_hookpoint") is not None
    metadata = source_metadata("gemma_scope_2", settings, **data)
    k = _k(settings.get("l0"), fields)
    return Stock(**fields, k=k, transcoder=transcoder).to_sae(None, metadata)


def _k(l0: float | None, fields: dict[str, Any]) -> int | None:
    """The mean number of active latents, as k."""
    return None if l0 is None else min(max(1, round(l0)), max(1, fields["b_enc"].numel()))


_RELEASE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-([a-z]+)")
_SITES = {
    "res": "model.layers.{}",
    "mlp": "model.layers.{}.post_feedforward_layernorm",
    "att": "model.layers.{}.self_attn.o_proj:input",
}
"""Modules by the last part of a repository's name."""


def _origin(where: str) -> dict[str, Any]:
    """What the names of folders say of the activations."""
    release, layer = _RELEASE.search(where), re.search(r"/layer_([0-9]{1,4})/", where)
    if release is None:
        return {}
    name = f"google/gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}"
    hookpoint = _SITES[release[3]].format(layer[1]) if layer and release[3] in _SITES else None
    return _described(name, hookpoint, None)


_SECOND = re.compile(r"gemma-scope-2-([0-9]+m|[0-9]+b)-(pt|it)")
_SECOND_SITES = {
    "resid_post": ("model.layers.{}.output", None),
    "mlp_out": ("model.layers.{}.post_feedforward_layernorm.output", None),
    "attn_out": ("model.layers.{}.self_attn.o_proj.input", None),
    "transcoder": (
        "model.layers.{}.pre_feedforward_layernorm.output",
        "model.layers.{}.post_feedforward_layernorm.output",
    ),
}
_SECOND_SITE = re.compile(rf"/({'|'.join(_SECOND_SITES)})[^/]*/layer_([0-9]{{1,4}})_")
"""Where an SAE without a configuration reads and writes, by its folder's name."""


def _second_origin(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """What the configuration, or else the names of folders, say of the activations."""
    release, site = _SECOND.search(where), _SECOND_SITE.search(where)
    name = settings.get("model_name")
    if name is None and release is not None:
        name = f"gemma-3-{release[1]}-{release[2]}"
    if name is not None:
        name = f"google/{name.removeprefix('google/')}".replace("gemma-v3", "gemma-3")
        name = name.replace("270m-pt", "270m")
    source, target = map(settings.get, _HOOKS)
    if source is None and site is not None:
        source, target = (end and end.format(site[2]) for end in _SECOND_SITES[site[1]])
    return _described(name, _hookpoint(source), None if target == source else _hookpoint(target))


def _hookpoint(name: str | None) -> str | None:
    """`module.output` and `module.input` as we name them."""
    module, _, end = (name or "").rpartition(".")
    return {"output": module, "input": f"{module}:input"}.get(end, name)


def _described(model: str | None, hookpoint: str | None, target: str | None) -> dict[str, Any]:
    """Metadata of Gemma's activations, whose contexts all begin with BOS."""
    return {
        "name": model,
        "hookpoint": hookpoint,
        "target_hookpoint": target,
        "layer": layer_of(hookpoint),
        "prepend_bos": True,
    }


@FORMATS.register("gemma_scope")
class GemmaScope(ReadOnlyFormat):
    library = package = "Gemma Scope"
    weights = ARRAYS_NAME
    read = staticmethod(read)


@FORMATS.register("gemma_scope_2")
class GemmaScope2(ReadOnlyFormat):
    library = package = "Gemma Scope 2"
    weights, optional = WEIGHTS_NAME, (CONFIG_NAME,)
    read = staticmethod(read_second)
