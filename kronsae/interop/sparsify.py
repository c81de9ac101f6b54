"""Format of sparsify (eai-sparsify): sae.safetensors and cfg.json, a folder per hookpoint.

It holds TopK autoencoders and transcoders, with Multi-TopK and a linear skip.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.errors import InputError
from kronsae.interop.formats import Format, Reader
from kronsae.interop.stock import (
    Stock,
    note_of,
    read_object,
    source_metadata,
    stock_of,
    take,
    write_folder,
)
from kronsae.model.origin import Origin, layer_of
from kronsae.model.sae import SAE
from kronsae.registry import FORMATS
from kronsae.system.files import read_tensors

WEIGHTS_NAME = "sae.safetensors"
CONFIG_NAME = "cfg.json"

_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}


def write(sae: SAE, folder: str | Path) -> Path:
    """Write `sae` for `sparsify.SparseCoder.load_from_disk(folder)`.

    Raises InputError if it is not a dense TopK SAE, or a transcoder between streams of two widths.
    """
    stock = stock_of(sae, "sparsify")
    if stock.threshold is not None:
        raise InputError(
            f"sparsify selects the k largest latents, but selection {sae.config.selection!r} has "
            "thresholds: use --to sae_lens or dictionary_learning"
        )
    if stock.transcoder and sae.config.d_out != sae.config.d_model:
        raise InputError(
            f"sparsify's transcoders have one width, but this one reads {sae.config.d_model} and "
            f"predicts {sae.config.d_out}"
        )
    if not stock.transcoder:
        stock = stock.with_decoder_bias_first(1)
    tensors = {theirs: getattr(stock, ours) for ours, theirs in _NAMES.items()}
    if stock.W_skip is not None:
        tensors["W_skip"] = stock.W_skip
    size, d = stock.W_enc.shape
    config = {
        "activation": "topk",
        "expansion_factor": max(1, size // d),
        "normalize_decoder": bool((stock.W_dec.norm(dim=1) - 1).abs().max() < 1e-3),
        "num_latents": size,
        "k": stock.k,
        "multi_topk": stock.multi_topk,
        "skip_connection": stock.W_skip is not None,
        "transcode": stock.transcoder,
        "d_in": d,
        "kronsae": note_of(sae),
    }
    return write_folder(folder, (WEIGHTS_NAME, tensors), (CONFIG_NAME, config))


def read(folder: Path) -> SAE:
    """Read an SAE of sparsify. Raises InputError if it is damaged or of an unknown kind."""
    settings = read_object(folder / CONFIG_NAME)
    path = folder / WEIGHTS_NAME
    if settings.get("activation", "topk") != "topk" or settings.get("signed"):
        kind = "signed" if settings.get("signed") else settings["activation"]
        raise InputError(f"{folder}: expected sparsify's activation 'topk', got {kind!r}")
    tensors = read_tensors(path)
    names = _NAMES | ({"W_skip": "W_skip"} if settings.get("skip_connection") else {})
    stock = Stock(
        **take(tensors, names, path, others=()),
        k=settings.get("k"),
        transcoder=bool(settings.get("transcode")),
        multi_topk=bool(settings.get("multi_topk")),
    )
    if stock.k is None:
        raise InputError(f"{folder / CONFIG_NAME} has no k")
    if not stock.transcoder:
        stock = stock.with_decoder_bias_first(-1)
    return stock.to_sae(settings.get("kronsae"), _metadata(folder, settings))


def _metadata(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    # The folder is named after its hookpoint (`layers.10`); the run's folder above names the model.
    try:
        run = read_object(folder.resolve().parent / "config.json")
    except InputError:
        run = {}
    name = folder.name
    transcoder = bool(settings.get("transcode"))  # from a module's input to its output
    return source_metadata(
        "sparsify",
        settings,
        name=run.get("model"),
        hookpoint=f"{name}:input" if transcoder else name,
        target_hookpoint=name if transcoder else None,
        layer=layer_of(name) if name.startswith("layers.") and not transcoder else None,
        context_length=run.get("ctx_len"),
    )


def reader(folder: Path, sae: SAE) -> Reader:
    # Otherwise the library crashes without a GPU.
    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder

    theirs = SparseCoder.load_from_disk(folder)

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices, _ = theirs.encode(x)
        out = theirs.decode(values, indices)
        if theirs.W_skip is not None:
            out = out + x @ theirs.W_skip.mT
        return (values > 0).sum(-1), out

    return apply


@FORMATS.register("sparsify")
class Sparsify(Format):
    library, package = "sparsify", "eai-sparsify"
    weights, config, optional = WEIGHTS_NAME, CONFIG_NAME, ("../config.json",)
    how_to_load = 'sparsify.SparseCoder.load_from_disk("{out}")'

    @staticmethod
    def folder_of(sae: SAE, name: str) -> str:
        """The hookpoint in the model without its head: "layers.6.mlp" of "model.layers.6.mlp"."""
        hookpoint = Origin.of(sae.metadata).hookpoint
        return name if hookpoint is None else re.sub(r"^\w+\.(?=\w+\.\d+)", "", hookpoint)

    read, write, reader = staticmethod(read), staticmethod(write), staticmethod(reader)
