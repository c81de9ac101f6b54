"""`python -m kronsae.properties RUN`: measure what a run's latents do on a text."""

import math
import sys
from typing import Any

from kronsae.commandline import exit_status, given_place
from kronsae.properties.run import PropertiesParser, examine, member_named, open_run
from kronsae.system.tables import aligned


def work(argv: list[str]) -> None:
    """Measure and print. Raises InputError if it cannot be done."""
    parser = PropertiesParser(
        "properties",
        "Measure what the latents of a run do on a text, in one pass over it, into "
        "RUN/properties/ (of another SAE: into runs/explored/NAME/properties/). [KronSAE, App. D]",
        "kronsae properties runs/MY-RUN --tokens 1M",
    )
    settings, text, flags = parser.read(argv)
    run, text, place = member_named(flags["run"], text, given_place(flags))
    opened = open_run(run, text, flags["device"], **place)
    stored = examine(opened, settings)
    print(f"{medians(stored.facts['summary'])}\n{opened.folder}: what was measured")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(work, argv)


def medians(summary: dict[str, Any]) -> str:
    """The medians over latents, bases and extensions that fire, as a table."""
    return aligned(
        ("", "fire", "frequency", "mean", "entropy", "multitoken"),
        [
            (
                name,
                f"{group['fire']:,} of {group['count']:,}",
                f"{100 * _median(group['frequency']):.3g} %",
                *(f"{_median(group[key]):.3g}" for key in ("mean", "entropy", "multitoken")),
            )
            for name, group in summary["groups"].items()
        ],
    )


def _median(quartiles: list[float]) -> float:
    return quartiles[1] if quartiles else math.nan


if __name__ == "__main__":
    sys.exit(main())
