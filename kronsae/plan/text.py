"""The plan of a run or a sweep as text."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kronsae.config import DataConfig, RunConfig, TrainConfig, kind_of
from kronsae.data.amount import in_words, name_of_text, too_few
from kronsae.plan.memory import listed, shortage
from kronsae.registry import SELECTIONS
from kronsae.runs.sweep import hookpoint_name
from kronsae.system import parallel


def describe_ranks(train: TrainConfig) -> str:
    """Number of processes and what they share, in words; "" for a single process."""
    data, heads = parallel.shape(train.tensor_parallel)
    if data * heads == 1:
        return ""
    if train.share == "members":
        return f", by {data} processes: each trains autoencoders of its own"
    shares = [f"{data} share the tokens of a batch"] if data > 1 else []
    if heads > 1:
        shares.append(f"{heads} the heads" if shares else f"{heads} share the heads")
    return f", by {data * heads} processes: {', '.join(shares)}"


def render(
    plan: dict[str, Any],
    members: Mapping[str, RunConfig],
    time: str,
    available: int | None = None,
    starts_from: str = "",
) -> str:
    """The plan as text.

    time: of the run, in words.  available: tokens to train on, about; None if it is not known.
    starts_from: the SAE whose weights training starts from, if it does.
    """
    config = next(iter(members.values()))
    data, train = config.data, config.train
    read = f"{_hookpoints(config.data for config in members.values())}, d = {_widths(members)}"
    cost = f"{plan['flops_per_token_model'] / 1e6:,.1f} M multiply-adds a token"
    if data.activations:
        cost = f"from the cache {data.activations}, so it runs for evaluations only"
    process = " in each process" if math.prod(plan["ranks"]) > 1 else ""
    process = " in the largest process" if len(plan["parts"]) > 1 else process
    disk = plan["disk_mib"]
    lines = [
        "What would run (nothing was loaded or written):",
        f"  language model   {data.model}, {read}; {cost}",
        f"  text             {name_of_text(data)}{in_words(available, data.epochs)}",
        f"  training         {plan['tokens']:,} tokens in {plan['steps']:,} steps of "
        f"{train.batch_size:,}, AdamW{describe_ranks(train)}",
        f"  device           {plan['device']}",
        f"  kernels          {plan['kernels']} ({plan['kernels_why']})",
    ]
    alike: dict[tuple[str, ...], list[str]] = {}  # members that differ in their hookpoint alone
    for name, figures in plan["members"].items():
        alike.setdefault(tuple(_member_lines(members[name], figures)), []).append(name)
    for (first, *rest), names in alike.items():
        title = "autoencoder" if len(members) == 1 else names_in_words(names)
        lines += [f"  {title:16} {first}"] if len(title) <= 16 else [f"  {title}", 19 * " " + first]
        lines += rest
    lines += [f"  starts from      {starts_from}"] if starts_from else []
    lines += [
        memory_line(plan, process),
        f"  disk             up to {sum(disk.values()):,.0f} MiB: {listed(disk.items())}",
        f"  time             {time}",
    ]
    if (too_short := too_few(train.tokens, available, data.epochs)) is not None:
        lines.append(f"It would end early: {too_short}")
    return wrapped(lines, shortage(plan))


def _hookpoints(configs: Iterable[DataConfig]) -> str:
    """What is read, in words; of several hookpoints their number and their names."""
    names = {}
    for data in configs:
        name = data.hookpoint or f"residual stream after block {data.layer}"
        if data.target_hookpoint:
            name += f", to predict {data.target_hookpoint}"
        names[hookpoint_name(vars(data))] = name
    if len(names) == 1:
        return next(iter(names.values()))
    return f"at {len(names)} hookpoints ({', '.join(names)})"


def _widths(members: Mapping[str, RunConfig]) -> str:
    widths = {config.sae.d_model for config in members.values()}
    return " and ".join(f"{width:,}" for width in sorted(widths))


def names_in_words(names: Sequence[str]) -> str:
    """The first and the last name, and how many lie between: "layer0 ... layer5 (6)"."""
    if len(names) <= 2:
        return " and ".join(names)
    return f"{names[0]} ... {names[-1]} ({len(names)})"


def _member_lines(config: RunConfig, figures: dict[str, Any]) -> list[str]:
    """Lines on one autoencoder, without its name. figures: of it, in the plan."""
    sae = config.sae
    shape = kind_of(vars(sae))
    if sae.heads:
        shape += f", {sae.heads:,} heads x {sae.m} x {sae.n}"
    if sae.experts:
        shape += f", {sae.experts} experts"
    moments, lr = config.train.moments, f"lr {config.train.lr:g}"
    if config.train.encoder_lr_ratio != 1:
        lr += f" (encoder {config.train.lr * config.train.encoder_lr_ratio:g})"
    rounded = "" if moments == "float32" else f", moments in {moments}"
    ratio = figures["flops_per_token_dense"] / figures["flops_per_token"]
    return [
        f"{shape}, F = {figures['dict_size']:,}, "
        f"{SELECTIONS[sae.selection].describe(sae)}, {figures['parameters'] / 1e6:,.1f} M "
        f"parameters, {lr}, {figures['compute_dtype']}{rounded}",
        f"    multiply-adds  {figures['flops_per_token'] / 1e6:,.2f} M a token (eq. 7; dense "
        f"TopK: x{ratio:.2f}), {figures['flops_per_token_step'] / 1e6:,.2f} M with the whole "
        "training step",
        f"    training step  {figures['training_step']} ({figures['training_step_why']})",
    ]


def memory_line(plan: dict[str, Any], process: str = "") -> str:
    """The line on memory. process: of which process it is, in words."""
    memory, free = plan["memory_mib"], plan["free_mib"]
    available = "" if free is None else f" ({free:,.0f} MiB are free)"
    return (
        f"  memory           {sum(memory.values()):,.0f} MiB{process}{available}: "
        f"{listed(memory.items())}"
    )


def wrapped(lines: Iterable[str], refused: str | None) -> str:
    """The lines wrapped at 80 columns. refused: why the plan would be refused, if it would."""
    lines = [*lines, f"It would be refused: {refused}"] if refused else lines
    wrapper = textwrap.TextWrapper(
        width=80,
        subsequent_indent=19 * " ",
        break_long_words=False,  # paths can be copied
        break_on_hyphens=False,
    )
    return "\n".join(map(wrapper.fill, lines))
