"""Starting a kernel: every launch goes through `launch`, so that all can be listed and compiled.

Inside `record`, nothing runs: each launch is noted with its arguments, which may be meta tensors.
The tests compile what production shapes would launch, for cards that are not there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kronsae_kernels.triton_impl.configs import Config, config_of, generation_of
from kronsae_kernels.triton_impl.device import INTERPRETED

FP_FUSION = True
"""Products and sums may be one instruction (pinned: Triton's default changes with versions).

Scores are products alone, so that selection does not depend on it.
"""


class Launch(NamedTuple):
    """One launch: what would be compiled, and with which grid it would run."""

    kernel: Any
    """The function under `triton.jit`."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By parameter name: tensors (perhaps meta), numbers, None; constexprs are in here too."""
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Registers that a thread may have at most (CUDA alone)."""


_recorded: list[Launch] | None = None
_recorded_generation: str | None = None


@contextmanager
def record(generation: str) -> Iterator[list[Launch]]:
    """Note launches instead of making them, configured for a card generation (as "sm_90")."""
    global _recorded, _recorded_generation
    before = _recorded, _recorded_generation
    _recorded, _recorded_generation = [], generation
    try:
        yield _recorded
    finally:
        _recorded, _recorded_generation = before


def recording() -> bool:
    """Whether launches are noted rather than made."""
    return _recorded is not None


def generation(device: torch.device) -> str:
    """Name of the card generation of a device: "sm_90", "gfx942"; "interpreter" for a CPU."""
    return _recorded_generation or generation_of(device)


def configure(kernel: str, device: torch.device, **blocks: int) -> Config:
    """A kernel's configuration for a device; `blocks` override its block sizes."""
    return config_of(kernel, generation(device), **blocks)


Grid = tuple[int, ...] | Callable[[dict[str, int]], tuple[int, ...]]


def launch(kernel: Any, grid: Grid, config: Config | None = None, **arguments: Any) -> None:
    """Run a kernel over a grid with the warps, stages and block sizes of its configuration.

    grid: programs in each dimension, or these as a function of the block sizes. An empty one
        launches nothing.
    config: by default the kernel's own for the device that the arguments are on.
    arguments: the kernel's, by name; those that `config` names are taken from there, and so is
        "MAX_REGISTERS" of a thread (0: as the compiler wants).
    """
    if config is None:
        config = configure(kernel.fn.__name__, _device_of(arguments))
    programs = grid if isinstance(grid, tuple) else grid(config.blocks)
    if 0 in programs:
        return
    arguments = {**config.blocks, **arguments}
    registers = arguments.pop("MAX_REGISTERS", 0) or None
    one = Launch(kernel, programs, arguments, config.num_warps, config.num_stages, registers)
    if _recorded is None:
        start(one)
    else:
        _recorded.append(one)


def start(one: Launch) -> None:
    """Make a launch on the device that its arguments are on."""
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages}
    if one.maxnreg is not None:
        options["maxnreg"] = one.maxnreg
    device = _device_of(one.arguments)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        one.kernel[one.grid](**one.arguments, **options, enable_fp_fusion=FP_FUSION)


def _device_of(arguments: dict[str, Any]) -> torch.device:
    for value in arguments.values():
        if isinstance(value, Tensor):
            return value.device
    raise ValueError("arguments: expected a tensor among them")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return bool(INTERPRETED.value)


def cdiv(number: int, size: int) -> int:
    """Blocks of a size that hold a number of things."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    return triton.next_power_of_2(max(1, number))
