"""`python -m kronsae.harvest`: write a language model's activations to a cache, once.

`python -m kronsae.train --activations DIR` trains from it, as often as wanted. The cache itself,
for Python, is `kronsae.cache`.
"""

import argparse
import dataclasses
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from kronsae.cache import CacheIndex, HarvestConfig, harvest
from kronsae.cache.index import DESCRIBED, HARVEST_NAME, INDEX_NAME, damaged, resume_command
from kronsae.cache.model import default_layers
from kronsae.cache.writer import Progress, stored_config
from kronsae.commandline import (
    Parser,
    Terminated,
    add_flag,
    load_plugins,
    signal_of,
    stoppable,
    stopped,
)
from kronsae.config import DataConfig, flag
from kronsae.data.text import check_text
from kronsae.errors import InputError
from kronsae.plan.memory import shortage
from kronsae.plan.outline import NoOutline, Outline, outline
from kronsae.plan.text import wrapped
from kronsae.plan.time import duration, model_seconds
from kronsae.system.devices import compute_dtype, free_bytes, resolve_device

__all__ = ["HarvestConfig", "harvest", "main", "make_plan"]

_MIB = 2**20

DISK_MARGIN = 1.05
"""A harvest is refused unless so many times the disk that it needs is free."""


def make_parser() -> Parser:
    parser = Parser(
        "harvest",
        "Write activations of a language model to a folder, to train on many times. The same "
        "command goes on with a harvest that was interrupted, and makes damaged shards of one that "
        "is complete anew.",
        "kronsae harvest --model EleutherAI/pythia-160m --layer 6 --tokens 50M \\\n"
        "    --dataset text.jsonl --out pythia-layer6\n"
        "kronsae train --activations pythia-layer6",
        usage="%(prog)s --out DIR [--model NAME --layer N ... --dataset NAME ...]",
        argument_default=argparse.SUPPRESS,
    )
    run = parser.add_argument_group("folder")
    run.add_argument("--out", type=Path, metavar="DIR", help="the cache to write")
    run.add_argument("--resume", type=Path, metavar="DIR", help="go on with the harvest in DIR")
    run.add_argument("--verify", type=Path, metavar="DIR", help="read and check all of a cache")
    run.add_argument("--plan", action="store_true", help="say what would run, and stop")
    group = parser.add_argument_group("what to harvest")
    for spec in dataclasses.fields(HarvestConfig):
        if spec.name in _LISTS:
            add_flag(group, spec, name=_LISTS[spec.name])
        elif spec.name != "data":
            add_flag(group, spec)
    group = parser.add_argument_group("language model and text")
    for spec in dataclasses.fields(DataConfig):
        if spec.name in (*DESCRIBED, "trust_remote_code"):
            add_flag(group, spec)
    return parser


_LISTS = {"layers": "layer", "hookpoints": "hookpoint"}

_WITH_RESUME = ("device", "trust_remote_code")
"""What the folder does not know."""


def parse(argv: list[str]) -> tuple[HarvestConfig | None, Path, bool]:
    """What to harvest (None: to verify), where, and whether to plan alone. Raises InputError."""
    given = vars(make_parser().parse(argv))
    folders = {name: given.pop(name) for name in ("out", "resume", "verify") if name in given}
    if len(folders) != 1:
        raise InputError(
            f"expected one of --out DIR, --resume DIR, --verify DIR, got {list(folders) or 'none'}"
        )
    [(action, folder)] = folders.items()
    plan = given.pop("plan", False)
    if action != "out":
        allowed = _WITH_RESUME if action == "resume" else ()
        for name in given:
            if name not in allowed:
                given_flag = flag(_LISTS.get(name, name))
                raise InputError(f"--{action} takes everything from the folder: no {given_flag}")
    if action == "verify":
        if plan:
            raise InputError("--plan has no effect with --verify: leave it out")
        return None, folder, False
    if action == "resume":
        device = {"device": given["device"]} if "device" in given else {}
        config = stored_config(folder, **device)
        trusted = {"trust_remote_code": given.get("trust_remote_code", False)}
        return dataclasses.replace(
            config, data=dataclasses.replace(config.data, **trusted)
        ), folder, plan  # fmt: skip
    own = {name: given.pop(name) for name in list(given) if name in _OWN}
    own |= {name: tuple(own[name]) for name in _LISTS if name in own}
    data = DataConfig(**given)
    if data.model == "embedded":
        for name in ("revision", "trust_remote_code"):
            if given.get(name):
                raise InputError(f"{flag(name)} has no effect with model 'embedded': leave it out")
    return HarvestConfig(data=data, **own), folder, plan


_OWN = {spec.name for spec in dataclasses.fields(HarvestConfig)} - {"data"}


def outlines(config: HarvestConfig) -> dict[str, Outline]:
    """The language model up to each hookpoint, by the name or layer that was asked for."""
    data = config.data
    layers = default_layers(data, config.layers, config.hookpoints)
    reads: list[dict[str, Any]] = [{"layer": layer} for layer in layers]
    reads += [{"hookpoint": name} for name in config.hookpoints]
    if not reads:
        raise InputError(
            f"--model {data.model} needs --layer N ... (residual streams after blocks, from 0) "
            "or --hookpoint MODULE_NAME ..."
        )
    return {
        " ".join(map(str, *read.items())): outline(dataclasses.replace(data, **read))
        for read in reads
    }


def last(models: dict[str, Outline]) -> Outline:
    """Up to where a forward pass goes."""
    return max(models.values(), key=lambda model: model.flops_per_token)


def make_plan(config: HarvestConfig, out: Path) -> dict[str, Any]:
    """Figures of a harvest, before a language model is loaded (JSON-able).

    Raises InputError for what the model's configuration rules out, NoOutline if it cannot tell.
    """
    data, device = config.data, resolve_device(config.device)
    check_text(data)
    models = outlines(config)
    model = last(models)
    size = compute_dtype(data.model_dtype, device).itemsize
    stored = size if config.dtype == "auto" else getattr(torch, config.dtype).itemsize
    width, length = sum(each.d_model for each in models.values()), model.context_length
    # Beside the activations a token id and the mask of each place in a context, but for the first.
    row = stored * width + 5 * length / (length - 1)
    contexts = -(-data.heldout_tokens // length)
    passes = data.contexts_per_batch * length
    shard = max(config.shard_tokens, passes)
    rows = config.tokens and config.tokens + contexts * (length - 1)
    there = sum(path.stat().st_size for path in out.glob("*.safetensors")) if out.exists() else 0
    existing = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    free = free_bytes(device)
    memory = {
        "language model": model.parameters * size,
        # The hookpoints' outputs, copied and joined, as float32, and what a block takes.
        "a forward pass": passes * (12 * model.hidden_size * size + (4 + 2 * size) * width),
        "a shard, and a copy to write": 2 * shard * width * stored,
    }
    return {
        "device": str(device),
        "hookpoints": {name: each.d_model for name, each in models.items()},
        "bytes_per_token": row,
        "tokens": config.tokens or None,
        "flops_per_token_model": model.flops_per_token,
        "memory_mib": {name: part / _MIB for name, part in memory.items()},
        "free_mib": None if free is None else free / _MIB,
        "disk_mib": rows * row / _MIB if rows else None,
        "disk_there_mib": there / _MIB,
        "disk_free_mib": shutil.disk_usage(existing).free / _MIB,
    }


def disk_shortage(plan: dict[str, Any]) -> str | None:
    """What to say if the disk is too small; None if it is not, or nobody knows."""
    if plan["disk_mib"] is None:
        return None
    needed, free = plan["disk_mib"] - plan["disk_there_mib"], plan["disk_free_mib"]
    if needed <= 0 or DISK_MARGIN * needed <= free:
        return None
    room = free * _MIB / plan["bytes_per_token"] / DISK_MARGIN
    return (
        f"{needed:,.0f} MiB of disk are needed ({plan['bytes_per_token']:,.0f} bytes a token), and "
        f"{free:,.0f} MiB are free, room for {room:,.0f} tokens: choose fewer --tokens, fewer "
        "hookpoints, --dtype bfloat16, or another disk"
    )


def harvest_time(plan: dict[str, Any], config: HarvestConfig) -> str:
    """The time of a harvest, in words: that of the language model up to the last hookpoint."""
    if plan["tokens"] is None:
        return "unknown, as nobody has counted the text"
    try:
        token = model_seconds(config.data, last(outlines(config)), resolve_device(config.device))
    except NoOutline as error:
        return f"not measured: {error}"
    tokens = plan["tokens"] + config.data.heldout_tokens
    return f"{duration(tokens * token)} (the language model alone, measured here)"


def render(plan: dict[str, Any], config: HarvestConfig, out: Path) -> str:
    """The plan as text, with the time that it would take."""
    tokens, memory, free = plan["tokens"], plan["memory_mib"], plan["free_mib"]
    beside = "" if free is None else f" ({free:,.0f} MiB are free)"
    if tokens is None:
        amount = "all of the text"
        room = plan["disk_free_mib"] * _MIB / plan["bytes_per_token"]
        disk = f"unknown; there is room for {room:,.0f} tokens"
    else:
        amount = f"{tokens:,} tokens"
        disk = f"{plan['disk_mib']:,.0f} MiB"
    widths = ", ".join(f"{name} (d = {width:,})" for name, width in plan["hookpoints"].items())
    lines = [
        "What would be harvested (nothing was loaded or written):",
        f"  language model   {config.data.model}; {plan['flops_per_token_model'] / 1e6:,.1f} M "
        f"multiply-adds a token, on {plan['device']}",
        f"  hookpoints       {widths}",
        f"  text             {config.data.dataset}: {amount}",
        f"  disk             {disk}, {plan['bytes_per_token']:,.0f} bytes a token, in {out} "
        f"({plan['disk_free_mib']:,.0f} MiB are free)",
        f"  memory           {sum(memory.values()):,.0f} MiB{beside}: "
        + ", ".join(f"{name} {size:,.0f}" for name, size in memory.items()),
        f"  time             {harvest_time(plan, config)}",
    ]
    return wrapped(lines, disk_shortage(plan) or shortage(plan))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the cache is complete and sound.

    2: what was asked for cannot work, or a cache is damaged. 128 + n: stopped by signal n.
    """
    folder: Path | None = None
    try:
        config, folder, plan_alone = parse(load_plugins(argv))
        if config is None:
            return _verify(folder)
        if not (folder / INDEX_NAME).exists() or plan_alone:
            try:
                plan = make_plan(config, folder)
            except NoOutline as error:  # which is no reason not to try
                print(f"disk and memory were not planned: {error}")
            else:
                if plan_alone:
                    print(render(plan, config, folder))
                    return 0
                reason = disk_shortage(plan) or shortage(plan)
                if reason is not None:
                    raise InputError(reason)
        with stoppable():
            index = harvest(config, folder, _show)
        print(describe(folder, index))
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:  # in the model's code, the data's or ours: the traceback helps
        traceback.print_exc()
        if folder is not None and (folder / HARVEST_NAME).exists():
            print(f"\nWhat was harvested stays: {resume_command(folder)} goes on", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as error:
        again = f"; {resume_command(folder)} goes on" if folder else ""
        print(f"{stopped(error)}{again}", file=sys.stderr)
        return 128 + signal_of(error)


def _show(progress: Progress) -> None:
    what = "was damaged, and is made anew" if progress.damaged else f"{progress.rows:,} tokens"
    print(f"{progress.section} shard {progress.number:,}: {what}", flush=True)


def describe(folder: Path, index: CacheIndex) -> str:
    """What a cache holds, as text."""
    names = ", ".join(f"{each.name} (d = {each.width:,})" for each in index.hookpoints)
    rows = index.train_rows + index.heldout_rows
    return (
        f"{folder}: {index.train_rows:,} tokens to train on, {index.heldout_rows:,} held out, in "
        f"{len(index.train) + len(index.heldout):,} shards of {index.dtype}, "
        f"{index.bytes / _MIB:,.0f} MiB ({index.bytes / rows:,.0f} bytes a token)\n"
        f"  {index.data.model}: {names}\n"
        f"Next: python -m kronsae.train --activations {folder}"
    )


def _verify(folder: Path) -> int:
    index = CacheIndex.open(folder)
    found = damaged(folder, index)
    for _, _, why in found:
        print(f"error: {why}", file=sys.stderr)
    if not found:
        print(f"{describe(folder, index)}\nAll files have the SHA-256 of the index.")
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
