"""`kronsae export SAE --to FORMAT`: write SAEs for another library, or push them to the hub.

SAE is anything that `kronsae.load` takes: a run folder, a folder of kronsae or of another library,
a hub id. So this also imports SAEs of other libraries (--to kronsae). Of a sweep's folder all
members are written, each to a folder that is named as the other library names those of a suite.
--to neuronpedia and sae_dashboard write what is known of a run's latents.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronsae.commandline import Parser, add_place_flags, exit_status, given_place, integer
from kronsae.config import kind_of
from kronsae.errors import InputError, warn
from kronsae.export.share import share
from kronsae.interop.formats import Format
from kronsae.interop.load import load
from kronsae.interop.suite import INDEX_NAME
from kronsae.model.sae import SAE
from kronsae.registry import DASHBOARDS, FORMATS
from kronsae.runs.folder import saved_members
from kronsae.system.files import replace_directory, write_json

VERIFY_TOKENS = 16_384


def _library(text: str) -> str:
    """A format's name from other spellings: saelens, SAE-Lens, dictionary-learning."""
    names = {name.replace("_", ""): name for name in (*FORMATS, *DASHBOARDS)}
    return names.get(re.sub("[_ -]", "", text.lower()), text)


def make_parser() -> Parser:
    parser = Parser(
        "export",
        "Write an SAE in the format of another library, or push it to the Hugging Face hub.",
        "kronsae export RUN --to sae_lens --out exported --verify\n"
        "kronsae export RUN --to hub --repo me/my-sae\n"
        "kronsae export SUITE --to sparsify --out exported\n"
        "kronsae export RUN --to neuronpedia --out exported",
        usage="%(prog)s SAE --to FORMAT (--out DIR | --repo OWNER/NAME) [flags]",
    )
    parser.add_argument(
        "source",
        metavar="SAE",
        help="run or sweep folder, folder of an SAE of any known format, or hub id",
    )
    parser.add_argument(
        "--members",
        nargs="+",
        metavar="NAME",
        help="members of a sweep to write (default: all that have an SAE)",
    )
    formats = (*(name for name, form in FORMATS.items() if form.written), *DASHBOARDS, "hub")
    parser.add_argument(
        "--to",
        required=True,
        type=_library,
        choices=formats,
        metavar="FORMAT",
        help=f"the library that will load it, or show its latents: {', '.join(formats)}",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (not with --to hub)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="load it in that library, and compare explained variance and L0 on the run's held-out "
        "tokens (without a run: on random vectors)",
    )
    parser.add_argument(
        "--tokens",
        type=integer,
        metavar="N",
        help=f"tokens to verify on (default: {VERIFY_TOKENS}), or "
        "on which to measure what is shown of latents",
    )
    add_place_flags(parser)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="with --verify, or to show latents: run code that comes with the model from the hub",
    )
    shown = parser.add_argument_group(f"with --to {' and '.join(DASHBOARDS)}")
    shown.add_argument(
        "--features", type=integer, nargs="+", metavar="N", help="latents to show (default: all)"
    )
    shown.add_argument(
        "--explanations",
        type=Path,
        metavar="DIR",
        help="what kronsae interpret wrote (default: RUN/explanations, if it is there)",
    )
    shown.add_argument(
        "--model-id", metavar="NAME", help="the model's name there (default: TransformerLens')"
    )
    shown.add_argument(
        "--source-set",
        metavar="NAME",
        help="the name of the SAEs of which it is one (default: for instance kronsae-res-4k)",
    )
    shown.add_argument("--creator", metavar="NAME", help="who made it (default: kronsae)")
    hub = parser.add_argument_group("with --to hub")
    hub.add_argument(
        "--repo", metavar="OWNER/NAME", help="repository; created if it does not exist"
    )
    hub.add_argument("--branch", metavar="NAME", help="branch to push to (default: main)")
    hub.add_argument("--private", action="store_true", help="make the repository private")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only if it succeeded.

    2: the request cannot work, or the verification failed.
    """
    return exit_status(_export, argv)


def _export(argv: list[str]) -> None:
    request = make_parser().parse(argv)
    _check(request)
    form = FORMATS[request.to] if request.to in FORMATS else None
    is_sweep = (Path(request.source) / INDEX_NAME).is_file() and request.subfolder is None
    if request.members and not is_sweep:
        raise InputError(f"--members has no effect: {request.source} is no sweep; leave it out")
    if request.to in DASHBOARDS:
        share(request, is_sweep)
        return
    if form is None:
        _push(request, is_sweep)
        return
    index: dict[str, Any] = {}
    if is_sweep:
        index, runs = saved_members(request.source, request.members)
        saes = {name: load(run) for name, run in runs.items()}
    else:
        saes = {"": _load(request)}
        if failed := saes[""].metadata.get("failed"):
            warn(f"{request.source} diverged ({failed})")
    folders = {name: request.out / folder for name, folder in _folders(saes, form).items()}
    if is_sweep:
        _write_suite(request.out, form, saes, index)
    else:
        form.write(saes[""], request.out)
    for name, sae in saes.items():
        kind = kind_of(dataclasses.asdict(sae.config))
        print(f"Wrote {folders[name]}: a {kind} for {form.library}")
    example = str(next(iter(folders.values())))
    inside_quotes = json.dumps(example, ensure_ascii=False)[1:-1]
    print("Load it with:", form.how_to_load.format(out=inside_quotes))
    if form.pickle:
        print("Its weights are a pickle, which kronsae.load reads with allow_pickle=True alone")
    for name, sae in saes.items() if request.verify else ():
        _verify(request, sae, folders[name])


def _load(request: argparse.Namespace) -> SAE:
    return load(request.source, revision=request.revision, **given_place(vars(request)))


def _folders(saes: dict[str, SAE], form: type[Format]) -> dict[str, str]:
    """The folder of each SAE: as the library names it, or by its own name if that is not unique."""
    if list(saes) == [""]:
        return {"": ""}
    folders = {name: form.folder_of(sae, name) for name, sae in saes.items()}
    return folders if len(set(folders.values())) == len(saes) else {name: name for name in saes}


def _write_suite(
    out: Path, form: type[Format], saes: dict[str, SAE], index: dict[str, Any]
) -> None:
    """Write all SAEs, or none if the format cannot hold one of them. index: of their sweep."""

    def write(part: Path) -> None:
        problems = {}
        for name, folder in _folders(saes, form).items():
            try:
                form.write(saes[name], part / folder)
            except InputError as error:
                problems[name] = error
        if problems:
            name, problem = next(iter(problems.items()))
            fitting = " ".join(other for other in saes if other not in problems)
            advice = f"; --members {fitting} writes those that fit" if fitting else ""
            raise InputError(f"{name}: {problem}. Nothing was written{advice}")
        if form is FORMATS["kronsae"]:  # by which `load` finds a layer
            write_json(part / INDEX_NAME, index)

    replace_directory(out, write)


def _push(request: argparse.Namespace, is_sweep: bool) -> None:
    from kronsae.hub import push

    # `push` finds the report in a run's folder.
    is_run = is_sweep or (Path(request.source) / "report.html").is_file()
    source = request.source if is_run else _load(request)
    url = push(
        source,
        request.repo,
        revision=request.branch,
        private=request.private,
        members=request.members,
    )
    where = f', subfolder="{(request.members or ["NAME"])[0]}"' if is_sweep else ""
    print(f'Pushed: {url}\nLoad it with: kronsae.load("{request.repo}"{where})')


def _check(request: argparse.Namespace) -> None:
    hub, shows = request.to == "hub", request.to in DASHBOARDS
    without_effect = {
        "--out": hub and request.out is not None,
        "--verify": (hub or shows) and request.verify,
        "--subfolder": shows and request.subfolder is not None,
        "--allow-pickle": shows and request.allow_pickle,
        "--revision": shows and request.revision is not None,
        "--repo": not hub and request.repo is not None,
        "--branch": not hub and request.branch is not None,
        "--private": not hub and request.private,
        **{
            f"--{name.replace('_', '-')}": not shows and getattr(request, name) is not None
            for name in ("features", "explanations", "model_id", "source_set", "creator")
        },
    }
    for flag, is_given in without_effect.items():
        if is_given:
            raise InputError(f"{flag} has no effect with --to {request.to}: leave it out")
    if hub and not request.repo:
        raise InputError("--to hub needs --repo OWNER/NAME")
    if not hub and request.out is None:
        raise InputError(f"--to {request.to} needs --out DIR, the folder to write")
    for flag, is_given in (
        ("--tokens", request.tokens is not None),
        ("--trust-remote-code", request.trust_remote_code),
    ):
        if is_given and not (request.verify or shows):
            raise InputError(f"{flag} has no effect without --verify: leave it out")
    if request.tokens is not None and request.tokens < 2:
        raise InputError(f"--tokens: expected at least 2, got {request.tokens}")
    if request.verify:
        from kronsae.export.verify import check_installed

        check_installed(request.to)


def _verify(request: argparse.Namespace, sae: SAE, folder: Path) -> None:
    from kronsae.export.verify import heldout_tokens, random_tokens, verify

    tokens = request.tokens or VERIFY_TOKENS
    heldout = heldout_tokens(sae, tokens, trust_remote_code=request.trust_remote_code)
    x, target, what = heldout or random_tokens(sae, tokens)
    result = verify(sae, folder, request.to, x, target)
    print(f"\nOn {result.tokens:,} {what}:")
    print(f"{'':28}{'explained variance':>20}{'L0':>12}")
    for figures in (result.before, result.after):
        print(f"{figures.library:28}{figures.explained_variance:20.6f}{figures.l0:12.4f}")
    print(
        "largest difference between coordinates of the reconstructions: "
        f"{result.largest_difference:.1e} standard deviations"
    )
    if not result.agrees:
        raise InputError(f"{result.after.library} gives other figures for {folder} than kronsae")


if __name__ == "__main__":
    sys.exit(main())
