"""`kronsae intervene RUN`: effects of changed latents on a language model.

--latent and --prompt: text and next token before and after, on request with a strength that keeps
the text fluent (--fluency), and beside a baseline (--mean-difference). --effects: the effect of
each latent's ablation on the loss, exact and estimated. --and-test: a latent of a Kron head
compared with its base and its extension.
"""

import argparse
import dataclasses
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from kronsae.commandline import Parser, exit_status, given_place
from kronsae.data import LanguageModel
from kronsae.data.activations import open_model
from kronsae.data.images import check_no_images
from kronsae.data.loading import quiet
from kronsae.data.packing import left_out_ids, prompt_ids, token_mask
from kronsae.data.token_text import token_texts
from kronsae.errors import InputError
from kronsae.interventions.effects import (
    Objective,
    and_test,
    attributed_effects,
    choose_pairs,
    encode_text,
    exact_effects,
    last_logit,
    summed_loss,
)
from kronsae.interventions.hooks import ablate, clamp, displace, intervene, steer
from kronsae.interventions.steering import (
    Change,
    Continuations,
    calibrated,
    continuations,
    difference_of_texts,
    generated,
    mean_difference,
)
from kronsae.metrics.figures import pearson, spearman
from kronsae.metrics.heldout import HeldoutText
from kronsae.metrics.target_model import (
    LoadedSAE,
    add_flags,
    given_data,
    load_sae,
    open_heldout,
)
from kronsae.metrics.usual import Usual, usual_values
from kronsae.model.massive import rule_of
from kronsae.model.sae import SAE
from kronsae.properties.contexts import short
from kronsae.properties.run import digest_of, folder_of, kept
from kronsae.runs.folder import RunFolder, output_folder, versions
from kronsae.system.devices import resolve_device, seed_everything
from kronsae.system.files import write_json
from kronsae.system.progress import Pace
from kronsae.system.tables import console_table, wrapping_console

TABLE_ROWS = 8


def make_parser() -> Parser:
    parser = Parser(
        "intervene",
        "Change latents in a language model while it runs, and measure the effects.",
        'kronsae intervene RUN --latent 107 --prompt "import os" --add 2x\n'
        'kronsae intervene RUN --latent 107 --prompt "import os" --fluency 1.5\n'
        "kronsae intervene RUN --effects 20\n"
        "kronsae intervene RUN --latent 107 --and-test",
        usage="%(prog)s RUN (--latent N ... | --effects N) [flags]",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, or any SAE that kronsae.load takes")
    parser.add_argument("--latent", type=int, nargs="+", metavar="N", help="latents to change")
    parser.add_argument("--prompt", metavar="TEXT", help="text that the model reads")
    edits = parser.add_argument_group(
        "change of --latent (default: --ablate)"
    ).add_mutually_exclusive_group()
    edits.add_argument("--ablate", action="store_true", help="set its value to 0")
    edits.add_argument(
        "--set",
        type=strength,
        metavar="X",
        help="set its value to X on every token; 2x: to twice its usual maximum",
    )
    edits.add_argument(
        "--add",
        type=strength,
        metavar="X",
        help="steer: add X times its decoder row; 2x: twice its usual maximum",
    )
    edits.add_argument(
        "--fluency",
        type=float,
        metavar="X",
        help="steer as strongly as keeps the perplexity of the text that comes out within X times "
        "(such as 1.5) that of unsteered text, by the unsteered model",
    )
    parser.add_argument(
        "--mean-difference",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="steer also by a baseline: the mean activation where the latents fire, minus that "
        "elsewhere; or, of two files with a text a line, that of the first minus the second",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="texts to draw, whose fluency is measured (default: 8 with --fluency or "
        "--mean-difference, otherwise the likeliest text alone)",
    )
    parser.add_argument(
        "--reconstruct",
        action="store_true",
        help="replace the activations by the reconstruction (default: keep the SAE's error)",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=40, metavar="N", help="tokens to generate (default: 40)"
    )
    effects = parser.add_argument_group("effects of latents, by ablation and by attribution")
    effects.add_argument(
        "--effects",
        type=int,
        metavar="N",
        help="measure N random latents that fire (or those of --latent)",
    )
    effects.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of random latents, texts (default: 0)",
    )
    effects.add_argument("--target", metavar="TOKEN", help="its logit after --prompt, not the loss")
    effects.add_argument(
        "--contexts-each", type=int, default=4, metavar="N", help="contexts per latent (default: 4)"
    )
    parser.add_argument(
        "--and-test",
        action="store_true",
        help="ablate the base, the extension and the composition of each --latent",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the results (default: a new one under runs/; none for --prompt alone)",
    )
    parser._negative_number_matcher = re.compile(r"^-\d*\.?\d+x?$")
    add_flags(parser)
    return parser


def work(argv: list[str]) -> None:
    request = make_parser().parse(argv)
    _check(request)
    if request.effects is not None:
        kind, measure, show = "effects", _effects, _show_effects
    elif request.and_test:
        kind, measure, show = "and-test", _and_tests, _show_and_tests
    else:
        kind, measure, show = "intervention", _steering, _show_steering
    is_written = request.out is not None or measure is not _steering
    folder = output_folder(request.out, "intervention") if is_written else nullcontext()
    with folder as out:
        if out is not None:
            RunFolder.check_free(out)
        console = wrapping_console()
        seed_everything(request.seed)
        device = resolve_device(request.device)
        loaded = load_sae(request.run, given_data(request), device, **given_place(vars(request)))
        check_no_images(loaded.data, "kronsae intervene")
        document = {
            "format": f"kronsae-{kind}",
            "command": shlex.join(["kronsae", "intervene", *argv]),
            "versions": versions(),
            "seed": request.seed,
            "subject": loaded.source,
            **measure(loaded, request, device),
        }
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / f"{kind}.json", document)
        show(document, console)
        if out is not None:
            console.print(f"In {out}: {kind}.json", markup=False)


def _check(request: argparse.Namespace) -> None:
    """Raise InputError for flags that do not go together."""
    steers = request.add is not None or request.fluency is not None
    baseline = request.mean_difference is not None
    of_text = {
        "--ablate, --set, --add and --fluency": request.ablate or request.set is not None or steers,
        "--reconstruct": request.reconstruct,
        "--mean-difference": baseline,
        "--samples": request.samples is not None,
    }
    if request.effects is not None:
        wrong = {"--and-test": request.and_test, **of_text}
        if request.effects < 2:
            raise InputError(f"--effects: expected >= 2 latents to compare, got {request.effects}")
        if (request.target is None) != (request.prompt is None):
            raise InputError("--effects: --prompt and --target go together")
    elif request.and_test:
        wrong = of_text | {"--prompt": request.prompt is not None}
        wrong["--target"] = request.target is not None
        if not request.latent:
            raise InputError("--and-test needs --latent")
    else:
        if request.prompt is None or not request.latent:
            raise InputError(
                "nothing to do: give --latent and --prompt, or --effects, or --and-test"
            )
        wrong = {
            "--target": request.target is not None,
            "--mean-difference without --add or --fluency": baseline and not steers,
            "--reconstruct with --mean-difference": baseline and request.reconstruct,
        }
        if baseline and len(request.mean_difference) not in (0, 2):
            raise InputError(
                "--mean-difference: expected two files of texts, or none, got "
                f"{len(request.mean_difference)}"
            )
        if request.samples is not None and request.samples < 1:
            raise InputError(f"--samples: expected >= 1 texts, got {request.samples}")
    for flag, is_given in wrong.items():
        if is_given:
            raise InputError(f"{flag} has no effect here: leave it out")


# Text


class Strength(NamedTuple):
    """A value of a latent, or a multiple of its usual maximum."""

    amount: float
    of_usual: bool = False

    def values(self, usual: Mapping[int, Usual], latents: Sequence[int]) -> dict[int, float]:
        """The value of each latent. Raises InputError for a multiple of what is not known."""
        if not self.of_usual:
            return dict.fromkeys(latents, self.amount)
        for latent in latents:
            if not usual[latent].maximum > 0:
                raise InputError(
                    f"latent {latent} fires on none of {usual[latent].read:,} tokens, so its usual "
                    "maximum is not known: give its value (--add 5), or more --heldout-tokens"
                )
        return {latent: self.amount * usual[latent].maximum for latent in latents}


def strength(text: str) -> Strength:
    """A number ("5"), or a multiple ("2x"). Raises ArgumentTypeError for anything else."""
    try:
        amount = float(text.removesuffix("x"))
    except ValueError:
        amount = math.nan
    if not math.isfinite(amount):
        raise argparse.ArgumentTypeError(
            f"expected a number (5), or a multiple of the latent's usual maximum (2x), got {text!r}"
        )
    return Strength(amount, text.endswith("x"))


SAMPLES = 8

USUAL_TOKENS = 8192
"""Tokens of text that tell what is usual for a latent, unless --heldout-tokens is given."""


def continuation(
    model: LanguageModel, prompt: str, new_tokens: int, bos: str = "auto"
) -> tuple[str, Tensor]:
    """The likeliest text after a prompt, and the logits of its first token ([V] float64).

    bos: how the prompt begins, see `kronsae.data.packing.context_begin`.
    Raises InputError if the prompt has fewer than two tokens (the first is never changed).
    """
    ids = torch.tensor([prompt_ids(model.tokenizer, prompt, bos)], device=model.device)
    if ids.shape[1] < 2:
        raise InputError(f"--prompt: expected two tokens at least, got {ids.shape[1]}")
    whole = generated(model, ids, new_tokens)
    text = model.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return text, next_logits(model, ids)


@torch.no_grad()
def next_logits(model: LanguageModel, ids: Tensor) -> Tensor:
    """Logits [V] float64 of the token after ids [1, t]."""
    return model.logits(ids)[0, -1].double().cpu()


def _steering(
    loaded: LoadedSAE, request: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Text after the prompt and its next tokens, without and with the change of the latents."""
    sae, latents = loaded.sae, list(dict.fromkeys(request.latent))
    sae.check_latents(latents)
    given = request.set or request.add or (Strength(1.0, True) if request.fluency else None)
    baseline = request.mean_difference
    with quiet():
        usual = _of_properties(sae, request, latents) if given else {}
        source, text = "its properties", None
        if given and not usual or baseline == []:
            must = baseline == [] or given is not None and given.of_usual
            text, source = _heldout(loaded, request, device, must)
        model = open_model(loaded.data, device)[0] if text is None else text.model
        if text is not None and not usual:
            usual = usual_values(sae, text, latents)
        values = given.values(usual, latents) if given else dict.fromkeys(latents, 0.0)
        changes = {"after": _change(model, sae, request, values)}
        if baseline is not None:
            along = _baseline(loaded, model, text, baseline, values)
            changes["mean difference"] = lambda times: displace(model, sae, times * along)
        prompt = _texts(loaded, model, [request.prompt])
        on_prompt = usual_values(sae, prompt, latents)
        ways = _continued(model, loaded, request, changes)
    times = ways[1].get("times", 1.0)
    if given and not request.set:
        step = float(_sum_of_rows(sae, values).norm())
        for way in ways[1:]:
            way["length"] = step * way.get("times", 1.0)
    return {
        "prompt": request.prompt,
        "change": "set" if request.set else "add" if given else "ablate",
        "reconstruct": request.reconstruct,
        "fluency": request.fluency,
        "usual": {"from": source} | {str(k): each._asdict() for k, each in usual.items()},
        "latents": [
            {
                "latent": latent,
                "value": value * times,
                "multiple": given.amount * times if given and given.of_usual else None,
                "fires_on_prompt": on_prompt[latent].tokens,
            }
            for latent, value in values.items()
        ],
        "continuations": ways,
    }


def _of_properties(sae: SAE, request: argparse.Namespace, latents: list[int]) -> dict[int, Usual]:
    """What is usual for the latents by the properties of the SAE; {} without, or of other text."""
    digest = digest_of(sae)
    stored = kept(folder_of(request.run, digest), digest, {}, given_data(request))
    return {} if stored is None else stored.usual(latents)


def _heldout(
    loaded: LoadedSAE, request: argparse.Namespace, device: torch.device, must: bool
) -> tuple[HeldoutText | None, str]:
    """Text to read what is usual from, and what it is. None with a Notice if it is not there.

    must: raise the InputError instead.
    """
    try:
        text = open_heldout(loaded, device, request.massive_multiple)
    except InputError as error:
        if must:
            raise
        return None, f"not known: {error}"
    if "heldout_tokens" not in given_data(request):
        text = text.first(USUAL_TOKENS)
    return text, f"{text.facts['dataset']}, {text.facts['which']}"


def _texts(loaded: LoadedSAE, model: LanguageModel, texts: Sequence[str]) -> HeldoutText:
    """Texts as the SAE's were read, without the tokens that it leaves out."""
    data = loaded.data
    text = HeldoutText.of(model, texts, data.bos, data.exclude_tokens)
    return dataclasses.replace(text, massive=rule_of(loaded.sae.metadata))


def _change(
    model: LanguageModel, sae: SAE, request: argparse.Namespace, values: Mapping[int, float]
) -> Change:
    """The change that the flags ask for, with a multiple of the values."""
    edit = clamp if request.set else steer

    def change(times: float) -> AbstractContextManager[None]:
        edits = [edit(latent, times * value) for latent, value in values.items()]
        if not (request.set or request.add or request.fluency):
            edits = [ablate(latent) for latent in values]
        return intervene(model, sae, edits, keep_error=not request.reconstruct)

    return change


def _sum_of_rows(sae: SAE, values: Mapping[int, float]) -> Tensor:
    """What steering by the values adds to activations: [d_out]."""
    return sae.W_dec.new_tensor(list(values.values())) @ sae.W_dec.detach()[list(values)]


def _baseline(
    loaded: LoadedSAE,
    model: LanguageModel,
    text: HeldoutText | None,
    files: Sequence[Path],
    values: Mapping[int, float],
) -> Tensor:
    """The mean difference [d_out], as long as what steering adds; turned round if that is < 0."""
    sae = loaded.sae
    if files:
        direction = difference_of_texts(
            *(_texts(loaded, model, _lines(file)) for file in files)
        ).to(sae.W_dec)
    else:
        assert text is not None
        direction = mean_difference(sae, text, list(values))
    if not direction.any():
        raise InputError("--mean-difference: both sets of texts have the same mean activation")
    sign = math.copysign(1.0, next(iter(values.values())))
    return direction * (sign * _sum_of_rows(sae, values).norm() / direction.norm())


def _lines(file: Path) -> list[str]:
    """The texts in a file, one a line."""
    try:
        lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"--mean-difference: {file} cannot be read: {error}") from error
    if not lines:
        raise InputError(f"--mean-difference: {file} has no text: expected one a line")
    return lines


def _continued(
    model: LanguageModel,
    loaded: LoadedSAE,
    request: argparse.Namespace,
    changes: Mapping[str, Change],
) -> list[dict[str, Any]]:
    """The prompt's continuation "before" and with each of the changes, and its next tokens."""
    ids = prompt_ids(model.tokenizer, request.prompt, loaded.data.bos)
    sampled = request.samples or (SAMPLES if request.fluency or len(changes) > 1 else 0)
    options = {"new_tokens": request.new_tokens, "samples": sampled, "seed": request.seed}
    before = continuations(model, ids, **options) if sampled else None
    ways, clean = [], None
    every: dict[str, Change] = {"before": lambda times: nullcontext(), **changes}
    for name, change in every.items():
        way: dict[str, Any] = {"what": name}
        drawn, times = before, 1.0
        if before is not None and name != "before":
            if request.fluency:
                found = calibrated(model, ids, change, request.fluency, before=before, **options)
                drawn, times, way["tried"] = found.after, found.strength, found.tried
            else:
                drawn = continuations(model, ids, change(1.0), **options)
            way["times"] = times
        with change(times):
            if drawn is None:
                text, logits = continuation(
                    model, request.prompt, request.new_tokens, loaded.data.bos
                )
                way["text"] = text
            else:
                logits = next_logits(model, torch.tensor([ids], device=model.device))
        if drawn is not None and before is not None:
            way |= _figures(model, loaded, ids, drawn, list(map(int, request.latent)))
            way["ratio"] = drawn.perplexity / before.perplexity
        clean = logits if clean is None else clean
        way["next_tokens"] = _next_tokens(clean, logits, model.tokenizer)
        ways.append(way)
    return ways


def _figures(
    model: LanguageModel,
    loaded: LoadedSAE,
    prompt: list[int],
    drawn: Continuations,
    latents: Sequence[int],
) -> dict[str, Any]:
    """Sampled texts, their fluency, and how often the latents fire on them.

    "fires": share of new tokens, as the unchanged model reads them, a mean over the latents.
    """
    ids = torch.cat([torch.tensor([prompt] * len(drawn.ids)), drawn.ids], 1)
    left_out = left_out_ids(model.tokenizer, loaded.data.exclude_tokens)
    mask = token_mask(ids, model.tokenizer, left_out, len(prompt))
    text = HeldoutText(model, ids, mask, massive=rule_of(loaded.sae.metadata))
    usual = usual_values(loaded.sae, text, latents).values()
    read = sum(each.read for each in usual)
    texts = drawn.texts(model.tokenizer)
    return {
        "text": texts[0],
        "texts": texts,
        "perplexity": drawn.perplexity,
        "distinct": drawn.distinct,
        "fires": sum(each.tokens for each in usual) / read if read else None,
    }


def _next_tokens(clean: Tensor, edited: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    """The next tokens whose probability changes most, from logits [V]."""
    p, q = clean.softmax(-1), edited.softmax(-1)
    return [
        {
            "token": token_texts([token], tokenizer)[0],
            "logits": [clean[token].item(), edited[token].item()],
            "probabilities": [p[token].item(), q[token].item()],
        }
        for token in (q - p).abs().topk(min(TABLE_ROWS, len(p))).indices.tolist()
    ]


def _show_steering(document: dict[str, Any], console: Console) -> None:
    latents, ways = document["latents"], document["continuations"]
    for line in _usual_in_words(document):
        console.print(line, style="dim", markup=False)
    error = "activations replaced by the reconstruction"
    error = error if document["reconstruct"] else "error kept"
    numbers = ", ".join(str(each["latent"]) for each in latents)
    done = f"latent {numbers} {_done(document)} ({error}), except on the first token"
    console.print(done + "\n", style="bold")
    for way in ways:
        console.print(way["what"], style="dim")
        console.print(Text(document["prompt"], style="dim") + Text(way["text"]), end="\n\n")
    if "perplexity" in ways[0]:
        _show_fluency(ways, console)
    table = console_table(("next token", "logit before", "after", "probability before", "after"))
    for each in ways[1]["next_tokens"]:
        table.add_row(
            Text(repr(each["token"])),
            *(f"{logit:.2f}" for logit in each["logits"]),
            *(f"{100 * share:.2f} %" for share in each["probabilities"]),
        )
    console.print(table)


def _usual_in_words(document: dict[str, Any]) -> Iterator[str]:
    """What is usual for the latents, and which of them a change cannot touch."""
    usual = document["usual"]
    for each in document["latents"]:
        latent, silent = each["latent"], not each["fires_on_prompt"]
        if silent and document["change"] == "ablate":
            yield (
                f"latent {latent} does not fire on the prompt: there is nothing to ablate in it, "
                "only in what the model adds"
            )
        if of_one := usual.get(str(latent)):
            fires = f"latent {latent} fires on {100 * of_one['tokens'] / of_one['read']:.3g} % of "
            fires += f"{of_one['read']:,} tokens ({usual['from']})"
            if of_one["tokens"]:
                fires += f"; there it is {short(of_one['mean'])} on average, and at most "
                fires += short(of_one["maximum"])
            yield fires
        elif document["change"] != "ablate":
            yield f"what is usual for latent {latent} is {usual['from']}"


def _done(document: dict[str, Any]) -> str:
    """What was done to the latents: "steered by 24.6 = 2x its usual maximum"."""
    latents, change = document["latents"], document["change"]
    if change == "ablate":
        return "ablated"
    values = list(dict.fromkeys(f"{each['value']:g}" for each in latents))
    multiple = latents[0]["multiple"]
    if multiple is not None:
        values = [short(each["value"]) for each in latents]
    done = f"{'set to' if change == 'set' else 'steered by'} {', '.join(values)}"
    return done if multiple is None else f"{done} = {multiple:.3g}x its usual maximum"


def _show_fluency(ways: list[dict[str, Any]], console: Console) -> None:
    table = console_table(("", "length", "perplexity", "ratio", "distinct pairs", "fires on"))
    for way in ways:
        fires = way["fires"]
        table.add_row(
            way["what"],
            short(way["length"]) if "length" in way else "–",
            f"{way['perplexity']:.2f}",
            f"{way['ratio']:.2f}",
            f"{100 * way['distinct']:.0f} %",
            "–" if fires is None else f"{100 * fires:.1f} %",
        )
    console.print(table)
    console.print(
        f"of {len(ways[0]['texts'])} sampled texts. length: of what is added to activations; "
        "perplexity: by the unchanged model, and its ratio to that before; distinct pairs: of "
        "adjacent tokens, fewer where a text repeats itself; fires on: share of the new tokens on "
        "which the latent fires, as the unchanged model reads them\n",
        style="dim",
    )


# Effects


def _effects(
    loaded: LoadedSAE, request: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Exact and attributed effects of latents, their correlations, and the time that they took."""
    objective: Objective = summed_loss
    of, unit = "loss", "nats a token on which the latent fires"
    with quiet():
        if request.prompt is None:
            text = open_heldout(loaded, device, request.massive_multiple)
        else:
            text = _of_prompt(loaded, request.prompt, device)
            objective = last_logit(_one_token(text.model.tokenizer, request.target))
            of, unit = f"logit of {request.target!r}", "logits"
    sae, batch = loaded.sae, min(16, text.contexts_per_batch)
    began = time.perf_counter()
    encoded = encode_text(sae, text)
    firings = encoded.firings(sae)
    pairs = choose_pairs(
        firings, request.effects, request.contexts_each, request.seed, request.latent or ()
    )
    latents, group = pairs[:, 1].unique(return_inverse=True)
    if len(latents) < 2:
        raise InputError("fewer than two of these latents fire on this text")
    attributed = attributed_effects(text.model, sae, encoded, objective, batch)
    between = time.perf_counter()
    exact = exact_effects(
        text.model, sae, encoded, pairs, objective, batch, _said("ablations", len(pairs))
    )
    seconds = {"attribution": between - began, "ablation": time.perf_counter() - between}

    def by_latent(values: Tensor) -> Tensor:
        """Sums of values [p] of pairs over each latent's contexts."""
        return torch.zeros(len(latents)).double().index_add_(0, group, values.cpu().double())

    context, latent = pairs.T
    tokens = by_latent(firings[context, latent])
    # On one prompt the whole effect; on other text the mean over tokens on which the latent fires.
    share = tokens if request.prompt is None else torch.ones_like(tokens)
    exact, attributed = by_latent(exact) / share, by_latent(attributed[context, latent]) / share
    return {
        "text": text.facts,
        "of": of,
        "unit": unit,
        "pearson": pearson(exact, attributed),
        "spearman": spearman(exact, attributed),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "latents": [
            {"latent": int(f), "tokens": int(t), "exact": e.item(), "attributed": a.item()}
            for f, t, e, a in zip(latents, tokens, exact, attributed, strict=True)
        ],
    }


def _said(unit: str, total: int) -> Callable[[int], None]:
    """Says how much is done and the time left, at each quarter."""
    pace, quarter = Pace(unit), 0

    def say(done: int) -> None:
        nonlocal quarter
        words = pace.words(done, total)
        if 4 * done // total > quarter:
            quarter = 4 * done // total
            print(words, flush=True)

    return say


def _of_prompt(loaded: LoadedSAE, prompt: str, device: torch.device) -> HeldoutText:
    model, data = open_model(loaded.data, device)[0], loaded.data
    text = HeldoutText.of(model, [prompt], data.bos, data.exclude_tokens)
    return dataclasses.replace(text, facts={"prompt": prompt, **text.facts})


def _one_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(map(repr, token_texts(ids, tokenizer)))
        raise InputError(f"--target {text!r}: expected one token, got {len(ids)} ({pieces})")
    return ids[0]


def _show_effects(document: dict[str, Any], console: Console) -> None:
    effects = sorted(document["latents"], key=lambda effect: -abs(effect["exact"]))
    table = console_table(("latent", "fires on (tokens)", "ablated", "attributed"), left=0)
    for effect in effects[:TABLE_ROWS]:
        figures = (f"{effect[name]:+.4f}" for name in ("exact", "attributed"))
        table.add_row(str(effect["latent"]), str(effect["tokens"]), *figures)
    console.print(
        f"Effect of ablating a latent on the {document['of']} ({document['unit']}); the "
        f"{min(TABLE_ROWS, len(effects))} strongest of {len(effects)}",
        style="bold",
        markup=False,
    )
    console.print(table)
    console.print(
        f"Attribution (gradient × activation) against ablation: Pearson {document['pearson']:.3f}, "
        f"Spearman {document['spearman']:.3f} over {len(effects)} latents"
    )


# AND


def _and_tests(
    loaded: LoadedSAE, request: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    with quiet():
        text = open_heldout(loaded, device, request.massive_multiple)
    return {
        "text": text.facts,
        "latents": [and_test(loaded.sae, text, latent) for latent in request.latent],
    }


def _show_and_tests(document: dict[str, Any], console: Console) -> None:
    for result in document["latents"]:
        gate = {name: f"{100 * share:.2f} %" for name, share in result["gate"].items()}
        console.print(
            f"latent {result['latent']} = head {result['head']} (base {result['base']} × extension "
            f"{result['extension']})",
            style="bold",
        )
        console.print(
            f"base positive on {gate['base']} of tokens, extension on {gate['extension']}, both on "
            f"{gate['both']}; the latent is active on {gate['fires']} ({result['tokens']:,} "
            "tokens). Effects of ablations on these:"
        )
        header = ("", "off", "head's others", "lost", "gained", "loss", "KL", "elsewhere")
        table = console_table(header)
        for ablated in result["ablated"]:
            table.add_row(
                ablated["what"],
                str(ablated["latents"]),
                f"{short(ablated['head_before'])} → {short(ablated['head_after'])}",
                f"{ablated['lost']:.2f}",
                f"{ablated['gained']:.2f}",
                f"{ablated['loss']:+.4f}",
                f"{ablated['divergence']:.4f}",
                f"{ablated['loss_elsewhere']:+.5f}",
            )
        console.print(table, end="\n\n")
    console.print(
        "off: silenced latents; head's others: summed activation of the head's other latents; "
        "lost: those that no longer fire; gained: latents of any head that fire instead; loss and "
        "KL divergence in nats per token; elsewhere: loss on the other tokens of these contexts",
        style="dim",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(work, argv)


if __name__ == "__main__":
    sys.exit(main())
