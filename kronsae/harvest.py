"""`kronsae harvest`: write a language model's activations to a cache.

`kronsae train --activations DIR` trains from it. `kronsae.cache` is the cache's Python interface.
"""

import argparse
import dataclasses
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from kronsae.cache import CacheIndex, HarvestConfig, harvest
from kronsae.cache.index import (
    DESCRIBED,
    HARVEST_NAME,
    INDEX_NAME,
    damaged,
    resume_command,
    so_far,
)
from kronsae.cache.writer import Progress, goes_on, stored_config
from kronsae.commandline import (
    Parser,
    Terminated,
    add_flag,
    as_command,
    load_plugins,
    of_machine,
    signal_of,
    stoppable,
    stopped,
)
from kronsae.config import OF_MACHINE, DataConfig, flag, stored
from kronsae.errors import InputError
from kronsae.plan.harvest import make_plan, render, why_early, why_refused
from kronsae.plan.outline import NoOutline
from kronsae.registry import command_line
from kronsae.system import parallel
from kronsae.system.devices import resolve_device, seed_everything
from kronsae.system.documents import part_of
from kronsae.system.files import read_checksummed
from kronsae.system.parallel import Mesh
from kronsae.system.progress import Pace
from kronsae.system.tables import wrapping_console
from kronsae.training.hookpoints import matches, numbers

__all__ = ["HarvestConfig", "harvest", "main", "make_plan"]


def make_parser() -> Parser:
    parser = Parser(
        "harvest",
        "Write activations of a language model to a folder, to train on many times. The same "
        "command resumes an interrupted harvest, repairs damaged shards of a complete one, and, "
        "with more --tokens, makes it longer. Processes that torchrun starts share the work.",
        "kronsae harvest --model EleutherAI/pythia-160m --layer 6 --tokens 50M \\\n"
        "    --dataset text.jsonl --out pythia-layer6\n"
        "kronsae train --activations pythia-layer6\n"
        "torchrun --nproc-per-node 8 -m kronsae.harvest --resume pythia-layer6 \\\n"
        "    --tokens 1B",
        usage="%(prog)s --out DIR [--model NAME --layer N ... --dataset NAME ...]",
        argument_default=argparse.SUPPRESS,
    )
    run = parser.add_argument_group("folder")
    run.add_argument("--out", type=Path, metavar="DIR", help="the cache to write")
    run.add_argument("--resume", type=Path, metavar="DIR", help="resume the harvest in DIR")
    run.add_argument(
        "--verify", type=Path, metavar="DIR", help="read a cache and check all of its files"
    )
    run.add_argument("--plan", action="store_true", help="show what would run, and stop")
    group = parser.add_argument_group("what to harvest")
    for spec in dataclasses.fields(HarvestConfig):
        if spec.name in _LISTS:
            add_flag(group, spec, name=_LISTS[spec.name])
        elif spec.name != "data":
            add_flag(group, spec)
    group = parser.add_argument_group("language model and text")
    for spec in dataclasses.fields(DataConfig):
        if spec.name in (*DESCRIBED, *OF_MACHINE):
            add_flag(group, spec)
    return parser


_LISTS = {"layers": "layer", "hookpoints": "hookpoint"}

_WITH_RESUME = ("device", "tokens", *OF_MACHINE)
"""Settings that the folder does not store, or that may grow."""


def parse(argv: list[str]) -> tuple[HarvestConfig | None, Path, bool]:
    """Settings (None: to verify), folder, and whether only to plan. Raises InputError."""
    flags = vars(make_parser().parse(argv))
    folders = {name: flags.pop(name) for name in ("out", "resume", "verify") if name in flags}
    if len(folders) != 1:
        raise InputError(
            f"expected one of --out DIR, --resume DIR, --verify DIR, got {list(folders) or 'none'}"
        )
    [(action, folder)] = folders.items()
    plan = flags.pop("plan", False)
    if action != "out":
        allowed = _WITH_RESUME if action == "resume" else ()
        for name in flags:
            if name not in allowed:
                refused = flag(_LISTS.get(name, name))
                raise InputError(f"--{action} takes everything from the folder: no {refused}")
    if action == "verify":
        if plan:
            raise InputError("--plan has no effect with --verify: leave it out")
        return None, folder, False
    if action == "resume":
        own = {name: flags.pop(name) for name in OF_MACHINE if name in flags}
        config = stored_config(folder)
        data = dataclasses.replace(config.data, **own)
        return dataclasses.replace(config, data=data, **flags), folder, plan
    own = {name: flags.pop(name) for name in list(flags) if name in _OWN}
    data = DataConfig(**{**_of_earlier_version(folder), **flags})
    for name, expand in (("layers", numbers), ("hookpoints", matches)):
        if name in own:
            own[name] = tuple(expand(own[name], data))
    if data.model == "embedded":
        for name in ("revision", "trust_remote_code"):
            if flags.get(name):
                raise InputError(f"{flag(name)} has no effect with model 'embedded': leave it out")
    return HarvestConfig(data=data, **own), folder, plan


def _of_earlier_version(folder: Path) -> dict[str, Any]:
    """What a harvest that an earlier version began goes by, for settings that came later."""
    try:
        known = part_of(read_checksummed(folder / HARVEST_NAME), "config", "data")
    except (OSError, ValueError):  # there is none, or `harvest` says why
        known = {}
    later = stored(DataConfig, {}) if known else {}
    return {name: value for name, value in later.items() if name not in known}


_OWN = {spec.name for spec in dataclasses.fields(HarvestConfig)} - {"data"}


RANK_SECONDS = 3600
"""Time that a process waits for another one: for its language model to load, or for a shard."""


@as_command()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only if the cache is complete and valid.

    2: the request cannot work, or a cache is damaged. 4: another process of torchrun was lost.
    128 + n: stopped by signal n.

    Under torchrun every process runs this, and the first one prints for all.
    """
    folder: Path | None = None
    first = parallel.is_first()
    try:
        config, folder, plan_alone = parse(load_plugins(argv))
        if config is None or plan_alone:
            return _look(config, folder) if first else 0
        mesh = _join(config)
        with mesh.world.together():
            if first and not _is_complete(folder, config):
                _check_plan(config, folder)
        with stoppable():
            _harvest(config, folder, mesh)
        parallel.leave()
        return 0
    except InputError as error:
        if first:  # all processes have the same error
            print(f"error: {error}", file=sys.stderr)
        return 2
    except parallel.RankLost as error:
        hint = f"resume by {resume_command(folder)}" if folder else ""
        rank, cause = os.environ.get("RANK", "0"), error.__cause__
        print(f"error: rank {rank}: another process was lost ({cause}); {hint}", file=sys.stderr)
        return 4
    except Exception as error:  # a bug in the model, the data or kronsae: the traceback helps
        reason = of_machine(error)
        print(f"error: {reason}", file=sys.stderr) if reason else traceback.print_exc()
        if folder is not None and (folder / HARVEST_NAME).exists():
            print(
                f"\nFinished shards are kept: resume by {resume_command(folder)}", file=sys.stderr
            )
        return 2 if reason else 1
    except (KeyboardInterrupt, Terminated) as error:
        hint = f"; resume by {resume_command(folder)}" if folder else ""
        if first:
            print(f"{stopped(error)}{hint}", file=sys.stderr)
        return 128 + signal_of(error)


def _join(config: HarvestConfig) -> Mesh:
    """The processes that harvest together."""
    try:
        device = resolve_device(config.device)
    except InputError as error:
        if not parallel.is_first():  # this process alone may lack it
            print(f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        raise
    return parallel.join(1, device, RANK_SECONDS)


def _look(config: HarvestConfig | None, folder: Path) -> int:
    """Show the plan of a harvest, or (without settings) verify a cache; the exit status."""
    if config is None:
        return _verify(folder)
    print(render(make_plan(config, folder), config, folder))
    return 0


def _check_plan(config: HarvestConfig, folder: Path) -> None:
    """Raise InputError if there is not enough memory or disk space; say if the text is short."""
    try:
        plan = make_plan(config, folder)
    except NoOutline as error:  # the harvest may still work
        print(f"disk and memory were not planned: {error}")
        return
    if (reason := why_refused(plan)) is not None:
        raise InputError(reason)
    if (early := why_early(plan, config)) is not None:
        print(f"It will end early: {early}", flush=True)


def _harvest(config: HarvestConfig, folder: Path, mesh: Mesh) -> None:
    """Harvest, and show its progress and what came of it."""
    console = wrapping_console(quiet=not mesh.first)
    seed_everything(config.seed)
    with Shown(console) as shown:
        index = harvest(config, folder, shown, mesh)
    console.print(describe(folder, index), markup=False)


def _is_complete(folder: Path, config: HarvestConfig) -> bool:
    """Whether the folder has all shards that are configured."""
    if not (folder / INDEX_NAME).exists():
        return False
    return not (folder / HARVEST_NAME).exists() or not goes_on(stored_config(folder), config)


SECONDS_BETWEEN_LINES = 600
"""Longest time without a line, where there is no terminal."""


class Shown:
    """Progress of a harvest: a bar on a terminal, elsewhere a line at each tenth."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace = Pace("tokens", rated=True)
        self.printed = (-1, 0.0)
        """Tenths of the harvest, and the time, of the last line."""
        self.bar = Bar(
            TextColumn("harvest"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("harvest", total=None, figures="")

    def __enter__(self) -> "Shown":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.repaired is not None:
            self.console.print(f"{progress.repaired} was damaged, is repaired")
            return
        now, rows, planned = time.monotonic(), progress.rows, progress.planned
        figures = self.pace.words(rows, planned, now)
        self.bar.update(self.task, completed=rows, total=planned, figures=figures)
        tenth, (printed, at) = 10 * rows // planned if planned else 0, self.printed
        late = now - at >= SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and (tenth != printed or late):
            self.printed = tenth, now
            self.console.print(figures)


def describe(folder: Path, index: CacheIndex) -> str:
    """The contents of a cache as text."""
    names = ", ".join(f"{point.name} (d = {point.width:,})" for point in index.hookpoints)
    rows = index.train_rows + index.heldout_rows
    layers = sum(point.layer is not None for point in index.hookpoints)
    at = ["--layer", "all"] if layers > 1 else []
    return (
        f"{folder}: {index.train_rows:,} tokens to train on{so_far(index)}, "
        f"{index.heldout_rows:,} held out, in "
        f"{len(index.train) + len(index.heldout):,} shards of {index.dtype}, "
        f"{index.bytes / 2**20:,.0f} MiB ({index.bytes / rows:,.0f} bytes a token)\n"
        f"  {index.data.model}: {names}\n"
        f"Next: {command_line('train', '--activations', str(folder), *at)}"
    )


def _verify(folder: Path) -> int:
    index = CacheIndex.open(folder)
    problems = [reason for _, _, reason in damaged(folder, index)]
    if not problems:
        print(f"{describe(folder, index)}\nAll files have the SHA-256 of the index.")
    if index.planned is not None:
        problems.append(f"the harvest is incomplete; resume it: {resume_command(folder)}")
    for reason in problems:
        print(f"error: {reason}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
