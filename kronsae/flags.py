"""What the command lines of the package share: strict flags, and errors in one line."""

import argparse
import difflib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kronsae.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argparse parser that takes whole flags alone, and raises InputError for anything wrong."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The flags in `argv`; an unknown one is an error that names those like it."""
        found, unknown = self.parse_known_args(argv)
        if unknown:
            raise InputError(self.unknown(unknown[0]))
        return found

    def unknown(self, argument: str) -> str:
        """What to say of an argument that is none, with the flags like it."""
        flags = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(argument.split("=")[0], flags, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "--help lists all flags"
        return f"unknown argument {argument!r}: {hint}"


def exit_status(work: Callable[[list[str]], None], argv: Sequence[str] | None) -> int:
    """Do the work of a command line: 0 when it was done, 2 if what was asked for cannot work."""
    try:
        work(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
