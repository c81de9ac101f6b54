"""`kronsae train`: train a sparse autoencoder on a language model's activations."""

import os
import shlex
import signal
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kronsae.commandline import (
    Terminated,
    as_command,
    load_plugins,
    of_machine,
    signal_of,
    status_of,
    stoppable,
    stopped,
)
from kronsae.config import DataConfig, RunConfig, SAEConfig, kind_of
from kronsae.data.activations import (
    NO_OVERLAP,
    HookpointActivations,
    LanguageModelActivations,
    split_target,
)
from kronsae.data.amount import count_tokens, in_words, name_of_text, too_few
from kronsae.data.packing import contexts_in_words
from kronsae.embedded import EMBEDDED_MODEL
from kronsae.errors import InputError
from kronsae.explore.report import elapsed, write_report
from kronsae.explore.sweep_report import write_sweep_report
from kronsae.metrics.figures import MEANING
from kronsae.metrics.heldout import Heldout, HeldoutText, massive_warning
from kronsae.model.massive import MassiveTokens, rule_of
from kronsae.model.normalizer import SAMPLE_TOKENS
from kronsae.model.ranks import check_heads, ranks_of_one
from kronsae.model.sae import load_metadata
from kronsae.plan.amount import available_tokens
from kronsae.plan.memory import check_memory, make_plan
from kronsae.plan.outline import NoOutline, Outline, outline
from kronsae.plan.text import describe_ranks, names_in_words, render
from kronsae.plan.time import run_time
from kronsae.properties.contexts import LatentContexts, as_contexts, top_contexts
from kronsae.properties.contexts import render as render_contexts
from kronsae.registry import SELECTIONS, command_line
from kronsae.runs.folder import RunFolder, SweepFolder, output_folder
from kronsae.runs.sweep import comparison
from kronsae.sources import open_hookpoints, source_of
from kronsae.system import parallel
from kronsae.system.checkpoint import list_checkpoints, step_of
from kronsae.system.devices import resolve_device, seed_everything
from kronsae.system.files import NOT_FINITE, check_writable
from kronsae.system.parallel import ALONE, Mesh, join
from kronsae.system.tables import fitted, wrapping_console
from kronsae.training.fit import fit, fit_many, fit_members
from kronsae.training.learner import why_not_fused
from kronsae.training.options import Request, parse
from kronsae.training.progress import ProgressBar
from kronsae.training.session import Diverged, FitResult, MemberPlan

__all__ = ["fit", "fit_many", "main"]


@as_command()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done.

    1: training diverged, or the model's code, the data's or ours has a fault. 2: the command, its
    data, the disk or the memory cannot be used. 3: a member of a sweep diverged, the others did
    not. 4: another process of torchrun was lost. 128 + n: stopped by signal n, and saved.

    Under torchrun every process runs this, and the first one prints for all.
    """
    quiet = not parallel.is_first()
    console = wrapping_console(quiet=quiet)
    try:
        request = parse(load_plugins(argv))
        if request.plan:
            if quiet:  # the first process measures
                return 0
            plan, members, data, model = _plan(request)
            available = available_tokens(data, model.context_length, model.vocabulary)
            takes = run_time(plan, members, data, model, available)
            text = render(plan, members, takes, available, request.starts_from)
            console.print(text, markup=False)
            return 0
        mesh = _join(request)
        if request.memory_check:
            with mesh.world.together():
                if mesh.first:
                    _check_memory(request, console)
        return train(request, console, mesh)
    except parallel.RankLost as error:
        print(f"error: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        return 4
    except Exception as error:
        status = 1 if isinstance(error, Diverged) else 2
        if quiet and isinstance(error, InputError):  # all processes have the same error
            return status
        return min(status, status_of(error))
    except KeyboardInterrupt:  # before there is a run
        return 128 + signal.SIGINT


def _join(request: Request) -> Mesh:
    """The processes that train together. Raises InputError for what they cannot train."""
    config = request.config.train
    if parallel.ranks() > 1 and request.config.data.overlap == "on":
        raise InputError(f"overlap 'on': {NO_OVERLAP}")
    for member in request.members.values():
        check_heads(member.sae, config.tensor_parallel)
    mesh = join(config.tensor_parallel, resolve_device(config.device), config.rank_timeout)
    request.owners(mesh)
    return mesh


def _check_memory(request: Request, console: Console) -> None:
    try:
        plan, *_ = _plan(request)
    except NoOutline as error:  # the run may fit all the same
        console.print(f"memory was not planned: {error}", markup=False)
    else:
        check_memory(plan)


def _plan(
    request: Request,
) -> tuple[dict[str, Any], dict[str, RunConfig], DataConfig, Outline]:
    """The plan, the members, the last hookpoint, and the language model's outline up to it."""
    outlines = {name: outline(data) for name, data in request.data.items()}
    widths = {name: (each.d_model, each.d_target) for name, each in outlines.items()}
    members = request.at_widths(widths).members
    last = max(outlines, key=lambda name: outlines[name].flops_per_token)
    saes = {id(sae): sae for sae in request.starts.values()}.values()
    starts = sum(weight.nbytes for sae in saes for weight in sae.state_dict().values())
    return make_plan(members, outlines[last], starts), members, request.data[last], outlines[last]


def train(request: Request, console: Console, mesh: Mesh = ALONE) -> int:
    """Train, evaluate and report; returns the exit status."""
    given = request.resume or request.out
    is_known = given is not None or not mesh.first  # the first process makes one for all
    with nullcontext(given) if is_known else output_folder(None, _name(request)) as out:
        return _train_in(Path(mesh.world.exchange(str(out))[0]), request, console, mesh)


def _train_in(out: Path, request: Request, console: Console, mesh: Mesh) -> int:
    try:
        with stoppable():
            status = _train(request, console, mesh, out)
            if status != 0:  # torchrun ends all processes when one fails: the first may still write
                mesh.world.exchange(None)
        parallel.leave()
        return status
    except (InputError, parallel.RankLost):
        raise
    except (KeyboardInterrupt, Terminated) as error:  # outside of the training loop
        if mesh.first:
            _say_how_to_go_on(out, f"{stopped(error)}.")
        return 128 + signal_of(error)
    except Exception as error:  # in the model's code, the data's or ours
        reason = of_machine(error)
        print(f"error: {reason}", file=sys.stderr) if reason else traceback.print_exc()
        _say_how_to_go_on(out, "When that is solved:")
        return 2 if reason else 1


def _resume_command(out: Path) -> str:
    return command_line("train", "--resume", str(out))


def _say_how_to_go_on(out: Path, cause: str) -> None:
    if any((out / name).exists() for name in ("config.json", "sweep.json")):
        print(
            f"\n{cause} Go on from the last checkpoint with:\n  {_resume_command(out)}",
            file=sys.stderr,
        )
    else:
        print(f"\n{cause} Nothing was written yet: start again.", file=sys.stderr)


def _train(request: Request, console: Console, mesh: Mesh, out: Path) -> int:
    began = time.monotonic()
    seed_everything(request.config.train.stream_seed)
    with mesh.world.together():
        if mesh.first:  # before the model is loaded; fit checks again
            check_writable(out) if request.resume else RunFolder.check_free(out)
    request, sources, heldout = _open(request, console, mesh)
    _describe(console, request, sources, heldout, out)
    folder = SweepFolder(out, request.members) if request.sweep else RunFolder(out)
    for run in folder.runs.values():
        if failed := _failed_before(run):
            name = f"{run.path.name}: " if request.sweep else ""
            console.print(f"Before it is resumed: {name}{failed}", style="yellow", markup=False)
    plans = [
        MemberPlan(
            *(name, config.sae, config.train),
            {"config": config.to_dict(), **request.notes.get(name, {})},
            request.hookpoints[name],
            request.starts.get(name),
        )
        for name, config in request.members.items()
    ]
    resume = request.resume is not None
    with ProgressBar(console, request) as progress:
        try:
            fitted = fit_members(
                *(plans, sources, heldout, out, resume, progress, mesh, request.sweep),
                on_judged=progress.judged,
            )
        except InputError:
            for run in folder.runs.values():
                if mesh.first and run.metrics.exists():
                    with suppress(InputError):  # the disk may be full: the first error counts
                        write_report(run.path)
            raise
    results = dict(zip(request.members, fitted, strict=True))
    tokens = max(result.tokens for result in fitted)
    stopped_by = next((result.stopped_by for result in fitted if result.stopped_by), None)
    if stopped_by is not None:
        for run in folder.runs.values():
            if mesh.first:
                write_report(run.path)
        console.print(
            f"Stopped by {signal.Signals(stopped_by).name} after {tokens:,} of "
            f"{request.config.train.tokens:,} tokens; everything is saved. Go on with:\n"
            f"  {_resume_command(out)}",
            markup=False,
        )
        return 128 + stopped_by
    latents = _report(results, request, heldout, folder, mesh)
    took = elapsed(time.monotonic() - began)
    took = f" in {took}" if not resume else f" ({took} since it was resumed)"
    done = f"\nTrained on {tokens:,} tokens{took}. Everything is in {folder.path}:\n"
    if mesh.first:
        _summarise(console, results, request, heldout, folder, latents, done)
    reasons = [result.failed for result in fitted if result.failed]
    if reasons and not request.sweep and mesh.first:
        print(f"error: {reasons[0]}", file=sys.stderr)
    return 0 if not reasons else 1 if len(reasons) == len(fitted) else 3


def _open(
    request: Request, console: Console, mesh: Mesh
) -> tuple[Request, dict[str, Any], dict[str, Heldout]]:
    """The request with the widths of the activations, and by hookpoint their sources, and held-out
    ones of those that this process trains on."""
    data, train_config = request.config.data, request.config.train
    names = escape(data.activations or f"{data.model} and {data.dataset}")
    console.print(f"[bold]kronsae[/bold]: loading {names}")
    if data.model_device is not None:
        resolve_device(data.model_device)
    receivers = request.receivers(mesh)
    sources = open_hookpoints(
        request.data,
        batch_size=train_config.batch_size,
        seed=train_config.stream_seed,
        device=resolve_device(train_config.device),
        mesh=mesh,
        receivers=receivers,
    )
    widths = {name: (x.d_model, getattr(x, "d_target", 0)) for name, x in sources.items()}
    request = request.at_widths(widths)
    heldout = {}
    for name, source in sources.items():
        if hasattr(source, "check_budget"):
            source.check_budget(request.config.train.tokens)
        if receivers is not None and mesh.world.rank not in receivers[name]:
            continue
        text = None
        if hasattr(source, "language_model"):
            read = source.language_model, source.heldout_contexts(), source.heldout_mask()
            text = HeldoutText(*read)
        rows = split_target(source.heldout_activations(), widths[name][1])
        heldout[name] = Heldout(*rows, text)
    return request, sources, heldout


def _name(request: Request) -> str:
    """What a new run folder is named after: MODEL-HOOK-ENCODER-F…-k….

    Of a sweep it is MODEL-HOOK-sweep, of one at several hookpoints MODEL-suite.
    """
    data, sae = request.config.data, request.config.sae
    hook = (data.hookpoint or f"layer{data.layer}").replace(":", "-")
    usual = (SAEConfig.selection, SAEConfig.objective)
    words = [sae.encoder, *(name for name in (sae.selection, sae.objective) if name not in usual)]
    words += [f"experts{sae.experts}"] if sae.experts else []
    words += [f"F{sae.dict_size}", *([f"k{sae.k}"] if sae.k else [])]
    kind = f"{hook}-sweep" if request.sweep else "-".join([hook, *words])
    kind = "suite" if len(request.data) > 1 else kind
    return f"{Path(data.model).name}-{kind}"


def _describe(
    console: Console,
    request: Request,
    sources: dict[str, Any],
    heldout: dict[str, Heldout],
    out: Path,
) -> None:
    config = request.config
    train = config.train
    source, *others = sources.values()
    held_out = len(next(iter(heldout.values())).activations)
    model = source_of(config.data.activations).describe(source, config.data)
    if others:
        names = ", ".join(other.language_model.hookpoint for other in others)
        model += f"; at {len(others)} more: {names}"
    available, described = _available(source), source.describe()
    length, documents = described.get("context_length"), getattr(source, "heldout_documents", None)
    rows = {
        "model" if config.data.image_column else "language model": model,
        "images"
        if config.data.image_column
        else "text": f"{name_of_text(config.data)}; {held_out:,} tokens "
        + (f"of {documents:,} documents " if documents else "")
        + f"held out{in_words(available, config.data.epochs)}",
        "read in": _read_in(config.data, length, described.get("context_begin")),
        "training": f"{train.tokens:,} tokens, {train.steps:,} steps of {train.batch_size:,}"
        + describe_ranks(train),
        **_describe_members(request),
        "starts from": request.starts_from,
        "run folder": str(out) + _done_before(out),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        if value:
            table.add_row(f"[dim]{name}[/dim]", escape(value))
    console.print(table)
    if (early := too_few(train.tokens, available, config.data.epochs)) is not None:
        console.print(f"It will end early: {early}", style="yellow", markup=False)


def _read_in(data: DataConfig, length: int | None, begin: list[str] | None) -> str:
    """What the model reads at once, in words; "" if that is not known."""
    if length is None:
        return ""
    if data.image_column is not None:
        return f"images of {length:,} positions, of which the patches are trained on"
    return contexts_in_words(length, begin)


def _available(source: Any) -> int | None:
    """About how many tokens of text there are to train on; None if it is not known."""
    if not isinstance(source, LanguageModelActivations | HookpointActivations):
        return None
    tokenizer, length = source.language_model.tokenizer, source.config.context_length
    return count_tokens(source.config, tokenizer, length, source.text)


def _done_before(out: Path) -> str:
    """How far a run that is resumed came before, in words; "" for a new one."""
    checkpoints = list_checkpoints(out / "checkpoints")
    return f", goes on after step {step_of(checkpoints[-1]):,}" if checkpoints else ""


def _failed_before(run: RunFolder) -> str | None:
    """How training diverged in a run that is resumed; None if it did not."""
    with suppress(OSError, ValueError):  # there is no SAE, or a damaged one, to be written again
        return load_metadata(run.sae).get("failed")
    return None


def _describe_members(request: Request) -> dict[str, str]:
    """A line about each member; one about those that differ in their hookpoint alone."""
    alike: dict[str, list[str]] = {}
    for name, member in request.members.items():
        alike.setdefault(_describe_member(member), []).append(name)
    return {
        names_in_words(names) if request.sweep else "autoencoder": text
        for text, names in alike.items()
    }


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


_SHOWN = (
    "explained_variance",
    "explained_variance_all",
    "l0",
    "dead_share",
    "dead_share_10k",
    "ce_clean",
    "ce_spliced",
    "ce_recovered",
)


def _report(
    results: dict[str, FitResult],
    request: Request,
    heldout: dict[str, Heldout],
    folder: RunFolder | SweepFolder,
    mesh: Mesh,
) -> list[LatentContexts]:
    """Write the reports; returns some latents of the last SAE with the contexts they fire in."""
    contexts: dict[str, list[LatentContexts]] = {}
    for name, result in results.items():
        if result.sae is None or result.failed:  # it is another process's, or not worth a look
            continue
        judged_on = heldout[request.hookpoints[name]].leaving_out(rule_of(result.sae.metadata))
        if judged_on.text is not None and judged_on.text.model.tokenizer is not None:
            # Each process may have a part of the heads, so that all take part.
            contexts[name] = top_contexts(result.sae, judged_on)
    for of_rank in mesh.world.exchange(contexts):
        contexts |= {name: list(map(as_contexts, latents)) for name, latents in of_rank.items()}
    if mesh.first:
        text = next(iter(heldout.values())).text
        for name, result in results.items():
            if not result.failed or folder.runs[name].sae.exists():  # else nothing was finite
                latents = contexts.get(name, [])
                tokenizer = text and text.model.tokenizer
                write_report(folder.runs[name].path, contexts=latents, tokenizer=tokenizer)
        if isinstance(folder, SweepFolder):
            write_sweep_report(folder)
    return next((contexts[name] for name in reversed(results) if name in contexts), [])


def _summarise(
    console: Console,
    results: dict[str, FitResult],
    request: Request,
    heldout: dict[str, Heldout],
    folder: RunFolder | SweepFolder,
    latents: list[LatentContexts],
    done: str,
) -> None:
    """Print the evaluation, some latents, and where everything is."""
    heldout_text = next(iter(heldout.values())).text
    model = heldout_text.model if heldout_text else None
    _warn_of_massive_tokens(console, results, request, heldout)
    tokens = next((r.metrics["heldout_tokens"] for r in results.values() if r.metrics), None)
    if tokens is not None:
        console.print(f"\n[bold]On held-out text[/bold] ({tokens:,} tokens)")
    evaluations = [result.metrics for result in results.values() if result.metrics]
    if model is not None and evaluations and not any("ce_clean" in e for e in evaluations):
        # The model of a cache may be out of reach, too.
        console.print(f"Without cross-entropy: {model.no_cross_entropy}", markup=False)
    if request.config.data.image_column is not None:
        console.print("Without the images on which latents fire: they are not shown")
    elif model is None or model.tokenizer is None:
        console.print("Without the contexts of latents, as the model's tokenizer is not here")
    if isinstance(folder, SweepFolder):
        _summarise_sweep(console, results, folder, done)
        return
    [result] = results.values()
    table = Table.grid(padding=(0, 2))
    for name in _SHOWN:
        if name in result.metrics:
            label, meaning = MEANING[name]
            value = result.metrics[name]
            text = "–" if value is None else f"{value:.4f}"
            table.add_row(label, text, f"[dim]{meaning}[/dim]")
    console.print(table)
    if NOT_FINITE in result.metrics:
        console.print(f"Not finite: {result.metrics[NOT_FINITE]}", style="yellow", markup=False)
    if latents and model is not None:
        console.print("\n[bold]What some latents have learned[/bold] (where they fire most)")
        for block in render_contexts(latents, model.tokenizer, console):
            console.print(block)
    data, following = request.config.data, []
    if model is not None and data.image_column is None:
        following += [f"{command_line('explore', str(folder.path))}  to look into its latents"]
    if data.model == EMBEDDED_MODEL and data.activations is None:
        following += ["kronsae train --help  for a --model, --layer and --dataset of your own"]
    lines = [
        "  report.html    this run to look at",
        f"  sae/           the autoencoder:  kronsae.load({str(folder.path)!r})",
        "  metrics.jsonl  every logged step",
        "  config.json    every setting, to repeat the run by --config",
        *(["Next:"] if following else []),
        *(f"  {line}" for line in following),
    ]
    console.print(done + "\n".join(lines), markup=False)


def _warn_of_massive_tokens(
    console: Console,
    results: dict[str, FitResult],
    request: Request,
    heldout: dict[str, Heldout],
) -> None:
    """Say where massive tokens hold much of the variance, once for each hookpoint."""
    judged = {
        request.hookpoints[name]: result
        for name, result in results.items()
        if result.sae and result.metrics
    }
    for hookpoint, result in judged.items():
        assert result.sae is not None
        text = heldout[hookpoint]
        rule, counted = rule_of(result.sae.metadata), None
        if rule is None:
            first = text.first(SAMPLE_TOKENS)
            counted = MassiveTokens.of(first.activations, first.targets)
        warning = massive_warning(result.metrics, text.leaving_out(rule, counted))
        if warning is not None:
            where = f"{hookpoint}: " if hookpoint else ""
            console.print(f"\nwarning: {where}{warning}", style="yellow", markup=False)


def _summarise_sweep(
    console: Console, results: dict[str, FitResult], folder: SweepFolder, done: str
) -> None:
    console.print(fitted(*comparison(folder.members()), console.width, left=2), markup=False)
    for name, result in results.items():
        if result.failed:
            console.print(f"{name}: {result.failed}", style="red", markup=False)
    example = next((name for name, result in results.items() if not result.failed), "NAME")
    console.print(
        f"{done}"
        f"  NAME/          the run of each: config.json, metrics.jsonl, report.html, sae/\n"
        f"  report.html    all of them to look at\n"
        f"  comparison.md  this table\n"
        f"  sweep.json     every setting and figure\n"
        f"Next: kronsae.load({str(folder.path / example)!r}), or --config "
        f"{shlex.quote(str(folder.path))}/NAME/config.json to train one of them alone.",
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
