"""JSON documents, which people edit, and values that are held to type hints.

`parse_json` and `read_json` are the only places that read a document; `typed` says whether what is
in it, or what a caller gave, has the types expected.
"""

import json
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from kronsae.errors import InputError

MAX_DEPTH = 64
"""Objects and lists inside each other that a document may have."""
MAX_DIGITS = 300
"""Digits of a whole number in a document: all of these are finite as floats."""


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises OSError, or ValueError as `parse_json` does."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """The JSON value in a text. Raises ValueError if there is none, or not one alone.

    That is also so if an object has a key twice (readers differ in which of them they take), for
    NaN, infinity, numbers as large, lone surrogates, and more than MAX_DEPTH levels.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError:
        raise ValueError(f"it has more than {MAX_DEPTH} levels") from None
    _check_depth(value, MAX_DEPTH)
    if b"\\u" in text if isinstance(text, bytes) else "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # raises ValueError for lone surrogates
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice: take one of them out")
    return values


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{shown(text)} has too many digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _check_depth(value: Any, levels: int) -> None:
    if isinstance(value, (dict, list)):
        if not levels:
            raise ValueError(f"it has more than {MAX_DEPTH} levels")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, levels - 1)


def to_json(value: Any, what: str, indent: int | None = 2) -> str:
    """`value` as JSON. Raises InputError, which names `what`, if it is no JSON value."""
    try:
        text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{what}: expected JSON values (text, finite numbers, true, false, null, and lists and "
            f"objects of these), got others: {error}"
        ) from error
    return text


def part_of(document: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A nested JSON object, {} if there is none (files are not trusted)."""
    part: Any = document
    for name in names:
        part = part.get(name) if isinstance(part, Mapping) else None
    return part if isinstance(part, dict) else {}


@dataclass(frozen=True)
class Keys:
    """A type hint for an object: hints of the values at its keys. Keys beside these are let be."""

    required: Mapping[str, Any]
    others: Mapping[str, Any] = field(default_factory=dict)
    null: bool = False
    """Whether null may be in its place."""


@dataclass(frozen=True)
class Number:
    """A type hint for a number (int or float) from `least` to `most`."""

    kind: type
    least: float = 0
    most: float = 2**53
    null: bool = False
    """Whether null may be in its place."""


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "an object",
    list: "a list",
}
"""Types in messages."""


def typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type hint says. Raises InputError, which begins with `name`, if it is not.

    name: of the value ("": a whole document).

    An integer may be given as a float without a fraction, a number as one of numpy or as a tensor
    [], text as a path.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _one_of(value, args, name)
    if isinstance(hint, (Keys, Number)) and value is None and hint.null:
        return None
    if isinstance(hint, Keys):
        values = typed(value, dict, name)
        for key in hint.required:
            if key not in values:
                raise _wrong(name, f"{key!r} is missing")
        hints = {**hint.required, **hint.others}
        return {k: typed(v, hints.get(k, Any), _inside(name, k)) for k, v in values.items()}
    if isinstance(hint, Number):
        number = _plain(value, hint.kind, name)
        if not hint.least <= number <= hint.most:
            expected = f"{_WORDS[hint.kind]} from {hint.least:,} to {hint.most:,}"
            raise _wrong(name, f"expected {expected}, got {shown(value)}")
        return number
    if origin is dict:
        values = typed(value, dict, name)
        return {k: typed(v, args[1], _inside(name, k)) for k, v in values.items()}
    if origin in (list, tuple):
        items = typed(value, list, name)
        return origin(typed(item, args[0], f"{name}[{i}]") for i, item in enumerate(items))
    return _plain(value, hint, name)


def _one_of(value: Any, hints: tuple[Any, ...], name: str) -> Any:
    """`value` as one of the hints says."""
    if value is None and NoneType in hints:
        return None
    *others, last = (hint for hint in hints if hint is not NoneType)
    for hint in others:
        try:
            return typed(value, hint, name)
        except InputError:
            continue
    return typed(value, last, name)


def _plain(value: Any, kind: Any, name: str) -> Any:
    """`value` as one of a plain type."""
    try:
        found = _converted(value, kind)
    except (ArithmeticError, AttributeError, ValueError, TypeError, RuntimeError):
        found = None  # NaN for a whole number, a path of bytes, a lone surrogate, a meta tensor
    if found is not None:
        return found
    expected, hint = _WORDS.get(kind) or kind.__name__, ""
    if isinstance(value, str) and kind in (int, float, bool, str):
        hint = " in UTF-8, without NUL" if kind is str else ", without quotes"
    raise _wrong(name, f"expected {expected}{hint}, got {shown(value)}")


def _converted(value: Any, kind: Any) -> Any:
    """`value` as one of a plain type, or None."""
    if getattr(value, "ndim", None) == 0 and not isinstance(value, kind):
        value = value.item()
    if kind in (int, float):
        number = isinstance(value, Real) and not isinstance(value, bool)
        return kind(value) if number and (kind is float or value == int(value)) else None
    if kind is str:
        text = os.fspath(value)
        return None if b"\0" in text.encode() else str(text)
    if kind is list:
        return list(value) if isinstance(value, (list, tuple)) else None
    if kind is dict:
        texts = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return dict(value) if texts else None
    return value if isinstance(value, kind) else None


def _inside(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _wrong(name: str, problem: str) -> InputError:
    return InputError(f"{name}: {problem}" if name else problem)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: Any) -> str:
    """`value` in a message, cut to a readable length."""
    return _short.repr(value)
