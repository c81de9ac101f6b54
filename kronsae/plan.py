"""`--plan`: what a run would take, before a language model is loaded or anything is allocated."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from kronsae.config import MULTI_TOPK, RunConfig, kind_of
from kronsae.errors import InputError
from kronsae.fit import resolve_device
from kronsae.learner import compute_dtype
from kronsae.selection import CANDIDATES
from kronsae_kernels import backends

_MIB = 2**20


def make_plan(config: RunConfig) -> dict[str, Any]:
    """Figures of the run: counts, bytes, multiply-adds a token, seconds (JSON-able).

    Only the model's config.json is read. Raises InputError if it cannot be found.
    """
    device = resolve_device(config.train.device)
    settings = _model_settings(config)
    data, train = config.data, config.train
    d = config.sae.d_model or settings["d_model"]
    # A target's width is only known from the loaded model: most are as wide as the residual stream.
    d_target = config.sae.d_target or (settings["d_model"] if data.target_hookpoint else 0)
    sae = dataclasses.replace(config.sae, d_model=d, d_target=d_target)
    encoder, decoder = sae.encoder_rows * (d + 1), (sae.dict_size + 1) * sae.d_out
    further = sae.experts * (d + 1)
    further += d * sae.d_out if sae.skip else 0
    further += sae.dict_size if sae.selection == "jumprelu" else 0
    parameters = encoder + decoder + further
    state = 4 * 3 * parameters + 8 * sae.dict_size  # weights and two moments; tokens since fired
    buffer = 4 * (d + d_target) * max(data.buffer_tokens, 2 * train.batch_size)
    dtype = compute_dtype(train.dtype, device)
    rows = sae.encoder_rows
    chunk = _chunk_tokens(rows, train.batch_size, dtype, device) * rows * dtype.itemsize
    # What is selected from, and decoded: more than k latents a token at some points of the grid.
    width = sae.k * (MULTI_TOPK if sae.objective == "multi_topk" else 1)
    candidates = width * (CANDIDATES if sae.selection == "batchtopk" else 1)
    codes = train.batch_size * candidates * 64
    memory = {}
    if sae.selection == "jumprelu":  # [b, F]: products, values, and their comparison
        tokens = _chunk_tokens(max(rows, sae.dict_size), train.batch_size, dtype, device)
        memory["scores of a chunk"] = 12 * tokens * sae.dict_size
    if sae.objective == "matryoshka":  # and their gradients, and the suffix sums of these
        memory["nested reconstructions"] = 3 * 4 * train.batch_size * len(sae.prefixes) * sae.d_out
    model_bytes = settings["parameters"] * _model_itemsize(data.model_dtype, device)
    sae_flops = sae.flops_per_token()
    # Backward: the encoder's and decoder's gradients take the 2k (k) live rows of a token alone.
    live = 2 * candidates if sae.encoder == "kron" else candidates
    step_flops = sae_flops + d * live + sae.d_out * (3 * width - sae.k)
    rate = _multiply_adds_per_second(device)
    seconds = train.tokens * (step_flops / rate[torch.float32] + settings["flops"] / rate["model"])
    return {
        "device": str(device),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "kernels": backends.choose(None, device),
        "kernels_why": _why(device)
        + ("; latents above thresholds: torch" if sae.selection == "jumprelu" else "")
        + ("; nested reconstructions: torch" if sae.objective == "matryoshka" else ""),
        "d_model": d,
        "d_target": d_target,
        "dict_size": sae.dict_size,
        "parameters": parameters,
        "parameters_encoder": encoder,
        "steps": train.steps,
        "tokens": train.tokens,
        "flops_per_token": sae_flops,
        "flops_per_token_dense": sae.dict_size * d + sae.k * sae.d_out,
        "flops_per_token_model": settings["flops"],
        "memory_mib": {
            "weights and moments": state / _MIB,
            "gradients": 4 * parameters / _MIB,
            "pre-latents of a chunk": chunk / _MIB,
            "codes of a batch": codes / _MIB,
            **{name: size / _MIB for name, size in memory.items()},
            "shuffle buffer": buffer / _MIB,
            "language model": model_bytes / _MIB,
        },
        "disk_mib": {
            "checkpoints": (train.keep_checkpoints + 1) * (state + buffer) / _MIB,
            "sae": 4 * parameters / _MIB,
        },
        "estimated_seconds": seconds,
    }


def render(plan: dict[str, Any], config: RunConfig) -> str:
    """The plan as text."""
    sae, data, train = config.sae, config.data, config.train
    shape = kind_of(vars(sae) | {"d_target": plan["d_target"]})
    if sae.encoder == "kron":
        shape += f", {sae.heads:,} heads x {sae.m} x {sae.n}"
    if sae.experts:
        shape += f", {sae.experts} experts"
    where = data.hookpoint or f"residual stream after block {data.layer}"
    if data.target_hookpoint:
        where += f", to predict {data.target_hookpoint}"
    memory, disk = plan["memory_mib"], plan["disk_mib"]
    ratio = plan["flops_per_token_dense"] / plan["flops_per_token"]
    minutes = plan["estimated_seconds"] / 60
    lines = [
        "What would run (nothing was loaded or written):",
        f"  language model   {data.model}, {where}, d = {plan['d_model']:,}",
        f"  text             {data.dataset}",
        f"  autoencoder      {shape}, F = {plan['dict_size']:,}, k = {sae.k}, "
        f"{plan['parameters'] / 1e6:,.1f} M parameters",
        f"  training         {plan['tokens']:,} tokens in {plan['steps']:,} steps of "
        f"{train.batch_size:,}, AdamW, lr {train.lr:g}",
        f"  device           {plan['device']}, {plan['compute_dtype']}",
        f"  kernels          {plan['kernels']} ({plan['kernels_why']})",
        f"  multiply-adds    {plan['flops_per_token'] / 1e6:,.2f} M a token for the autoencoder "
        f"(eq. 7; dense TopK: x{ratio:.2f}), {plan['flops_per_token_model'] / 1e6:,.1f} M for the "
        "language model",
        f"  memory           {sum(memory.values()):,.0f} MiB: "
        + ", ".join(f"{name} {size:,.0f}" for name, size in memory.items()),
        f"  disk             up to {sum(disk.values()):,.0f} MiB: "
        + ", ".join(f"{name} {size:,.0f}" for name, size in disk.items()),
        f"  time             about {minutes:,.1f} minutes, from the matrix rate of this device "
        "(a rough lower estimate)",
    ]
    return "\n".join(lines)


def _model_settings(config: RunConfig) -> dict[str, int]:
    """Width, parameters and multiply-adds a token up to the hookpoint, from the model's config."""
    from transformers import AutoConfig

    data = config.data
    name: str | Path = data.model
    if data.model == "embedded":
        from kronsae.embedded import embedded_model_path

        name = embedded_model_path()
    try:
        model = AutoConfig.from_pretrained(
            name, revision=data.revision, trust_remote_code=data.trust_remote_code
        )
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise InputError(
            f"the configuration of {data.model!r} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    text = model.get_text_config()
    d, layers = text.hidden_size, text.num_hidden_layers
    if data.layer is not None and not 0 <= data.layer < layers:
        raise InputError(f"layer {data.layer}: {data.model} has {layers} blocks, 0 to {layers - 1}")
    inner = getattr(text, "intermediate_size", None) or 4 * d
    block = (
        4 * d * d + (3 if getattr(text, "hidden_act", "") in ("silu", "swiglu") else 2) * d * inner
    )
    used = layers if data.layer is None else data.layer + 1
    return {
        "d_model": d,
        "parameters": layers * block + 2 * text.vocab_size * d,
        "flops": used * block,
    }


def _model_itemsize(name: str, device: torch.device) -> int:
    return compute_dtype(name, device).itemsize


def _chunk_tokens(columns: int, batch: int, dtype: torch.dtype, device: torch.device) -> int:
    from kronsae_kernels.torch_impl import chunk_tokens

    return min(batch, chunk_tokens(columns * dtype.itemsize, device))


def _why(device: torch.device) -> str:
    if device.type == "cpu":
        return "the device is a CPU"
    return "this version has no kernels of its own for this device"


def _multiply_adds_per_second(device: torch.device) -> dict[Any, float]:
    """Rate of a matrix product here, measured in a fraction of a second."""
    size = 1024 if device.type == "cpu" else 8192
    rates: dict[Any, float] = {}
    for name in (torch.float32, "model"):
        dtype = compute_dtype("auto", device) if name == "model" else torch.float32
        a = torch.ones(size, size, dtype=dtype, device=device)
        a @ a
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(3):
            a @ a
        _synchronize(device)
        rates[name] = 3 * size**3 / (time.perf_counter() - start)
    return rates


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
