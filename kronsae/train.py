"""`python -m kronsae.train`: train a sparse autoencoder on a language model's activations."""

import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kronsae.commandline import Terminated, load_plugins, signal_of, stoppable, stopped
from kronsae.config import RunConfig, SAEConfig, kind_of
from kronsae.data.activations import NO_OVERLAP
from kronsae.errors import InputError
from kronsae.explore.report import write_report
from kronsae.interop.load import load
from kronsae.metrics.figures import MEANING
from kronsae.metrics.heldout import Heldout, HeldoutText
from kronsae.model.ranks import check_heads, ranks_of_one
from kronsae.plan.memory import check_memory, make_plan
from kronsae.plan.outline import NoOutline, Outline, outline
from kronsae.plan.text import describe_ranks, render
from kronsae.plan.time import run_time
from kronsae.registry import SELECTIONS
from kronsae.runs.folder import RunFolder, SweepFolder
from kronsae.runs.sweep import comparison
from kronsae.sources import open_activations, source_of
from kronsae.system import parallel
from kronsae.system.devices import resolve_device
from kronsae.system.parallel import ALONE, Mesh, join
from kronsae.system.tables import aligned
from kronsae.training.fit import fit, fit_many
from kronsae.training.learner import why_not_fused
from kronsae.training.options import Request, parse
from kronsae.training.progress import ProgressBar
from kronsae.training.session import FitResult

__all__ = ["fit", "fit_many", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done.

    2: what was asked for cannot work. 3: a member of a sweep ended early, the others did not.
    4: another process of torchrun was lost. 128 + n: stopped by signal n, and saved.

    Under torchrun every process runs this, and the first one speaks for all.
    """
    quiet = not parallel.is_first()
    console = Console(stderr=False, highlight=False, soft_wrap=True, quiet=quiet)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        request = parse(load_plugins(argv))
        if request.plan:
            if quiet:  # one measures
                return 0
            plan, members, model = _plan(request)
            console.print(render(plan, members, run_time(plan, members, model)), markup=False)
            return 0
        mesh = _join(request)
        if request.memory_check:
            with mesh.world.together():
                if mesh.first:
                    _check_memory(request, console)
        return train(request, console, mesh)
    except InputError as error:
        if not quiet:  # all have the same
            errors.print(f"error: {error}", style="red", markup=False)
        return 2
    except parallel.RankLost as error:
        rank = os.environ.get("RANK", "0")
        errors.print(f"error: rank {rank}: {error}", style="red", markup=False)
        return 4
    except KeyboardInterrupt:  # before there is a run
        return 128 + signal.SIGINT


def _join(request: Request) -> Mesh:
    """The processes that train together. Raises InputError for what they cannot train."""
    config = request.config.train
    if parallel.ranks() > 1 and request.config.data.overlap == "on":
        raise InputError(f"overlap 'on': {NO_OVERLAP}")
    mesh = join(config.tensor_parallel, resolve_device(config.device), config.rank_timeout)
    parallel.owners(request.members, config.share, (mesh.data.size, mesh.heads.size))
    for member in request.members.values():
        check_heads(member.sae, mesh.heads.size)
    return mesh


def _check_memory(request: Request, console: Console) -> None:
    try:
        plan, _, _ = _plan(request)
    except NoOutline as error:  # which is no reason not to try
        console.print(f"memory was not planned: {error}", markup=False)
    else:
        check_memory(plan)


def _plan(request: Request) -> tuple[dict[str, Any], dict[str, RunConfig], Outline]:
    """The plan, and the members and the language model that it is of."""
    model = outline(request.config.data)
    members = request.at_width(model.d_model, model.d_target).members
    return make_plan(members, model), members, model


def train(request: Request, console: Console, mesh: Mesh = ALONE) -> int:
    """Model and text -> activations -> fit -> evaluation and report; returns the exit status."""
    out = request.resume or request.out or _new_folder(request)
    out = Path(mesh.world.exchange(str(out))[0])
    try:
        with stoppable():
            status = _train(request, console, mesh, out)
            if status != 0:  # torchrun ends all others where one has failed: the first may write
                mesh.world.exchange(None)
        parallel.leave()
        return status
    except (InputError, parallel.RankLost):
        raise
    except (KeyboardInterrupt, Terminated) as error:  # where `fit` does not wait for it
        if mesh.first:
            _say_how_to_go_on(out, f"{stopped(error)}.")
        return 128 + signal_of(error)
    except Exception:  # in the model's code, the data's or ours, for all of which it helps
        traceback.print_exc()
        _say_how_to_go_on(out, "When that is solved:")
        return 1


def _say_how_to_go_on(out: Path, words: str) -> None:
    if any((out / name).exists() for name in ("config.json", "sweep.json")):
        print(
            f"\n{words} Go on from the last checkpoint with:\n"
            f"  python -m kronsae.train --resume {out}",
            file=sys.stderr,
        )
    else:
        print(f"\n{words} Nothing was written yet; start again.", file=sys.stderr)


def _train(request: Request, console: Console, mesh: Mesh, out: Path) -> int:
    from kronsae.data import split_target

    began = time.monotonic()
    data, train_config = request.config.data, request.config.train
    with mesh.world.together():
        if request.resume is None and mesh.first:
            RunFolder.check_free(out)  # before the model is loaded; fit checks again
    what = escape(data.activations or f"{data.model} and {data.dataset}")
    console.print(f"[bold]kronsae[/bold]: loading {what}")
    if data.model_device is not None:
        resolve_device(data.model_device)
    source = open_activations(
        data,
        batch_size=train_config.batch_size,
        seed=train_config.stream_seed,
        device=resolve_device(train_config.device),
    )
    d_target = getattr(source, "d_target", 0)
    request = request.at_width(source.d_model, d_target)
    if hasattr(source, "check_budget"):
        source.check_budget(request.config.train.tokens)
    text = None
    if hasattr(source, "language_model"):
        source.language_model.ranks = mesh.reading
        read = source.language_model, source.heldout_contexts(), source.heldout_mask()
        text = HeldoutText(*read)
    heldout = Heldout(*split_target(source.heldout_activations(), d_target), text)
    _describe(console, request, source, heldout, out)
    names = list(request.members)
    folder = SweepFolder(out, names) if request.sweep else RunFolder(out)
    with ProgressBar(console, request) as progress:
        try:
            results = _fit(request, source, heldout, out, progress, mesh)
        except InputError:
            for run in folder.runs.values():
                if mesh.first and run.metrics.exists():
                    with suppress(InputError):  # the disk may be full: the first error counts
                        write_report(run.path)
            raise
    results = dict(zip(names, results, strict=True))
    stopped_by = next((r.stopped_by for r in results.values() if r.stopped_by), None)
    if stopped_by is not None:
        for run in folder.runs.values():
            if mesh.first:
                write_report(run.path)
        tokens = max(result.tokens for result in results.values())
        console.print(
            f"Stopped by {signal.Signals(stopped_by).name} after {tokens:,} of "
            f"{request.config.train.tokens:,} tokens; everything is saved. Go on with:\n"
            f"  python -m kronsae.train --resume {out}",
            markup=False,
        )
        return 128 + stopped_by
    device = resolve_device(train_config.device)
    _summarise(console, results, heldout, folder, time.monotonic() - began, mesh, device)
    return 3 if any(result.failed for result in results.values()) else 0


def _fit(
    request: Request,
    source: Any,
    heldout: Heldout,
    out: Path,
    progress: ProgressBar,
    mesh: Mesh,
) -> list[FitResult]:
    """The results of all members, in order."""
    configs = list(request.members.values())
    settings = [
        {"config": config.to_dict(), **request.notes.get(name, {})}
        for name, config in request.members.items()
    ]
    resume = request.resume is not None
    common = {"heldout": heldout, "out": out, "resume": resume, "mesh": mesh}
    if request.sweep:
        return fit_many(
            [config.sae for config in configs],
            source,
            [config.train for config in configs],
            names=list(request.members),
            settings=settings,
            on_record=progress,
            **common,
        )
    [config] = configs
    alone = fit(
        config.sae,
        source,
        config.train,
        settings=settings[0],
        on_record=lambda record: progress("", record),
        **common,
    )
    return [alone]


def _new_folder(request: Request) -> Path:
    """runs/MODEL-HOOK-ENCODER-F…-k…-TIME (of a sweep: MODEL-HOOK-sweep-TIME), not yet there."""
    data, sae = request.config.data, request.config.sae
    hook = data.hookpoint or f"layer{data.layer}"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    usual = (SAEConfig.selection, SAEConfig.objective)  # which a name need not say
    point = [sae.encoder, *(word for word in (sae.selection, sae.objective) if word not in usual)]
    point += [f"experts{sae.experts}"] if sae.experts else []
    point += [f"F{sae.dict_size}", *([f"k{sae.k}"] if sae.k else [])]
    what = "sweep" if request.sweep else "-".join(point)
    return Path("runs") / f"{Path(data.model).name}-{hook}-{what}-{stamp}"


def _describe(console: Console, request: Request, source: Any, heldout: Heldout, out: Path) -> None:
    config = request.config
    train = config.train
    rows = {
        "language model": source_of(config.data.activations).describe(source, config.data),
        "text": f"{config.data.dataset}; {heldout.activations.shape[0]:,} tokens held out",
        "training": f"{train.tokens:,} tokens, {train.steps:,} steps of {train.batch_size:,}"
        + describe_ranks(train),
        **{
            name if request.sweep else "autoencoder": _describe_member(member)
            for name, member in request.members.items()
        },
        "run folder": str(out),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/dim]", escape(value))
    console.print(table)


def _describe_member(config: RunConfig) -> str:
    sae, train = config.sae, config.train
    shape = kind_of(vars(sae))
    if sae.heads:
        shape += f", {sae.heads:,} heads x ({sae.m} base, {sae.n} extension)"
    if sae.experts:
        shape += f", {sae.experts} experts"
    active = SELECTIONS[sae.selection].describe(sae)
    ranks = ranks_of_one(train)
    reason = why_not_fused(sae, train, resolve_device(train.device), ranks)
    step = "fused step" if reason is None else f"autograd and AdamW (not fused: {reason})"
    return (
        f"{shape}: F = {sae.dict_size:,} latents, {active}; lr {train.lr:g}, "
        f"seed {train.seed}, {step}"
    )


_SHOWN = ("explained_variance", "l0", "dead_share", "ce_clean", "ce_spliced", "ce_recovered")


def _summarise(
    console: Console,
    results: dict[str, FitResult],
    heldout: Heldout,
    folder: RunFolder | SweepFolder,
    seconds: float,
    mesh: Mesh,
    device: torch.device,
) -> None:
    """Write the reports; print the evaluation, some latents, and where everything is."""
    from kronsae.properties.contexts import render as render_contexts
    from kronsae.properties.contexts import top_contexts

    model = heldout.text.model if heldout.text else None
    tokenizer = model.tokenizer if model else None
    if not all(result.sae for result in results.values()) and not mesh.first:
        return  # the first process reads what it lacks
    for name, result in results.items():
        sae = result.sae or load(folder.runs[name].sae, device=device)
        # Of a part of the heads on each process, which all take part.
        latents = [] if tokenizer is None else top_contexts(sae, heldout)
        if not mesh.first:
            continue
        write_report(folder.runs[name].path, contexts=latents, tokenizer=tokenizer)
    if not mesh.first:
        return
    tokens = max(result.tokens for result in results.values())
    done = f"\nTrained on {tokens:,} tokens in {seconds:,.0f} s. Everything is in {folder.path}:\n"
    console.print("\n[bold]On held-out text[/bold]")
    # The model of a cache may be out of reach.
    missing = getattr(model, "missing", None)
    if missing is not None:
        console.print(f"Without cross-entropy, as the model is not here: {missing}", markup=False)
    if tokenizer is None:
        console.print("Without the contexts of latents, as the model's tokenizer is not here")
    if isinstance(folder, SweepFolder):
        console.print(aligned(*comparison(folder.members()), left=2), markup=False)
        for name, result in results.items():
            if result.failed:
                console.print(f"{name} ended early: {result.failed}", style="red", markup=False)
        console.print(
            f"{done}"
            f"  NAME/          the run of each: config.json, metrics.jsonl, report.html, sae/\n"
            f"  comparison.md  this table\n"
            f"  sweep.json     every setting and figure\n"
            f"Next: kronsae.load({str(folder.path / next(iter(results)))!r}), or --config "
            f"{folder.path}/NAME/config.json to train one of them alone.",
            markup=False,
        )
        return
    [result] = results.values()
    table = Table.grid(padding=(0, 2))
    for name in _SHOWN:
        if name in result.metrics:
            label, meaning = MEANING[name]
            table.add_row(label, f"{result.metrics[name]:.4f}", f"[dim]{meaning}[/dim]")
    console.print(table)
    if latents:
        console.print("\n[bold]What some latents have learned[/bold] (where they fire most)")
    for block in render_contexts(latents, tokenizer, console):
        console.print(block)
    console.print(
        f"{done}"
        f"  report.html    this run to look at\n"
        f"  sae/           the autoencoder:  kronsae.load({str(folder.path)!r})\n"
        f"  metrics.jsonl  every logged step\n"
        f"  config.json    every setting; --config {folder.config} repeats the run\n"
        f"Next: python -m kronsae.explore {folder.path} to look into its latents, or a --model, "
        f"--layer and --dataset of your own (python -m kronsae.train --help).",
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
