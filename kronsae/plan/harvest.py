"""Plan of a harvest: memory, disk, multiply-adds and time, before a language model is loaded."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from kronsae.cache import HarvestConfig
from kronsae.config import DataConfig
from kronsae.data.amount import about, name_of_text, too_few
from kronsae.data.many_hookpoints import default_layers
from kronsae.data.text import check_text
from kronsae.errors import InputError
from kronsae.plan.amount import available_tokens
from kronsae.plan.memory import MIB, in_mib, shortage, weight_bytes
from kronsae.plan.outline import NoOutline, Outline, outline
from kronsae.plan.text import memory_line, wrapped
from kronsae.plan.time import model_seconds
from kronsae.system.devices import free_bytes, model_dtype, resolve_device
from kronsae.system.parallel import ranks
from kronsae.system.progress import duration

DISK_MARGIN = 1.05
"""A harvest is refused unless 1.05 times the disk space that it needs is free."""


def reads(config: HarvestConfig) -> dict[str, DataConfig]:
    """What is read of the language model, by the name or layer that the user gave.

    Raises InputError if the configuration names no hookpoint.
    """
    data = config.data
    given: dict[str, dict[str, Any]] = {
        f"layer {layer}": {"layer": layer}
        for layer in default_layers(data, config.layers, config.hookpoints)
    }
    given |= {f"hookpoint {name}": {"hookpoint": name} for name in config.hookpoints}
    if not given:
        raise InputError(
            f"--model {data.model} needs --layer N ... (residual streams after blocks, from 0) "
            "or --hookpoint NAME ..."
        )
    return {name: dataclasses.replace(data, **read) for name, read in given.items()}


def outlines(config: HarvestConfig) -> dict[str, Outline]:
    """The language model up to each of these hookpoints. Raises InputError as `reads` does."""
    return {name: outline(data) for name, data in reads(config).items()}


def _last(models: dict[str, Outline]) -> str:
    """The name of the last hookpoint, where a forward pass ends."""
    return max(models, key=lambda name: models[name].flops_per_token)


def make_plan(config: HarvestConfig, out: Path) -> dict[str, Any]:
    """Figures of a harvest (JSON-able).

    Raises InputError for settings that the model's configuration rules out, NoOutline if its sizes
    cannot be known before it is loaded.
    """
    data, device = config.data, resolve_device(config.device)
    check_text(data)
    models = outlines(config)
    model = models[_last(models)]
    size = model_dtype(data.model_dtype, device, model.checkpoint).itemsize
    stored = size if config.dtype == "auto" else getattr(torch, config.dtype).itemsize
    widths = {name: outlined.d_model for name, outlined in models.items()}
    width, length = sum(widths.values()), model.context_length
    # Each token of a context has an id and a mask, but the first one has no activations.
    scales = 4 * len(widths) if config.dtype == "int8" else 0
    row = stored * width + scales + 5 * length / (length - 1)
    contexts = -(-data.heldout_tokens // length)
    available = available_tokens(data, length)
    harvested = min(filter(None, (config.tokens, available)), default=0)
    rows = harvested and harvested + contexts * (length - 1)
    tokens = data.contexts_per_batch * length
    memory = {
        "language model": model.parameters * weight_bytes(data, size),
        # The hookpoints' outputs, copied and joined, as float32, and a block's activations.
        "a forward pass": tokens * (12 * model.hidden_size * size + (4 + 2 * size) * width),
        "a shard": (config.shard_tokens + tokens) * (width * stored + scales),
    }
    there = sum(path.stat().st_size for path in out.glob("*.safetensors")) if out.exists() else 0
    existing = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    free = free_bytes(device)
    return {
        "device": str(device),
        "hookpoints": widths,
        "bytes_per_token": row,
        "tokens": harvested or None,
        "available_tokens": available,
        "flops_per_token_model": model.flops_per_token,
        "memory_mib": in_mib(memory),
        "free_mib": None if free is None else free / MIB,
        "disk_mib": rows * row / MIB if rows else None,
        "disk_there_mib": there / MIB,
        "disk_free_mib": shutil.disk_usage(existing).free / MIB,
    }


def why_refused(plan: dict[str, Any]) -> str | None:
    """The message for a plan that needs too much disk space or memory; None otherwise."""
    return _disk_shortage(plan) or shortage(plan)


def why_early(plan: dict[str, Any], config: HarvestConfig) -> str | None:
    """The message for a text that gives fewer tokens than configured; None otherwise."""
    return too_few(config.tokens, plan["available_tokens"])


def _disk_shortage(plan: dict[str, Any]) -> str | None:
    if plan["disk_mib"] is None or plan["tokens"] == plan["available_tokens"]:  # an estimate
        return None
    needed, free = plan["disk_mib"] - plan["disk_there_mib"], plan["disk_free_mib"]
    if needed <= 0 or DISK_MARGIN * needed <= free:
        return None
    room = free * MIB / plan["bytes_per_token"] / DISK_MARGIN
    return (
        f"{needed:,.0f} MiB of disk are needed ({plan['bytes_per_token']:,.0f} bytes a token), and "
        f"{free:,.0f} MiB are free, room for {room:,.0f} tokens: choose fewer --tokens, fewer "
        "hookpoints, --dtype bfloat16 or int8, or another disk"
    )


def render(plan: dict[str, Any], config: HarvestConfig, out: Path) -> str:
    """The plan as text, with the time of the harvest, which is measured."""
    amount = f"{config.tokens:,} tokens" if config.tokens else "all of the text"
    if plan["available_tokens"] is not None:
        amount += f" (it has {about(plan['available_tokens'])})"
    if plan["tokens"] is None:
        room = plan["disk_free_mib"] * MIB / plan["bytes_per_token"]
        disk = f"unknown; there is room for {room:,.0f} tokens"
    else:
        disk = f"{plan['disk_mib']:,.0f} MiB"
    widths = ", ".join(f"{name} (d = {width:,})" for name, width in plan["hookpoints"].items())
    lines = [
        "What would be harvested (nothing was loaded or written):",
        f"  language model   {config.data.model}; {plan['flops_per_token_model'] / 1e6:,.1f} M "
        f"multiply-adds a token, on {plan['device']}",
        f"  hookpoints       {widths}",
        f"  text             {name_of_text(config.data)}: {amount}",
        f"  disk             {disk}, {plan['bytes_per_token']:,.0f} bytes a token, in {out} "
        f"({plan['disk_free_mib']:,.0f} MiB are free)",
        memory_line(plan),
        f"  time             {_time(plan, config)}",
    ]
    if (early := why_early(plan, config)) is not None:
        lines.append(f"It would end early: {early}")
    return wrapped(lines, why_refused(plan))


def _time(plan: dict[str, Any], config: HarvestConfig) -> str:
    """The time of the language model up to the last hookpoint, in words."""
    if plan["tokens"] is None:
        return "unknown: the length of the text is not known"
    models = outlines(config)
    last = _last(models)
    try:
        token = model_seconds(reads(config)[last], models[last], torch.device(plan["device"]))
    except NoOutline as error:
        return f"not measured: {error}"
    tokens = plan["tokens"] + config.data.heldout_tokens
    return f"{duration(tokens * token / ranks())} (the language model alone, measured here)"
