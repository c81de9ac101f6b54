"""A stand-in for a device without float64, such as mps, on a machine without one.

While `no_doubles` is open, tensors on `DEVICE` compute on the CPU. As on mps, float64 is an error
there, and so is a tensor of another device in the same operation (numbers [] excepted).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
"""torch lets no other device be imitated that has no hardware."""

AUTOCAST = torch.autocast
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Tensor(torch.Tensor):
    """A tensor on `DEVICE`, whose values `inner` has."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Tensor":
        if inner.dtype == torch.float64:
            raise TypeError("this device has no float64")
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, **layout, dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    is_meta = False

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU; its tensors are on `DEVICE` if those that it gets are."""
    wrappers: dict[int, Tensor] = {}
    others: list[torch.Tensor] = []

    def unwrap(x: Any) -> Any:
        if isinstance(x, Tensor):
            wrappers[id(x.inner)] = x
            return x.inner
        if isinstance(x, torch.Tensor):
            others.append(x)
        return x

    args, kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    here = bool(wrappers)
    if here and func not in MOVES and any(x.ndim for x in others):
        raise RuntimeError(f"{func}: expected all tensors on one device")
    if kwargs.get("device") is not None:
        here = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs["device"] = torch.device("cpu")
    elif func in MOVES and func is torch.ops.aten.copy_.default:
        here = id(args[0]) in wrappers

    def wrap(x: Any) -> Any:
        if here and isinstance(x, torch.Tensor):
            return wrappers.get(id(x)) if id(x) in wrappers else Tensor(x)
        return x

    return tree_map(wrap, func(*args, **kwargs))


@contextmanager
def no_doubles() -> Iterator[torch.device]:
    """While open, the device that it gives can be used."""
    with (
        _Mode(),
        mock.patch("torch.autocast", _autocast),
        mock.patch("torch.is_autocast_enabled", return_value=False),
        mock.patch("torch.amp.is_autocast_available", lambda device: device != DEVICE.type),
    ):
        yield DEVICE


def _autocast(device: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Any:
    if device != DEVICE.type:
        return AUTOCAST(device, dtype, enabled)
    assert not enabled
    return nullcontext()
