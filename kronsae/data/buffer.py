"""A seeded shuffle buffer of activations, sized in tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kronsae.data.rows import BatchMemory, gather
from kronsae.errors import InputError

MOVED_ROWS = 4096
"""Rows that are moved in one go: a small copy reuses memory, a large one is given new pages."""


class ShuffleBuffer:
    """Mixes a stream of activations [r, d]: every batch is drawn from `capacity` waiting rows.

    It fills up, serves half of its rows in random order without replacement, fills up again, and
    serves everything when the stream ends; only the very last batch can be smaller. Capacity is
    raised to twice the batch size if it is less. Rows live in one tensor that is made once.

    source: its tensors are not written to, and must not change until the next one is asked for
        (what does not fit is kept without a copy).
    device: where rows wait and batches are given; None takes that of the source's tensors.
    """

    def __init__(
        self,
        source: Iterator[Tensor],
        capacity: int,
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size: expected >= 1, got {batch_size}")
        self.source = source
        self.capacity = max(capacity, 2 * batch_size)
        self.batch_size = batch_size
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: Tensor | None = None
        self.memory: BatchMemory | None = None  # of the batches, on a CPU
        self.filled = 0  # rows [0, filled) wait
        self.served = torch.empty(0, dtype=torch.int64)  # rows chosen at the last refill
        self.order = self.served  # those of them still to serve
        self.overflow: Tensor | None = None  # what the last forward pass gave beyond capacity
        self.ended = False

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            if not self.order.numel():
                self._refill()
                if not self.filled:
                    return
            chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
            batch = self._batch(chosen)
            if not self.order.numel():
                self._close_gaps()
            yield batch

    def _batch(self, chosen: Tensor) -> Tensor:
        """The rows [B, d] with these numbers [B]."""
        if self.memory is None:
            return self.rows.index_select(0, chosen.to(self.rows.device))
        return gather([self.rows], chosen, self.memory.take(len(chosen)))

    @property
    def served_at_once(self) -> int:
        """Rows between two times that it fills up: half of it, in whole batches."""
        half = max(self.batch_size, self.capacity // 2)
        return half - half % self.batch_size

    def _refill(self) -> None:
        while self.filled < self.capacity and not self.ended:
            x = self.overflow if self.overflow is not None else next(self.source, None)
            self.overflow = None
            if x is None:
                self.ended = True
                break
            if self.rows is None:
                self._allocate(x)
            taken = min(x.shape[0], self.capacity - self.filled)
            self.rows[self.filled : self.filled + taken] = x[:taken]
            self.filled += taken
            if taken < x.shape[0]:
                self.overflow = x[taken:]
        self.served = torch.randperm(self.filled, generator=self.generator)
        if not self.ended:
            self.served = self.served[: self.served_at_once]
        self.order = self.served

    def _allocate(self, like: Tensor) -> None:
        shape = (self.capacity, like.shape[1])
        self.rows = torch.empty(shape, dtype=like.dtype, device=self.device or like.device)
        if self.rows.device.type == "cpu":
            self.memory = BatchMemory(self.batch_size, like.shape[1], like.dtype)

    def _close_gaps(self) -> None:
        """Move waiting rows from the end into the places of those served."""
        left = self.filled - self.served.numel()
        used = torch.zeros(self.filled, dtype=torch.bool)
        used[self.served] = True
        holes, movable = used[:left].nonzero().squeeze(1), (~used[left:]).nonzero().squeeze(1)
        for to, since in zip(holes.split(MOVED_ROWS), movable.split(MOVED_ROWS), strict=True):
            self.rows[to] = self.rows[since + left]
        self.filled = left

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the batches to come, but for the source's own position.

        Views, valid until the next batch: save or copy them before.
        """
        none = torch.empty(0, 0)
        return {
            "rows": none if self.rows is None else self.rows[: self.filled],
            "order": self.order,
            "served": self.served if self.order.numel() else self.order,
            "overflow": none if self.overflow is None else self.overflow,
            "generator": self.generator.get_state(),
            "ended": self.ended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state (which is copied), with the source where it was then."""
        rows, overflow = state["rows"], state["overflow"]
        self.filled = rows.shape[0]
        if self.filled:
            self._allocate(rows)
            self.rows[: self.filled] = rows
        self.order, self.served = state["order"].clone(), state["served"].clone()
        self.overflow = overflow.clone() if overflow.numel() else None
        self.generator.set_state(state["generator"])
        self.ended = state["ended"]
