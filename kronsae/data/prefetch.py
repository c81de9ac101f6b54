"""Forward passes of the language model, run in a thread ahead of the consumer."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronsae.data.common import Interrupted
from kronsae.system.devices import with_index

CLOSE_TIMEOUT = 5.0
"""Seconds that `Prefetcher.close` waits for a thread that hangs, as in a read from a network."""


class ForwardPass(NamedTuple):
    """Activations of one forward pass of a language model."""

    rows: list[Tensor]
    """[r, d] of each hookpoint, on the device where they wait for training."""
    position: dict[str, Any]
    """The source's position after this pass, as in its `state_dict`."""


class Prefetcher:
    """Iterates over `passes`, which a thread runs up to `limit` rows ahead of the consumer.

    Each pass carries the position after it, so that a state that the consumer saves does not count
    passes that it has not taken. The iterator's exceptions are raised in the consumer, in their
    order. The thread has its own CUDA streams on `devices`; the consumer's stream waits for them.

    limit: the thread waits while so many rows are ready.
    """

    def __init__(
        self, passes: Iterator[ForwardPass], limit: int, devices: tuple[torch.device, ...]
    ) -> None:
        self.passes = passes
        self.limit = limit
        gpus = dict.fromkeys(with_index(device) for device in devices if device.type == "cuda")
        self.streams = {device: torch.cuda.Stream(device) for device in gpus}
        for device, stream in self.streams.items():  # the weights may still be on their way
            stream.wait_stream(torch.cuda.current_stream(device))
        self.ready: deque[tuple[ForwardPass, torch.cuda.Event | None]] = deque()
        self.rows = 0  # in `ready`
        self.error: BaseException | None = None
        self.ended = self.closed = self.interrupted = False
        self._waited = 0.0
        self._waits_since: float | None = None
        # Its lock is re-entrant: a signal handler may call `interrupt` while this thread holds it.
        self.changed = threading.Condition()
        # A daemon thread: a read that never returns must not keep the process alive.
        self.thread = threading.Thread(target=self._work, name="kronsae-prefetch", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[ForwardPass]:
        return self

    def __next__(self) -> ForwardPass:
        """The next pass. Raises Interrupted at once after `interrupt`."""
        with self.changed:
            while not (self.ready or self.ended or self.interrupted):
                self.changed.wait()
            if self.interrupted:
                raise Interrupted
            if not self.ready:
                raise self.error or StopIteration
            forward_pass, event = self.ready.popleft()
            self.rows -= len(forward_pass.rows[0])
            self.changed.notify_all()
        if event is not None:
            stream = torch.cuda.current_stream(forward_pass.rows[0].device)
            stream.wait_event(event)
            for rows in forward_pass.rows:
                # The allocator must not reuse the memory before this stream has read it.
                rows.record_stream(stream)
        return forward_pass

    @property
    def waited(self) -> float:
        """Seconds that the thread has waited for the consumer."""
        with self.changed:
            since = self._waits_since
            return self._waited + (0.0 if since is None else time.monotonic() - since)

    def interrupt(self) -> None:
        """Make the consumer's `next` raise Interrupted; may be called from a signal handler."""
        with self.changed:
            self.interrupted = True
            self.changed.notify_all()

    def close(self) -> bool:
        """End the thread after its current pass; False if it hangs (see CLOSE_TIMEOUT)."""
        with self.changed:
            timeout = 0 if self.closed else CLOSE_TIMEOUT
            self.closed = True
            self.changed.notify_all()
        self.thread.join(timeout)
        return not self.thread.is_alive()

    def _work(self) -> None:
        with ExitStack() as stack:
            # The last one sets the thread's current device: the language model's.
            for stream in self.streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            try:
                for forward_pass in self.passes:
                    if not self._append(forward_pass):
                        return
            except BaseException as error:  # raised again in the consumer
                self.error = error
            finally:
                with self.changed:
                    self.ended = True
                    self.changed.notify_all()

    def _append(self, forward_pass: ForwardPass) -> bool:
        """Hand over a pass and wait for room; False once closed."""
        stream = self.streams.get(forward_pass.rows[0].device)
        event = None if stream is None else stream.record_event()
        with self.changed:
            self.ready.append((forward_pass, event))
            self.rows += len(forward_pass.rows[0])
            self.changed.notify_all()
            self._waits_since = time.monotonic()
            while self.rows >= self.limit and not self.closed:
                self.changed.wait()
            self._waited += time.monotonic() - self._waits_since
            self._waits_since = None
            return not self.closed
