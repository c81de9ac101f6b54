"""`python -m kronsae.interpret RUN`: explanations of latents, and how well they predict."""

import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from kronsae.commandline import Parser, exit_status
from kronsae.data.loading import quiet
from kronsae.errors import InputError
from kronsae.interpret.chat import Answers, Chat, LocalChat, ServerChat
from kronsae.interpret.examples import collect, firing_counts
from kronsae.interpret.scoring import EXPLANATION_TOKENS, SHOWN, Interpretation, interpret
from kronsae.metrics.target_model import add_flags, given_data, load_saes, open_heldout
from kronsae.runs.folder import versions
from kronsae.system.devices import resolve_device
from kronsae.system.files import write_json

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
    parser.add_argument("run", metavar="RUN", help="run folder, folder of a saved SAE, or hub id")
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
    found = make_parser().parse(argv)
    device = resolve_device(found.device)
    if (found.explainer is None) == (found.server is None):
        raise InputError("give --explainer MODEL, or --server URL with --server-model NAME")
    if (found.server is None) != (found.server_model is None):
        raise InputError("--server and --server-model go together")
    if found.explainer is not None and found.parallel is not None:
        raise InputError("--parallel has no effect with --explainer: leave it out")
    if (found.parallel or 1) < 1:
        raise InputError(f"--parallel: expected >= 1, got {found.parallel}")
    console = Console(highlight=False, soft_wrap=True)
    loaded_saes = load_saes([found.run], given_data(found), device)
    if len(loaded_saes) > 1:
        raise InputError(f"{found.run} is a sweep: name one of its members")
    [loaded] = loaded_saes
    models = [loaded.data.model, *filter(None, [found.explainer])]
    console.print(f"loading {' and '.join(models)}", style="dim", markup=False)
    chat: Chat
    if found.server is not None:
        chat, parallel = ServerChat(found.server, found.server_model), found.parallel or 4
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        chat, parallel = LocalChat(found.explainer, dtype=dtype, device=device), 1
    with quiet():
        text = open_heldout(loaded, device)
    facts = text.facts
    console.print(
        f"reading {facts['tokens']:,} tokens of {facts['dataset']} ({facts['which']})",
        style="dim",
        markup=False,
    )
    sae = loaded.sae
    latents = found.latent
    if latents is None:
        counts = firing_counts(sae, text).counts
        often = (counts > SHOWN).nonzero()[:, 0].cpu()
        order = torch.randperm(len(often), generator=torch.Generator().manual_seed(found.seed))
        latents = sorted(often[order[: found.latents]].tolist())
        if not latents:
            raise InputError(f"no latent fires more than {SHOWN} times: more --heldout-tokens")
    for latent in latents:
        if not 0 <= latent < sae.dict_size:
            raise InputError(f"--latent: expected 0 to {sae.dict_size - 1}, got {latent}")
    found.out.mkdir(parents=True, exist_ok=True)
    answers = Answers(chat, found.out / ANSWERS)
    examples = collect(sae, text, latents, found.seed)
    tokenizer = text.model.tokenizer
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(parallel) as pool,
    ):
        task = bar.add_task("explaining", total=len(latents))
        pending = [
            pool.submit(interpret, each, tokenizer, answers, found.seed) for each in examples
        ]
        try:
            results = []
            for each in pending:
                results.append(each.result())
                bar.advance(task)
        except BaseException:
            answers.stop()
            console.print("Stopping, once what was asked is answered", markup=False)
            pool.shutdown(cancel_futures=True)
            if answers.asked:
                console.print(
                    f"Stopped: {answers.path} keeps {answers.asked:,} new answers, and the same "
                    "command goes on from there",
                    markup=False,
                )
            raise
    document = {
        "format": "kronsae-interpretation",
        "format_version": 1,
        "command": shlex.join(["python", "-m", "kronsae.interpret", *argv]),
        "versions": versions(),
        "seed": found.seed,
        "subject": loaded.source,
        "explainer": chat.name,
        "text": text.facts,
        "summary": summary(results),
        "costs": answers.costs(),
        "latents": [_plain(each) for each in results],
    }
    write_json(found.out / RESULT, document)
    _show(results, document, console)
    console.print(f"In {found.out}: {RESULT}, {ANSWERS}", markup=False)


def summary(results: list[Interpretation]) -> dict[str, Any]:
    """Means over latents, and how many replies could not be read."""
    out: dict[str, Any] = {
        "latents": len(results),
        "explained": sum(each.explanation is not None for each in results),
        "explanations_discarded": sum(
            each.explanation is None and each.firing > 0 for each in results
        ),
    }
    for task in ("detection", "fuzzing"):
        scores = [score for each in results if (score := getattr(each, task)) is not None]
        known = [score.score for score in scores if score.score is not None]
        out[task] = statistics.fmean(known) if known else None
        out[f"{task}_scored"] = len(known)
        out[f"{task}_discarded"] = sum(score.discarded for score in scores)
    return out


def _plain(result: Interpretation) -> dict[str, Any]:
    scores = {name: getattr(result, name) for name in ("detection", "fuzzing")}
    return result._asdict() | {name: each and each._asdict() for name, each in scores.items()}


def _show(results: list[Interpretation], document: dict[str, Any], console: Console) -> None:
    def shown(value: float | None) -> str:
        return "   –" if value is None else f"{value:4.2f}"

    console.print("latent  detection  fuzzing  explanation", style="dim")
    for each in results:
        scores = [score and score.score for score in (each.detection, each.fuzzing)]
        missing = "(never fires here)" if not each.firing else "(no readable reply)"
        explanation = each.explanation or missing
        line = f"{each.latent:6}       {shown(scores[0])}     {shown(scores[1])}  "
        text = Text(line) + Text(explanation, style="" if each.explanation else "dim")
        text.truncate(max(40, console.width), overflow="ellipsis")
        console.print(text)
    found, costs = document["summary"], document["costs"]
    console.print(
        f"\nmean: detection {shown(found['detection']).strip()} of {found['detection_scored']}, "
        f"fuzzing {shown(found['fuzzing']).strip()} of {found['fuzzing_scored']} latents; not "
        f"readable: {found['explanations_discarded']} explanations, "
        f"{found['detection_discarded']} + {found['fuzzing_discarded']} judgements"
    )
    if found["explanations_discarded"]:
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
