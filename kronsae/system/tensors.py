"""Tensors that come from a caller or a file, checked before anything is computed with them."""

import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kronsae.errors import InputError, first_line
from kronsae.system.devices import free_bytes
from kronsae.system.documents import shown
from kronsae_kernels import SparseCodes

BFLOAT16 = (
    ". If these are the bits of bfloat16, which numpy does not have, give "
    "torch.as_tensor(x).view(torch.bfloat16)"
)
"""Advice for unsigned numbers in the place of floats."""


def as_values(x: Any, name: str, expected: str = "[..., d]") -> Tensor:
    """The floating-point tensor that a caller gave, as a tensor or as an array of numpy.

    An array keeps its memory, unless its bytes or rows are stored backwards. Eight-bit floats, with
    which torch does not compute, become float32.
    Raises InputError, which names `name`, for anything else, for a sparse or nested tensor, and for
    one without values, on the device "meta".
    """
    if isinstance(x, np.ma.MaskedArray):
        raise InputError(
            f"{name}: expected an array without a mask, got a masked one: give those of its rows "
            "that count"
        )
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        x = _of_numpy(x)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        dtype = str(getattr(x, "dtype", "")).removeprefix("torch.")
        got = f"{list(x.shape)} {x.dtype}" if dtype else shown(x)
        raise InputError(
            f"{name}: expected a floating tensor {expected}, or an array of numpy, got {got}"
            + (BFLOAT16 if dtype == "uint16" else "")
        )
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested one" if x.is_nested else f"{x.layout}: give {name}.to_dense()"
        raise InputError(f"{name}: expected a dense tensor, got {kind}")
    if x.is_meta:
        raise InputError(f"{name}: expected a tensor with values, got one on the device 'meta'")
    return x.float() if x.itemsize == 1 else x


def _of_numpy(x: np.ndarray) -> Any:
    """The tensor on an array's memory; of a copy if torch cannot have that."""
    if not x.dtype.isnative or any(stride < 0 for stride in x.strides):
        x = x.astype(x.dtype.newbyteorder("="), order="C")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the array may be read-only: nothing is written to it
        try:
            return torch.from_numpy(x)
        except TypeError:  # numpy's longdouble, and dtypes of other packages
            return x


def check_weights(tensors: dict[str, Tensor], path: Any, unset: Collection[str] = ()) -> None:
    """Raise InputError unless all of these tensors, read from `path`, are floats.

    They have to be finite in float32, in which SAEs are loaded.
    unset: names of those that may be NaN or infinite, as they may not have been learned yet.
    """
    for name, x in tensors.items():
        problem = None
        if not x.is_floating_point() or x.layout != torch.strided or x.is_nested or x.is_meta:
            problem = f"expected floating-point numbers, dense, got {x.dtype}, {x.layout}"
        elif name not in unset and not torch.isfinite(x.float()).all():
            problem = "it holds NaN, infinity, or numbers too large for float32"
        if problem:
            raise InputError(
                f"{path}: {name}: {problem}. No SAE can be made of it: take the file again from "
                "its source, or train (or convert) the SAE again"
            )


def check_room(count: int, device: torch.device | str | None, what: str, advice: str) -> None:
    """Raise InputError if `count` numbers of float32 do not fit the free memory of a device.

    device: None is torch's default.  what, advice: for the message.
    """
    try:
        place = torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        problem = first_line(error)
        raise InputError(f"device {device!r} cannot be used: {problem}") from error
    free = free_bytes(place) if place.type in ("cpu", "cuda") else None
    if free is not None and place.type == "cuda":  # torch has some of it, unused
        free += torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    if free is not None and 4 * count > free:
        raise InputError(
            f"{what} would take {4 * count / 2**20:,.0f} MiB of memory or more on {place}, where "
            f"{free / 2**20:,.0f} MiB are free: {advice}"
        )


def dense(codes: SparseCodes, size: int) -> Tensor:
    """Codes [..., k] as a tensor [..., size] of their dtype, zero elsewhere."""
    values, indices = codes
    # Added, not written: an unused slot (value 0) may name a latent of another slot.
    out = values.new_zeros(*values.shape[:-1], size)
    return out.scatter_add_(-1, indices, values)
