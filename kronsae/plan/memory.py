"""Memory, disk and multiply-adds of a run or a sweep, before a language model is loaded.

Memory is what exists at the same time: what stays (weights, moments, buffers, the language model),
and the largest of what comes and goes: a step, an evaluation, a checkpoint.
"""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from kronsae.cache import CacheIndex
from kronsae.cache.reader import group_rows
from kronsae.config import DataConfig, RunConfig, SAEConfig, TrainConfig
from kronsae.data.activations import overlaps
from kronsae.data.language_model import LOGITS_AT_ONCE
from kronsae.data.rows import BATCHES_IN_MEMORY
from kronsae.errors import InputError
from kronsae.metrics.heldout import BATCH_TOKENS, CONTEXTS_AT_ONCE
from kronsae.model import flops
from kronsae.model.normalizer import SAMPLE_TOKENS
from kronsae.model.objectives import auxk_latents, auxk_tokens
from kronsae.model.ranks import check_heads, ranks_of_one
from kronsae.model.sae import SAE
from kronsae.plan.outline import Outline
from kronsae.registry import OBJECTIVES, SELECTIONS
from kronsae.runs.sweep import hookpoints_of
from kronsae.system import parallel
from kronsae.system.devices import (
    compute_dtype,
    free_bytes,
    model_dtype,
    resolve_device,
    with_index,
)
from kronsae.training import eight_bit
from kronsae.training.learner import UNCONFIRMED, check_step, with_largest_k
from kronsae_kernels import backends
from kronsae_kernels.step import why_not_graphed
from kronsae_kernels.torch_impl import chunk_tokens

MIB = 2**20

TEXT_BYTES = 30 * MIB
"""Memory of a tokenizer and of the text held at once, measured with the embedded default."""

DOCUMENT_BYTES = 4096
"""A usual size of documents, for the buffer of a stream."""

MMAP_BYTES = 32 * MIB
"""Smaller freed tensors on the CPU stay with the C library; larger ones go back to the system.
(The largest value that glibc's M_MMAP_THRESHOLD grows to on 64 bits.)"""

MEMORY_MARGIN = 1.5
"""A run is refused if it needs 1.5 times the free memory or more: plans are estimates."""


def make_plan(members: Mapping[str, RunConfig], model: Outline, starts: int = 0) -> dict[str, Any]:
    """Counts, bytes and multiply-adds of a run, or of a sweep of several members (JSON-able).

    members: by name, with the width of their activations; they share data and stream.
    starts: bytes of the SAEs that training starts from, which stay in the CPU's memory.
    """
    config = next(iter(members.values()))
    train = config.train
    device = resolve_device(train.device)
    model_device = _model_device(config.data, device)
    ranks = parallel.shape(train.tensor_parallel)
    of_one = ranks_of_one(train)
    plans = {name: _member(c.sae, c.train, device, of_one) for name, c in members.items()}
    parts = _parts(members, ranks)
    by_process = [[plans[name] for name in names] for names in parts]
    process = max(by_process, key=lambda process: sum(member.state for member in process))
    # Bytes of the activations of a token, and their targets, at each hookpoint of a process.
    row = 4 * max(_width([members[name] for name in names]) for names in parts)
    dtype = model_dtype(config.data.model_dtype, model_device, model.checkpoint)
    kept = row // 4 * min(4, dtype.itemsize)
    buffer, saved_buffer = _buffer_bytes(config, row, kept)
    reader = _reader(config, model, dtype, ranks, kept) if model_device == device else None
    stays = {
        "language model": reader.weights if reader else 0,
        "text": _text_bytes(config.data) if device.type == "cpu" else 0,
        "weights and moments": sum(member.state for member in process),
        **({"SAEs to start from": starts} if starts and device.type == "cpu" else {}),
        "copies in the compute dtype": sum(member.copies for member in process),
        "shuffle buffer": buffer,
        "activations made ahead": buffer // 2 if overlaps(config.data, model_device) else 0,
        # The first batches wait for the mean; of one, raw, normalised, and a few in the step.
        "batches": row * (max(SAMPLE_TOKENS, train.batch_size) + 6 * train.batch_size),
        "held-out activations": row * config.data.heldout_tokens,
    }
    # The first process copies, one at a time, the states that it gets from the others.
    received = 2 * max(member.state for member in plans.values()) if len(parts) > 1 else 0
    copied = max(stays["weights and moments"], received) + saved_buffer
    memory, passes = _peak(train, process, reader, stays, copied, device)
    free = free_bytes(device)
    state = train.tensor_parallel * sum(member.state for member in plans.values())
    disk = {
        "checkpoints": (train.keep_checkpoints + 1) * (state + saved_buffer),
        "autoencoders": sum(4 * member.parameters for member in plans.values()),
    }
    return {
        "device": str(device),
        "model_device": str(model_device),
        "ranks": list(ranks),
        "kernels": backends.choose(None, device),
        "kernels_why": "; ".join([_kernels_reason(device), *_in_torch(members.values())]),
        "d_model": model.d_model,
        "steps": train.steps,
        "tokens": train.tokens,
        "flops_per_token_model": model.flops_per_token,
        "parts": parts,
        "members": {name: member.figures for name, member in plans.items()},
        "memory_mib": in_mib(memory),
        "passes_mib": in_mib(passes),
        "free_mib": None if free is None else free / MIB,
        "disk_mib": in_mib(disk),
    }


class _Member(NamedTuple):
    """An SAE: the figures that a plan shows, and bytes on each rank."""

    figures: dict[str, Any]
    parameters: int
    state: int
    """Weights, moments, and tokens since each latent fired."""
    copies: int
    """Weights in the compute dtype."""
    step: int
    """Memory of a training step beside these."""
    kept: int
    """The part of `step` that the C library keeps on a CPU."""
    evaluation: int
    graph: bool
    """Whether the step is a CUDA graph."""


class _Reader(NamedTuple):
    """Bytes of a language model that reads text."""

    weights: int
    forward: int
    """Activations of a forward pass up to the hookpoint."""
    widest: int
    """The largest of these."""
    losses: int
    """Logits for the losses of held-out text."""


def _peak(
    train: TrainConfig,
    process: list[_Member],
    reader: _Reader | None,
    stays: dict[str, int],
    copied: int,
    device: torch.device,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of all that exists at the same time, and of each pass, only one of which does.

    reader: the language model, if it is on the device.  copied: bytes that a checkpoint copies.
    """
    passes = {
        "a step": max(member.step for member in process),
        "an evaluation": max(member.evaluation for member in process),
    }
    reading = "a forward pass of the language model"
    if reader is not None:
        passes |= {reading: reader.forward, "its losses": reader.losses}
    if device.type == "cpu":
        passes["the copy for a checkpoint"] = copied
        if train.tensor_parallel > 1:  # rank 0 saves the whole autoencoder
            whole = max(member.parameters for member in process)
            passes["the whole autoencoder, to save it"] = 4 * whole
    kept, allocator = dict.fromkeys(passes, 0), {}
    if device.type == "cpu":
        # A step and a forward pass have tensors of other sizes, so that neither can reuse all of
        # the memory of the other.
        kept["a step"] = max(member.kept for member in process)
        if reader is not None and reader.widest < MMAP_BYTES:
            kept[reading] = reader.forward
        allocator = {"kept by the allocator": sum(kept.values())}
    graphs = [member.step for member in process if member.graph]
    if graphs:  # a graph's kernels write to the same addresses in every replay
        kept["a step"] = max(graphs)
        allocator = {"kept by CUDA graphs": sum(graphs)}
    beside = {name: size - kept[name] for name, size in passes.items()}
    largest = max(beside, key=lambda name: beside[name])
    return {**stays, **allocator, f"at most beside it ({largest})": beside[largest]}, passes


def _parts(members: Mapping[str, RunConfig], ranks: tuple[int, int]) -> list[list[str]]:
    """Names of the members that each process trains alone; one part, of all, if they share them."""
    train = next(iter(members.values())).train
    hookpoints = hookpoints_of({name: config.data for name, config in members.items()})
    owned = parallel.owners(hookpoints, train.share, ranks)
    parts: dict[int, list[str]] = {}
    for name in members:
        parts.setdefault(owned.get(name, 0), []).append(name)
    return list(parts.values())


def _width(configs: Iterable[RunConfig]) -> int:
    """Width of the activations, and their targets, of the hookpoints that these read."""
    places = {
        (config.data.layer, config.data.hookpoint, config.data.target_hookpoint): config.sae
        for config in configs
    }
    return sum(sae.d_model + sae.d_target for sae in places.values())


def _member(
    sae: SAEConfig, train: TrainConfig, device: torch.device, ranks: tuple[int, int]
) -> _Member:
    """Figures of one SAE, and bytes on each of the ranks (along data, along heads)."""
    check_heads(sae, ranks[1])
    reason = check_step(sae, train, device, ranks)
    fused = reason is None
    dtype = compute_dtype(train.dtype, device)
    parameters = _parameters(sae)
    # Bytes on a rank; all parameters but the matrices and biases of latents are few.
    own, rows = math.ceil(parameters / ranks[1]), sae.encoder_rows // ranks[1]
    # The fused step writes no gradients, but keeps the matrices in the compute dtype.
    gradients = 0 if fused else 4 * own
    matrices = rows * sae.d_model, sae.dict_size // ranks[1] * sae.d_out
    short = {
        "float32": 8 * sum(matrices),
        "bfloat16": 4 * sum(matrices),
        "8bit": sum(map(eight_bit.state_bytes, matrices)),
    }
    moments = 8 * (own - sum(matrices)) + short[train.moments]
    batch = math.ceil(train.batch_size / ranks[0])
    step = gradients + _pre_latent_bytes(rows, batch, dtype, device)
    step += _code_bytes(sae, train, device, ranks, fused)
    returned = 0 if fused else sum(4 * size for size in matrices if 4 * size >= MMAP_BYTES)
    # Evaluation goes in smaller batches. Folding the normalizer takes a new SAE, and the encoder in
    # float64.
    widest = SELECTIONS[sae.selection].widest(sae)
    judged = _pre_latent_bytes(rows, BATCH_TOKENS, torch.float32, device)
    judged += 64 * BATCH_TOKENS * min(widest, sae.latents_per_token)
    folded = 8 * sae.encoder_rows * (sae.d_model + 1) // ranks[1]
    graphed = train.cuda_graph != "off" and why_not_graphed(device, ranks[1]) is None
    return _Member(
        figures={
            "compute_dtype": str(dtype).removeprefix("torch."),
            "training_step": "fused" if fused else "autograd and AdamW",
            "training_step_why": reason or "gradients are never written",
            "dict_size": sae.dict_size,
            "parameters": parameters,
            "flops_per_token": flops.flops_per_token(sae),
            "flops_per_token_dense": flops.forward(
                sae.d_model, sae.dict_size, sae.k, d_out=sae.d_out
            ),
            "flops_per_token_step": _step_flops(sae, train),
        },
        parameters=parameters,
        state=4 * own + moments + 8 * sae.dict_size // ranks[1],
        copies=dtype.itemsize * own if fused and dtype != torch.float32 else 0,
        step=step,
        kept=step - returned,
        evaluation=4 * own + max(folded, judged),
        graph=fused and graphed,
    )


def _parameters(sae: SAEConfig) -> int:
    """Number of parameters of the whole autoencoder."""
    return sum(parameter.numel() for parameter in SAE(sae, device="meta").parameters())


def _auxiliary(sae: SAEConfig, train: TrainConfig) -> tuple[int, int]:
    """Tokens of a batch with the auxiliary loss, and the dead latents that it selects for each."""
    tokens = auxk_tokens(sae, train, train.batch_size)
    return tokens, min(sae.dict_size, auxk_latents(sae, train)) if tokens else 0


def _step_flops(sae: SAEConfig, train: TrainConfig) -> float:
    """Multiply-adds of a training step, per token."""
    tokens, dead = _auxiliary(sae, train)
    return flops.training_step(
        sae.d_model,
        sae.dict_size,
        sae.k,
        train.batch_size,
        auxk=dead,
        auxk_fraction=tokens / train.batch_size,
        heads=sae.heads,
        m=sae.m,
        n=sae.n,
    ).total


def _code_bytes(
    sae: SAEConfig, train: TrainConfig, device: torch.device, ranks: tuple[int, int], fused: bool
) -> int:
    """Bytes of a step's latents, reconstructions and their gradients on a rank."""
    sae = with_largest_k(sae, train)
    selection, objective = SELECTIONS[sae.selection], OBJECTIVES[sae.objective]
    dtype = compute_dtype(train.dtype, device)
    batch = math.ceil(train.batch_size / ranks[0])
    tokens, dead = _auxiliary(sae, train)
    # Selected and decoded: more than k latents a token with some selections and objectives.
    width = min(selection.widest(sae) * objective.decoded_per_k, sae.latents_per_token)
    total = 64 * max(batch * width, math.ceil(tokens / ranks[0]) * dead)
    if ranks[1] > 1:  # candidates of all ranks: value, index, copies to sort
        total += 32 * ranks[1] * batch * width
        if fused:  # the decoded parts of all ranks, summed in float32, and their squares
            total += 8 * batch * sae.d_out
    if not selection.by_k and not fused and not sae.m:  # a dense encoder's scores, where above
        total += 12 * sae.dict_size * _chunk_tokens(sae.dict_size, batch, dtype, device)
    total += objective.step_bytes(sae, sae.k, batch, device.type == "cpu")
    if sae.refine:  # values, products, errors and their gradients of each step
        total += sae.refine * batch * (24 * width + 16 * sae.d_out)
    if fused and not selection.exact:  # batches are kept until their steps are confirmed
        total += 4 * batch * (sae.d_model + sae.d_target) * min(UNCONFIRMED, train.log_every)
    return total


def _text_bytes(data: DataConfig) -> int:
    """Bytes of a tokenizer, and of documents that are held at once."""
    return TEXT_BYTES + (DOCUMENT_BYTES * data.shuffle_documents if data.streaming else 0)


def _buffer_bytes(config: RunConfig, row: int, kept: int) -> tuple[int, int]:
    """Bytes of the shuffle buffer in memory, and in a checkpoint.

    row, kept: bytes of what is read of a token, in float32 and as a language model gives it.
    """
    data = config.data
    tokens = max(data.buffer_tokens, 2 * config.train.batch_size)
    if data.activations is None:
        return kept * tokens, kept * tokens
    index = CacheIndex.open(data.activations)
    permuted = data.activations_order == "global"
    rows = group_rows(index, data.buffer_tokens if permuted else 0)
    read_ahead = 2 * rows * row // 4 * index.dtype_in_memory.itemsize
    if permuted:
        return read_ahead + BATCHES_IN_MEMORY * config.train.batch_size * row, 0
    live = row // 4 * index.dtype_in_memory.itemsize * tokens
    return live + read_ahead, live


def _reader(
    config: RunConfig, model: Outline, dtype: torch.dtype, ranks: tuple[int, int], row: int
) -> _Reader:
    """Rough sizes of the language model, which computes in `dtype`, and its activations on a rank.

    row: bytes of what is read of a token.
    """
    size = dtype.itemsize
    tokens = config.data.contexts_per_batch * model.context_length
    # A block's widest activation has four times the model's width, and exists twice. About six more
    # of that width exist beside it: the residual stream, its norm, attention. Ranks share the
    # contexts out, and each gets the activations of all.
    own = math.ceil(config.data.contexts_per_batch / math.prod(ranks)) * model.context_length
    width = own * model.hidden_size * size
    # Logits, the same in float32, and logarithms of probabilities.
    logit = size + 4 + (4 if size < 4 else 0)
    judged = CONTEXTS_AT_ONCE * model.context_length
    row_of_one = min(4, size) * (config.sae.d_model + config.sae.d_target)
    return _Reader(
        weights=math.ceil(model.parameters * weight_bytes(config.data, size)),
        # What other hookpoints give waits, until the tokens to train on are copied.
        forward=14 * width + row * (tokens - own) + 2 * max(0, row - row_of_one) * own,
        widest=4 * width,
        losses=logit * min(LOGITS_AT_ONCE, judged * model.vocabulary),
    )


def weight_bytes(data: DataConfig, size: int) -> float:
    """Bytes of a weight of the language model, which computes with numbers of `size` bytes.

    A --device-map puts no more weights on a device than fit there: they do not count.
    """
    if data.device_map is not None:
        return 0
    return {"8bit": 1, "4bit": 0.5}.get(data.load_in, size)


def _model_device(data: DataConfig, device: torch.device) -> torch.device:
    """The language model's device; `device` itself if it is the autoencoder's."""
    if data.model_device is None:
        return device
    own = resolve_device(data.model_device)
    return device if with_index(own) == with_index(device) else own


def in_mib(sizes: Mapping[str, float]) -> dict[str, float]:
    """Bytes in MiB."""
    return {name: size / MIB for name, size in sizes.items()}


def listed(sizes: Iterable[tuple[str, float]]) -> str:
    """Sizes in words: "weights 1,024, text 30"."""
    return ", ".join(f"{name} {size:,.0f}" for name, size in sizes)


def shortage(plan: dict[str, Any]) -> str | None:
    """The message for a plan that needs far more memory than is free; None otherwise."""
    needed, free = sum(plan["memory_mib"].values()), plan["free_mib"]
    # Processes on one machine share its memory; a GPU belongs to one process.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if plan["device"] == "cpu" else 1
    if free is None or processes * needed <= MEMORY_MARGIN * free:
        return None
    per_process = f" for each of {processes} processes" if processes > 1 else ""
    return (
        f"{needed:,.0f} MiB of memory are needed{per_process} on {plan['device']}, where "
        f"{free:,.0f} MiB are free: "
        + listed(sorted(plan["memory_mib"].items(), key=lambda part: -part[1]))
    )


def check_memory(plan: dict[str, Any]) -> None:
    """Raise InputError if a plan needs far more memory than is free."""
    reason = shortage(plan)
    if reason is not None:
        raise InputError(
            f"{reason}. Train fewer or smaller autoencoders, or use a smaller buffer (--plan shows "
            "what they take); --no-memory-check starts anyway"
        )


def _kernels_reason(device: torch.device) -> str:
    if device.type == "cpu":
        return "the device is a CPU"
    return backends.why_not("triton", device) or "the device is a GPU"


def _in_torch(members: Iterable[RunConfig]) -> list[str]:
    """Parts of a step that run in torch on any device."""
    saes = [config.sae for config in members]
    parts = {
        "latents above thresholds: torch": any(not SELECTIONS[s.selection].by_k for s in saes),
        "nested reconstructions: torch": any(OBJECTIVES[s.objective].nested for s in saes),
    }
    return [part for part, used in parts.items() if used]


def _chunk_tokens(columns: int, batch: int, dtype: torch.dtype, device: torch.device) -> int:
    return min(batch, chunk_tokens(columns * dtype.itemsize, device))


def _pre_latent_bytes(rows: int, batch: int, dtype: torch.dtype, device: torch.device) -> int:
    return rows * dtype.itemsize * _chunk_tokens(rows, batch, dtype, device)
