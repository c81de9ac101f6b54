"""Parts that all command lines share: strict flags, plugins, stops, and errors in one line."""

import argparse
import dataclasses
import difflib
import errno
import io
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NoReturn, get_args, get_origin

from kronsae.config import base_type
from kronsae.errors import InputError, Notice, first_line, warn
from kronsae.registry import SAE_KINDS, load_plugin
from kronsae.system.devices import seed_everything
from kronsae.system.documents import parse_json
from kronsae.system.files import usable_path
from kronsae.system.threads import limited_threads


class Terminated(BaseException):
    """Raised on SIGTERM or SIGHUP. A BaseException, so that no handler of errors catches it."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.number = number


STOPS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask a command to stop; SIGHUP comes when its terminal closes, unless under nohup."""

REPEAT_SECONDS = 0.05
"""Time after which a stop that Python dropped is raised again."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Terminated on SIGTERM and SIGHUP, KeyboardInterrupt on SIGINT, so that none is lost.

    Then half-written files are removed, and the user is told how to go on. Python prints and drops
    exceptions that are raised in a destructor or in the callback of a weak reference: a dropped
    stop is raised again a moment later, or at the end. If the work raises an error after the signal
    (other processes were stopped too, or a library was interrupted half-way), the stop is raised
    instead, `from` the error. (Code that catches BaseException and goes on does lose it.)

    Outside of the main thread, where no signal arrives, nothing changes. An ignored signal stays
    ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops = _Stops()
    try:
        yield
        if stops.dropped:
            raise stops.exception()
    except Exception as error:
        if stops.received:
            raise stops.exception() from error
        raise
    finally:
        stops.restore()


class _Stops:
    """Signal handlers of `stoppable`, and what has arrived.

    received: the signals that came.  dropped: True if Python dropped the last stop.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.dropped = False
        self.handlers = {
            number: signal.signal(number, self.stop)
            for number in STOPS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        self.hook, sys.unraisablehook = sys.unraisablehook, self.see_dropped

    def exception(self) -> KeyboardInterrupt | Terminated:
        return stop_of(self.received[-1])

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.dropped = False
        if number != signal.SIGALRM:  # the alarm repeats the signal that came
            self.received.append(number)
        raise self.exception()

    def see_dropped(self, unraisable: Any) -> None:
        if not self.received or not isinstance(
            unraisable.exc_value, KeyboardInterrupt | Terminated
        ):
            self.hook(unraisable)
            return
        self.dropped = True
        self.handlers.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, self.stop))
        signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS)

    def restore(self) -> None:
        sys.unraisablehook = self.hook
        if signal.SIGALRM in self.handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.handlers.items():
            if signal.getsignal(number) == self.stop:  # and not one that was set later, to stay
                signal.signal(number, handler)


def stop_of(number: int) -> KeyboardInterrupt | Terminated:
    """The exception for a signal of `STOPS`."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


def signal_of(error: KeyboardInterrupt | Terminated) -> signal.Signals:
    """The signal that raised it."""
    return signal.Signals(error.number) if isinstance(error, Terminated) else signal.SIGINT


def stopped(error: KeyboardInterrupt | Terminated) -> str:
    """A sentence about a stop, with the error that it was raised from, if there is one."""
    cause = error.__cause__
    after = "" if cause is None else f" (after it came {type(cause).__name__}: {cause})"
    return f"Stopped by {signal_of(error).name}{after}"


class Enduring:
    """A text stream that never raises: whatever cannot be written there is dropped.

    It may have no reader any more (`| head`), lie on a full disk, be closed, or know too few
    characters, in whose place it gets escapes.  lost: called once, with the error, when the stream
    fails though somebody may still read it.
    """

    def __init__(self, stream: Any, lost: Callable[[Exception], None] = lambda error: None) -> None:
        self.stream = open(os.devnull, "w") if stream is None else stream
        self.lost = lost
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._enduring():
            self.stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._enduring():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @contextmanager
    def _enduring(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            failed, self.stream = self.stream, open(os.devnull, "w")
            with suppress(OSError, ValueError):  # also what it holds back goes nowhere
                os.dup2(self.stream.fileno(), failed.fileno())
            if not isinstance(error, BrokenPipeError):
                self.lost(error)


@contextmanager
def as_command() -> Iterator[None]:
    """Set up threads and output of a command, and restore both; decorates every `main`.

    See `limited_threads` and `enduring_output`.
    """
    with limited_threads(), enduring_output():
        yield


@contextmanager
def enduring_output() -> Iterator[None]:
    """Let nothing that is printed end the work.

    If standard output fails, though it has a reader, standard error says so.
    """

    def tell(error: Exception) -> None:
        print(f"warning: what is printed from here on is lost: {error}", file=sys.stderr)

    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Enduring(sys.stdout, tell), Enduring(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


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
    """An argparse parser that does not abbreviate flags, and raises InputError for wrong ones.

    command: of `kronsae COMMAND`.  description: a sentence or two about it.
    example: one or more command lines, which its help shows.
    others: other libraries' flags, and our words for them.
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
        self.register("type", Path, _path)
        self.add_argument(
            "--plugin",
            action="append",
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="run this Python file first: it registers encoders, selections and other kinds of "
            "its own (may be given several times)",
        )

    def format_help(self) -> str:
        """The description, the example, and then every flag."""
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
        if message.startswith(tuple(f"argument --{kind}: invalid choice" for kind in SAE_KINDS)):
            message += "; a kind of your own is registered by --plugin FILE"
        raise InputError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but InputError for an empty value, and a warning of a flag given twice."""
        given: dict[str, str] = {}
        last = ""
        for argument in sys.argv[1:] if args is None else args:
            name, equals, value = argument.partition("=")
            action = self._option_string_actions.get(name)
            if action is not None:
                last, before = name, given.get(action.dest)
                if before is not None:
                    twice = f"{name} is given twice" if before == name else f"{before} and {name}"
                    several = isinstance(action, argparse._AppendAction)  # or one that extends
                    warn(f"{twice}: {'the values of both count' if several else 'the last counts'}")
                given[action.dest] = name
            if not argument or equals and not value and action is not None:
                place = f"{last}: " if last else ""
                raise InputError(f"{place}expected a value, got an empty string")
        return super().parse_known_args(args, namespace)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The flags in `argv`; an unknown one is an error that names those like it."""
        options, unknown = self.parse_known_args(argv)
        if unknown:
            raise InputError(self.unknown(unknown[0]))
        return options

    def unknown(self, argument: str) -> str:
        """The error for an unknown argument, with the flags like it."""
        name = argument.split("=")[0].replace("_", "-")
        if name in self.others:
            return f"unknown argument {argument!r}: here it is {self.others[name]}"
        flags = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        close = [f"--{flag}" for flag in difflib.get_close_matches(name.lstrip("-"), flags, n=3)]
        hint = f"did you mean {' or '.join(close)}?" if close else "--help lists all flags"
        return f"unknown argument {argument!r}: {hint}"


def _path(text: str) -> Path:
    """The path that a flag names."""
    try:
        return usable_path(text, "path")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


_format_any_warning = warnings.formatwarning


def _format_warning(message: Any, category: type[Warning], *where: Any, **line: Any) -> str:
    if issubclass(category, Notice):
        return f"warning: {message}\n"
    return _format_any_warning(message, category, *where, **line)


def load_plugins(argv: Sequence[str] | None) -> list[str]:
    """Run the files that --plugin names, before a parser is made: they may add flags to it.

    From now on a `Notice` is shown as one sentence, without the line of code that gave it.
    Returns the other arguments (by default those of the process).
    """
    warnings.formatwarning = _format_warning
    rest, arguments = [], iter(sys.argv[1:] if argv is None else argv)
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if name != "--plugin":
            rest.append(argument)
            continue
        path = path if equals else next(arguments, "")
        if not path:
            raise InputError("--plugin: expected one argument, a Python file")
        load_plugin(path)
    return rest


DISK = ("EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "ENAMETOOLONG", "EIO")
MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "can't start new thread")
"""What torch, C++ and Python say if there is none left."""


def of_machine(error: Exception) -> str | None:
    """A sentence about an error of the disk or the memory; None for one that needs a traceback."""
    name = errno.errorcode.get(getattr(error, "errno", None) or 0)
    if isinstance(error, OSError) and name in DISK:
        return f"the disk does not let this command go on: {error}"
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in MEMORY)
    if said or isinstance(error, MemoryError) or name == "ENOMEM":
        reason = first_line(error)
        return (
            f"there is not enough memory ({reason}): take smaller settings, or a higher limit "
            "(ulimit -v) if this process has one"
        )
    return None


def status_of(error: Exception) -> int:
    """Say what a user can solve; returns the exit status, 2. Raises any other error again."""
    reason = str(error) if isinstance(error, InputError) else of_machine(error)
    if reason is None:
        raise error
    print(f"error: {reason}", file=sys.stderr)
    return 2


@as_command()
def exit_status(work: Callable[[list[str]], None], argv: Sequence[str] | None) -> int:
    """Run `work` with the arguments of a command line; returns the exit status.

    0: done. 2: the arguments or the data cannot be used. 128 + n: stopped by signal n.
    """
    try:
        with stoppable():
            rest = load_plugins(argv)
            seed_everything(0)  # a command with a --seed takes that
            work(rest)
    except Exception as error:
        return status_of(error)
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


integer.__name__ = "int"  # for argparse's messages


def shown(value: Any) -> str:
    """A default as help texts show it: 131_072, float32, on."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:_}" if isinstance(value, int) else str(value)


def add_place_flags(parser: Any) -> None:
    """Add flags that say where in a folder or repository an SAE is, and how it is read."""
    parser.add_argument(
        "--subfolder", metavar="NAME", help="folder or file in SAE that holds it, such as layers.6"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read weights that are a pickle, from which only tensors are loaded",
    )


def given_place(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of `add_place_flags` that were given, as arguments of `kronsae.load`."""
    return {name: flags[name] for name in ("subfolder", "allow_pickle") if flags.get(name)}


def layers(text: str) -> int | range | str:
    """A layer ("3"), several in a row ("0-11"), or "all". Raises ArgumentTypeError otherwise."""
    first, dash, last = text.partition("-")
    if text == ALL:
        return text
    if first.isdecimal() and last.isdecimal():
        if int(first) > int(last):
            raise argparse.ArgumentTypeError(f"expected the first layer before the last: {text!r}")
        return range(int(first), int(last) + 1)
    if first.isdecimal() and not dash:
        return int(first)
    raise argparse.ArgumentTypeError(f"expected a layer (3), several (0-11) or all, got {text!r}")


def json_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises ArgumentTypeError for anything else."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object ({error}): {text}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, such as {{...}}: {text}")
    return value


PARSERS: dict[str, Callable[[str], Any]] = {"layers": layers, "json": json_object}
"""How the text of a flag is read, by `parse` of its `kronsae.config.setting`."""

ALL = "all"
"""All layers of a language model, or of a cache."""


def add_flag(
    group: Any,
    spec: dataclasses.Field[Any],
    *,
    name: str | None = None,
    several: bool = False,
    help: str | None = None,
    default: str | None = None,
) -> None:
    """Add the flag of a config field to a group; the parser omits flags that are not given.

    name, help: in place of the field's.  default: to be shown in place of the field's.
    several: True for a flag of one value or more, which gives a list; also if the field is a tuple.
    """
    usual: Any = spec.default
    if default is None:
        default = "" if usual in (None, 0, False, "", ()) else shown(usual)
    text = (help or spec.metadata["help"]) + (f" (default: {default})" if default else "")
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    kind, is_tuple = base_type(spec)[0], False
    if get_origin(kind) is tuple or isinstance(usual, tuple):
        kind, is_tuple = (get_args(kind) or (type(usual[0]),))[0], True
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        parse = PARSERS.get(spec.metadata.get("parse", ""), kind)
        options["type"] = integer if parse is int else parse
        options["metavar"] = {int: "N", float: "X", str: "NAME"}.get(kind, "JSON")
        if several or is_tuple:
            options |= {"nargs": "+", "action": "extend"}
    if "choices" in spec.metadata:
        options["choices"] = tuple(spec.metadata["choices"])
        del options["metavar"]
    group.add_argument(f"--{(name or spec.name).replace('_', '-')}", dest=spec.name, **options)
