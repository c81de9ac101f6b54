"""`--plan`: what a run would take, before a language model is loaded or anything is allocated."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from kronsae.config import RunConfig
from kronsae.errors import InputError
from kronsae.fit import resolve_device
from kronsae.learner import compute_dtype, why_not_fused
from kronsae_kernels import backends

_MIB = 2**20


def make_plan(config: RunConfig) -> dict[str, Any]:
    """Figures of the run: counts, bytes, multiply-adds a token, seconds (JSON-able).

    Only the model's config.json is read. Raises InputError if it cannot be found.
    """
    device = resolve_device(config.train.device)
    settings = _model_settings(config)
    d = config.sae.d_model or settings["d_model"]
    sae, data, train = dataclasses.replace(config.sae, d_model=d), config.data, config.train
    encoder, decoder = sae.encoder_rows * (d + 1), sae.dict_size * d + d
    parameters = encoder + decoder
    state = 4 * 3 * parameters + 8 * sae.dict_size  # weights and two moments; tokens since fired
    buffer = 4 * d * max(data.buffer_tokens, 2 * train.batch_size)
    dtype = compute_dtype(train.dtype, device)
    chunk = _pre_latent_bytes(sae.encoder_rows, train.batch_size, dtype, device)
    codes = train.batch_size * sae.k * 64
    reason = why_not_fused(sae, train, device)
    # The fused step writes no gradients, but keeps the matrices in the compute dtype, too.
    copies = dtype.itemsize * parameters if dtype != torch.float32 else 0
    gradients = 4 * parameters if reason is not None else copies
    model_bytes = settings["parameters"] * _model_itemsize(data.model_dtype, device)
    sae_flops = sae.flops_per_token()
    # Backward: the encoder's and decoder's gradients take the 2k (k) live rows of a token alone.
    live = 2 * sae.k if sae.encoder == "kron" else sae.k
    step_flops = sae_flops + d * (live + 2 * sae.k)
    rate = _multiply_adds_per_second(device)
    seconds = train.tokens * (step_flops / rate[torch.float32] + settings["flops"] / rate["model"])
    return {
        "device": str(device),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "kernels": backends.choose(None, device),
        "kernels_why": _why(device),
        "training_step": "fused" if reason is None else "autograd and AdamW",
        "training_step_why": "gradients are never written" if reason is None else reason,
        "d_model": d,
        "dict_size": sae.dict_size,
        "parameters": parameters,
        "parameters_encoder": encoder,
        "steps": train.steps,
        "tokens": train.tokens,
        "flops_per_token": sae_flops,
        "flops_per_token_dense": sae.dict_size * d + sae.k * d,
        "flops_per_token_model": settings["flops"],
        "memory_mib": {
            "weights and moments": state / _MIB,
            "gradients" if reason is not None else "copies": gradients / _MIB,
            "pre-latents of a chunk": chunk / _MIB,
            "codes of a batch": codes / _MIB,
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
    shape = f"{sae.heads:,} heads x {sae.m} x {sae.n}" if sae.encoder == "kron" else "dense"
    where = data.hookpoint or f"residual stream after block {data.layer}"
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
        f"  training step    {plan['training_step']} ({plan['training_step_why']})",
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


def _pre_latent_bytes(rows: int, batch: int, dtype: torch.dtype, device: torch.device) -> int:
    from kronsae_kernels.torch_impl import chunk_tokens

    bytes_per_token = rows * dtype.itemsize
    return min(batch, chunk_tokens(bytes_per_token, device)) * bytes_per_token


def _why(device: torch.device) -> str:
    reason = backends.why_not("triton", device)
    if device.type == "cpu":
        reason = "the device is a CPU"
    return reason or "the device is a GPU"


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
