"""Configuration, tokenizer and weights of a transformers model by its name."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from kronsae.config import LOAD_IN, DataConfig
from kronsae.data.common import reason
from kronsae.embedded import EMBEDDED_MODEL, embedded_model_path
from kronsae.errors import InputError, Notice, require
from kronsae.system.documents import read_json
from kronsae.system.files import usable_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and warnings of transformers, except progress of downloads."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", Notice)
            if downloads:
                enable_progress_bars()
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class Source(NamedTuple):
    """Where the files of a model are: its name on the hub, or folder."""

    name: str
    gguf_file: str | None = None
    """A file in the folder, which transformers turns into a model."""
    adapter: str | None = None
    """Folder of a LoRA adapter, whose base model `name` is."""

    @property
    def gguf(self) -> dict[str, str]:
        """The argument of from_pretrained that names the file."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def source_of_model(name: str) -> Source:
    """The source of the model of that name. Raises InputError for what is no model."""
    if name == EMBEDDED_MODEL:
        try:
            return Source(str(embedded_model_path()))
        except FileNotFoundError as error:
            raise InputError(str(error)) from error
    path = usable_path(os.path.expanduser(name), "model")
    if path.suffix == ".gguf" and path.is_file():
        require("gguf", f"model {name!r}, a GGUF file,")
        return Source(str(path.parent), path.name)
    if not path.is_dir():
        return Source(name)
    adapter = path / "adapter_config.json"
    if adapter.is_file() and not (path / "config.json").is_file():
        try:
            base = read_json(adapter)["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = None
        if not isinstance(base, str):
            raise InputError(f"model {name!r}: its adapter_config.json names no base model")
        if not (path / "adapter_model.safetensors").is_file():
            raise InputError(
                f"model {name!r}, an adapter of {base}, has no adapter_model.safetensors, the only "
                "format that is read (unpickling can run code)"
            )
        require("peft", f"model {name!r}, an adapter of {base},")
        return Source(base, adapter=str(path))
    return Source(str(path))


def load_config(
    name: str,
    revision: str | None,
    trust_remote_code: bool,
    kwargs: Mapping[str, Any] | None = None,
    images: bool = False,
) -> Any:
    """A model's configuration. kwargs: values that replace those of its file, and others.

    images: that of the part that reads images, as patches. Raises InputError if there is none.
    """
    from transformers import AutoConfig

    source = source_of_model(name)
    try:
        config = AutoConfig.from_pretrained(
            source.name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **source.gguf,
            **(kwargs or {}),
        )
    except Exception as error:  # transformers and the hub raise dozens of kinds
        raise InputError(_not_found(name, revision, error)) from error
    if not images:
        return config
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "patch_size"):
        raise InputError(
            f"model {name!r} (of type {config.model_type!r}) has no part that reads images as "
            "patches: --image-column is for ViT, CLIP, SigLIP, DINOv2 and the like"
        )
    return vision


class NoSkeleton(InputError):
    """Raised if a model cannot be created without weights; it may still load and run."""


def load_skeleton(
    name: str,
    revision: str | None,
    trust_remote_code: bool,
    kwargs: Mapping[str, Any] | None = None,
    images: bool = False,
) -> tuple[Any, Any]:
    """A model's configuration, and the model on the meta device, without weights.

    Raises InputError if its config.json cannot be loaded, NoSkeleton if it needs its weights.
    """
    with quiet():
        config = load_config(name, revision, trust_remote_code, kwargs, images)
        try:
            with torch.device("meta"):
                model = loader_of(config).from_config(config, trust_remote_code=trust_remote_code)
        except Exception as error:  # there are dozens of types
            raise NoSkeleton(
                f"model {name!r} cannot be created without weights ({reason(error)})"
            ) from error
    return config, model


def config_of(data: DataConfig) -> Any:
    """`load_config` of the model that `data` names."""
    images, trusted = data.image_column is not None, data.trust_remote_code
    with quiet():
        return load_config(data.model, data.revision, trusted, data.model_kwargs, images)


def skeleton_of(data: DataConfig) -> tuple[Any, Any]:
    """`load_skeleton` of the model that `data` names."""
    images, trusted = data.image_column is not None, data.trust_remote_code
    return load_skeleton(data.model, data.revision, trusted, data.model_kwargs, images)


def module_names(data: DataConfig) -> list[str]:
    """Names of a model's modules, in its order. Raises InputError as `load_skeleton` does."""
    _, model = skeleton_of(data)
    return [name for name, _ in model.named_modules() if name]


def _not_found(name: str, revision: str | None, error: Exception) -> str:
    text = str(error)
    why = reason(error)
    if "trust_remote_code" in text:
        return (
            f"model {name!r} needs code from its hub repository. Read that code, then "
            "allow it with --trust-remote-code"
        )
    if os.path.isdir(os.path.expanduser(name)):
        return f"model {name!r}: the folder holds no transformers model ({why})"
    if name.startswith((".", "/", "~")):
        return f"model {name!r}: there is no such folder"
    at = f", revision {revision!r}" if revision else ""
    hint = "; log in with `hf auth login`" if "gated" in text or "401" in text else ""
    return (
        f"model {name!r}: there is no such folder here, and the Hugging Face hub did not give it"
        f"{at}{hint}. Check the name and the network ({why})"
    )


def load_tokenizer(name: str, common: dict[str, Any]) -> Any:
    """The model's tokenizer. Raises InputError if it has none."""
    from transformers import AutoTokenizer

    advice = (
        "text cannot be read without one. Save it beside the model, or name another model (images "
        "are read by a vision model with --image-column)"
    )
    source = source_of_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **common, **source.gguf)
    except Exception as error:  # of dozens of kinds
        raise InputError(f"model {name!r} has no tokenizer: {advice} ({reason(error)})") from error
    # Without files, transformers 5 makes a tokenizer that knows its special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"model {name!r} has no tokenizer: {advice}")
    return tokenizer


def find_tokenizer(name: str, common: dict[str, Any]) -> Any | None:
    """The model's tokenizer; None if it has none."""
    try:
        with quiet():
            return load_tokenizer(name, common)
    except InputError:
        return None


def load_model(
    name: str,
    config: Any,
    dtype: torch.dtype,
    common: dict[str, Any],
    device: torch.device | str = "cpu",
    *,
    kwargs: Mapping[str, Any] | None = None,
    load_in: str = LOAD_IN[0],
    device_map: str | None = None,
) -> tuple["PreTrainedModel", tuple[str, ...]]:
    """The model on a device, and the names of weights that its files lack.

    config: by `load_config` with the same kwargs.
    device_map: where accelerate puts its parts, in place of `device`.
    Raises InputError for weights that cannot be loaded, and without a package that is needed.
    """
    import transformers

    recent = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (4, 56)
    source, loader = source_of_model(name), loader_of(config)
    own: dict[str, Any] = dict(source.gguf) or {"use_safetensors": True}
    own |= _of_loading(config, kwargs or {}) | _rounding(load_in, dtype)
    # A model that was rounded is put on its device while it is loaded, and stays there.
    rounded = "quantization_config" in own or getattr(config, "quantization_config", None)
    if device_map is not None or rounded:
        require("accelerate", "--device-map" if device_map else "a model in 8 or 4 bits")
        own["device_map"] = device_map or {"": str(torch.device(device))}
    try:
        model, info = loader.from_pretrained(
            source.name,
            config=config,
            output_loading_info=True,
            **{"dtype" if recent else "torch_dtype": dtype},
            **own,
            **common,
        )
        if source.adapter is not None:
            from peft import PeftModel

            adapted: Any = PeftModel.from_pretrained(model, source.adapter)
            model = adapted.merge_and_unload()
        if "device_map" not in own:
            model.to(device)
    except Exception as error:  # of dozens of kinds
        if "safetensors" in str(error):
            raise InputError(
                f"model {name!r} has no weights in safetensors format, the only one that is read "
                "(unpickling can run code): convert it with save_pretrained, or give a --revision "
                f"that has them ({reason(error)})"
            ) from error
        why = reason(error)
        if "ignore_mismatched_sizes" in why:
            given = f", with --model-kwargs {dict(kwargs)}" if kwargs else ""
            why = f"they have other shapes than its configuration gives{given}"
        raise InputError(f"model {name!r}: its weights cannot be loaded ({why})") from error
    return model, tuple(sorted(info["missing_keys"] - _computed(model)))


def _of_loading(config: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are none of the values in the model's configuration."""
    own = {name: value for name, value in kwargs.items() if not hasattr(config, name)}
    memory = own.get("max_memory")
    if isinstance(memory, Mapping):  # JSON has no numbers as keys
        own["max_memory"] = {int(k) if k.isdecimal() else k: v for k, v in memory.items()}
    return own


def check_load_in(load_in: str) -> None:
    """Raise InputError without the packages that a model in 8 or 4 bits needs."""
    if load_in != LOAD_IN[0]:
        for package in ("bitsandbytes", "accelerate"):
            require(package, f"--load-in {load_in}")


def _rounding(load_in: str, dtype: torch.dtype) -> dict[str, Any]:
    """The argument that makes transformers round matrices. Raises InputError without bitsandbytes.

    dtype: of products with them.
    """
    if load_in == LOAD_IN[0]:
        return {}
    check_load_in(load_in)
    from transformers import BitsAndBytesConfig

    # It warns at each product that it is rounded to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    bits = {"load_in_8bit": True} if load_in == "8bit" else {"load_in_4bit": True, **nf4}
    return {"quantization_config": BitsAndBytesConfig(**bits)}


def main_device(model: "PreTrainedModel") -> torch.device:
    """The device of a model's weights, or, if they are on several, the first that computes.

    Parts that are left in memory or on the disk are brought there when they run.
    """
    places = list(getattr(model, "hf_device_map", {}).values())
    first = next(model.parameters()).device
    if len(set(places)) < 2 and first.type != "meta":
        return first
    place = next((place for place in places if place not in ("cpu", "disk")), "cpu")
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


@contextmanager
def stored_weight(model: nn.Module, name: str) -> Iterator[torch.Tensor]:
    """While open, the weight of that name, also if it is kept in memory or on the disk."""
    owner, _, own_name = name.rpartition(".")
    weight = model.get_parameter(name)
    if not weight.is_meta:
        yield weight
        return
    from accelerate.utils import align_module_device

    module = model.get_submodule(owner)
    with align_module_device(module, torch.device("cpu")):
        yield module.get_parameter(own_name)


def _computed(model: "PreTrainedModel") -> set[str]:
    """Weights that no file needs to have, such as sinusoidal positions: their class saves none."""
    import transformers

    classes = (getattr(transformers, name, None) for name in model.config.architectures or ())
    names = {name for c in classes for name in getattr(c, "_keys_to_ignore_on_save", None) or ()}
    return names | {name.removeprefix(f"{model.base_model_prefix}.") for name in names}


def checkpoint_dtype(config: Any) -> torch.dtype | None:
    """The dtype of a model's weights by its config; None if that does not say."""
    for part in (config, config.get_text_config()):
        with quiet():  # transformers warns of the older name
            dtype = getattr(part, "dtype", None) or getattr(part, "torch_dtype", None)
        if dtype is not None:
            return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return None


def loader_of(config: Any) -> Any:
    """The class of transformers that loads a model of this config, with its head if it has one.

    Models that read images too (LLaVA, Qwen2-VL) are loaded with the head of their text half.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if has_causal_class(config):
        return AutoModelForCausalLM
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModel


def has_causal_class(config: Any) -> bool:
    """Whether the model has a head that predicts the next token.

    Masked language models (BERT) have a causal class too; it applies only if `is_decoder` is set.
    That of models from text to text (Marian, Pegasus) is their decoder alone.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return True
    kind = config.model_type
    other = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    encoder = kind in other and not getattr(config, "is_decoder", False)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encoder
