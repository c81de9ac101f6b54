"""`python -m kronsae.train`: train a sparse autoencoder on a language model's activations."""

import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from kronsae.cli import Request, parse
from kronsae.config import RunConfig, kind_of
from kronsae.errors import InputError
from kronsae.evaluate import Heldout
from kronsae.fit import FitResult, fit, resolve_device
from kronsae.metrics import MEANING
from kronsae.plan import make_plan, render
from kronsae.report import write_report
from kronsae.run import RunFolder

__all__ = ["fit", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done.

    2: what was asked for cannot work. 128 + n: stopped by signal n, and saved.
    """
    console = Console(stderr=False, highlight=False, soft_wrap=True)
    try:
        request = parse(argv)
        if request.plan:
            console.print(render(make_plan(request.config), request.config), markup=False)
            return 0
        return train(request, console)
    except InputError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"error: {error}", style="red", markup=False
        )
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def train(request: Request, console: Console) -> int:
    """Model and text -> activations -> fit -> evaluation and report; returns the exit status."""
    from kronsae.data import open_activations, split_target

    began = time.monotonic()
    config = request.config
    out = request.resume or request.out or _new_folder(config)
    if request.resume is None:
        RunFolder.check_free(out)  # before the model is loaded; fit checks again
    what = escape(f"{config.data.model} and {config.data.dataset}")
    console.print(f"[bold]kronsae[/bold]: loading {what}")
    source = open_activations(
        config.data,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        device=resolve_device(config.train.device),
    )
    widths = {
        "d_model": config.sae.d_model or source.d_model,
        "d_target": config.sae.d_target or source.d_target,
    }
    config = dataclasses.replace(config, sae=dataclasses.replace(config.sae, **widths))
    activations, targets = split_target(source.heldout_activations(), source.d_target)
    heldout = Heldout(
        activations,
        source.heldout_contexts(),
        source.token_mask(source.heldout_contexts()),
        source.language_model,
        targets,
    )
    _describe(console, config, source, heldout, out)
    with _Progress(console, config) as progress:
        try:
            result = fit(
                config.sae,
                source,
                config.train,
                heldout=heldout,
                out=out,
                resume=request.resume is not None,
                settings={"config": config.to_dict()},
                on_record=progress,
            )
        except InputError:
            if (out / "metrics.jsonl").exists():
                write_report(out)
            raise
    if result.stopped_by is not None:
        write_report(out)
        name = signal.Signals(result.stopped_by).name
        console.print(
            f"Stopped by {name} after {result.tokens:,} of {config.train.tokens:,} tokens; "
            f"everything is saved. Go on with:\n  python -m kronsae.train --resume {out}",
            markup=False,
        )
        return 128 + result.stopped_by
    _summarise(console, config, result, heldout, RunFolder(out), time.monotonic() - began)
    return 0


def _new_folder(config: RunConfig) -> Path:
    """runs/MODEL-HOOK-ENCODER-F…-k…-TIME, not yet there."""
    data, sae = config.data, config.sae
    hook = data.hookpoint or f"layer{data.layer}"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    usual = ("topk", "plain")  # what a name need not say
    point = [sae.encoder, *(word for word in (sae.selection, sae.objective) if word not in usual)]
    point += [f"experts{sae.experts}"] if sae.experts else []
    kind = "-".join(point)
    name = f"{Path(data.model).name}-{hook}-{kind}-F{sae.dict_size}-k{sae.k}-{stamp}"
    return Path("runs") / name


def _describe(
    console: Console, config: RunConfig, source: Any, heldout: Heldout, out: Path
) -> None:
    sae, train, model = config.sae, config.train, source.language_model
    parameters = sum(p.numel() for p in model.model.parameters())
    shape = kind_of(vars(sae))
    if sae.encoder == "kron":
        shape += f", {sae.heads:,} heads x ({sae.m} base, {sae.n} extension)"
    if sae.experts:
        shape += f", {sae.experts} experts"
    about = "" if sae.selection == "topk" else "about "
    reads = model.hookpoint
    if sae.d_target:
        reads += f" and, to predict it, {model.target_hookpoint}"
    rows = {
        "language model": f"{config.data.model}, {parameters / 1e6:,.1f} M parameters; reads out "
        f"{reads} (d = {source.d_model:,})",
        "text": f"{config.data.dataset}; {heldout.activations.shape[0]:,} tokens held out",
        "autoencoder": f"{shape}: F = {sae.dict_size:,} latents, {about}{sae.k} active a token",
        "training": f"{train.tokens:,} tokens, {train.steps:,} steps of {train.batch_size:,}, "
        f"lr {train.lr:g}, seed {train.seed}",
        "run folder": str(out),
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/dim]", escape(value))
    console.print(table)


class _Progress:
    """Shows the records of `fit`: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, config: RunConfig) -> None:
        self.console = console
        self.total = config.train.steps
        self.every = max(1, self.total // 10)
        self.printed = -1
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=self.total, figures="")

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if record["kind"] == "train":
            figures = (
                f"EV {record['explained_variance']:.3f}  dead {record['dead_share']:.1%}  "
                f"{record['tokens_per_s']:,.0f} tokens/s"
            )
            self.bar.update(self.task, completed=step, figures=figures)
            if not self.console.is_terminal and step // self.every != self.printed:
                self.printed = step // self.every
                self.console.print(f"step {step:,}/{self.total:,}  {figures}")
        elif record["kind"] == "heldout":
            self.console.print(
                f"step {step:,}: held-out explained variance "
                f"{record['explained_variance']:.4f}, L0 {record['l0']:.1f}"
            )


_SHOWN = ("explained_variance", "l0", "dead_share", "ce_clean", "ce_spliced", "ce_recovered")


def _summarise(
    console: Console,
    config: RunConfig,
    result: FitResult,
    heldout: Heldout,
    run: RunFolder,
    seconds: float,
) -> None:
    """Write the report; print the evaluation, some latents, and where everything is."""
    from kronsae.contexts import render as render_contexts
    from kronsae.contexts import top_contexts

    tokenizer = heldout.language_model.tokenizer
    latents = top_contexts(result.sae, heldout)
    write_report(run.path, contexts=latents, tokenizer=tokenizer)
    console.print("\n[bold]On held-out text[/bold]")
    table = Table.grid(padding=(0, 2))
    for name in _SHOWN:
        if name in result.metrics:
            label, meaning = MEANING[name]
            table.add_row(label, f"{result.metrics[name]:.4f}", f"[dim]{meaning}[/dim]")
    console.print(table)
    console.print("\n[bold]What some latents have learned[/bold] (where they fire most)")
    for block in render_contexts(latents, tokenizer, console):
        console.print(block)
    console.print(
        f"\nTrained on {result.tokens:,} tokens in {seconds:,.0f} s. Everything is in {run.path}:\n"
        f"  report.html    this run to look at\n"
        f"  sae/           the autoencoder:  kronsae.load({str(run.path)!r})\n"
        f"  metrics.jsonl  every logged step\n"
        f"  config.json    every setting; --config {run.config} repeats the run\n"
        f"Next: python -m kronsae.train --help, or --model, --layer and --dataset of your own.",
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
