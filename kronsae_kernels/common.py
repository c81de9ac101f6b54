"""Sparse codes, checks of arguments, and small conversions that all operations share.

Letters, everywhere in this package:
  B tokens        d width of an activation       F dictionary size (F = h m n for a Kron encoder)
  h heads         m base, n extension pre-latents a head         k selected latents a token
(m, n, k are not the M, N, K of a matrix product.)
"""

import math
import numbers
import operator
import reprlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

COMPOSITIONS = ("mand", "relu_mul", "mul")
LAYOUTS = ("head-major", "row-major")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SparseCodes(NamedTuple):
    """The k active latents of each token."""

    values: Tensor
    """[..., k] float32 (float64 for float64 input), largest first; ties: lowest index first."""
    indices: Tensor
    """[..., k] int64, latent index in [0, F)."""


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError(message) unless `condition` holds.

    A message with a shape in it is a function: torch.compile cannot format a symbolic size.
    """
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of products, values and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape_of(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def shown(value: Any) -> str:
    """A wrong argument, in short; with its type, if that is not one of plain numbers or lists."""
    kind, text = type(value), reprlib.repr(value)
    if kind in (int, float, list, tuple):
        return text
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{text} ({module}{kind.__qualname__})"


def check_tensors(**tensors: Tensor) -> None:
    """Each argument is a dense tensor of one process."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {shown(tensor)}")
        if tensor.layout != torch.strided or tensor.is_nested:
            got = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
            raise ValueError(f"{name}: expected a dense tensor, got {got}")
        if type(tensor).__name__ == "DTensor":
            raise ValueError(
                f"{name}: expected a tensor of this process, got a DTensor. Give `.to_local()` of "
                "tokens that are sharded over processes, and `.full_tensor()` of sharded weights "
                "(`fully_shard` of the module does that around its forward)"
            )


def check_floating(**tensors: Tensor | None) -> None:
    """Each argument is a tensor of one of DTYPES (or None)."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensors(**{name: tensor})
        require(
            tensor.dtype in DTYPES,
            f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}",
        )


def check_integers(**tensors: Tensor) -> None:
    """Each argument is of one of INTEGERS."""
    for name, tensor in tensors.items():
        require(
            tensor.dtype in INTEGERS,
            f"{name}: expected integers (int8 to int64, or uint8), got {tensor.dtype}",
        )


def check_same(attribute: str, **tensors: Tensor | None) -> None:
    """All given tensors have the same `device` or `dtype`."""
    values = {name: getattr(t, attribute) for name, t in tensors.items() if t is not None}
    require(
        len(set(values.values())) <= 1,
        f"all tensors must have the same {attribute}, got "
        + ", ".join(f"{name} {value}" for name, value in values.items()),
    )


def check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    if tensor is not None:
        require(
            tuple(tensor.shape) == expected,
            lambda: f"{name}: expected {meaning} = {list(expected)}, got {shape_of(tensor)}",
        )


def check_matrix(name: str, tensor: Tensor, rank: int, layout: str) -> None:
    """A tensor of this rank, none of whose dimensions is 0."""
    require(
        tensor.ndim == rank and tensor.numel() > 0,
        lambda: f"{name}: expected {layout} with no empty dimension, got {shape_of(tensor)}",
    )


def check_mask(mask: Tensor | None, size: int, tokens: tuple[int, ...] | None = None) -> None:
    """Mask [F] of latents that may be selected, F = size, or (tokens given) [*tokens, F]."""
    if mask is not None:
        check_tensors(mask=mask)
        if mask.ndim == 1 or tokens is None:
            check_shape("mask", mask, (size,), "[F]")
        else:
            check_shape("mask", mask, (*tokens, size), "[F], or one mask a token, [..., F]")
        require(mask.dtype == torch.bool, f"mask: expected torch.bool, got {mask.dtype}")


def dict_size(w_enc: Tensor, m: int | None) -> int:
    """F of an encoder [h, m + n, d], of which m is checked, or (m None) of a dense one [F, d]."""
    if m is None:
        return w_enc.shape[0]
    heads, rows, _ = w_enc.shape
    check_count("m", m, 1, rows - 1, f"w_enc has m + n = {rows} rows a head")
    return heads * m * (rows - m)


def as_integer(value: Any) -> Any:
    """An integer of numpy, or a tensor that is a single one, as an int; anything else as it is."""
    if isinstance(value, int):
        return value
    if isinstance(value, Tensor):
        single = value.ndim == 0 and value.dtype in INTEGERS and not value.is_meta
        return int(value) if single else value
    try:
        return operator.index(value)
    except TypeError:
        return value


def as_number(value: Any) -> Any:
    """A number of numpy, or a tensor that is a single one, as a float; anything else as it is."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Tensor):
        single = value.ndim == 0 and value.dtype != torch.bool and not value.is_meta
        return value.item() if single else value
    return value.item() if isinstance(value, numbers.Real) and hasattr(value, "item") else value


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(name: str, value: int, low: int, high: int, meaning: str) -> None:
    require(
        is_integer(value) and low <= value <= high,
        lambda: f"{name}: expected an integer in [{low}, {high}] ({meaning}), got {shown(value)}",
    )


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, f"{name}: expected one of {allowed}, got {value!r}")


def check_number(name: str, value: float, low: float | None, below: float | None = None) -> None:
    """A finite number in [low, below). (A default that is a number would be symbolic, compiled.)"""

    def message() -> str:
        least = "" if low is None else f" >= {low:g}"
        less = "" if below is None else f" and < {below:g}"
        return f"{name}: expected a finite number{least}{less}, got {shown(value)}"

    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right = number and -math.inf < value < math.inf  # (isfinite takes no symbolic number)
    right = right and (low is None or value >= low) and (below is None or value < below)
    require(right, message)


def cast_for_autocast(tensor: Tensor) -> Tensor:
    """A floating tensor in autocast's dtype where autocast is on (never float64), else itself."""
    device_type = tensor.device.type
    # torch.compile of older torch cannot trace the question, and traces no other devices.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    if not available or not torch.is_autocast_enabled(device_type) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Inside an operator: its dtypes are chosen already, and sums stay in float32."""
    device_type = tensor.device.type
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
