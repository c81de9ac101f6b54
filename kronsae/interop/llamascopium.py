"""Formats of Llama Scope, and of llamascopium (lm-saes), the library that trained it.

Such an SAE or transcoder reads activations times sqrt(d) / (their mean norm), and what it
reconstructs is divided by that factor of its target. Both factors are folded into the weights, so
that latents keep the values that they had in training.
Latents may be selected by their values times the norms of their decoder rows. Thresholds are then
divided by these norms; with TopK latents become those products.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kronsae.errors import InputError
from kronsae.interop.formats import ReadOnlyFormat
from kronsae.interop.stock import Stock, read_object, source_metadata, take
from kronsae.model.origin import layer_of
from kronsae.model.sae import SAE
from kronsae.registry import FORMATS
from kronsae.system.documents import Keys, Number, shown, typed
from kronsae.system.files import read_tensors

_NAMES = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
_LINEAR = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight",
    "b_dec": "decoder.bias",
}
"""Names in files of earlier versions, whose matrices are transposed."""
_MEAN_NORM = "dataset_average_activation_norm"
_POSITIVE = Number(float, least=1e-30, most=1e30)
_CONFIG = Keys(
    {"hook_point_in": str},
    {
        **dict.fromkeys(("hook_point_out", "act_fn", "norm_activation", "sae_type"), str | None),
        **dict.fromkeys(("use_decoder_bias", "use_glu_encoder"), bool | None),
        "sparsity_include_decoder_norm": bool | None,
        "apply_decoder_bias_to_pre_encoder": bool | None,
        **dict.fromkeys(("top_k", "d_model", "d_sae"), int | None),
        "jump_relu_threshold": float | None,
        _MEAN_NORM: Keys({"in": _POSITIVE, "out": _POSITIVE}, null=True),
    },
)


def read(config: Path, path: Path) -> SAE:
    """Read the SAE of a file of settings and one of weights.

    Raises InputError if it is damaged, or of a kind that has no counterpart here.
    """
    settings = typed(read_object(config), _CONFIG, str(config))
    activation = settings.get("act_fn") or "relu"
    _check(settings, activation, config)
    source = settings["hook_point_in"]
    target = settings.get("hook_point_out") or source
    tensors = read_tensors(path)
    stock = Stock(
        **_fields(settings, tensors, path),
        k=settings.get("top_k") if activation == "topk" else None,
        transcoder=target != source,
    )
    for name, size in zip(("d_sae", "d_model"), stock.W_enc.shape, strict=True):
        if settings.get(name, size) not in (None, size):
            raise InputError(f"{config}: {name} is {settings[name]:,}, the weights have {size:,}")
    scales = _scales(settings, tensors, stock, (source, target), path)
    if settings.get("apply_decoder_bias_to_pre_encoder") and not stock.transcoder:
        stock = stock.with_decoder_bias_first(-1)
    by_norm = settings.get("sparsity_include_decoder_norm") is not False
    if activation == "topk" and by_norm:
        stock = stock.with_unit_rows()
    if activation == "jumprelu":
        unit = scales[1] if by_norm else scales[0]
        stock = replace(stock, threshold=_thresholds(settings, tensors, stock, unit, path))
        if by_norm:
            stock = replace(stock, threshold=stock.threshold / stock.W_dec.norm(dim=1))
    if activation == "relu":
        stock = replace(stock, threshold=torch.zeros_like(stock.b_enc))
    metadata = source_metadata(
        "llamascopium",
        settings,
        name="meta-llama/Llama-3.1-8B" if "Llama3_1-8B-Base" in str(path.absolute()) else None,
        hookpoint=source,
        target_hookpoint=target if stock.transcoder else None,
        layer=layer_of(source),
    )
    return stock.of_raw(*scales).to_sae(None, metadata)


def _check(settings: dict[str, Any], activation: str, config: Path) -> None:
    """Raise InputError for a kind of SAE that has no counterpart here."""
    kind, norm = (settings.get(name) for name in ("sae_type", "norm_activation"))
    problem = None
    if kind not in (None, "sae"):
        problem = f"sae_type {shown(kind)}"
    elif settings.get("use_glu_encoder"):
        problem = "an encoder with a second, multiplied projection (use_glu_encoder)"
    elif activation in ("batchtopk", "layertopk", "batchlayertopk"):
        problem = f"act_fn {shown(activation)}, which selects by the batch, without thresholds"
    elif activation not in ("relu", "jumprelu", "topk"):
        problem = f"act_fn {shown(activation)}"
    elif norm not in (None, "dataset-wise", "inference"):
        problem = f"norm_activation {shown(norm)}, a factor that is another for each token or batch"
    if problem is not None:
        raise InputError(f"{config}: the SAE has {problem}: that has no counterpart here")


def _fields(settings: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Weights and biases, as fields of `Stock`."""
    earlier = "encoder.weight" in tensors
    names = dict(_LINEAR if earlier else _NAMES)
    if settings.get("use_decoder_bias") is False:
        del names["b_dec"]
    others = (f"{_MEAN_NORM}*", "*log_jumprelu_threshold", "b_D", "decoder.bias")
    fields = take(tensors, names, path, ("W_dec" if earlier else "W_enc",), others)
    if "b_dec" not in fields:
        fields["b_dec"] = fields["W_dec"].new_zeros(fields["W_dec"].shape[1:])
    return fields


def _scales(
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    stock: Stock,
    hooks: tuple[str, str],
    path: Path,
) -> tuple[float, float]:
    """Factors by which the input and the target are multiplied. hooks: the names of both."""
    if settings.get("norm_activation") == "inference":  # they are folded already
        return 1.0, 1.0
    norms = settings.get(_MEAN_NORM)
    if norms is None:
        names = {"in": f"{_MEAN_NORM}.{hooks[0]}", "out": f"{_MEAN_NORM}.{hooks[1]}"}
        norms = take(tensors, names, path)
        norms = {end: typed(norms[end], _POSITIVE, f"{path}: {names[end]}") for end in norms}
    width, target_width = stock.W_enc.shape[1], stock.W_dec.shape[1]
    return math.sqrt(width) / norms["in"], math.sqrt(target_width) / norms["out"]


def _thresholds(
    settings: dict[str, Any], tensors: dict[str, Tensor], stock: Stock, unit: float, path: Path
) -> Tensor:
    """Thresholds [F]: those that the tensors learned, or else the one of the settings.

    unit: of the latter, which is one of raw activations.
    """
    shared = settings.get("jump_relu_threshold")
    learned = [name for name in tensors if name.endswith("log_jumprelu_threshold")]
    if learned or shared is None:
        name = learned[0] if learned else "log_jumprelu_threshold"
        return take(tensors, {"threshold": name}, path)["threshold"].exp()
    return torch.full_like(stock.b_enc, shared * unit)


def _read_llama_scope(folder: Path) -> SAE:
    return read(folder / LlamaScope.config, folder / LlamaScope.weights)


def _read_llamascopium(folder: Path) -> SAE:
    return read(folder / Llamascopium.config, folder / Llamascopium.weights)


@FORMATS.register("llama_scope")
class LlamaScope(ReadOnlyFormat):
    library = package = "Llama Scope"
    weights, config = "checkpoints/final.safetensors", "hyperparams.json"
    read = staticmethod(_read_llama_scope)


@FORMATS.register("llamascopium")
class Llamascopium(ReadOnlyFormat):
    library = package = "llamascopium"
    weights, config = "sae_weights.safetensors", "config.json"
    read = staticmethod(_read_llamascopium)
