"""Format of dictionary_learning: ae.pt and config.json, as in its trainer_0/.

ae.pt is a pickle. `kronsae.load` reads it only with allow_pickle=True, and by
`torch.load(weights_only=True)`, which makes tensors and plain containers and runs no other code.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.errors import InputError
from kronsae.interop.formats import Format, Reader
from kronsae.interop.lens_format import ungated
from kronsae.interop.stock import (
    Stock,
    note_of,
    read_object,
    source_metadata,
    stock_of,
    take,
    unpickled,
)
from kronsae.model.origin import Origin, layer_of
from kronsae.model.sae import SAE
from kronsae.registry import FORMATS, OBJECTIVES
from kronsae.system.documents import part_of, typed
from kronsae.system.files import replace_directory, write_json

WEIGHTS_NAME = "ae.pt"
CONFIG_NAME = "config.json"

_LINEAR = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight",
    "b_dec": "b_dec",
}
_PARAMETERS = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_TRAINERS = {
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
}
"""Classes that `write` writes, and the names of trainers that SAEBench expects for them."""
CLASSES = (*_TRAINERS, "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder")
"""Classes that `read` reads."""


def write(sae: SAE, folder: str | Path) -> Path:
    """Write `sae` for `dictionary_learning.utils.load_dictionary(folder, device)`.

    Raises InputError if it is a transcoder, or not dense.
    """
    stock = stock_of(sae, "dictionary_learning")
    if stock.transcoder:
        raise InputError(
            "dictionary_learning has no transcoders: use --to sparsify (TopK) or sae_lens (with "
            "thresholds)"
        )
    kind = _class_of(sae, stock)
    if kind == "JumpReluAutoEncoder":
        tensors = _transposed({ours: getattr(stock, ours) for ours in _PARAMETERS}, "W_enc")
        tensors["threshold"] = stock.threshold
    else:
        stock = stock.with_decoder_bias_first(1)
        matryoshka = kind == "MatryoshkaBatchTopKSAE"
        names, transposed = (_PARAMETERS, "W_enc") if matryoshka else (_LINEAR, "decoder.weight")
        tensors = _transposed({names[ours]: getattr(stock, ours) for ours in names}, transposed)
        # -1 means a threshold that was never learned: TopK needs none.
        first = torch.tensor(-1.0) if stock.threshold is None else stock.threshold[0]
        tensors |= {"k": torch.tensor(stock.k, dtype=torch.int32), "threshold": first.clone()}
        if matryoshka:
            tensors["group_sizes"] = torch.tensor([0, *sae.config.prefixes]).diff()
    config = {"trainer": _trainer(sae, kind), "kronsae": note_of(sae)}

    def save(new: Path) -> None:
        torch.save({name: t.contiguous() for name, t in tensors.items()}, new / WEIGHTS_NAME)
        write_json(new / CONFIG_NAME, config)

    return replace_directory(Path(folder), save)


def _class_of(sae: SAE, stock: Stock) -> str:
    if sae.selection.exact:
        return "AutoEncoderTopK"
    if not sae.selection.by_k or stock.gated:
        return "JumpReluAutoEncoder"
    nested = OBJECTIVES[sae.config.objective].nested
    return "MatryoshkaBatchTopKSAE" if nested else "BatchTopKSAE"


def _trainer(sae: SAE, kind: str) -> dict[str, Any]:
    origin = Origin.of(sae.metadata)
    train = part_of(sae.metadata, "config", "train")
    tokens, batch = train.get("tokens"), train.get("batch_size")
    return {
        "trainer_class": _TRAINERS[kind],
        "dict_class": kind,
        "activation_dim": sae.config.d_model,
        "dict_size": sae.config.dict_size,
        "k": sae.config.k or None,
        "lr": train.get("lr"),
        "seed": train.get("seed"),
        "steps": -(-tokens // batch) if tokens and batch else None,
        "layer": origin.layer,
        "lm_name": origin.model,
        "submodule_name": origin.hookpoint,
        "device": "cpu",
        "wandb_name": f"kronsae-{kind}",
    }


def _transposed(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    return tensors | {name: tensors[name].T}


def read(folder: Path) -> SAE:
    """Read an SAE of dictionary_learning: unpickles tensors of ae.pt.

    Raises InputError if ae.pt holds anything else, is damaged, or of an unknown class. ReLU and
    gated autoencoders become thresholds.
    """
    settings = read_object(folder / CONFIG_NAME)
    trainer = part_of(settings, "trainer")
    kind = trainer.get("dict_class")
    if kind not in CLASSES:
        raise InputError(
            f"{folder}: dictionary_learning's class {kind!r} has no counterpart here; known are "
            f"{', '.join(CLASSES)}"
        )
    path = folder / WEIGHTS_NAME
    tensors = unpickled(path)
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        fields = _transposed(take(tensors, _PARAMETERS | {"threshold": "threshold"}, path), "W_enc")
    elif kind == "GatedAutoEncoder":
        names = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_dec": "decoder_bias"}
        names |= {name: name for name in ("r_mag", "mag_bias", "gate_bias")}
        fields = _transposed(take(tensors, names, path), "W_dec")
        fields["W_enc"], fields["b_enc"], fields["threshold"] = ungated(
            fields["W_enc"], fields.pop("r_mag"), fields.pop("mag_bias"), fields.pop("gate_bias")
        )
    else:
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
        names = _LINEAR | {"b_dec": bias}
        names |= {"threshold": "threshold"} if kind == "BatchTopKSAE" else {}
        fields = _transposed(take(tensors, names, path), "W_dec")
        if kind in ("AutoEncoder", "AutoEncoderNew"):
            fields["threshold"] = torch.zeros_like(fields["b_enc"])
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        fields["threshold"] = fields["threshold"].clamp(min=0).expand(len(fields["b_enc"])).clone()
    stock = Stock(**fields, k=_k_of(kind, trainer, tensors, path))
    if kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"):
        stock = stock.with_decoder_bias_first(-1)
    metadata = source_metadata(
        "dictionary_learning",
        settings,
        name=trainer.get("lm_name"),
        hookpoint=trainer.get("submodule_name"),
        layer=_layer_of(trainer),
        context_length=part_of(settings, "buffer").get("ctx_len"),
    )
    return stock.to_sae(settings.get("kronsae"), metadata)


def _layer_of(trainer: dict[str, Any]) -> int | None:
    """The block, if the SAE is one of the residual stream after it: `resid_post_layer_3`."""
    name = str(trainer.get("submodule_name") or "resid_post")
    of_block = "resid_post" in name or layer_of(name) is not None
    return trainer.get("layer") if of_block else None


def _k_of(kind: str, trainer: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> int | None:
    if kind not in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        return None
    k = tensors.get("k", trainer.get("k"))
    if k is None:
        raise InputError(f"neither {path} nor {CONFIG_NAME} has k")
    return typed(k, int, f"{path}: k")


def reader(folder: Path, sae: SAE) -> Reader:
    from dictionary_learning.utils import load_dictionary

    theirs, _ = load_dictionary(str(folder), "cpu")

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = theirs.encode(x)
        return (latents != 0).sum(-1), theirs.decode(latents)

    return apply


@FORMATS.register("dictionary_learning")
class DictionaryLearning(Format):
    library, package = "dictionary_learning", "dictionary-learning"
    weights, config, pickle = WEIGHTS_NAME, CONFIG_NAME, True
    how_to_load = 'dictionary_learning.utils.load_dictionary("{out}", "cpu")'
    read, write, reader = staticmethod(read), staticmethod(write), staticmethod(reader)
