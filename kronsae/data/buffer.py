"""A seeded shuffle buffer of activations, sized in tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class ShuffleBuffer:
    """Mixes a stream of activations [r, d]: every batch is drawn from `capacity` waiting rows.

    It fills up, serves half of its rows in random order without replacement, fills up again, and
    serves everything when the stream ends; only the very last batch can be smaller. Capacity is
    raised to twice the batch size if it is less. Rows live in one tensor that is made once.
    """

    def __init__(self, source: Iterator[Tensor], capacity: int, batch_size: int, seed: int) -> None:
        self.source = source
        self.capacity = max(capacity, 2 * batch_size)
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: Tensor | None = None
        self.filled = 0  # rows [0, filled) wait
        self.order = torch.empty(0, dtype=torch.int64)  # rows to serve before the next refill
        self.overflow: Tensor | None = None  # what the last forward pass gave beyond capacity
        self.ended = False

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            if not self.order.numel():
                self._refill()
                if not self.filled:
                    return
            chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
            batch = self.rows[chosen]
            if not self.order.numel():
                self._close_gaps()
            yield batch

    def _refill(self) -> None:
        while self.filled < self.capacity and not self.ended:
            x = self.overflow if self.overflow is not None else next(self.source, None)
            self.overflow = None
            if x is None:
                self.ended = True
                break
            if self.rows is None:
                self.rows = x.new_empty(self.capacity, x.shape[1])
            taken = min(x.shape[0], self.capacity - self.filled)
            self.rows[self.filled : self.filled + taken] = x[:taken]
            self.filled += taken
            if taken < x.shape[0]:
                self.overflow = x[taken:].clone()
        self.served = torch.randperm(self.filled, generator=self.generator)
        if not self.ended:
            half = max(self.batch_size, self.capacity // 2)
            self.served = self.served[: half - half % self.batch_size]
        self.order = self.served

    def _close_gaps(self) -> None:
        """Move waiting rows from the end into the places of those served."""
        left = self.filled - self.served.numel()
        used = torch.zeros(self.filled, dtype=torch.bool)
        used[self.served] = True
        holes, movable = used[:left].nonzero().squeeze(1), (~used[left:]).nonzero().squeeze(1)
        self.rows[holes] = self.rows[movable + left]
        self.filled = left

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the batches to come, but for the source's own position."""
        rows = torch.empty(0, 0) if self.rows is None else self.rows[: self.filled]
        return {
            "rows": rows,
            "order": self.order,
            "served": self.served if self.order.numel() else self.order,
            "overflow": torch.empty(0, 0) if self.overflow is None else self.overflow,
            "generator": self.generator.get_state(),
            "ended": self.ended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows = state["rows"]
        self.filled = rows.shape[0]
        if self.filled:
            self.rows = rows.new_empty(self.capacity, rows.shape[1])
            self.rows[: self.filled] = rows
        self.order, self.served = state["order"], state["served"]
        self.overflow = state["overflow"] if state["overflow"].numel() else None
        self.generator.set_state(state["generator"])
        self.ended = state["ended"]
