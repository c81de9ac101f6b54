"""What a language model takes and gives, from its configuration alone: no weight is loaded."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kronsae.cache import CacheIndex
from kronsae.cache.reader import places_of
from kronsae.config import DataConfig
from kronsae.data.common import reason
from kronsae.data.language_model import (
    EMBEDDED_LAYER,
    check_layer,
    find_module,
    first_tensor,
    lists_of_blocks,
)
from kronsae.data.loading import has_causal_class, load_config, quiet
from kronsae.embedded import EMBEDDED_MODEL
from kronsae.errors import InputError
from kronsae.sources import Cache, source_of


class Outline(NamedTuple):
    """A language model up to its hookpoint."""

    d_model: int
    """Width of the hookpoint's output."""
    parameters: int
    """Of the whole model."""
    flops_per_token: float
    """Multiply-adds of a forward pass that ends at the hookpoint."""
    context_length: int
    """Tokens a context that the multiply-adds are of."""
    hidden_size: int
    """Width of the residual stream."""
    vocabulary: int
    """Tokens that it tells apart."""
    d_target: int = 0
    """Width of the target hookpoint's output; 0 without one."""


class NoOutline(InputError):
    """The model cannot be outlined; it may still load and run."""


def outline(config: DataConfig, context_length: int = 1024) -> Outline:
    """The outline of the model that `config` names, run without numbers (on the meta device).

    A model that only runs on numbers is outlined by its parts: the width of the module, or of the
    model, and a multiply-add for each weight of the blocks up to the hookpoint.
    Raises InputError if its config.json cannot be had, or it has no such layer or module;
    NoOutline if it is a model that cannot be made without its weights.
    """
    if config.activations is not None:
        return _of_cache(config)
    layer, settings, model = _skeleton(config)
    if layer is None:
        modules = [find_module(model, config.model, config.hookpoint)]
    else:
        modules = [blocks[layer] for _, blocks in lists_of_blocks(model)]
    text = settings.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or context_length
    tokens = min(config.context_length or context_length, longest)
    vocabulary = getattr(text, "vocab_size", 0)
    parameters = sum(p.numel() for p in model.parameters())
    for module in modules:
        try:
            d, flops = _run(model, module, tokens)
            d_target = 0
            if config.target_hookpoint:  # the forward pass ends there
                target = find_module(model, config.model, config.target_hookpoint)
                d_target, flops = _run(model, target, tokens)
        except Exception as error:  # whatever a model does that needs numbers
            warnings.warn(f"{config.model} is outlined by its parts: {error}", stacklevel=2)
            continue
        return Outline(d, parameters, flops, tokens, text.hidden_size, vocabulary, d_target)
    blocks = [module for _, found in lists_of_blocks(model) for module in found]
    used = blocks if layer is None else blocks[: layer + 1]
    weights = sum(p.numel() for block in used for p in block.parameters())
    width = modules and getattr(modules[0], "out_features", None)
    hidden = text.hidden_size
    d_target = hidden if config.target_hookpoint else 0
    return Outline(width or hidden, parameters, weights, tokens, hidden, vocabulary, d_target)


def _of_cache(config: DataConfig) -> Outline:
    """What a cache says; no model runs while one trains from it."""
    if source_of(config.activations) is not Cache:
        raise NoOutline(f"nothing is known of {config.activations} before it is opened")
    index = CacheIndex.open(config.activations)
    places = places_of(index, config.layer, config.hookpoint, config.target_hookpoint)
    d, *of_target = (index.hookpoints[place].width for place in places)
    parameters, tokens = index.model["parameters"], index.context_length
    return Outline(d, parameters, 0.0, tokens, d, 0, sum(of_target))


def _skeleton(config: DataConfig) -> tuple[int | None, Any, nn.Module]:
    """The layer that is read, the model's configuration, and the model on the meta device."""
    from transformers import AutoModel, AutoModelForCausalLM

    layer = config.layer
    if layer is None and config.hookpoint is None and config.model == EMBEDDED_MODEL:
        layer = EMBEDDED_LAYER
    with quiet():
        settings = load_config(config.model, config.revision, config.trust_remote_code)
        if layer is not None:
            check_layer(config.model, settings, layer)
        loader = AutoModelForCausalLM if has_causal_class(settings) else AutoModel
        try:
            with torch.device("meta"):
                model = loader.from_config(settings, trust_remote_code=config.trust_remote_code)
        except Exception as error:  # of dozens of kinds
            raise NoOutline(
                f"model {config.model!r} cannot be made without weights ({reason(error)})"
            ) from error
    model.config.pad_token_id = None  # some models look for it among the tokens, to warn
    return layer, settings, model.eval()


def forward_pass(
    config: DataConfig,
    contexts: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """A forward pass on [contexts, tokens] up to the hookpoint, of a model of meaningless weights.

    Raises NoOutline if the model only runs on numbers of its own.
    """
    layer, _, model = _skeleton(config)
    name = config.target_hookpoint or config.hookpoint
    if layer is None or config.target_hookpoint:
        module = find_module(model, config.model, name)
    else:
        module = lists_of_blocks(model)[0][1][layer]
    model.to(dtype).to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(0.01 if tensor.is_floating_point() else 0)
    ids = torch.zeros(contexts, tokens, dtype=torch.int64, device=device)

    def run() -> None:
        try:
            _width(model, module, ids)
        except Exception as error:  # whatever a model does with weights of its own
            what = f"model {config.model!r} only runs with its own weights"
            raise NoOutline(f"{what} ({reason(error)})") from error

    return run


class _Reached(Exception):
    """Ends the forward pass at the hookpoint."""


def _run(model: nn.Module, module: nn.Module, tokens: int) -> tuple[int, float]:
    """Width of the module's output, and multiply-adds a token up to it."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        width = _width(model, module, ids)
    return width, counter.get_total_flops() / 2 / tokens


@torch.no_grad()
def _width(model: nn.Module, module: nn.Module, ids: torch.Tensor) -> int:
    """Width of the module's output in a forward pass that ends there."""
    widths: list[int] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        widths.append(first_tensor(output).shape[-1])
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(input_ids=ids)
    except _Reached:
        return widths[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(module).__name__} does not run in a forward pass")
