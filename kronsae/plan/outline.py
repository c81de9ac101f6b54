"""Sizes and costs of a language model from its configuration alone, without its weights."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kronsae.cache import CacheIndex
from kronsae.cache.reader import hookpoint_numbers
from kronsae.config import DataConfig
from kronsae.data.activations import check_context_length
from kronsae.data.common import reason
from kronsae.data.hookpoints import Hook, Reached, check_layer, hooks_at, lists_of_blocks
from kronsae.data.images import blank_pixels
from kronsae.data.language_model import layer_or_hookpoint, max_context, runs_before
from kronsae.data.loading import NoSkeleton, check_load_in, checkpoint_dtype, skeleton_of
from kronsae.errors import InputError, warn
from kronsae.sources import Cache, source_of


class Outline(NamedTuple):
    """Sizes of a language model, and the cost of a forward pass up to its hookpoint."""

    d_model: int
    """Width of the hookpoint."""
    parameters: int
    """Number of parameters of the whole model."""
    flops_per_token: float
    """Multiply-adds per token of a forward pass that ends at the hookpoint."""
    context_length: int
    """Tokens per context of that forward pass."""
    hidden_size: int
    """Width of the residual stream."""
    vocabulary: int
    """Number of tokens known."""
    checkpoint: torch.dtype | None = None
    """dtype of the weights in the model's files, if its configuration says."""
    d_target: int = 0
    """Width of the target hookpoint; 0 without one."""


class NoOutline(InputError):
    """Raised if a model's sizes cannot be known before it is loaded; it may still load and run."""


def outline(config: DataConfig, context_length: int = 1024) -> Outline:
    """The outline of the model that `config` names, from a run on the meta device.

    A model that does not run there is estimated by its parts: the width of the module, or of the
    model, and a multiply-add for each weight of the blocks up to the hookpoint.
    Raises InputError if its config.json cannot be loaded, or has no such layer or module;
    NoOutline if the model cannot be created without weights.
    """
    if config.activations is not None:
        return _of_cache(config, config.activations)
    check_load_in(config.load_in)
    read, settings, model = _skeleton(config)
    if config.image_column is None:
        check_context_length(config, max_context(model))
    hooks = _hooks(model, config.model, read)
    text = settings.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or context_length
    tokens = min(config.context_length or context_length, longest)
    inputs = _inputs(config, 1, tokens)
    vocabulary = getattr(text, "vocab_size", 0)
    checkpoint = checkpoint_dtype(settings)
    parameters = sum(p.numel() for p in model.parameters())
    failed = None
    targets = []
    if config.target_hookpoint:
        targets = _hooks(model, config.model, config.target_hookpoint)
    for number, hook in enumerate(hooks):
        reached: list[Any] = []
        try:
            tokens, d, flops = _run(model, hook, inputs)
            d_target = 0
            if targets:  # the forward pass ends there
                with hook.reading(reached.append):
                    _, d_target, flops = _run(model, targets[number % len(targets)], inputs)
        except Exception as error:  # of any type: the model needs numbers
            failed = reason(error)
            continue
        if targets and not reached:
            read_at = config.hookpoint or hook.name
            raise runs_before(config.model, config.target_hookpoint or "", read_at)
        return Outline(
            *(d, parameters, flops, tokens, text.hidden_size, vocabulary, checkpoint, d_target)
        )
    if failed is not None:
        warn(f"the plan counts {config.model} by its parts, as it did not run on text ({failed})")
    blocks = [block for _, blocks in lists_of_blocks(model) for block in blocks]
    used = blocks if isinstance(read, str) else blocks[: read + 1]
    weights = sum(p.numel() for block in used for p in block.parameters())
    width = hooks and hooks[0].declared_width
    hidden = text.hidden_size
    d_target = hidden if config.target_hookpoint else 0
    return Outline(
        *(width or hidden, parameters, weights, tokens, hidden, vocabulary, checkpoint, d_target)
    )


def _of_cache(config: DataConfig, activations: str) -> Outline:
    """The outline from a cache's index; no language model runs during training from a cache."""
    if source_of(activations) is not Cache:
        raise NoOutline(f"the sizes of {activations} are unknown until it is run")
    index = CacheIndex.open(activations)
    numbers = hookpoint_numbers(index, config.layer, config.hookpoint, config.target_hookpoint)
    d, *d_target = (index.hookpoints[number].width for number in numbers)
    parameters, tokens = index.model["parameters"], index.context_length
    return Outline(d, parameters, 0.0, tokens, d, 0, d_target=sum(d_target))


def _skeleton(config: DataConfig) -> tuple[int | str, Any, nn.Module]:
    """The layer or hookpoint to read, the model's configuration, the model on the meta device."""
    read = layer_or_hookpoint(config.model, config.layer, config.hookpoint)
    try:
        settings, model = skeleton_of(config)
    except NoSkeleton as error:
        raise NoOutline(str(error)) from error
    if isinstance(read, int):
        check_layer(config.model, settings, read)
    if not model.config.is_encoder_decoder:
        model.config.pad_token_id = None  # some models warn if they find it among the tokens
    model.config.use_cache = True  # else masks look for several texts, which needs values
    # Experts' products need this dtype where there are no values.
    return read, settings, model.bfloat16().eval()


def forward_pass(
    config: DataConfig, contexts: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """A function that runs the model, with meaningless weights, up to the (target) hookpoint.

    contexts, tokens: of its input. It raises NoOutline if the model does not run with such weights.
    """
    read, _, model = _skeleton(config)
    read = config.target_hookpoint or read
    hook = _hooks(model, config.model, read)[0]
    model.to(dtype).to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(0.01 if tensor.is_floating_point() else 0)
    inputs = _inputs(config, contexts, tokens)
    inputs = {
        name: torch.zeros(x.shape, dtype=dtype if x.is_floating_point() else x.dtype, device=device)
        for name, x in inputs.items()
    }

    def run() -> None:
        try:
            _shape(model, hook, inputs)
        except Exception as error:  # of any type
            problem = f"model {config.model!r} only runs with its own weights"
            raise NoOutline(f"{problem} ({reason(error)})") from error

    return run


def _hooks(model: nn.Module, name: str, read: int | str) -> list[Hook]:
    """Where a layer or hookpoint may be: in one place, or one for each list of blocks."""
    if isinstance(read, str):
        return hooks_at(model, name, read)
    return [Hook(f"{blocks}.{read}", modules[read]) for blocks, modules in lists_of_blocks(model)]


def _inputs(config: DataConfig, contexts: int, tokens: int) -> dict[str, torch.Tensor]:
    """What the model reads, on the meta device: token ids, or images."""
    if config.image_column is not None:
        return {"pixel_values": blank_pixels(config, contexts).bfloat16()}
    return {"input_ids": torch.zeros(contexts, tokens, dtype=torch.int64, device="meta")}


def _run(model: nn.Module, hook: Hook, inputs: dict[str, torch.Tensor]) -> tuple[int, int, float]:
    """Tokens and width of the hookpoint, and multiply-adds per token up to it."""
    with FlopCounterMode(display=False) as counter:
        shape = _shape(model, hook, inputs)
    ids = inputs.get("input_ids")
    tokens = shape[1] if ids is None else ids.shape[1]
    return tokens, shape[-1], counter.get_total_flops() / 2 / tokens


@torch.no_grad()
def _shape(model: nn.Module, hook: Hook, inputs: dict[str, torch.Tensor]) -> torch.Size:
    """Shape of the hookpoint in a forward pass that ends there."""
    shapes: list[torch.Size] = []

    def stop(hidden: Any) -> None:
        shapes.append(hidden.shape)
        raise Reached

    try:
        with warnings.catch_warnings(), hook.reading(stop):
            warnings.simplefilter("ignore")
            model(**inputs)
    except Reached:
        return shapes[0]
    raise RuntimeError(f"{type(hook.module).__name__} does not run in a forward pass")
