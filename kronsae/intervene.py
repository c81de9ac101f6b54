"""`kronsae intervene RUN`: effects of changed latents on a language model.

--latent and --prompt: its text and next token before and after. --effects: the effect of each
latent's ablation on the loss, exact and estimated. --and-test: a latent of a Kron head compared
with its base and its extension.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kronsae.commandline import Parser, exit_status
from kronsae.data import LanguageModel
from kronsae.data.activations import open_model
from kronsae.data.loading import quiet
from kronsae.data.packing import token_mask
from kronsae.data.token_text import token_texts
from kronsae.errors import InputError
from kronsae.interventions.effects import (
    AndTest,
    Objective,
    and_test,
    attributed_effects,
    choose_pairs,
    encode_text,
    exact_effects,
    last_logit,
    summed_loss,
)
from kronsae.interventions.hooks import Edit, ablate, clamp, intervene, steer
from kronsae.metrics.figures import pearson, spearman
from kronsae.metrics.heldout import HeldoutText
from kronsae.metrics.target_model import (
    LoadedSAE,
    add_flags,
    given_data,
    load_saes,
    open_heldout,
)
from kronsae.model.sae import SAE
from kronsae.properties.contexts import short
from kronsae.runs.folder import RunFolder, versions
from kronsae.system.devices import resolve_device
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
    parser.add_argument("run", metavar="RUN", help="run folder, folder of a saved SAE, or hub id")
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
    text = parser.add_argument_group("text to generate")
    text.add_argument("--new-tokens", type=int, default=40, metavar="N", help="(default: 40)")
    text.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="of sampling (default: 0, the likeliest token)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of everything random"
    )
    effects = parser.add_argument_group("effects of latents, by ablation and by attribution")
    effects.add_argument(
        "--effects",
        type=int,
        metavar="N",
        help="measure N random latents that fire (or those of --latent)",
    )
    effects.add_argument(
        "--target",
        metavar="TOKEN",
        help="measure this token's logit after --prompt instead of the loss",
    )
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
    device = resolve_device(request.device)
    loaded_saes = load_saes([request.run], given_data(request), device)
    if len(loaded_saes) > 1:
        raise InputError(f"{request.run} is a sweep: name one of its members")
    [loaded] = loaded_saes
    if not measures:
        with quiet():
            model, _ = open_model(loaded.data, device)
        _generate(model, loaded.sae, request, console)
        return
    measure = _and_tests if request.effects is None else _effects
    measure(
        loaded,
        request,
        device,
        out,
        {
            "command": shlex.join(["kronsae", "intervene", *argv]),
            "versions": versions(),
            "seed": request.seed,
            "subject": loaded.source,
        },
        console,
    )


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


class Changed(NamedTuple):
    """A model's continuation of a prompt without and with edits."""

    before: str
    """The text that it generates without the edits."""
    after: str
    logits: Tensor
    """[V] float64: logits of the next token without the edits."""
    edited: Tensor
    """The same with the edits."""


@torch.no_grad()
def before_and_after(
    model: LanguageModel,
    sae: SAE,
    edits: Sequence[Edit],
    prompt: str,
    *,
    keep_error: bool = True,
    new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> Changed:
    """Generate from a prompt with and without the edits (see `intervene`), with the same seed.

    Raises InputError if the prompt has fewer than two tokens (the first is never changed).
    """
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]], device=model.device)
    if ids.shape[1] < 2:
        raise InputError(f"--prompt: expected two tokens at least, got {ids.shape[1]}")
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    if not temperature:
        options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    tokenizer, generate = model.tokenizer, cast(Any, model.model).generate
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), None)

    def run() -> tuple[str, Tensor]:
        logits = model.logits(ids)[0, -1].double().cpu()
        torch.manual_seed(seed)
        whole = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=pad,
            max_new_tokens=new_tokens,
            use_cache=True,
            **options,
        )
        return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True), logits

    with quiet():
        before, logits = run()
        with intervene(model, sae, edits, keep_error=keep_error):
            after, edited = run()
    return Changed(before, after, logits, edited)


def _generate(
    model: LanguageModel, sae: SAE, request: argparse.Namespace, console: Console
) -> None:
    if request.set is not None:
        edits = [clamp(latent, request.set) for latent in request.latent]
        done = f"set to {request.set:g}"
    elif request.add is not None:
        edits = [steer(latent, request.add) for latent in request.latent]
        done = f"steered by {request.add:g}"
    else:
        edits, done = [ablate(latent) for latent in request.latent], "ablated"
    changed = before_and_after(
        model,
        sae,
        edits,
        request.prompt,
        keep_error=not request.reconstruct,
        new_tokens=request.new_tokens,
        temperature=request.temperature,
        seed=request.seed,
    )
    latents = ", ".join(map(str, request.latent))
    error = "activations replaced by the reconstruction" if request.reconstruct else "error kept"
    console.print(f"latent {latents} {done} ({error}), except on the first token\n", style="bold")
    for name, text in (("before", changed.before), ("after", changed.after)):
        console.print(name, style="dim")
        console.print(Text(request.prompt, style="dim") + Text(text), end="\n\n")
    console.print(_next_tokens(changed, model.tokenizer))


def _next_tokens(changed: Changed, tokenizer: Any) -> Table:
    """Table of the next tokens whose probability changes most."""
    p, q = (logits.softmax(-1) for logits in (changed.logits, changed.edited))
    header = ("next token", "logit before", "after", "change", "probability before", "after")
    table = console_table(header)
    for token in (q - p).abs().topk(min(TABLE_ROWS, len(p))).indices.tolist():
        before, after = changed.logits[token].item(), changed.edited[token].item()
        table.add_row(
            Text(repr(token_texts([token], tokenizer)[0])),
            f"{before:.2f}",
            f"{after:.2f}",
            f"{after - before:+.2f}",
            f"{100 * p[token]:.2f} %",
            f"{100 * q[token]:.2f} %",
        )
    return table


# Effects


def _effects(
    loaded: LoadedSAE,
    request: argparse.Namespace,
    device: torch.device,
    out: Path,
    origin: dict[str, Any],
    console: Console,
) -> None:
    objective: Objective = summed_loss
    of = "loss"
    with quiet():
        if request.prompt is None:
            text = open_heldout(loaded, device)
        else:
            text = _of_prompt(loaded, request.prompt, device)
            token, of = _one_token(text.model.tokenizer, request.target)
            objective = last_logit(token)
    document = {
        "format": "kronsae-effects",
        **origin,
        "text": text.facts,
        "of": of,
        "unit": "nats a token on which the latent fires" if of == "loss" else "logits",
        **_measure_effects(loaded.sae, text, objective, request),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "effects.json", document)
    drawn = _draw_effects(document, out / "effects.png")
    _show_effects(document, console)
    console.print(f"In {out}: effects.json{', effects.png' if drawn else ''}", markup=False)


def _measure_effects(
    sae: SAE, text: HeldoutText, objective: Objective, request: argparse.Namespace
) -> dict[str, Any]:
    """Exact and attributed effects of latents, their correlations, and the time that they took."""
    began = time.perf_counter()
    encoded = encode_text(sae, text)
    firings = encoded.firings(sae)
    pairs = choose_pairs(
        firings, request.effects, request.contexts_each, request.seed, request.latent or ()
    )
    latents, group = pairs[:, 1].unique(return_inverse=True)
    if len(latents) < 2:
        raise InputError("fewer than two of these latents fire on this text")
    batch = min(16, text.contexts_per_batch)
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
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    mask = token_mask(ids, model.tokenizer)
    if not mask.any():
        raise InputError("--prompt: SAEs are trained on none of its tokens")
    return HeldoutText(model, ids, mask, 1, {"prompt": prompt, "tokens": int(mask.sum())})


def _one_token(tokenizer: Any, text: str) -> tuple[int, str]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(map(repr, token_texts(ids, tokenizer)))
        raise InputError(f"--target {text!r}: expected one token, got {len(ids)} ({pieces})")
    return ids[0], f"logit of {text!r}"


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
    seconds = document["seconds"]
    console.print(
        f"Attribution (gradient × activation) against ablation: Pearson {document['pearson']:.3f}, "
        f"Spearman {document['spearman']:.3f} over {len(effects)} latents; "
        f"attribution took {seconds['attribution']:.1f} s, ablation {seconds['ablation']:.1f} s"
    )


def _draw_effects(document: dict[str, Any], path: Path) -> bool:
    """Draw attributed against exact effects on symlog axes. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    effects = document["latents"]
    exact, attributed = ([effect[name] for effect in effects] for name in ("exact", "attributed"))
    sizes = sorted(abs(value) for value in exact + attributed)
    linear = max(sizes[len(sizes) // 4], 1e-12)  # a quarter of the values is in the linear part
    limit = 1.5 * sizes[-1]
    figure, axes = pyplot.subplots(figsize=(5.4, 5), layout="constrained")
    axes.plot([-limit, limit], [-limit, limit], color="#bbbbbb", linewidth=1)
    axes.scatter(exact, attributed, s=14, alpha=0.6, color="#4477aa", linewidths=0)
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("symlog", linthresh=linear)
        axis.set_major_locator(matplotlib.ticker.SymmetricalLogLocator(base=10, linthresh=linear))
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    axes.set_xlabel(f"ablation: change of the {document['of']}\n({document['unit']})")
    axes.set_ylabel("attribution: gradient × activation")
    axes.set_title(
        f"{len(effects)} latents, Pearson {document['pearson']:.3f}, "
        f"Spearman {document['spearman']:.3f}",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


# AND


def _and_tests(
    loaded: LoadedSAE,
    request: argparse.Namespace,
    device: torch.device,
    out: Path,
    origin: dict[str, Any],
    console: Console,
) -> None:
    with quiet():
        text = open_heldout(loaded, device)
    results = [and_test(loaded.sae, text, latent) for latent in request.latent]
    for result in results:
        _show_and_test(result, console)
    document = {
        "format": "kronsae-and-test",
        **origin,
        "text": text.facts,
        "latents": [
            result._asdict()
            | {"gate": result.gate._asdict(), "ablated": [x._asdict() for x in result.ablated]}
            for result in results
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "and-test.json", document)
    console.print(f"In {out}: and-test.json", markup=False)


def _show_and_test(result: AndTest, console: Console) -> None:
    gate = result.gate
    console.print(
        f"latent {result.latent} = head {result.head} (base {result.base} × extension "
        f"{result.extension})",
        style="bold",
    )
    console.print(
        f"base positive on {100 * gate.base:.2f} % of tokens, extension on "
        f"{100 * gate.extension:.2f} %, both on {100 * gate.both:.2f} %; the latent is active "
        f"on {100 * gate.fires:.2f} % ({result.tokens:,} tokens). Effects of ablations on these:"
    )
    header = ("", "off", "head's others", "lost", "gained", "loss", "KL", "elsewhere")
    table = console_table(header)
    for ablated in result.ablated:
        table.add_row(
            ablated.what,
            str(ablated.latents),
            f"{short(ablated.head_before)} → {short(ablated.head_after)}",
            f"{ablated.lost:.2f}",
            f"{ablated.gained:.2f}",
            f"{ablated.loss:+.4f}",
            f"{ablated.divergence:.4f}",
            f"{ablated.loss_elsewhere:+.5f}",
        )
    console.print(table)
    console.print(
        "off: silenced latents; head's others: summed activation of the head's other latents; "
        "lost: those that no longer fire; gained: latents of any head that fire instead; loss and "
        "KL divergence in nats per token; elsewhere: loss on the other tokens of these contexts\n",
        style="dim",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(work, argv)


if __name__ == "__main__":
    sys.exit(main())
