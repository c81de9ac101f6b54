"""A seeded shuffle buffer of activations."""

from collections.abc import Iterator, Sequence
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


def in_batches(x: Tensor) -> Tensor:
    """x in the dtype of batches: float32, or float64 if x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ShuffleBuffer:
    """Shuffles a stream of activations through a buffer of `capacity` rows (tokens).

    It fills up, serves half of its rows in random order without replacement, fills up again, and
    serves everything when the stream ends; only the very last batch can be smaller. The capacity
    is at least twice the batch size. Hookpoints that are read together share one order: a batch
    has the same tokens of each.
    Rows keep the dtype in which they come, so that those of a bfloat16 model take half the memory;
    batches are float32, or float64 if the rows are.

    source: gives tensors [r, d], one for each hookpoint, with a row for each token. They are not
        written to, and must not change until the next ones are asked for (rows that do not fit are
        kept without a copy).
    device: of the buffer and the batches; None takes that of the source's tensors.
    hookpoints: number of them.
    """

    def __init__(
        self,
        source: Iterator[Sequence[Tensor]],
        capacity: int,
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
        hookpoints: int = 1,
    ) -> None:
        check_batch_size(batch_size)
        self.source = source
        self.capacity = max(capacity, 2 * batch_size)
        self.batch_size = batch_size
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        # [capacity, d] of each hookpoint, from the first refill on
        self.rows = [torch.empty(0, 0)] * hookpoints
        self.memory: list[BatchMemory] = []  # of the batches, on a CPU
        self.filled = 0  # rows [0, filled) hold activations
        self.served = torch.empty(0, dtype=torch.int64)  # rows drawn at the last refill
        self.order = self.served  # the drawn rows that are still to serve
        self.overflow: Sequence[Tensor] | None = None  # rows of the source that did not fit
        self.ended = False

    def __iter__(self) -> Iterator[list[Tensor]]:
        while (batch := self.next()) is not None:
            yield batch

    def next(self) -> list[Tensor] | None:
        """The next batch: tensors [B, d], one for each hookpoint; None after the last one."""
        if not self.order.numel():
            self._refill()
            if not self.filled:
                return None
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        batch = self._batch(chosen)
        if not self.order.numel():
            self._close_gaps()
        return batch

    def _batch(self, chosen: Tensor) -> list[Tensor]:
        """The rows [B, d] of each hookpoint at indices [B]."""
        if not self.memory:
            chosen = chosen.to(self.rows[0].device)
            return [in_batches(rows.index_select(0, chosen)) for rows in self.rows]
        return [
            gather([rows], chosen, memory.take(len(chosen)))
            for rows, memory in zip(self.rows, self.memory, strict=True)
        ]

    @property
    def rows_per_refill(self) -> int:
        """Rows served between two refills: half of the capacity, in whole batches."""
        half = max(self.batch_size, self.capacity // 2)
        return half - half % self.batch_size

    def _refill(self) -> None:
        while self.filled < self.capacity and not self.ended:
            parts = self.overflow if self.overflow is not None else next(self.source, None)
            self.overflow = None
            if parts is None:
                self.ended = True
                break
            if not self.rows[0].numel():
                self._allocate(parts)
            taken = min(len(parts[0]), self.capacity - self.filled)
            for number, part in enumerate(parts):
                rows = self.rows[number]
                wide = torch.promote_types(rows.dtype, part.dtype)
                if wide != rows.dtype:  # the run goes on with another --model-dtype
                    rows = self.rows[number] = rows.to(wide)
                rows[self.filled : self.filled + taken] = part[:taken]
            self.filled += taken
            if taken < len(parts[0]):
                self.overflow = [part[taken:] for part in parts]
        self.served = torch.randperm(self.filled, generator=self.generator)
        if not self.ended:
            self.served = self.served[: self.rows_per_refill]
        self.order = self.served

    def _allocate(self, like: Sequence[Tensor]) -> None:
        self.rows, self.memory = [], []
        for part in like:
            shape, device = (self.capacity, part.shape[1]), self.device or part.device
            self.rows.append(torch.empty(shape, dtype=part.dtype, device=device))
            if device.type == "cpu":
                dtype = in_batches(part[:0]).dtype
                self.memory.append(BatchMemory(self.batch_size, part.shape[1], dtype))

    def _close_gaps(self) -> None:
        """Move rows from the end into the gaps that served rows left."""
        left = self.filled - self.served.numel()
        used = torch.zeros(self.filled, dtype=torch.bool)
        used[self.served] = True
        gaps, movable = used[:left].nonzero().squeeze(1), (~used[left:]).nonzero().squeeze(1)
        for to, start in zip(gaps.split(MOVED_ROWS), movable.split(MOVED_ROWS), strict=True):
            for rows in self.rows:
                rows[to] = rows[start + left]
        self.filled = left

    def state_dicts(self) -> list[dict[str, Any]]:
        """For each hookpoint all that determines its next batches, but the source's position.

        The tensors are views, valid until the next batch: save or copy them before.
        """
        overflow = self.overflow or [torch.empty(0, 0)] * len(self.rows)
        shared = {
            "order": self.order,
            "served": self.served if self.order.numel() else self.order,
            "generator": self.generator.get_state(),
            "ended": self.ended,
        }
        return [
            {**shared, "rows": rows[: self.filled], "overflow": left}
            for rows, left in zip(self.rows, overflow, strict=True)
        ]

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states, which are copied; the source has to stand where it stood then."""
        states = [typed(state, _STATE, "source.buffer") for state in states]
        parts, overflow = ([state[name] for state in states] for name in ("rows", "overflow"))
        self.filled = len(parts[0])
        if self.filled:
            self._allocate(parts)
            for rows, part in zip(self.rows, parts, strict=True):
                rows[: self.filled] = part
        shared = states[0]
        self.order, self.served = shared["order"].clone(), shared["served"].clone()
        self.overflow = [part.clone() for part in overflow] if overflow[0].numel() else None
        self.generator.set_state(shared["generator"])
        self.ended = shared["ended"]
