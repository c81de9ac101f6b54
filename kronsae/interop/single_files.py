"""Formats of single files: pickles of Qwen-Scope, OpenAI, Goodfire and others; transcoder sets.

A pickle is read only with allow_pickle=True, and by `torch.load(weights_only=True)`. Which suite
it is of, the names of its tensors say: see `LAYOUTS`. What the tensors do not say (k, the model,
the block) is in the name of the file, or of a folder above it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from kronsae.errors import InputError
from kronsae.interop.formats import FileFormat
from kronsae.interop.stock import Stock, source_metadata, take, unpickled
from kronsae.model.sae import SAE
from kronsae.registry import FORMATS
from kronsae.system.documents import part_of, shown
from kronsae.system.files import read_tensors

_NAMES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def _relu(fields: dict[str, Any]) -> Stock:
    return Stock(**fields, threshold=torch.zeros_like(fields["b_enc"]))


def _qwen_scope(content: dict[str, Any], path: Path) -> tuple[Stock, dict[str, Any]]:
    where = path.absolute().as_posix()
    release = re.search(r"SAE-Res-([^/]+)-W[0-9]+K-L0_([0-9]{1,6})", where)
    if release is None:
        raise InputError(
            f"{path}: k is in the name of Qwen-Scope's repositories alone: keep the file in a "
            "folder of such a name, as in SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer6.sae.pt"
        )
    fields = take(content, _NAMES, path, ("W_dec",), others=())
    return Stock(**fields, k=int(release[2])), {"name": f"Qwen/{release[1]}"}


def _openai(content: dict[str, Any], path: Path) -> tuple[Stock, dict[str, Any]]:
    activation = content.get("activation", "ReLU")
    if activation != "ReLU":
        why = "has no counterpart here: expected 'ReLU'"
        if activation == "TopK":
            why = (
                "goes with a LayerNorm of each token before it is encoded, whose inverse decodes: "
                "that has no counterpart here (its ReLU autoencoders, v1 and v4, are read)"
            )
        raise InputError(f"{path}: OpenAI's activation {shown(activation)} {why}")
    names = {
        "W_enc": "encoder.weight",
        "b_enc": "latent_bias",
        "W_dec": "decoder.weight",
        "b_dec": "pre_bias",
    }
    others = ("activation*", "stats_last_nonzero")
    stock = _relu(take(content, names, path, ("W_dec",), others)).with_decoder_bias_first(-1)
    of_gpt2 = "gpt2-small" in path.absolute().as_posix()
    return stock, {"name": "openai-community/gpt2"} if of_gpt2 else {}


def _linear(content: dict[str, Any], path: Path) -> tuple[Stock, dict[str, Any]]:
    """Two layers with biases: Goodfire's, and those of DeepSeek-R1-Distill-Llama-8B."""
    suffix = "_linear" if "encoder_linear.weight" in content else ""
    names = {
        "W_enc": f"encoder{suffix}.weight",
        "b_enc": f"encoder{suffix}.bias",
        "W_dec": f"decoder{suffix}.weight",
        "b_dec": f"decoder{suffix}.bias",
    }
    model = re.fullmatch(r"(DeepSeek|Llama)(-.+)-SAE-l[0-9]+", path.stem)
    owner = {"DeepSeek": "deepseek-ai", "Llama": "meta-llama"}
    data = {"name": f"{owner[model[1]]}/{model[1]}{model[2]}"} if model else {}
    return _relu(take(content, names, path, ("W_dec",), others=())), data


def _hook_z(content: dict[str, Any], path: Path) -> tuple[Stock, dict[str, Any]]:
    """Attention SAEs of GPT-2 small, of the concatenated heads."""
    stock = _relu(take(content, _NAMES, path, ("W_enc",), ())).with_decoder_bias_first(-1)
    block = re.match(r"gpt2-small_L([0-9]{1,4})_", path.name)
    data = {}
    if block is not None:
        module = f"transformer.h.{block[1]}.attn.c_proj:input"
        data = {"name": "openai-community/gpt2", "hookpoint": module}
    return stock, data


class Layout(NamedTuple):
    """A suite's layout of a pickle."""

    suite: str
    file: str
    """Pattern that a file's name begins with."""
    has: str
    """Name of a tensor that others have not."""
    read: Callable[[dict[str, Any], Path], tuple[Stock, dict[str, Any]]]
    """The SAE of a pickle's content, and what is known of its activations."""


LAYOUTS = (
    Layout("Qwen-Scope", r"layer[0-9]+\.sae\.pt", "W_enc", _qwen_scope),
    Layout("hook_z of GPT-2 small", "", "W_enc", _hook_z),
    Layout("OpenAI", "", "latent_bias", _openai),
    Layout("Goodfire", "", "encoder_linear.weight", _linear),
    Layout("DeepSeek-R1-Distill", "", "encoder.weight", _linear),
)


def read_pickle(path: Path) -> SAE:
    """Read the SAE of a pickle. Raises InputError if it holds none of the `LAYOUTS`."""
    content = unpickled(path)
    for layout in LAYOUTS:
        if layout.has in content and re.match(layout.file, path.name):
            stock, data = layout.read(content, path)
            layer = re.search(r"(?:^layer|-SAE-l)([0-9]{1,4})\.", path.name)
            if layer is not None:
                data |= {"layer": int(layer[1]), "hookpoint": f"model.layers.{int(layer[1])}"}
            return stock.to_sae(None, source_metadata(layout.suite, {}, **data))
    raise InputError(
        f"{path}: no layout that is known has these tensors: {sorted(content)}; known are those of "
        f"{', '.join(layout.suite for layout in LAYOUTS)}"
    )


_SET = ("model_name", "feature_input_hook", "feature_output_hook")


def read_transcoder(path: Path) -> SAE:
    """Read a transcoder of a set for circuit-tracer: `layer_N.safetensors` beside config.yaml.

    Raises InputError if it is damaged, or has other tensors.
    """
    tensors = read_tensors(path)
    names = _NAMES | {name: name for name in ("W_skip", "threshold") if name in tensors}
    fields = take(tensors, names, path, others=())
    if "threshold" not in fields:
        fields["threshold"] = torch.zeros_like(fields["b_enc"])
    settings = _settings(path.with_name("config.yaml"))
    block = path.stem.removeprefix("layer_")
    ends = (settings.get(f"feature_{end}_hook") for end in ("input", "output"))
    source, target = (f"blocks.{block}.{end}" if end else None for end in ends)
    data = {"name": settings.get("model_name"), "hookpoint": source, "target_hookpoint": target}
    metadata = source_metadata("transcoder_set", settings, **data)
    return Stock(**fields, transcoder=True).to_sae(None, metadata)


def _settings(path: Path) -> dict[str, Any]:
    """Names in a set's config.yaml; {} without the file. Raises InputError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    known = part_of({"set": settings}, "set")
    return {name: known[name] for name in _SET if isinstance(known.get(name), str)}


@FORMATS.register("pickle")
class Pickle(FileFormat):
    library = package = "Qwen-Scope, OpenAI, Goodfire"
    weights, pickle = "*.pt*", True
    read = staticmethod(read_pickle)


@FORMATS.register("transcoder_set")
class TranscoderSet(FileFormat):
    library = package = "circuit-tracer"
    weights, optional = "layer_*.safetensors", ("config.yaml",)
    read = staticmethod(read_transcoder)
