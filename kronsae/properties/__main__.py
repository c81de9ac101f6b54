"""`python -m kronsae.properties RUN`: measure what a run's latents do on a text."""

import sys
from typing import Any

from kronsae.commandline import exit_status
from kronsae.properties.run import PropertiesParser, examine, say


def work(argv: list[str]) -> None:
    """What the command line asks for. Raises InputError if it cannot be done."""
    parser = PropertiesParser(
        "properties",
        "Measure what the latents of a run do on a text, in one pass over it, into "
        "RUN/properties/. [KronSAE, App. D]",
        "kronsae properties runs/MY-RUN --tokens 1M",
    )
    settings, text, flags = parser.read(argv)
    stored = examine(flags["run"], settings, text, flags["device"], say)
    for line in describe(stored.facts["summary"]):
        print(line)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 only when the work was done."""
    return exit_status(work, argv)


def describe(summary: dict[str, Any]) -> list[str]:
    """The medians as a table."""
    lines = [f"{'':10}{'fire':>16}{'frequency':>12}{'mean':>9}{'entropy':>9}{'multitoken':>12}"]
    for name, group in summary["groups"].items():
        medians = [group[key][1] if group[key] else float("nan")
                   for key in ("frequency", "mean", "entropy", "multitoken")]  # fmt: skip
        frequency, mean, entropy, multitoken = medians
        lines.append(
            f"{name:10}{group['fire']:>8,}/{group['count']:<7,}{100 * frequency:>10.3g} %"
            f"{mean:>9.3g}{entropy:>9.3g}{multitoken:>12.3g}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
