"""`python -m kronsae.interpret RUN`: explanations of latents, and how well they predict."""

import argparse
import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.text import Text

from kronsae.commandline import Parser, exit_status, given_place
from kronsae.data.images import check_no_images
from kronsae.data.loading import quiet
from kronsae.errors import InputError
from kronsae.interpret.chat import Answers, Chat, ServerChat
from kronsae.interpret.examples import LatentExamples, collect, firing_counts
from kronsae.interpret.local import LocalChat
from kronsae.interpret.scoring import EXPLANATION_TOKENS, SHOWN, Interpretation, interpret
from kronsae.metrics.target_model import (
    HeldoutText,
    add_flags,
    given_data,
    load_sae,
    open_heldout,
)
from kronsae.model.sae import SAE
from kronsae.runs.folder import versions
from kronsae.system.devices import resolve_device, seed_everything
from kronsae.system.files import check_writable, lock, write_json
from kronsae.system.progress import Pace
from kronsae.system.tables import console_table, wrapping_console

ANSWERS, RESULT = "answers.jsonl", "interpretation.json"


def make_parser() -> Parser:
    parser = Parser(
        "interpret",
        "Let a language model explain latents, and score the explanations by detection and "
        "fuzzing. The same command goes on where it was stopped: answers are kept in "
        f"{ANSWERS} of --out.",
        "kronsae interpret RUN --explainer Qwen/Qwen2.5-7B-Instruct --out explanations",
        usage="%(prog)s RUN --out DIR (--explainer MODEL | --server URL) ...",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, or any SAE that kronsae.load takes")
    model = parser.add_argument_group("the model that explains (one of the two)")
    model.add_argument(
        "--explainer", metavar="MODEL", help="transformers model: hub name or folder"
    )
    model.add_argument(
        "--server",
        metavar="URL",
        help="OpenAI-compatible server, as http://localhost:8000/v1 (its key: OPENAI_API_KEY)",
    )
    model.add_argument("--server-model", metavar="NAME", help="which of the server's models")
    model.add_argument(
        "--parallel", type=int, metavar="N", help="requests to a server at a time (default: 4)"
    )
    which = parser.add_argument_group("what to explain").add_mutually_exclusive_group()
    which.add_argument("--latent", type=int, nargs="+", metavar="N", help="these latents")
    which.add_argument(
        "--latents", type=int, default=20, metavar="N", help="N drawn at random (default: 20)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of whatever is drawn")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results")
    add_flags(parser)
    return parser


def work(argv: list[str]) -> None:
    """Explain and score latents of an SAE. Raises InputError if it cannot be done."""
    flags = make_parser().parse(argv)
    _check(flags)
    check_writable(flags.out)
    seed_everything(flags.seed)
    device = resolve_device(flags.device)
    console = wrapping_console()
    loaded = load_sae(flags.run, given_data(flags), device, **given_place(vars(flags)))
    check_no_images(loaded.data, "kronsae interpret")
    loaded.sae.check_latents(flags.latent or ())
    models = [loaded.data.model, *filter(None, [flags.explainer])]
    say = partial(console.print, style="dim", markup=False)
    say(f"loading {' and '.join(models)}")
    chat: Chat
    if flags.server is not None:
        chat, parallel = ServerChat(flags.server, flags.server_model), flags.parallel or 4
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        chat, parallel = LocalChat(flags.explainer, dtype=dtype, device=device), 1
    with quiet():
        text = open_heldout(loaded, device, flags.massive_multiple)
    facts = text.facts
    say(f"reading {facts['tokens']:,} tokens of {facts['dataset']} ({facts['which']})")
    latents = flags.latent or _draw(loaded.sae, text, flags.latents, flags.seed)
    flags.out.mkdir(parents=True, exist_ok=True)
    held = lock(flags.out, f"{flags.out} is in use: another process writes explanations there")
    try:
        answers = Answers(chat, flags.out / ANSWERS)
        examples = collect(loaded.sae, text, latents, flags.seed)
        tokenizer = text.model.tokenizer
        results = _interpret_all(examples, tokenizer, answers, flags.seed, parallel, console)
        document = _document(results, answers, text, loaded.source, flags.seed, argv)
        write_json(flags.out / RESULT, document)
    finally:
        held.release()
    _show(results, document, console)
    console.print(f"In {flags.out}: {RESULT}, {ANSWERS}", markup=False)


def _document(
    results: list[Interpretation],
    answers: Answers,
    text: HeldoutText,
    subject: str,
    seed: int,
    argv: list[str],
) -> dict[str, Any]:
    """What RESULT holds."""
    return {
        "format": "kronsae-interpretation",
        "format_version": 1,
        "command": shlex.join(["python", "-m", "kronsae.interpret", *argv]),
        "versions": versions(),
        "seed": seed,
        "subject": subject,
        "explainer": answers.chat.name,
        "text": text.facts,
        "summary": summary(results),
        "costs": answers.costs(),
        "latents": [_plain(result) for result in results],
    }


def _check(flags: argparse.Namespace) -> None:
    if (flags.explainer is None) == (flags.server is None):
        raise InputError("give --explainer MODEL, or --server URL with --server-model NAME")
    if (flags.server is None) != (flags.server_model is None):
        raise InputError("--server and --server-model go together")
    if flags.explainer is not None and flags.parallel is not None:
        raise InputError("--parallel has no effect with --explainer: leave it out")
    if (flags.parallel or 1) < 1:
        raise InputError(f"--parallel: expected >= 1, got {flags.parallel}")


def _draw(sae: SAE, text: HeldoutText, count: int, seed: int) -> list[int]:
    """Latents drawn from those that fire often enough to explain and to test."""
    often = (firing_counts(sae, text).counts > SHOWN).nonzero()[:, 0].cpu()
    order = torch.randperm(len(often), generator=torch.Generator().manual_seed(seed))
    if not len(order[:count]):
        raise InputError(f"no latent fires more than {SHOWN} times: more --heldout-tokens")
    return sorted(often[order[:count]].tolist())


def _interpret_all(
    examples: list[LatentExamples],
    tokenizer: Any,
    answers: Answers,
    seed: int,
    parallel: int,
    console: Console,
) -> list[Interpretation]:
    """Interpretations of the latents, `parallel` at a time; answers are kept if it is stopped.

    What was asked by then is waited for, until a second stop.
    """
    with ThreadPoolExecutor(parallel) as pool:
        try:
            pending = [
                pool.submit(interpret, latent, tokenizer, answers, seed) for latent in examples
            ]
            quietly = not console.is_terminal
            waiting = track(pending, "explaining", console=console, transient=True, disable=quietly)
            results, pace = [], Pace("latents")
            for done, future in enumerate(waiting, 1):
                results.append(future.result())
                words = pace.words(done, len(pending))
                if quietly and 10 * done // len(pending) > 10 * (done - 1) // len(pending):
                    console.print(f"explained {words}")
            return results
        except BaseException:
            _wait(pool, answers, console)
            raise


def _wait(pool: ThreadPoolExecutor, answers: Answers, console: Console) -> None:
    """Wait for the answers that are under way, and say how many are kept."""
    try:
        answers.stop()
        console.print("Stopping, once what was asked is answered; Ctrl-C stops at once")
        pool.shutdown(cancel_futures=True)
    except BaseException:
        answers.abandon()
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        if answers.asked:
            console.print(
                f"Stopped: {answers.path} keeps {answers.asked:,} new answers, and the same "
                "command goes on from there",
                markup=False,
            )


def summary(results: list[Interpretation]) -> dict[str, Any]:
    """Means over latents, and how many replies could not be read."""
    explained = [result for result in results if result.explanation is not None]
    fire = [result for result in results if result.firing]
    out: dict[str, Any] = {
        "latents": len(results),
        "explained": len(explained),
        "explanations_discarded": len(fire) - len(explained),
    }
    for task in ("detection", "fuzzing"):
        scores = [score for result in results if (score := getattr(result, task)) is not None]
        known = [score.score for score in scores if score.score is not None]
        out[task] = statistics.fmean(known) if known else None
        out[f"{task}_scored"] = len(known)
        out[f"{task}_discarded"] = sum(score.discarded for score in scores)
    return out


def _plain(result: Interpretation) -> dict[str, Any]:
    scores = {name: getattr(result, name) for name in ("detection", "fuzzing")}
    return result._asdict() | {name: score and score._asdict() for name, score in scores.items()}


def _show(results: list[Interpretation], document: dict[str, Any], console: Console) -> None:
    def text_of(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    table = console_table(("latent", "detection", "fuzzing"), left=0)
    table.add_column("explanation", no_wrap=True, overflow="ellipsis")
    for result in results:
        missing = "(never fires here)" if not result.firing else "(no readable reply)"
        table.add_row(
            str(result.latent),
            *(text_of(score and score.score) for score in (result.detection, result.fuzzing)),
            Text(result.explanation or missing, style="" if result.explanation else "dim"),
        )
    console.print(table)
    means, costs = document["summary"], document["costs"]
    console.print(
        f"\nmean: detection {text_of(means['detection'])} of {means['detection_scored']}, "
        f"fuzzing {text_of(means['fuzzing'])} of {means['fuzzing_scored']} latents; not "
        f"readable: {means['explanations_discarded']} explanations, "
        f"{means['detection_discarded']} + {means['fuzzing_discarded']} judgements"
    )
    if means["explanations_discarded"]:
        console.print(
            f"An explanation is read from a line EXPLANATION: …, and {ANSWERS} has what the model "
            "said instead. Small models, and those that think aloud until their "
            f"{EXPLANATION_TOKENS} tokens are used up, often miss it."
        )
    console.print(
        f"{costs['calls']:,} calls ({costs['answers_found']:,} answers were there already), "
        f"{costs['prompt_tokens']:,} tokens read and {costs['completion_tokens']:,} written"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(work, argv)


if __name__ == "__main__":
    sys.exit(main())
