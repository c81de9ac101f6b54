"""`python -m kronsae.explore RUN`: a page to look into a run's latents."""

import sys
from contextlib import nullcontext
from pathlib import Path
from socket import socket
from typing import Any

from kronsae.commandline import exit_status, given_place, integer
from kronsae.errors import InputError, warn
from kronsae.explore.report import EXPLORER, link_explorer
from kronsae.explore.serve import bound, serve_run
from kronsae.explore.site import write_site
from kronsae.explore.write import write_explorer
from kronsae.features.card import card, check_file
from kronsae.interop.suite import INDEX_NAME
from kronsae.properties.examples import WINDOW
from kronsae.properties.labels import FILE, Labels, labels_beside, read_labels, write_labels
from kronsae.properties.run import (
    PropertiesParser,
    is_run,
    member_named,
    open_properties,
    open_run,
    say,
)
from kronsae.system.files import check_writable


def make_parser() -> PropertiesParser:
    parser = PropertiesParser(
        "explore",
        "Write one HTML file to look into the latents of a run, or of another SAE. Their "
        "properties are measured first, unless RUN/properties/ has them (of another SAE: "
        "runs/explored/NAME/properties/).",
        "kronsae explore runs/MY-RUN --labels explanations\n"
        "kronsae explore runs/MY-RUN --serve\n"
        "kronsae explore SAE --model gpt2 --layer 6 --dataset text.jsonl\n"
        "kronsae explore runs/MY-RUN --feature 537 --out card.png\n"
        "kronsae explore runs/MY-SUITE --out pages",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="page (default: explorer.html in RUN, or in runs/explored/NAME); of a sweep or "
        "suite: a folder of pages",
    )
    parser.add_argument(
        "--feature",
        type=integer,
        metavar="N",
        help="write the card of this latent instead, as .html or .png (default: "
        "RUN/feature-N.html)",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        action="append",
        metavar="PATH",
        help="labels of latents: the --out of kronsae interpret, or a labels.json that a page "
        f"saved. They are kept in {FILE} beside the run, which each page shows",
    )
    served = parser.add_argument_group("the page with the language model behind it")
    served.add_argument(
        "--serve",
        action="store_true",
        help="serve the page on this machine in place of writing it: type a text and see which "
        "features fire, steer them, ablate a latent, its base or its extension",
    )
    served.add_argument(
        "--host",
        metavar="NAME",
        help="address to serve on (default: 127.0.0.1, which only this machine reaches)",
    )
    served.add_argument(
        "--port", type=integer, metavar="N", help="its port (default: one that is free)"
    )
    return parser


def work(argv: list[str]) -> None:
    """Write or serve the page of a run. Raises InputError if it cannot be done."""
    settings, text, flags = make_parser().read(argv)
    serves = flags.get("serve", False)
    for name in ("out", "feature") if serves else ("host", "port"):
        if name in flags:
            reason = "with --serve" if serves else "without --serve"
            raise InputError(f"--{name} has no effect {reason}: leave it out")
    address = flags.pop("host", "127.0.0.1"), flags.pop("port", 0)
    with bound(*address) if serves else nullcontext() as door:
        _explore(settings, text, flags, door)


def _explore(
    settings: dict[str, Any], text: dict[str, Any], flags: dict[str, Any], door: socket | None
) -> None:
    """Write what the flags ask for, or serve it behind the door."""
    if "out" in flags:
        check_writable(flags["out"].parent)
    run, text, place = member_named(flags["run"], text, given_place(flags))
    if (run / INDEX_NAME).is_file() and "subfolder" not in place:
        if flags.keys() & {"feature", "serve", "labels"} or "out" not in flags:
            raise InputError(
                f"{run} is a sweep: give --out FOLDER for the pages of all members, or name one "
                "member: its folder, or --layer or --hookpoint if that tells which"
            )
        say(f"{write_site(run, settings, text, flags['device'], flags['out'])}: open it")
        return
    feature, given = flags.get("feature"), flags.get("labels", [])
    opened = open_run(run, text, flags["device"], **place)
    home, of_run = opened.folder.parent, is_run(run)
    out = flags.get("out", home / (EXPLORER if feature is None else f"feature-{feature}.html"))
    if door is None:
        check_writable(out.parent)
    if feature is not None:
        check_file(out)
        opened.sae.check_latents([feature])
    for source in given:
        read_labels(source, opened.sae.dict_size, None)
    sae, data, stored, tokenizer = open_properties(opened, settings)
    labels = _labels(given, home, sae.dict_size, opened.digest)
    if door is None:
        out.parent.mkdir(parents=True, exist_ok=True)
    if feature is not None:
        label = labels[feature].text if feature in labels else None
        made = card(sae, stored, feature, tokenizer, label).write(out)
        say(f"{made}: the card of latent {feature}")
        return
    if stored.properties.post.intervals is None:
        _say_what_is_missing(opened.folder)
    about, activations = (run, sae, stored, tokenizer), None if of_run else data
    if door is not None:
        serve_run(*about, activations, labels, data, home / FILE, door)
        return
    write_explorer(*about, out, activations, labels)
    if of_run and out == run / EXPLORER:
        link_explorer(run)
    say(f"{out} ({out.stat().st_size / 2**20:.1f} MiB): open it in a browser")


def _labels(given: list[Path], folder: Path, latents: int, digest: str) -> Labels:
    """The labels beside a run, after those of --labels have been added to them.

    A label by a person is not replaced with one that a model wrote.
    """
    labels = labels_beside(folder, latents, digest)
    for source in given:
        for latent, label in read_labels(source, latents, digest).items():
            if not label.by or latent not in labels or labels[latent].by:
                labels[latent] = label
    if given:
        write_labels(labels, folder / FILE, digest)
        say(f"{folder / FILE}: {len(labels):,} label{'s' if len(labels) != 1 else ''}")
    return labels


def _say_what_is_missing(folder: Path) -> None:
    warn(
        f"{folder} was measured by an older version: the page has no examples by activation "
        f"interval, and only {WINDOW} tokens of each example. Move the folder away to measure anew"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(work, argv)


if __name__ == "__main__":
    sys.exit(main())
