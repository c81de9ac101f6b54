"""`kronsae evaluate RUN…`: metrics of SAEs on held-out text."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from kronsae.commandline import Parser, exit_status, given_place
from kronsae.config import kind_of
from kronsae.data.loading import quiet
from kronsae.errors import InputError
from kronsae.evaluate.judge import Judgement, judge
from kronsae.evaluate.show import console_table, draw, facts, markdown, text_in_words
from kronsae.metrics.absorption import FirstLetters
from kronsae.metrics.figures import density_histogram
from kronsae.metrics.heldout import HeldoutText, massive_warning
from kronsae.metrics.probing import ClassProbes, classes_of, labelled_text
from kronsae.metrics.target_model import (
    LoadedSAE,
    add_flags,
    by_text,
    given_data,
    held_out_by_run,
    load_saes,
    open_heldout,
)
from kronsae.runs.folder import RunFolder, output_folder, versions
from kronsae.system.devices import resolve_device
from kronsae.system.files import NOT_FINITE, finite, write_json, write_text
from kronsae.system.progress import Pace
from kronsae.system.tables import wrapping_console


def make_parser() -> Parser:
    parser = Parser(
        "evaluate",
        "Evaluate SAEs on text that they were not trained on: explained variance, firing rates of "
        "latents, and the language model's loss with reconstructed activations. Writes "
        "evaluation.json, evaluation.md and pictures.",
        "kronsae evaluate runs/MY-RUN runs/ANOTHER",
        usage="%(prog)s RUN [RUN ...] [--out DIR] [flags]",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder, sweep folder (all its members), or whatever kronsae.load takes",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: a new one under runs/)"
    )
    parser.add_argument(
        "--ks",
        nargs="+",
        type=int,
        metavar="K",
        help="evaluate each SAE at each of these k in place of its own (selection topk alone)",
    )
    parser.add_argument(
        "--absorption",
        action="store_true",
        help="also measure first-letter absorption (reads 6,000 words: minutes on a CPU)",
    )
    parser.add_argument(
        "--probe",
        metavar="COLUMN",
        help="also measure sparse probing: how well 1, 2 and 5 latents predict this column of the "
        "dataset (reads about 150,000 tokens: minutes on a CPU)",
    )
    add_flags(parser)
    return parser


def work(argv: list[str]) -> None:
    request = make_parser().parse(argv)
    with output_folder(request.out, "evaluation") as out:
        RunFolder.check_free(out)
        _evaluate(request, shlex.join(["kronsae", "evaluate", *argv]), out)


def _evaluate(request: Namespace, command: str, out: Path) -> None:
    device = resolve_device(request.device)
    given = given_data(request)
    loaded_saes = load_saes(request.runs, given, device, **given_place(vars(request)))
    if request.ks:
        loaded_saes = [at for loaded in loaded_saes for at in _at_ks(loaded, request.ks)]
    console = wrapping_console()
    entries: dict[str, dict[str, Any]] = {}
    texts = []
    for group in by_text(loaded_saes):
        if request.probe is not None:
            classes_of(group[0].data, request.probe)  # before the model is loaded
        console.print(f"loading {group[0].data.model}", style="dim", markup=False)
        with quiet():
            text = open_heldout(group[0], device, request.massive_multiple, group[1:])
        names = [loaded.name for loaded in group]
        texts.append({"of": names, **text.facts, "model": text.model.describe()})
        texts[-1]["no_cross_entropy"] = text.model.no_cross_entropy
        measures = _measures(group[0], text, request, console)
        texts[-1] |= {name: measure.facts for name, measure in measures.items()}
        measured = [
            {name: measure.measure(loaded.sae) for name, measure in measures.items()}
            for loaded in group
        ]
        judgements = _judge(group, text, console)
        for loaded, judgement, beside in zip(group, judgements, measured, strict=True):
            entry = entries[loaded.name] = _entry(loaded, judgement)
            for name, (figures, details) in beside.items():
                entry["metrics"] |= figures
                entry[name] = details
        warning = massive_warning(entries[group[0].name]["metrics"], text)
        if warning is not None:
            texts[-1]["warning"] = warning
    document = {
        "format": "kronsae-evaluation",
        "format_version": 1,
        "command": command,
        "versions": versions(),
        "device": str(device),
        "texts": texts,
        "judged": [entries[loaded.name] for loaded in loaded_saes],
    }
    _write(document, out, console)


def _at_ks(loaded: LoadedSAE, ks: Iterable[int]) -> list[LoadedSAE]:
    """An SAE with each number of active latents, none twice."""
    try:
        return [
            loaded._replace(name=f"{loaded.name} k={k}", sae=loaded.sae.with_k(k))
            for k in dict.fromkeys(ks)
        ]
    except InputError as error:
        raise InputError(f"--ks: {loaded.name}: {error}") from error


def _measures(
    loaded: LoadedSAE, text: HeldoutText, request: Namespace, console: Console
) -> dict[str, FirstLetters | ClassProbes]:
    """What else is measured of SAEs of a model and text, by its name in evaluation.json."""
    measures: dict[str, FirstLetters | ClassProbes] = {}
    if request.absorption:
        with _reading("words for --absorption", console) as show:
            measures["absorption"] = FirstLetters.of(text.model, bos=loaded.data.bos, on_read=show)
    if request.probe is not None:
        held_out = held_out_by_run(loaded, text.model)
        documents, classes = labelled_text(text.model, loaded.data, request.probe, held_out)
        documents = replace(documents, massive=text.massive)
        with _reading("documents for --probe", console) as show:
            measures["probe"] = ClassProbes(documents, classes, on_read=show)
    return measures


@contextmanager
def _reading(unit: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A function that shows how many are read, of how many: a bar, or a line each quarter."""
    pace, quarters = Pace(unit), [0]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"reading {unit}", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            words = pace.words(done, total)
            if not console.is_terminal and 4 * done // total > quarters[-1]:
                quarters.append(4 * done // total)
                console.print(f"read {words}", style="dim")

        yield show


def _judge(group: list[LoadedSAE], text: HeldoutText, console: Console) -> list[Judgement]:
    total, done = 2 * sum(1 for _ in text.batches()), count(1)
    with _reading("batches of contexts", console) as show:
        saes = {loaded.name: loaded.sae for loaded in group}
        judgements = judge(saes, text, lambda: show(next(done), total))
    return [judgements[loaded.name] for loaded in group]


def _entry(loaded: LoadedSAE, judgement: Judgement) -> dict[str, Any]:
    config, metadata = loaded.sae.config, loaded.sae.metadata
    trained = (metadata.get("config") or {}).get("train") or {}
    return {
        "name": loaded.name,
        "source": loaded.source,
        "kind": kind_of(vars(config)),
        "dict_size": config.dict_size,
        "k": config.k,
        "dtype": str(loaded.sae.W_dec.dtype).removeprefix("torch."),
        "trained_tokens": metadata.get("tokens"),
        "seed": trained.get("seed"),
        "tokens": judgement.tokens,
        "metrics": finite(judgement.metrics),
        "densities": density_histogram(judgement.counts, judgement.tokens),
    }


def _write(document: dict[str, Any], out: Path, console: Console) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", document)
    write_text(out / "evaluation.md", markdown(document))
    try:
        pictures = [path.name for path in draw(document["judged"], out)]
    except ImportError:
        pictures = []
    for text in document["texts"]:
        names = f"{', '.join(text['of'])}: " if len(document["texts"]) > 1 else ""
        amount = f"{text['tokens']:,} tokens of {text['dataset']} ({text['which']})"
        console.print(
            f"{names}{amount}, in {text_in_words(text)}; {text['left_out']}",
            style="dim",
            markup=False,
        )
        if text["no_cross_entropy"]:
            console.print(f"without cross-entropy: {text['no_cross_entropy']}", markup=False)
        if "warning" in text:
            console.print(f"warning: {text['warning']}", style="yellow", markup=False)
    if len(document["judged"]) == 1:
        [entry] = document["judged"]
        console.print(" · ".join([entry["name"], *filter(None, facts(entry))]), style="bold")
    console.print(console_table(document["judged"]))
    for entry in document["judged"]:
        if reason := entry["metrics"].get(NOT_FINITE):
            line = f"{entry['name']}: not finite: {reason}"
            console.print(line, style="yellow", markup=False)
    console.print(
        f"In {out}: evaluation.md (explains each figure), "
        f"{', '.join(['evaluation.json', *pictures])}"
        + ("" if pictures else " (pictures need matplotlib: pip install matplotlib)"),
        markup=False,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only if it succeeded."""
    return exit_status(work, argv)


if __name__ == "__main__":
    sys.exit(main())
