"""Which implementation runs an operation: by the tensors' device, or exactly the one asked for.

A backend is a module with the functions of `torch_impl` (same names, same arguments). Kernels for
another device plug in here: one line in `_BACKENDS`, nothing else in the package changes.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from kronsae_kernels import torch_impl


class Backend(NamedTuple):
    """One implementation of all operations."""

    module: ModuleType
    device_types: tuple[str, ...]
    """Device types that it is the default for."""
    why_not: Callable[[torch.device], str | None]
    """Why it cannot run on a device, or None if it can."""


_BACKENDS: dict[str, Backend] = {
    "torch": Backend(torch_impl, ("cpu",), lambda device: None),
}
NAMES = ("triton", "torch", "reference")


def choose(impl: str | None, device: torch.device) -> str:
    """Name of the implementation for tensors on `device`.

    None: the backend whose default this device is, else "torch". A name: exactly that one.
    Raises ValueError for an unknown name, RuntimeError with the reason if it cannot run here.
    """
    if impl is None:
        for name, backend in _BACKENDS.items():
            if device.type in backend.device_types and backend.why_not(device) is None:
                return name
        return "torch"
    if impl == "reference":
        return impl
    if not isinstance(impl, str) or (impl not in NAMES and impl not in _BACKENDS):
        raise ValueError(f"impl: expected None or one of {NAMES}, got {impl!r}")
    reason = (
        _BACKENDS[impl].why_not(device)
        if impl in _BACKENDS
        else f"this version of kronsae_kernels has no {impl} kernels"
    )
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run on {device}: {reason}")
    return impl


def module(name: str) -> ModuleType:
    """The backend's functions, by the name that `choose` gave."""
    return _BACKENDS[name].module
