"""`--plan`: what a run or a sweep would take, before a language model is loaded.

Memory is what is there at the same time: what stays (weights, moments, buffers, the language
model), and the largest of what comes and goes: a step, an evaluation, a checkpoint.
"""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kronsae.cache import CacheIndex
from kronsae.cache.reader import group_rows
from kronsae.config import DataConfig, RunConfig, SAEConfig, TrainConfig
from kronsae.data.activations import overlaps
from kronsae.data.language_model import LOGITS_AT_ONCE
from kronsae.data.rows import KEPT
from kronsae.errors import InputError
from kronsae.metrics.heldout import BATCH_TOKENS, CONTEXTS_AT_ONCE
from kronsae.model import flops
from kronsae.model.flops import flops_per_token
from kronsae.model.objectives import auxk_latents, auxk_tokens
from kronsae.model.ranks import check_heads, ranks_of_one
from kronsae.plan.outline import Outline
from kronsae.registry import OBJECTIVES, SAE_KINDS, SELECTIONS
from kronsae.system import parallel
from kronsae.system.devices import compute_dtype, free_bytes, resolve_device, with_index
from kronsae.training.learner import UNCONFIRMED, check_step
from kronsae.training.stream import NORMALIZER_TOKENS
from kronsae_kernels import backends
from kronsae_kernels.step import why_not_graphed

_MIB = 2**20

TEXT_BYTES = 30 * _MIB
"""Of a tokenizer, and of the text that is held at once: seen with the embedded default."""

RETURNED = 32 * _MIB
"""A tensor on the CPU that is smaller leaves its memory to the C library, which keeps it; a larger
one to the system. (The most that glibc's M_MMAP_THRESHOLD grows to, on 64 bits.)"""

FAR = 1.5
"""A run is refused if it needs so many times the memory that is free: plans are estimates."""


def make_plan(members: Mapping[str, RunConfig], model: Outline) -> dict[str, Any]:
    """Figures of a run, or of a sweep of several: counts, bytes, multiply-adds (JSON-able).

    members: by name, with the width of their activations; they share data and stream.
    """
    config = next(iter(members.values()))
    data, train, d = config.data, config.train, model.d_model
    device = resolve_device(train.device)
    ranks = parallel.shape(train.tensor_parallel)
    of_one = ranks_of_one(train)
    every = {name: _member(c.sae, c.train, device, of_one) for name, c in members.items()}
    parts = _parts(members, ranks)
    largest_part = max(parts, key=lambda names: sum(every[n]["state"] for n in names))
    each = {name: every[name] for name in largest_part}  # what one process has
    rows = 4 * (d + model.d_target)  # bytes of an activation, and of its target
    buffer, kept_buffer = _buffer_bytes(config, rows)
    states = [member["state"] for member in each.values()]
    model_device = _model_device(data, device)
    of_model = model.parameters * compute_dtype(data.model_dtype, model_device).itemsize
    ahead = overlaps(data, model_device)
    reading, widest, losses = _forward_bytes(config, model, model_device, ranks)
    stays = {
        "language model": of_model if model_device == device else 0,
        "text": TEXT_BYTES if device.type == "cpu" else 0,
        "weights and moments": sum(states),
        "copies in the compute dtype": sum(member["copies"] for member in each.values()),
        "shuffle buffer": buffer,
        "activations made ahead": buffer // 2 if ahead else 0,
        # The first batches wait for the mean; of one, raw, normalised, and a few in the step.
        "batches": rows * (max(NORMALIZER_TOKENS, train.batch_size) + 6 * train.batch_size),
        "held-out activations": rows * data.heldout_tokens,
    }
    passes = {
        "a step": max(member["step"] for member in each.values()),
        "an evaluation": max(member["evaluation"] for member in each.values()),
    }
    if model_device == device:
        passes |= {"a forward pass of the language model": reading, "its losses": losses}
    if device.type == "cpu":
        # The first process copies, one at a time, what it got from another one.
        received = 2 * max(m["state"] for m in every.values()) if len(parts) > 1 else 0
        passes["the copy for a checkpoint"] = max(sum(states), received) + kept_buffer
        if train.tensor_parallel > 1:  # rank 0 writes the whole
            whole = max(member["parameters"] for member in each.values())
            passes["the whole autoencoder, to save it"] = 4 * whole
    kept = dict.fromkeys(passes, 0)
    if device.type == "cpu":
        # A step and a forward pass have tensors of other sizes, so neither finds room for all of
        # its own in what the other has left.
        kept["a step"] = max(member["kept"] for member in each.values())
        if model_device == device and widest < RETURNED:
            kept["a forward pass of the language model"] = reading
        stays["kept by the allocator"] = sum(kept.values())
    graphs = [member["step"] for member in each.values() if member["graph"]]
    if graphs:  # what a graph's kernels write is written to the same place in every replay
        kept["a step"] = max(graphs)
        stays["kept by CUDA graphs"] = sum(graphs)
    beside = {name: size - kept[name] for name, size in passes.items()}
    largest = max(beside, key=beside.get)
    memory = {**stays, f"at most beside it ({largest})": beside[largest]}
    free = free_bytes(device)
    return {
        "device": str(device),
        "model_device": str(model_device),
        "ranks": list(ranks),
        "kernels": backends.choose(None, device),
        "kernels_why": "; ".join([_why(device), *_in_torch(members.values())]),
        "d_model": d,
        "steps": train.steps,
        "tokens": train.tokens,
        "flops_per_token_model": model.flops_per_token,
        "parts": parts,
        "members": {name: {key: member[key] for key in _SHOWN} for name, member in every.items()},
        "memory_mib": {name: size / _MIB for name, size in memory.items()},
        "passes_mib": {name: size / _MIB for name, size in passes.items()},
        "free_mib": None if free is None else free / _MIB,
        "disk_mib": {
            "checkpoints": (train.keep_checkpoints + 1)
            * (train.tensor_parallel * sum(m["state"] for m in every.values()) + kept_buffer)
            / _MIB,
            "autoencoders": sum(4 * member["parameters"] for member in every.values()) / _MIB,
        },
    }


_SHOWN = (
    *("compute_dtype", "training_step", "training_step_why", "dict_size"),
    *("parameters", "flops_per_token", "flops_per_token_dense", "flops_per_token_step"),
)


def _parts(members: Mapping[str, RunConfig], ranks: tuple[int, int]) -> list[list[str]]:
    """Names of the members that each process trains alone; one part, of all, if they share them."""
    train = next(iter(members.values())).train
    owned = parallel.owners(members, train.share, ranks)
    parts: dict[int, list[str]] = {}
    for name in members:
        parts.setdefault(owned.get(name, 0), []).append(name)
    return list(parts.values())


def _member(
    sae: SAEConfig, train: TrainConfig, device: torch.device, ranks: tuple[int, int]
) -> dict[str, Any]:
    """Counts of one SAE, and bytes on each of the ranks (along data, along heads)."""
    d, (sharing_tokens, sharing_heads) = sae.d_model, ranks
    check_heads(sae, sharing_heads)
    batch = math.ceil(train.batch_size / sharing_tokens)
    dtype = compute_dtype(train.dtype, device)
    reason = check_step(sae, train, device, ranks)
    encoder = sae.encoder_rows * (d + 1)
    parameters = encoder + (sae.dict_size + 1) * sae.d_out
    parameters += sae.experts * (d + 1)  # the router
    parameters += d * sae.d_out if sae.skip else 0
    kinds = [registry[getattr(sae, part)] for part, registry in SAE_KINDS.items()]
    encoder_kind, selection, objective = kinds
    parameters += encoder_kind.parameter_count(sae) + selection.parameter_count(sae)
    shape = {"heads": sae.heads, "m": sae.m, "n": sae.n}
    on = auxk_tokens(sae, train, train.batch_size)
    dead = min(sae.dict_size, auxk_latents(sae, train)) if on else 0
    step = flops.training_step(
        d,
        sae.dict_size,
        sae.k,
        train.batch_size,
        auxk=dead,
        auxk_fraction=on / train.batch_size,
        **shape,
    )
    # What a rank holds; all but matrices and biases of latents is small.
    own, own_rows = math.ceil(parameters / sharing_heads), sae.encoder_rows // sharing_heads
    chunk = _pre_latent_bytes(own_rows, batch, dtype, device)
    # What is selected from, and decoded: more than k latents a token at some points of the grid.
    kept = reason is None and not selection.exact  # batches, until their steps are made
    widest = selection.widest(sae)
    judged = 64 * BATCH_TOKENS * min(widest, sae.latents_per_token)
    width = min(widest * objective.decoded_per_k, sae.latents_per_token)
    codes = 64 * max(batch * width, math.ceil(on / sharing_tokens) * dead)
    if sharing_heads > 1:  # candidates of all ranks: value, index, copies to sort
        codes += 32 * sharing_heads * batch * width
        if reason is None:  # what all decode, added up in float32, and its squares
            codes += 8 * batch * sae.d_out
    if not selection.by_k and reason is not None:  # [b, F]: products, values, and more
        columns = max(sae.encoder_rows, sae.dict_size)
        codes += 12 * sae.dict_size * _chunk_tokens(columns, batch, dtype, device)
    if objective.nested:  # and their gradients, and the suffix sums of these
        codes += 3 * 4 * batch * len(sae.prefixes) * sae.d_out
    if kept:
        codes += 4 * batch * (d + sae.d_target) * min(UNCONFIRMED, train.log_every)
    # The fused step writes no gradients, but keeps the matrices in the compute dtype.
    copies = dtype.itemsize * own if reason is None and dtype != torch.float32 else 0
    gradients = 4 * own if reason is not None else 0
    matrices = own_rows * d, sae.dict_size // sharing_heads * sae.d_out
    moments = 8 * own - (4 * sum(matrices) if train.moments == "bfloat16" else 0)
    returned = sum(4 * size for size in matrices if 4 * size >= RETURNED) if gradients else 0
    # Folding takes a new SAE, and the encoder in float64. What is judged goes in smaller batches.
    seen = _pre_latent_bytes(own_rows, BATCH_TOKENS, torch.float32, device)
    return {
        "compute_dtype": str(dtype).removeprefix("torch."),
        "graph": reason is None
        and train.cuda_graph != "off"
        and why_not_graphed(device, sharing_heads) is None,
        "training_step": "fused" if reason is None else "autograd and AdamW",
        "training_step_why": "gradients are never written" if reason is None else reason,
        "dict_size": sae.dict_size,
        "parameters": parameters,
        "flops_per_token": flops_per_token(sae),
        "flops_per_token_dense": flops.forward(d, sae.dict_size, sae.k, d_out=sae.d_out),
        "flops_per_token_step": step.total,
        # Weights and two moments; tokens since each latent fired.
        "state": 4 * own + moments + 8 * sae.dict_size // sharing_heads,
        "copies": copies,
        "step": gradients + chunk + codes,
        "kept": gradients + chunk + codes - returned,
        "evaluation": 4 * own + max(8 * encoder // sharing_heads, seen + judged),
    }


def _buffer_bytes(config: RunConfig, row: int) -> tuple[int, int]:
    """What the shuffle buffer takes, for rows of so many bytes; and in a checkpoint."""
    data = config.data
    live = row * max(data.buffer_tokens, 2 * config.train.batch_size)
    if data.activations is None:
        return live, live
    index = CacheIndex.open(data.activations)
    permuted = data.activations_order == "global"
    rows = group_rows(index, data.buffer_tokens if permuted else 0)
    read_ahead = 2 * rows * row // 4 * getattr(torch, index.dtype).itemsize
    read_ahead += KEPT * config.train.batch_size * row if permuted else 0
    return (read_ahead, 0) if permuted else (live + read_ahead, live)


def _forward_bytes(
    config: RunConfig, model: Outline, device: torch.device, ranks: tuple[int, int]
) -> tuple[int, int, int]:
    """Roughly, of the language model's own activations: to read out, the largest of these, and for
    its losses."""
    size = compute_dtype(config.data.model_dtype, device).itemsize
    tokens = config.data.contexts_per_batch * model.context_length
    # The widest place of a block has four widths, twice, and about six lie beside it: the residual
    # stream, what was normalised of it, attention. Ranks share the contexts out, and each gets what
    # all have read.
    own = math.ceil(config.data.contexts_per_batch / math.prod(ranks)) * model.context_length
    width = own * model.hidden_size * size
    reading = 14 * width + 4 * (tokens - own) * model.d_model
    # Logits, the same in float32, and logarithms of probabilities.
    of_logit = size + 4 + (4 if size < 4 else 0)
    judged = CONTEXTS_AT_ONCE * model.context_length
    return reading, 4 * width, of_logit * min(LOGITS_AT_ONCE, judged * model.vocabulary)


def _model_device(data: DataConfig, device: torch.device) -> torch.device:
    """Where the language model runs: the very device of the autoencoder, or another."""
    if data.model_device is None:
        return device
    found = resolve_device(data.model_device)
    return device if with_index(found) == with_index(device) else found


def shortage(plan: dict[str, Any]) -> str | None:
    """What to say if a plan needs far more memory than is free; None if it does not."""
    needed, free = sum(plan["memory_mib"].values()), plan["free_mib"]
    # Processes on one machine share its memory; a GPU is one process's own.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if plan["device"] == "cpu" else 1
    if free is None or here * needed <= FAR * free:
        return None
    parts = sorted(plan["memory_mib"].items(), key=lambda part: -part[1])
    each = f" for each of {here} processes" if here > 1 else ""
    return (
        f"{needed:,.0f} MiB of memory are needed{each} on {plan['device']}, where {free:,.0f} MiB "
        "are free: " + ", ".join(f"{name} {size:,.0f}" for name, size in parts)
    )


def check_memory(plan: dict[str, Any]) -> None:
    """Raise InputError if a plan needs far more memory than is free."""
    reason = shortage(plan)
    if reason is not None:
        raise InputError(
            f"{reason}. Train fewer or smaller autoencoders, or a smaller buffer (--plan shows "
            "what they take); --no-memory-check starts anyway"
        )


def _chunk_tokens(columns: int, batch: int, dtype: torch.dtype, device: torch.device) -> int:
    from kronsae_kernels.torch_impl import chunk_tokens

    return min(batch, chunk_tokens(columns * dtype.itemsize, device))


def _why(device: torch.device) -> str:
    reason = backends.why_not("triton", device)
    if device.type == "cpu":
        reason = "the device is a CPU"
    return reason or "the device is a GPU"


def _in_torch(members: Iterable[RunConfig]) -> list[str]:
    """What is made of torch calls on any device."""
    saes = [config.sae for config in members]
    parts = {
        "latents above thresholds: torch": any(not SELECTIONS[s.selection].by_k for s in saes),
        "nested reconstructions: torch": any(OBJECTIVES[s.objective].nested for s in saes),
    }
    return [part for part, there in parts.items() if there]


def _pre_latent_bytes(rows: int, batch: int, dtype: torch.dtype, device: torch.device) -> int:
    return rows * dtype.itemsize * _chunk_tokens(rows, batch, dtype, device)
