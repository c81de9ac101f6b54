"""Small things that the sources of data share: fingerprints, and reasons of errors."""

import hashlib
from typing import Any

import torch
from torch import Tensor

REASON_CHARACTERS = 240
"""Longest reason quoted from another library's error."""


class Interrupted(Exception):
    """Whoever waits for activations was asked to stop: they may come or not, but not now."""


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that identify some JSON values, strings and bytes, in their order."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()[:16]


def reason(error: BaseException) -> str:
    """An error's type and the first line of its message, cut to a readable length."""
    lines = (line.strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), "no message")
    return f"{type(error).__name__}: {first}"[:REASON_CHARACTERS]


def is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
