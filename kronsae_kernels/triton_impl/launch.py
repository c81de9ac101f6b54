"""Starting a kernel: every launch goes through `launch`, so that all can be listed and compiled.

Inside `record`, nothing runs: each launch is noted with its arguments, which may be meta tensors.
The tests compile what production shapes would launch, for cards that are not there.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kronsae_kernels.triton_impl.configs import Config, generation_of
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


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    """Run a kernel over a grid with the warps, stages and block sizes of its configuration.

    arguments: the kernel's, by name; those that `config` names are taken from there, and so is
    "MAX_REGISTERS" of a thread (0: as the compiler wants). An empty grid launches nothing.
    """
    if 0 in grid:
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    arguments = {**config.blocks, **arguments}
    registers = arguments.pop("MAX_REGISTERS", 0)
    if registers:
        options["maxnreg"] = registers
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, **options))
        return
    tensor = next(a for a in arguments.values() if isinstance(a, Tensor))
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        kernel[grid](**arguments, **options, enable_fp_fusion=FP_FUSION)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return bool(INTERPRETED.value)


def next_power_of_2(number: int) -> int:
    return triton.next_power_of_2(max(1, number))
