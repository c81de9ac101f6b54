"""What the command lines of the package share: strict flags, and errors in one line."""

import argparse
import dataclasses
import difflib
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from types import FrameType, MappingProxyType
from typing import Any, NoReturn, get_args, get_origin

from kronsae.config import base_type
from kronsae.errors import InputError
from kronsae.registry import load_plugin


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


class _Formatter(argparse.HelpFormatter):
    """Help of at most 80 columns, whatever the terminal has."""

    def __init__(self, prog: str) -> None:
        width = min(80, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=26, width=width)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """One value or more as "N ...": the choices of a flag are long enough once."""
        if action.nargs != "+":
            return super()._format_args(action, default_metavar)
        [metavar] = self._metavar_formatter(action, default_metavar)(1)
        return f"{metavar} ..."


class Parser(argparse.ArgumentParser):
    """An argparse parser that takes whole flags alone, and raises InputError for anything wrong.

    command: of `kronsae COMMAND`.  description: what it does, in a sentence or two.
    example: a command line or several, which its help shows beneath.
    others: what other libraries call a flag, and what to say of it here.
    """

    def __init__(
        self,
        command: str,
        description: str,
        example: str,
        others: Mapping[str, str] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        super().__init__(
            prog=f"kronsae {command}",
            description=description,
            formatter_class=_Formatter,
            allow_abbrev=False,
            **options,
        )
        self.example = example
        self.others = others
        self.add_argument(
            "--plugin",
            action="append",
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="run this Python file first: it registers encoders, selections and other kinds of "
            "its own (may be given several times)",
        )

    def format_help(self) -> str:
        """What it does, an example, and then every flag."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        lines = "".join(f"\n  {line}" for line in self.example.splitlines())
        opening = f"{formatter.format_help()}\nExample:{lines}\n\n"
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return opening + formatter.format_help()

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
        name = argument.split("=")[0].replace("_", "-")
        if name in self.others:
            return f"unknown argument {argument!r}: here it is {self.others[name]}"
        flags = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(name, flags, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "--help lists all flags"
        return f"unknown argument {argument!r}: {hint}"


def load_plugins(argv: Sequence[str] | None) -> list[str]:
    """Run the files that --plugin names, before a parser is made: they may add flags to it.

    Returns the other arguments (by default those of the process).
    """
    rest, argv = [], iter(sys.argv[1:] if argv is None else argv)
    for argument in argv:
        name, given, path = argument.partition("=")
        if name != "--plugin":
            rest.append(argument)
            continue
        path = path if given else next(argv, "")
        if not path:
            raise InputError("--plugin: expected one argument, a Python file")
        load_plugin(path)
    return rest


def exit_status(work: Callable[[list[str]], None], argv: Sequence[str] | None) -> int:
    """Do the work of a command line: 0 when it was done, 2 if what was asked for cannot work.

    128 + n: stopped by signal n.
    """
    try:
        with stoppable():
            work(load_plugins(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as error:
        print(stopped(error), file=sys.stderr)
        return 128 + signal_of(error)
    return 0


def integer(text: str) -> int:
    """A whole number as people write them: 4096, 4_096, 1e6, 500k, 1.5M, 2B."""
    unit = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        value = Decimal(text[:-1] if unit > 1 else text) * unit
        if abs(value) < 10**40 and value == int(value):
            return int(value)
    except ArithmeticError:  # no number
        pass
    raise ValueError(text)


integer.__name__ = "int"  # which argparse says in its messages


def shown(value: Any) -> str:
    """A default in a help text: 131_072, float32, on."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:_}" if isinstance(value, int) else str(value)


def add_flag(
    group: Any,
    spec: dataclasses.Field[Any],
    *,
    name: str | None = None,
    several: bool = False,
    help: str | None = None,
    default: str | None = None,
) -> None:
    """The flag of a config field, which a parser leaves out of what it found if it is not given.

    name, help: in place of the field's.  default: to be shown in place of the field's.
    several: it takes one value or more, and gives a list, as for a field that is a tuple.
    """
    if default is None:
        default = "" if spec.default in (None, 0, False, "", ()) else shown(spec.default)
    text = (help or spec.metadata["help"]) + (f" (default: {default})" if default else "")
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    kind, is_tuple = base_type(spec)[0], False
    if get_origin(kind) is tuple or isinstance(spec.default, tuple):
        kind, is_tuple = (get_args(kind) or (type(spec.default[0]),))[0], True
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = integer if kind is int else kind
        options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
        if several or is_tuple:
            options |= {"nargs": "+", "action": "extend"}
    if "choices" in spec.metadata:
        options["choices"] = tuple(spec.metadata["choices"])
        del options["metavar"]
    group.add_argument(f"--{(name or spec.name).replace('_', '-')}", dest=spec.name, **options)
