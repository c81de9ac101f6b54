"""A kernel that reads the same bytes over and over, past the first-level cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Int32 numbers that a program reads at once."""
STEP = 129
"""Blocks from one read of a program to its next: no multiprocessor meets its own block soon."""


@triton.jit
def _read_again(
    numbers, sums, repeats,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program i adds up blocks i, i + STEP, i + 2 STEP ... (modulo BLOCKS), lane by lane."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, repeats, 4):
        for more in tl.static_range(4):  # four reads in flight
            block = (program + (first + more) * STEP) % BLOCKS
            total += tl.load(numbers + block * BLOCK + lanes, cache_modifier=".cg")
    tl.store(sums + program * BLOCK + lanes, total)


def read_again(data: Tensor, repeats: int) -> Tensor:
    """Read all of `data` (bytes, a multiple of 4 BLOCK) `repeats` times (a multiple of 4).

    Returns [blocks, BLOCK] int32: what each program added up.
    """
    numbers = data.view(torch.int32)
    blocks = numbers.numel() // BLOCK
    sums = torch.empty(blocks, BLOCK, dtype=torch.int32, device=data.device)
    _read_again[(blocks,)](numbers, sums, repeats, blocks, BLOCK, STEP, num_warps=8)
    return sums
