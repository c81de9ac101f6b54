"""What the command line turns into a message: one exception, and one kind of warning."""

import warnings
from collections.abc import Container
from importlib import metadata
from typing import Any


class InputError(ValueError):
    """Input that cannot work: the message names what was expected, what came and what to do.

    Everything that a user can cause (a flag, a file, a dataset, a model name) raises this; a
    bug of ours raises something else and keeps its traceback.
    """


class Notice(UserWarning):
    """What a user should know while the work goes on."""


def warn(message: str) -> None:
    """Give a `Notice`, which a command line shows as one sentence."""
    warnings.warn(message, Notice, stacklevel=3)


def require(package: str, needed_by: str) -> None:
    """Raise InputError if `package` (a name on the index), which `needed_by` needs, is missing."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        message = f"{needed_by} needs the package {package}: pip install {package}"
        raise InputError(message) from None


def differences(was: Any, now: Any, name: str = "", ignored: Container[str] = ()) -> list[str]:
    """Lines "name: was X, is Y" for the settings that are not the same in two nested dicts.

    name: of the two as a whole; what is inside is named "NAME.KEY".  ignored: names to leave out.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(was.keys() | now.keys())
            for line in differences(
                was.get(key), now.get(key), f"{name}.{key}" if name else key, ignored
            )
        ]
    return [] if was == now or name in ignored else [f"{name}: was {_shown(was)}, is {_shown(now)}"]


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return f"{value:,}" if type(value) is int else repr(value)


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type, if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
