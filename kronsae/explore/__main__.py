"""`python -m kronsae.explore RUN`: a page to look into a run's latents."""

import sys
from pathlib import Path

from kronsae.commandline import exit_status, given_place, integer
from kronsae.errors import InputError
from kronsae.explore.site import write_site
from kronsae.explore.write import write_explorer
from kronsae.features.card import card, check_file
from kronsae.interop.load import load
from kronsae.interop.suite import INDEX_NAME
from kronsae.properties.run import PropertiesParser, is_run, open_properties, say
from kronsae.properties.store import FOLDER
from kronsae.system.files import check_writable


def work(argv: list[str]) -> None:
    """Write the page of a run. Raises InputError if it cannot be done."""
    parser = PropertiesParser(
        "explore",
        "Write one HTML file to look into the latents of a run, or of another SAE. Their "
        "properties are measured first, unless RUN/properties/ has them (for another SAE: "
        "properties/ beside --out).",
        "kronsae explore runs/MY-RUN\n"
        "kronsae explore SAE --model gpt2 --layer 6 --dataset text.jsonl --out sae.html\n"
        "kronsae explore runs/MY-RUN --feature 537 --out card.png\n"
        "kronsae explore runs/MY-SUITE --out pages",
        saes=True,
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="page (default: RUN/explorer.html); of a sweep or suite: a folder of pages",
    )
    parser.add_argument(
        "--feature",
        type=integer,
        metavar="N",
        help="write the card of this latent instead, as .html or .png (default: "
        "RUN/feature-N.html)",
    )
    settings, text, flags = parser.read(argv)
    run = flags["run"]
    if (run / INDEX_NAME).is_file() and "subfolder" not in flags:
        if "feature" in flags or "out" not in flags:
            raise InputError(
                f"{run} is a sweep: give --out FOLDER for the pages of all members, or give the "
                "folder of one member"
            )
        say(f"{write_site(run, settings, text, flags['device'], flags['out'])}: open it")
        return
    of_run = is_run(run)
    place = given_place(flags)
    if not of_run and "out" not in flags:
        load(str(run), **place)  # says what is wrong with it, if it is none
        raise InputError(f"{run} is no run: give --out FILE, in a folder for this SAE's properties")
    feature = flags.get("feature")
    name = "explorer.html" if feature is None else f"feature-{feature}.html"
    out = flags.get("out", run / name)
    check_writable(out.parent)
    if feature is not None:
        check_file(out)
    folder = (run if of_run else out.parent) / FOLDER
    sae, data, stored, tokenizer = open_properties(
        run,
        settings,
        text,
        flags["device"],
        folder,
        lambda sae: sae.check_latents([] if feature is None else [feature]),
        **place,
    )
    if feature is not None:
        say(f"{card(sae, stored, feature, tokenizer).write(out)}: the card of latent {feature}")
        return
    write_explorer(run, sae, stored, tokenizer, out, None if of_run else data)
    say(f"{out} ({out.stat().st_size / 2**20:.1f} MiB): open it in a browser")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(work, argv)


if __name__ == "__main__":
    sys.exit(main())
