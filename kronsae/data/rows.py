"""Batches gathered from rows of tensors, in memory that is reused."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GATHER_BYTES = 2**19
"""Bytes gathered before they are converted, while they are still in the processor's cache."""

BATCHES_IN_MEMORY = 3
"""Batches whose memory is kept: one in use, one waiting, one being gathered."""


class BatchMemory:
    """Memory for batches [B, width] on the CPU, reused once no one references the batch.

    A new large tensor gets new pages, and the first write to a page takes several times as long as
    later ones.
    """

    def __init__(self, batch_size: int, width: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (batch_size, width), dtype
        self.slots: list[tuple[np.ndarray, weakref.ref]] = []  # memory, and the view in use

    def take(self, count: int) -> Tensor:
        """An uninitialised batch [count <= B, width], not reused while anything references it."""
        free = (slot for slot, (_, view) in enumerate(self.slots) if view() is None)
        slot = next(free, len(self.slots))
        if slot == BATCHES_IN_MEMORY:
            return torch.empty(self.shape, dtype=self.dtype)[:count]
        if slot == len(self.slots):
            rows, width = self.shape
            memory = np.empty(rows * width * self.dtype.itemsize, np.uint8)
            self.slots.append((memory, weakref.ref(memory)))
        memory, _ = self.slots[slot]
        # Only tensors that share the memory keep this view alive.
        view = memory[:]
        self.slots[slot] = memory, weakref.ref(view)
        return torch.from_numpy(view).view(self.dtype).view(self.shape)[:count]


def gather(parts: Sequence[Tensor], rows: Tensor, into: Tensor) -> Tensor:
    """Write rows [B] of several tensors [r, width] side by side to `into`, and return it.

    into: [B, sum of widths]; rows are converted to its dtype. All tensors are on one device.
    """
    columns = into.split([part.shape[1] for part in parts], 1)
    for part, column in zip(parts, columns, strict=True):
        # index_select is several times as fast as part[rows] on a CPU.
        if part.dtype == column.dtype:
            torch.index_select(part, 0, rows, out=column)
            continue
        size = max(1, GATHER_BYTES // (part.shape[1] * part.itemsize))
        for indices, block in zip(rows.split(size), column.split(size), strict=True):
            block.copy_(part.index_select(0, indices))
    return into
