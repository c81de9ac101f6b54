"""`kronsae intervene RUN`: effects of changed latents on a language model.

--latent and --prompt: its text and next token before and after. --effects: the effect of each
latent's ablation on the loss, exact and estimated. --and-test: a latent of a Kron head compared
with its base and its extension.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kronsae.commandline import Parser, exit_status, given_place
from kronsae.data import LanguageModel
from kronsae.data.activations import open_model
from kronsae.data.images import check_no_images
from kronsae.data.loading import quiet
from kronsae.data.packing import context_begin, left_out_ids, prompt_ids, token_mask
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
from kronsae.interventions.hooks import ablate, clamp, intervene, steer
from kronsae.metrics.figures import pearson, spearman
from kronsae.metrics.heldout import HeldoutText
from kronsae.metrics.target_model import (
    LoadedSAE,
    add_flags,
    given_data,
    load_sae,
    open_heldout,
)
from kronsae.properties.contexts import short
from kronsae.runs.folder import RunFolder, versions
from kronsae.system.devices import resolve_device, seed_everything
from kronsae.system.files import write_json
from kronsae.system.tables import console_table

TABLE_ROWS = 8


def make_parser() -> Parser:
    parser = Parser(
        "intervene",
        "Change latents in a language model while it runs, and measure the effects.",
        'kronsae intervene RUN --latent 107 --prompt "import os" --add 5\n'
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
    edits.add_argument("--set", type=float, metavar="X", help="set its value to X on every token")
    edits.add_argument("--add", type=float, metavar="X", help="steer: add X times its decoder row")
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
        "--seed", type=int, default=0, metavar="N", help="seed of the random latents (default: 0)"
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
        "--out", type=Path, metavar="DIR", help="folder of the results of --effects and --and-test"
    )
    add_flags(parser)
    return parser


def work(argv: list[str]) -> None:
    request = make_parser().parse(argv)
    _check(request)
    out = request.out or Path("runs") / f"intervention-{time.strftime('%Y%m%d-%H%M%S')}"
    measures = request.effects is not None or request.and_test
    if measures:
        RunFolder.check_free(out)
    console = Console(highlight=False, soft_wrap=True)
    seed_everything(request.seed)
    device = resolve_device(request.device)
    loaded = load_sae(request.run, given_data(request), device, **given_place(vars(request)))
    check_no_images(loaded.data, "kronsae intervene")
    if not measures:
        with quiet():
            model, _ = open_model(loaded.data, device)
        _generate(model, loaded, request, console)
        return
    if request.effects is not None:
        kind, measure, show = "effects", _effects, _show_effects
    else:
        kind, measure, show = "and-test", _and_tests, _show_and_tests
    document = {
        "format": f"kronsae-{kind}",
        "command": shlex.join(["kronsae", "intervene", *argv]),
        "versions": versions(),
        "seed": request.seed,
        "subject": loaded.source,
        **measure(loaded, request, device),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{kind}.json", document)
    show(document, console)
    console.print(f"In {out}: {kind}.json", markup=False)


def _check(request: argparse.Namespace) -> None:
    """Raise InputError for flags that do not go together."""
    changes = request.ablate or request.set is not None or request.add is not None
    if request.effects is not None:
        wrong = {"--and-test": request.and_test, "--ablate, --set and --add": changes}
        wrong["--reconstruct"] = request.reconstruct
        if request.effects < 2:
            raise InputError(f"--effects: expected >= 2 latents to compare, got {request.effects}")
        if (request.target is None) != (request.prompt is None):
            raise InputError("--effects: --prompt and --target go together")
    elif request.and_test:
        wrong = {"--ablate, --set and --add": changes, "--reconstruct": request.reconstruct}
        wrong |= {"--prompt": request.prompt is not None, "--target": request.target is not None}
        if not request.latent:
            raise InputError("--and-test needs --latent")
    else:
        if request.prompt is None or not request.latent:
            raise InputError(
                "nothing to do: give --latent and --prompt, or --effects, or --and-test"
            )
        wrong = {"--target": request.target is not None, "--out": request.out is not None}
    for flag, is_given in wrong.items():
        if is_given:
            raise InputError(f"{flag} has no effect here: leave it out")


# Text


@torch.no_grad()
def continuation(
    model: LanguageModel, prompt: str, new_tokens: int, bos: str = "auto"
) -> tuple[str, Tensor]:
    """The likeliest text after a prompt, and the logits of its first token ([V] float64).

    bos: how the prompt begins, see `kronsae.data.packing.context_begin`.
    Raises InputError if the prompt has fewer than two tokens (the first is never changed).
    """
    tokenizer, generate = model.tokenizer, cast(Any, model.model).generate
    ids = torch.tensor([prompt_ids(tokenizer, prompt, bos)], device=model.device)
    if ids.shape[1] < 2:
        raise InputError(f"--prompt: expected two tokens at least, got {ids.shape[1]}")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    whole = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=pad,
        max_new_tokens=new_tokens,
        use_cache=True,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return text, model.logits(ids)[0, -1].double().cpu()


def _generate(
    model: LanguageModel, loaded: LoadedSAE, request: argparse.Namespace, console: Console
) -> None:
    """Print the continuations of the prompt and the next tokens, without and with the edits."""
    if request.set is not None:
        edits = [clamp(latent, request.set) for latent in request.latent]
        done = f"set to {request.set:g}"
    elif request.add is not None:
        edits = [steer(latent, request.add) for latent in request.latent]
        done = f"steered by {request.add:g}"
    else:
        edits, done = [ablate(latent) for latent in request.latent], "ablated"
    prompt = request.prompt, request.new_tokens, loaded.data.bos
    with quiet():
        before, clean = continuation(model, *prompt)
        with intervene(model, loaded.sae, edits, keep_error=not request.reconstruct):
            after, edited = continuation(model, *prompt)
    latents = ", ".join(map(str, request.latent))
    error = "activations replaced by the reconstruction" if request.reconstruct else "error kept"
    console.print(f"latent {latents} {done} ({error}), except on the first token\n", style="bold")
    for name, text in (("before", before), ("after", after)):
        console.print(name, style="dim")
        console.print(Text(request.prompt, style="dim") + Text(text), end="\n\n")
    console.print(_next_tokens(clean, edited, model.tokenizer))


def _next_tokens(clean: Tensor, edited: Tensor, tokenizer: Any) -> Table:
    """Table of the next tokens whose probability changes most, from logits [V]."""
    p, q = clean.softmax(-1), edited.softmax(-1)
    table = console_table(("next token", "logit before", "after", "probability before", "after"))
    for token in (q - p).abs().topk(min(TABLE_ROWS, len(p))).indices.tolist():
        table.add_row(
            Text(repr(token_texts([token], tokenizer)[0])),
            f"{clean[token]:.2f}",
            f"{edited[token]:.2f}",
            f"{100 * p[token]:.2f} %",
            f"{100 * q[token]:.2f} %",
        )
    return table


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
    exact = exact_effects(text.model, sae, encoded, pairs, objective, batch)
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


def _of_prompt(loaded: LoadedSAE, prompt: str, device: torch.device) -> HeldoutText:
    model, _ = open_model(loaded.data, device)
    bos = loaded.data.bos
    ids = torch.tensor([prompt_ids(model.tokenizer, prompt, bos)])
    left_out = left_out_ids(model.tokenizer, loaded.data.exclude_tokens)
    mask = token_mask(ids, model.tokenizer, left_out, len(context_begin(model.tokenizer, bos)))
    if not mask.any():
        raise InputError("--prompt: SAEs are trained on none of its tokens")
    return HeldoutText(model, ids, mask, 1, {"prompt": prompt, "tokens": int(mask.sum())})


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
