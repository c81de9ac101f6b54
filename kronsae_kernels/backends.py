"""Choice of the implementation of an operation: by the tensors' device, or the one asked for.

A backend is a module with these functions of `torch_impl` (same names, same arguments): `encode`,
`threshold_encode`, `encode_backward`, `decode`, `decode_backward` and `hierarchical`. Kernels for
another device plug in here: one line in `_BACKENDS`, nothing else in the package changes.
"""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch.torch_version import TorchVersion


class Backend(NamedTuple):
    """One implementation of all operations."""

    module: str
    """Imported when it is first used."""
    device_types: tuple[str, ...]
    """Device types that it is the default for."""
    why_not: Callable[[torch.device, torch.dtype], str | None]
    """Why it cannot run tensors of a dtype on a device, or None if it can."""


OLDEST_TRITON = "3.5"


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    if TorchVersion(triton.__version__) < OLDEST_TRITON:
        return f"its kernels need triton {OLDEST_TRITON} or newer, {triton.__version__} is there"
    from kronsae_kernels.triton_impl import launch

    if device.type == "cpu" and not launch.interpreted():
        return "Triton needs a GPU (or its interpreter: TRITON_INTERPRET=1)"
    if device.type not in ("cuda", "cpu") and not launch.recording():
        return f"Triton runs on CUDA and ROCm devices, not on {device.type}"
    if dtype == torch.float64:
        return "its kernels compute in float32, not in float64"
    return None


_BACKENDS: dict[str, Backend] = {
    "triton": Backend("kronsae_kernels.triton_impl.operations", ("cuda",), _why_not_triton),
    "torch": Backend("kronsae_kernels.torch_impl", ("cpu",), lambda device, dtype: None),
}
NAMES = ("triton", "torch", "reference")


def choose(impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Name of the implementation for tensors of a dtype on a device.

    None: the backend whose default this device is and that can run there, else "torch". A name:
    exactly that one. Raises ValueError for an unknown name, RuntimeError with the reason if it
    cannot run here.
    """
    if impl is None:
        for name, backend in _BACKENDS.items():
            if device.type in backend.device_types and backend.why_not(device, dtype) is None:
                return name
        return "torch"
    if impl == "reference":
        return impl
    if not isinstance(impl, str) or (impl not in NAMES and impl not in _BACKENDS):
        raise ValueError(f"impl: expected None or one of {NAMES}, got {impl!r}")
    reason = _BACKENDS[impl].why_not(device, dtype)
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run on {device}: {reason}")
    return impl


def why_not(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why an implementation cannot run tensors of a dtype on a device, or None if it can."""
    return None if impl == "reference" else _BACKENDS[impl].why_not(device, dtype)


def module(name: str) -> ModuleType:
    """The backend's functions, by the name that `choose` gave."""
    return importlib.import_module(_BACKENDS[name].module)
