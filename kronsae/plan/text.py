"""The plan of a run or a sweep as text."""

import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from kronsae.config import RunConfig, TrainConfig, kind_of
from kronsae.plan.memory import shortage
from kronsae.registry import SELECTIONS
from kronsae.system import parallel


def describe_ranks(train: TrainConfig) -> str:
    """How many processes train, and what they share; nothing of one alone."""
    data, heads = parallel.shape(train.tensor_parallel)
    if data * heads == 1:
        return ""
    if train.share == "members":
        return f", by {data} processes: each trains autoencoders of its own"
    what = [f"{data} share the tokens of a batch"] if data > 1 else []
    what += [f"{heads} share the heads" if not what else f"{heads} the heads"] if heads > 1 else []
    return f", by {data * heads} processes: {', '.join(what)}"


def render(plan: dict[str, Any], members: Mapping[str, RunConfig], time: str) -> str:
    """The plan as text. time: that of the run, in words."""
    config = next(iter(members.values()))
    data, train = config.data, config.train
    where = data.hookpoint or f"residual stream after block {data.layer}"
    if data.target_hookpoint:
        where += f", to predict {data.target_hookpoint}"
    memory, disk, free = plan["memory_mib"], plan["disk_mib"], plan["free_mib"]
    of_each = " in each process" if math.prod(plan["ranks"]) > 1 else ""
    of_each = " in the largest process" if len(plan["parts"]) > 1 else of_each
    beside = "" if free is None else f" ({free:,.0f} MiB are free)"
    cost = f"{plan['flops_per_token_model'] / 1e6:,.1f} M multiply-adds a token"
    if data.activations:
        cost = f"from the cache {data.activations}, so it runs to evaluate alone"
    lines = [
        "What would run (nothing was loaded or written):",
        f"  language model   {data.model}, {where}, d = {plan['d_model']:,}; {cost}",
        f"  text             {data.dataset}",
        f"  training         {plan['tokens']:,} tokens in {plan['steps']:,} steps of "
        f"{train.batch_size:,}, AdamW{describe_ranks(train)}",
        f"  device           {plan['device']}",
        f"  kernels          {plan['kernels']} ({plan['kernels_why']})",
    ]
    for name, member in plan["members"].items():
        sae, lr = members[name].sae, members[name].train.lr
        shape = kind_of(vars(sae))
        if sae.heads:
            shape += f", {sae.heads:,} heads x {sae.m} x {sae.n}"
        if sae.experts:
            shape += f", {sae.experts} experts"
        ratio = member["flops_per_token_dense"] / member["flops_per_token"]
        moments = members[name].train.moments
        rounded = "" if moments == "float32" else f", moments in {moments}"
        active = SELECTIONS[sae.selection].describe(sae)
        title = "autoencoder" if len(members) == 1 else name
        lines += [
            f"  {title:16} {shape}, F = {member['dict_size']:,}, {active}, "
            f"{member['parameters'] / 1e6:,.1f} M parameters, lr {lr:g}, "
            f"{member['compute_dtype']}{rounded}",
            f"    multiply-adds  {member['flops_per_token'] / 1e6:,.2f} M a token (eq. 7; dense "
            f"TopK: x{ratio:.2f}), {member['flops_per_token_step'] / 1e6:,.2f} M with the whole "
            "training step",
            f"    training step  {member['training_step']} ({member['training_step_why']})",
        ]
    lines += [
        f"  memory           {sum(memory.values()):,.0f} MiB{of_each}{beside}: "
        + ", ".join(f"{name} {size:,.0f}" for name, size in memory.items()),
        f"  disk             up to {sum(disk.values()):,.0f} MiB: "
        + ", ".join(f"{name} {size:,.0f}" for name, size in disk.items()),
        f"  time             {time}",
    ]
    return wrapped(lines, shortage(plan))


def wrapped(lines: Iterable[str], refused: str | None) -> str:
    """The lines at 80 columns, and why the plan would be refused, if it would."""
    lines = [*lines, f"It would be refused: {refused}"] if refused else lines
    whole = {"break_long_words": False, "break_on_hyphens": False}  # paths can be copied
    return "\n".join(textwrap.fill(line, 80, subsequent_indent=19 * " ", **whole) for line in lines)
