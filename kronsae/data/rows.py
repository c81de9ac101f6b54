"""Rows of tensors in any order: what batches are made of."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

AT_ONCE = 2**19
"""Bytes that are gathered before they are converted: they still are in the processor's cache."""

KEPT = 3
"""Batches whose memory is kept: one in use, one that waits, and one that is being made."""


class BatchMemory:
    """Memory for batches [B, width] on the CPU, used again once nobody holds the batch.

    A large tensor is given new pages each time that it is made, and first writing to them takes
    several times as long as to write to old ones.
    """

    def __init__(self, batch_size: int, width: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (batch_size, width), dtype
        self.kept: list[tuple[np.ndarray, weakref.ref]] = []  # memory, and who uses it

    def take(self, count: int) -> Tensor:
        """A batch [count, width] of any content. It is the caller's as long as he holds it.

        count: at most B.
        """
        free = (place for place, (_, user) in enumerate(self.kept) if user() is None)
        place = next(free, len(self.kept))
        if place == KEPT:
            return torch.empty(self.shape, dtype=self.dtype)[:count]
        if place == len(self.kept):
            rows, width = self.shape
            memory = np.empty(rows * width * self.dtype.itemsize, np.uint8)
            self.kept.append((memory, weakref.ref(memory)))
        memory, _ = self.kept[place]
        # All tensors that share the memory keep this view alive, and nothing else does.
        view = memory[:]
        self.kept[place] = memory, weakref.ref(view)
        return torch.from_numpy(view).view(self.dtype).view(self.shape)[:count]


def gather(parts: Sequence[Tensor], rows: Tensor, into: Tensor) -> Tensor:
    """Rows [B] of tensors [r, width] that lie side by side, converted to the dtype of `into`.

    into: [B, sum of widths], which is written and given back. All are on one device.
    """
    columns = into.split([part.shape[1] for part in parts], 1)
    for part, column in zip(parts, columns, strict=True):
        # index_select is several times as fast as part[rows] on a CPU.
        if part.dtype == column.dtype:
            torch.index_select(part, 0, rows, out=column)
            continue
        at_once = max(1, AT_ONCE // (part.shape[1] * part.itemsize))
        for numbers, block in zip(rows.split(at_once), column.split(at_once), strict=True):
            block.copy_(part.index_select(0, numbers))
    return into
