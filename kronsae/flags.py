"""What the command lines of the package share: strict flags, and errors in one line."""

import argparse
import difflib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from kronsae.errors import InputError


class Terminated(BaseException):
    """SIGTERM came. No handler of mere errors may take it for one."""


@contextmanager
def sigterm() -> Iterator[None]:
    """Raise Terminated on SIGTERM, as Python raises KeyboardInterrupt on SIGINT.

    So what is half-written is cleared away, and the user told how to go on. Outside of the main
    thread, where no signal arrives, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:  # and not one that came later, to stay
            signal.signal(signal.SIGTERM, before)


def signal_of(error: KeyboardInterrupt | Terminated) -> int:
    """The signal that raised it."""
    return int(signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


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
