"""A seeded shuffle buffer of activations."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kronsae.data.common import check_batch_size
from kronsae.data.rows import BatchMemory, gather
from kronsae.system.documents import Keys, typed

MOVED_ROWS = 4096
"""Rows moved per copy: a small copy reuses memory, a large one gets new pages each time."""


_STATE = Keys(
    {
        **dict.fromkeys(("rows", "order", "served", "overflow", "generator"), Tensor),
        "ended": bool,
    }
)


class ShuffleBuffer:
    """Shuffles a stream of activations [r, d] through a buffer of `capacity` rows (tokens).

    It fills up, serves half of its rows in random order without replacement, fills up again, and
    serves everything when the stream ends; only the very last batch can be smaller. The capacity
    is at least twice the batch size.

    source: its tensors are not written to, and must not change until the next one is asked for
        (rows that do not fit are kept without a copy).
    device: of the buffer and the batches; None takes that of the source's tensors.
    """

    def __init__(
        self,
        source: Iterator[Tensor],
        capacity: int,
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        check_batch_size(batch_size)
        self.source = source
        self.capacity = max(capacity, 2 * batch_size)
        self.batch_size = batch_size
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = torch.empty(0, 0)  # [capacity, d] from the first refill on
        self.memory: BatchMemory | None = None  # of the batches, on a CPU
        self.filled = 0  # rows [0, filled) hold activations
        self.served = torch.empty(0, dtype=torch.int64)  # rows drawn at the last refill
        self.order = self.served  # the drawn rows that are still to serve
        self.overflow: Tensor | None = None  # rows of the source that did not fit
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
        """The rows [B, d] at indices [B]."""
        if self.memory is None:
            return self.rows.index_select(0, chosen.to(self.rows.device))
        return gather([self.rows], chosen, self.memory.take(len(chosen)))

    @property
    def rows_per_refill(self) -> int:
        """Rows served between two refills: half of the capacity, in whole batches."""
        half = max(self.batch_size, self.capacity // 2)
        return half - half % self.batch_size

    def _refill(self) -> None:
        while self.filled < self.capacity and not self.ended:
            x = self.overflow if self.overflow is not None else next(self.source, None)
            self.overflow = None
            if x is None:
                self.ended = True
                break
            if not self.rows.numel():
                self._allocate(x)
            taken = min(x.shape[0], self.capacity - self.filled)
            self.rows[self.filled : self.filled + taken] = x[:taken]
            self.filled += taken
            if taken < x.shape[0]:
                self.overflow = x[taken:]
        self.served = torch.randperm(self.filled, generator=self.generator)
        if not self.ended:
            self.served = self.served[: self.rows_per_refill]
        self.order = self.served

    def _allocate(self, like: Tensor) -> None:
        shape = (self.capacity, like.shape[1])
        self.rows = torch.empty(shape, dtype=like.dtype, device=self.device or like.device)
        if self.rows.device.type == "cpu":
            self.memory = BatchMemory(self.batch_size, like.shape[1], like.dtype)

    def _close_gaps(self) -> None:
        """Move rows from the end into the gaps that served rows left."""
        left = self.filled - self.served.numel()
        used = torch.zeros(self.filled, dtype=torch.bool)
        used[self.served] = True
        gaps, movable = used[:left].nonzero().squeeze(1), (~used[left:]).nonzero().squeeze(1)
        for to, start in zip(gaps.split(MOVED_ROWS), movable.split(MOVED_ROWS), strict=True):
            self.rows[to] = self.rows[start + left]
        self.filled = left

    def state_dict(self) -> dict[str, Any]:
        """Everything that determines the next batches, except the source's position.

        The tensors are views, valid until the next batch: save or copy them before.
        """
        return {
            "rows": self.rows[: self.filled],
            "order": self.order,
            "served": self.served if self.order.numel() else self.order,
            "overflow": torch.empty(0, 0) if self.overflow is None else self.overflow,
            "generator": self.generator.get_state(),
            "ended": self.ended,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, which is copied; the source has to stand where it stood then."""
        state = typed(state, _STATE, "source.buffer")
        rows, overflow = state["rows"], state["overflow"]
        self.filled = rows.shape[0]
        if self.filled:
            self._allocate(rows)
            self.rows[: self.filled] = rows
        self.order, self.served = state["order"].clone(), state["served"].clone()
        self.overflow = overflow.clone() if overflow.numel() else None
        self.generator.set_state(state["generator"])
        self.ended = state["ended"]
