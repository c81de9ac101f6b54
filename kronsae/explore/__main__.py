"""`python -m kronsae.explore RUN`: a page to look into a run's latents."""

import sys
from pathlib import Path

from kronsae.commandline import exit_status
from kronsae.explore.write import write_explorer
from kronsae.properties.run import PropertiesParser, examine, kept, open_run, say
from kronsae.system.files import check_writable


def work(argv: list[str]) -> None:
    """Write the page of a run. Raises InputError if it cannot be done."""
    parser = PropertiesParser(
        "explore",
        "Write one HTML file to look into the latents of a run. Their properties are measured "
        "first, unless RUN/properties/ has them.",
        "kronsae explore runs/MY-RUN",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page (default: RUN/explorer.html)"
    )
    settings, text, flags = parser.read(argv)
    run = flags["run"]
    out = flags.get("out", run / "explorer.html")
    check_writable(out.parent)
    sae, data, _ = open_run(run, text, flags["device"])
    stored = kept(run, settings, text)
    if stored is None:
        stored = examine(run, settings, text, flags["device"])
    from kronsae.data.loading import load_tokenizer

    common = {"revision": data.revision, "trust_remote_code": data.trust_remote_code}
    tokenizer = load_tokenizer(data.model, common)
    write_explorer(run, sae, stored, tokenizer, out)
    say(f"{out} ({out.stat().st_size / 2**20:.1f} MiB): open it in a browser")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(work, argv)


if __name__ == "__main__":
    sys.exit(main())
