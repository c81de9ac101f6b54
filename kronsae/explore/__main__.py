"""`python -m kronsae.explore RUN`: a page to look into a run's latents."""

import sys
from pathlib import Path

from kronsae.commandline import exit_status, given_place
from kronsae.errors import InputError
from kronsae.explore.write import write_explorer
from kronsae.interop.load import load
from kronsae.properties.run import PropertiesParser, examine, is_run, kept, open_run, say
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
        "kronsae explore SAE --model gpt2 --layer 6 --dataset text.jsonl --out sae.html",
        saes=True,
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page (default: RUN/explorer.html)"
    )
    settings, text, flags = parser.read(argv)
    run = flags["run"]
    of_run = is_run(run)
    place = given_place(flags)
    if not of_run and "out" not in flags:
        load(str(run), **place)  # says what is wrong with it, if it is none
        raise InputError(f"{run} is no run: give --out FILE, in a folder for this SAE's properties")
    out = flags.get("out", run / "explorer.html")
    check_writable(out.parent)
    folder = (run if of_run else out.parent) / FOLDER
    sae, data, digest = open_run(run, text, flags["device"], **place)
    stored = kept(folder, digest, settings, text)
    if stored is None:
        stored = examine(run, settings, text, flags["device"], folder, **place)
    from kronsae.data.loading import find_tokenizer

    common = {"revision": data.revision, "trust_remote_code": data.trust_remote_code}
    tokenizer = find_tokenizer(data.model, common)
    write_explorer(run, sae, stored, tokenizer, out, None if of_run else data)
    say(f"{out} ({out.stat().st_size / 2**20:.1f} MiB): open it in a browser")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(work, argv)


if __name__ == "__main__":
    sys.exit(main())
