"""Devices and dtypes by name, free memory, and a clock for devices that run behind the host."""

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kronsae.errors import InputError, first_line
from kronsae.system.documents import Number, typed


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and torch, which a model or a plugin may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """States of the generators of Python and numpy, as JSON values."""
    version, numbers, gauss = random.getstate()
    of_numpy: Any = np.random.get_state()
    _, keys, *rest = of_numpy
    return {
        "python": [version, np.array(numbers, np.uint32).tobytes().hex(), gauss],
        "numpy": [keys.tobytes().hex(), *rest],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """The inverse of `random_states`. Raises InputError for what it does not give."""

    def unpacked(text: str) -> np.ndarray:
        return np.frombuffer(bytes.fromhex(text), np.uint32)

    try:
        version, numbers, gauss = states["python"]
        random.setstate((version, tuple(unpacked(numbers).tolist()), gauss))
        keys, position, *rest = states["numpy"]
        position = typed(position, Number(int, 0, 624), "position")
        np.random.set_state(("MT19937", unpacked(keys), position, *rest))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"random_states: {error}") from error


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda if there is one. Raises InputError without it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected cpu, cuda or mps")
        device = torch.device(name)
        if device.type == "mps" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError("torchrun's processes cannot share one: start a single process")
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # under torchrun
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise InputError(f"device {name!r} cannot be used: {reason}") from error
    return device


def of_doubles(device: torch.device) -> torch.device:
    """Where float64 numbers of a device are kept: on the CPU if it has none, as mps."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def as_double(x: torch.Tensor) -> torch.Tensor:
    """x in float64, on `of_doubles` of its device."""
    return x.to(of_doubles(x.device), torch.float64)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 on a GPU, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def model_dtype(name: str, device: torch.device, checkpoint: torch.dtype | None) -> torch.dtype:
    """The dtype of that name for a language model whose weights have the dtype `checkpoint`.

    "auto" is bfloat16 on a GPU. On a CPU it is bfloat16 if the weights are and the processor has
    instructions for it, which is about three times as fast as float32; else float32.
    """
    if name == "auto" and device.type == "cpu" and checkpoint == torch.bfloat16 and has_bfloat16():
        return torch.bfloat16
    return compute_dtype(name, device)


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16, as far as the system says."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def with_index(device: torch.device) -> torch.device:
    """The device with its index, as tensors have it: "cuda" alone is the current card."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps", 0) if device.type == "mps" else device


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device, or None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sizes = (_available(), _left_in_group(), _left_of_limit())
    return min((size for size in sizes if size is not None), default=None)


def _available() -> int | None:
    """Memory that the machine can give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = dict(line.split(":") for line in lines)["MemAvailable"]
        return int(kilobytes.split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:  # not Linux: all memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _left_in_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory below a container's limit that is free; its file cache counts as free."""
    try:
        limit = int((root / "memory.max").read_text())  # "max" where there is none
        used = int((root / "memory.current").read_text())
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return limit - used + int(statistics["inactive_file"])
    except (OSError, KeyError, ValueError):
        return None


def _left_of_limit() -> int | None:
    """Addresses below this process' limit (`ulimit -v`) that it does not use yet; None without."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return None if limit == resource.RLIM_INFINITY else limit - pages * resource.getpagesize()
    except (ImportError, OSError):  # not Linux
        return None


class Clock:
    """Mean time of the blocks that run in it (`with clock:`), on a CPU or a GPU.

    On a GPU it is the time between two CUDA events; only `mean_ms` waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.count = 0.0, 0
        self.began: Any = None
        self.pending: list[tuple[Any, Any]] = []  # CUDA events

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __enter__(self) -> None:
        self.began = self._now()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            return
        self.count += 1
        if self.device.type != "cuda":
            self.seconds += time.monotonic() - self.began
            return
        self.pending.append((self.began, self._now()))
        while self.pending and self.pending[0][1].query():
            self._take()

    def _take(self) -> None:
        began, ended = self.pending.pop(0)
        ended.synchronize()
        self.seconds += began.elapsed_time(ended) / 1e3

    @property
    def mean_ms(self) -> float:
        while self.pending:
            self._take()
        return 1e3 * self.seconds / max(1, self.count)
