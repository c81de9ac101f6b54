"""Helpers of the data sources: fingerprints, and short messages of errors."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from kronsae.errors import InputError
from kronsae.system.documents import Keys, Number, typed

REASON_CHARACTERS = 240
"""Longest message quoted from another library's error."""


class Interrupted(Exception):
    """Raised where activations are waited for, when the run is asked to stop."""


class BadImage(InputError):
    """An image that cannot be read; without it, or with another, the data are others."""


def digest(*parts: Any) -> str:
    """Hash of JSON values, strings and bytes in their order: 16 hexadecimal digits."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()[:16]


def reason(error: BaseException) -> str:
    """Type and first line of an error, cut to a readable length."""
    lines = (line.strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), "no message")
    return f"{type(error).__name__}: {first}"[:REASON_CHARACTERS]


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: expected >= 1, got {batch_size}")


def given(state: Any, most: float = 2**53) -> int:
    """The number in a source's state of what it has given. Raises InputError if it is none."""
    return typed(state, Keys({"given": Number(int, 0, most)}), "source")["given"]


def as_kept(x: Tensor) -> Tensor:
    """Activations as they are kept: bfloat16 and float16 as they are, others in float32."""
    return x if x.dtype in (torch.bfloat16, torch.float16) else x.float()


def is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
