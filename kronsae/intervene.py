"""`python -m kronsae.intervene RUN`: what changing latents does to a language model.

With --latent and --prompt: its text and next token before and after. With --effects: what each
latent's ablation does to the loss, exactly and estimated. With --and-test: a latent of a Kron head
against its base and its extension.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    exact_effects,
    last_logit,
    read,
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

TOP = 8
"""Next tokens in a table."""


def make_parser() -> Parser:
    parser = Parser(
        "intervene",
        "Change latents in a language model while it runs, and see what that does.",
        'kronsae intervene RUN --latent 107 --prompt "import os" --add 5\n'
        "kronsae intervene RUN --effects 20\n"
        "kronsae intervene RUN --latent 107 --and-test",
        usage="%(prog)s RUN (--latent N ... | --effects N) [flags]",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, folder of a saved SAE, or hub id")
    parser.add_argument("--latent", type=int, nargs="+", metavar="N", help="latents to change")
    parser.add_argument("--prompt", metavar="TEXT", help="what the model reads")
    edits = parser.add_argument_group("what to do to --latent (default: --ablate)")
    edits = edits.add_mutually_exclusive_group()
    edits.add_argument("--ablate", action="store_true", help="its value becomes 0")
    edits.add_argument("--set", type=float, metavar="X", help="its value becomes X, everywhere")
    edits.add_argument("--add", type=float, metavar="X", help="steer: X times its decoder row")
    parser.add_argument(
        "--reconstruct",
        action="store_true",
        help="put the reconstruction in the activations' place (default: keep the SAE's error)",
    )
    text = parser.add_argument_group("text to generate")
    text.add_argument("--new-tokens", type=int, default=40, metavar="N", help="(default: 40)")
    text.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 (default): the likeliest"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of whatever is drawn")
    effects = parser.add_argument_group("effects of latents, by ablation and by attribution")
    effects.add_argument(
        "--effects", type=int, metavar="N", help="of N latents that fire (or of --latent)"
    )
    effects.add_argument(
        "--target", metavar="TOKEN", help="on this token's logit after --prompt, not on the loss"
    )
    effects.add_argument(
        "--contexts-each", type=int, default=4, metavar="N", help="contexts a latent (default: 4)"
    )
    parser.add_argument(
        "--and-test",
        action="store_true",
        help="ablate the base, the extension and the composition of each --latent",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write --effects and --and-test"
    )
    add_flags(parser)
    return parser


def work(argv: list[str]) -> None:
    found = make_parser().parse(argv)
    _check(found)
    out = found.out
    if out is None and (found.effects is not None or found.and_test):
        out = Path("runs") / f"intervention-{time.strftime('%Y%m%d-%H%M%S')}"
    if out is not None:
        RunFolder.check_free(out)
    console = Console(highlight=False, soft_wrap=True)
    device = resolve_device(found.device)
    loaded_saes = load_saes([found.run], given_data(found), device)
    if len(loaded_saes) > 1:
        raise InputError(f"{found.run} is a sweep: name one of its members")
    [loaded] = loaded_saes
    made_with = {
        "command": shlex.join(["python", "-m", "kronsae.intervene", *argv]),
        "versions": versions(),
        "seed": found.seed,
    }
    if found.effects is not None:
        _effects(loaded, found, device, out, made_with, console)
    elif found.and_test:
        _and_tests(loaded, found, device, out, made_with, console)
    else:
        with quiet():
            model, _ = open_model(loaded.data, device)
        _generate(model, loaded.sae, found, console)


def _check(found: argparse.Namespace) -> None:
    """Raises InputError for flags that do not go together."""
    changes = found.ablate or found.set is not None or found.add is not None
    if found.effects is not None:
        wrong = {"--and-test": found.and_test, "--ablate, --set and --add": changes}
        wrong["--reconstruct"] = found.reconstruct
        if found.effects < 2:
            raise InputError(f"--effects: expected >= 2 latents to compare, got {found.effects}")
        if (found.target is None) != (found.prompt is None):
            raise InputError("--effects: --prompt and --target go together")
    elif found.and_test:
        wrong = {"--ablate, --set and --add": changes, "--reconstruct": found.reconstruct}
        wrong |= {"--prompt": found.prompt is not None, "--target": found.target is not None}
        if not found.latent:
            raise InputError("--and-test needs --latent")
    else:
        if found.prompt is None or not found.latent:
            raise InputError(
                "nothing to do: give --latent and --prompt, or --effects, or --and-test"
            )
        wrong = {"--target": found.target is not None, "--out": found.out is not None}
    for flag, given in wrong.items():
        if given:
            raise InputError(f"{flag} has no effect here: leave it out")


# Text


class Changed(NamedTuple):
    """What edits do to what a model says after a prompt."""

    before: str
    """The text that it generates."""
    after: str
    logits: Tensor
    """[V] float64: of the next token, without the edits."""
    edited: Tensor
    """The same with them."""


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
    """Generate from a prompt with and without the edits (see `intervene`), from one seed.

    Raises InputError if the prompt holds fewer than two tokens (the first is never changed).
    """
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]], device=model.device)
    if ids.shape[1] < 2:
        raise InputError(f"--prompt: expected two tokens at least, got {ids.shape[1]}")
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "use_cache": True}
    options |= {"do_sample": True, "temperature": temperature} if temperature else {}
    if not temperature:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    tokenizer = model.tokenizer
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), None)

    def run() -> tuple[str, Tensor]:
        logits = model.logits(ids)[0, -1].double().cpu()
        torch.manual_seed(seed)
        attention = torch.ones_like(ids)
        whole = model.model.generate(ids, attention_mask=attention, pad_token_id=pad, **options)
        return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True), logits

    with quiet():
        before, logits = run()
        with intervene(model, sae, edits, keep_error=keep_error):
            after, edited = run()
    return Changed(before, after, logits, edited)


def _generate(model: LanguageModel, sae: SAE, found: argparse.Namespace, console: Console) -> None:
    if found.set is not None:
        edits = [clamp(latent, found.set) for latent in found.latent]
        done = f"set to {found.set:g}"
    elif found.add is not None:
        edits = [steer(latent, found.add) for latent in found.latent]
        done = f"steered by {found.add:g}"
    else:
        edits, done = [ablate(latent) for latent in found.latent], "ablated"
    changed = before_and_after(
        model,
        sae,
        edits,
        found.prompt,
        keep_error=not found.reconstruct,
        new_tokens=found.new_tokens,
        temperature=found.temperature,
        seed=found.seed,
    )
    latents = ", ".join(map(str, found.latent))
    kept = "its reconstruction in the activations' place" if found.reconstruct else "error kept"
    console.print(f"latent {latents} {done} ({kept}), but for the first token\n", style="bold")
    for name, text in (("before", changed.before), ("after", changed.after)):
        console.print(name, style="dim")
        console.print(Text(found.prompt, style="dim") + Text(text), end="\n\n")
    console.print(_next_tokens(changed, model.tokenizer))


def _next_tokens(changed: Changed, tokenizer: Any) -> Table:
    """The next tokens whose probability changes most, and what that is in logits."""
    p, q = (logits.softmax(-1) for logits in (changed.logits, changed.edited))
    header = ("next token", "logit before", "after", "change", "probability before", "after")
    table = console_table(header)
    for token in (q - p).abs().topk(min(TOP, len(p))).indices.tolist():
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
    found: argparse.Namespace,
    device: torch.device,
    out: Path,
    made_with: dict[str, Any],
    console: Console,
) -> None:
    objective: Objective = summed_loss
    of = "loss"
    with quiet():
        if found.prompt is None:
            text = open_heldout(loaded, device)
        else:
            text = _of_prompt(loaded, found.prompt, device)
            token, of = _one_token(text.model.tokenizer, found.target)
            objective = last_logit(token)
    model, sae = text.model, loaded.sae
    began = time.perf_counter()
    encoded = read(sae, text)
    firings = encoded.firings(sae)
    pairs = choose_pairs(
        firings, found.effects, found.contexts_each, found.seed, found.latent or ()
    )
    if len(pairs[:, 1].unique()) < 2:
        raise InputError("fewer than two of these latents fire on this text")
    batch = min(16, text.contexts_per_batch)
    estimate = attributed_effects(model, sae, encoded, objective, batch)
    between = time.perf_counter()
    exact = exact_effects(model, sae, encoded, pairs, objective, batch)
    seconds = {"attribution": between - began, "ablation": time.perf_counter() - between}
    estimate, fired = (each[pairs[:, 0], pairs[:, 1]] for each in (estimate, firings))
    latents, place = pairs[:, 1].unique(return_inverse=True)
    tokens = torch.zeros(len(latents), dtype=torch.float64).index_add_(
        0, place, fired.cpu().double()
    )
    # Of one prompt the effect as a whole; of text, a token on which the latent fires.
    share = tokens if found.prompt is None else torch.ones_like(tokens)
    exact, estimate = (
        torch.zeros_like(tokens).index_add_(0, place, each.cpu().double()) / share
        for each in (exact, estimate)
    )
    document = {
        "format": "kronsae-effects",
        **made_with,
        "subject": loaded.source,
        "text": text.facts,
        "of": of,
        "unit": "nats a token on which the latent fires" if of == "loss" else "logits",
        "pearson": pearson(exact, estimate),
        "spearman": spearman(exact, estimate),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "latents": [
            {"latent": int(f), "tokens": int(t), "exact": e.item(), "attributed": a.item()}
            for f, t, e, a in zip(latents, tokens, exact, estimate, strict=True)
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "effects.json", document)
    drawn = _draw_effects(document, out / "effects.png")
    _show_effects(document, console)
    console.print(f"In {out}: effects.json{', effects.png' if drawn else ''}", markup=False)


def _of_prompt(loaded: LoadedSAE, prompt: str, device: torch.device) -> HeldoutText:
    model, _ = open_model(loaded.data, device)
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    mask = token_mask(ids, model.tokenizer)
    if not mask.any():
        raise InputError("--prompt: no token of it is one that SAEs are trained on")
    return HeldoutText(model, ids, mask, 1, {"prompt": prompt, "tokens": int(mask.sum())})


def _one_token(tokenizer: Any, text: str) -> tuple[int, str]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(map(repr, token_texts(ids, tokenizer)))
        raise InputError(f"--target {text!r}: expected one token, got {len(ids)} ({pieces})")
    return ids[0], f"logit of {text!r}"


def _show_effects(document: dict[str, Any], console: Console) -> None:
    found = sorted(document["latents"], key=lambda each: -abs(each["exact"]))
    table = console_table(("latent", "fires on (tokens)", "ablated", "attributed"), left=0)
    for each in found[:TOP]:
        figures = (f"{each[name]:+.4f}" for name in ("exact", "attributed"))
        table.add_row(str(each["latent"]), str(each["tokens"]), *figures)
    console.print(
        f"What ablating a latent does to the {document['of']} ({document['unit']}); the "
        f"{min(TOP, len(found))} strongest of {len(found)}",
        style="bold",
        markup=False,
    )
    console.print(table)
    seconds = document["seconds"]
    console.print(
        f"Attribution (gradient × activation) against ablation: Pearson {document['pearson']:.3f}, "
        f"Spearman {document['spearman']:.3f} over {len(found)} latents; "
        f"attribution took {seconds['attribution']:.1f} s, ablation {seconds['ablation']:.1f} s"
    )


def _draw_effects(document: dict[str, Any], path: Path) -> bool:
    """A point for each latent, on axes that show small and large effects; False: no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = document["latents"]
    exact, attributed = ([each[name] for each in found] for name in ("exact", "attributed"))
    sizes = sorted(abs(value) for value in exact + attributed)
    linear = max(sizes[len(sizes) // 4], 1e-12)  # a quarter of the values is on the linear part
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
        f"{len(found)} latents, Pearson {document['pearson']:.3f}, "
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
    found: argparse.Namespace,
    device: torch.device,
    out: Path,
    made_with: dict[str, Any],
    console: Console,
) -> None:
    with quiet():
        text = open_heldout(loaded, device)
    results = [and_test(loaded.sae, text, latent) for latent in found.latent]
    for result in results:
        _show_and_test(result, console)
    document = {
        "format": "kronsae-and-test",
        **made_with,
        "subject": loaded.source,
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
        f"{100 * gate.extension:.2f} %, both on {100 * gate.both:.2f} %; the latent is among the "
        f"active on {100 * gate.fires:.2f} % ({result.tokens:,} tokens). On these, if ablated:"
    )
    header = ("", "off", "head's others", "lost", "gained", "loss", "KL", "elsewhere")
    table = console_table(header)
    for each in result.ablated:
        table.add_row(
            each.what,
            str(each.latents),
            f"{short(each.head_before)} → {short(each.head_after)}",
            f"{each.lost:.2f}",
            f"{each.gained:.2f}",
            f"{each.loss:+.4f}",
            f"{each.divergence:.4f}",
            f"{each.loss_elsewhere:+.5f}",
        )
    console.print(table)
    console.print(
        "off: latents silenced; head's others: summed activation of its other latents; lost: those "
        "that no longer fire; gained: latents, anywhere, that fire instead; loss and KL divergence "
        "in nats a token, elsewhere: the loss on the other tokens of these contexts\n",
        style="dim",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(work, argv)


if __name__ == "__main__":
    sys.exit(main())
