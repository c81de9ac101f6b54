"""What the command lines of the package share: strict flags, and errors in one line."""

import argparse
import dataclasses
import difflib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from kronsae.config import base_type
from kronsae.errors import InputError


class Terminated(BaseException):
    """SIGTERM came. No handler of mere errors may take it for one."""


AGAIN = 0.05
"""Seconds until a stop that Python dropped is raised again."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Terminated on SIGTERM and KeyboardInterrupt on SIGINT, so that neither is ever lost.

    So what is half-written is cleared away, and the user told how to go on. Python prints and drops
    what is raised inside a destructor or the callback of a weak reference: it is raised again a
    moment later, or at the end. An error that the work raises after the signal (other processes
    were stopped too, or a library was interrupted half-way) is raised as that stop, `from` the
    error. (Code that catches BaseException and goes on does lose it.)

    Outside of the main thread, where no signal arrives, nothing changes. An ignored signal stays
    so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    lost = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal lost
        lost = False
        if number != signal.SIGALRM:  # the alarm repeats the signal that came
            came.append(number)
        raise _exception_of(came[-1])

    def see_dropped(dropped: Any) -> None:
        nonlocal lost
        if came and isinstance(dropped.exc_value, KeyboardInterrupt | Terminated):
            lost = True
            before.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, stop))
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            hook(dropped)

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    hook, sys.unraisablehook = sys.unraisablehook, see_dropped
    try:
        yield
        if lost:
            raise _exception_of(came[-1])
    except Exception as error:
        if came:
            raise _exception_of(came[-1]) from error
        raise
    finally:
        sys.unraisablehook = hook
        if signal.SIGALRM in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            if signal.getsignal(number) is stop:  # and not one that came later, to stay
                signal.signal(number, handler)


def _exception_of(number: int) -> KeyboardInterrupt | Terminated:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def signal_of(error: KeyboardInterrupt | Terminated) -> signal.Signals:
    """The signal that raised it."""
    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


def stopped(error: KeyboardInterrupt | Terminated) -> str:
    """What to say of a stop, with the error that it was raised from, if there is one."""
    cause = error.__cause__
    after = "" if cause is None else f" (after it came {type(cause).__name__}: {cause})"
    return f"Stopped by {signal_of(error).name}{after}"


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
    """Do the work of a command line: 0 when it was done, 2 if what was asked for cannot work.

    128 + n: stopped by signal n.
    """
    try:
        with stoppable():
            work(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as error:
        print(stopped(error), file=sys.stderr)
        return 128 + signal_of(error)
    return 0


def add_flag(group: Any, spec: dataclasses.Field, several: bool = False) -> None:
    """The flag of a config field. several: it takes one value or more, and gives a list."""
    kind, _ = base_type(spec)
    default = "" if spec.default in (None, 0, False, "") else f" (default: {spec.default})"
    options: dict[str, Any] = {"help": (spec.metadata["help"] + default).replace("%", "%%")}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = kind
        options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
    if several and kind is not bool:
        options |= {"nargs": "+", "action": "extend"}
    if "choices" in spec.metadata:
        options["choices"] = spec.metadata["choices"]
        del options["metavar"]
    group.add_argument(f"--{spec.name.replace('_', '-')}", **options)
