"""Forward passes made ahead of who takes them, in a thread of their own."""

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

PATIENCE = 5.0
"""Seconds that `Ahead.close` waits for a thread that is stuck, as in a read from a network."""


class Pass(NamedTuple):
    """What one forward pass of a language model gave."""

    rows: Tensor
    """[r, d], on the device where they wait to be trained on."""
    position: dict[str, Any]
    """Where the source stands after it: what comes next, as in its `state_dict`."""


class Ahead:
    """The passes of an iterator, in its order, made in a thread up to `limit` rows ahead.

    Each is given with the position after it, so that a state taken by the consumer knows nothing of
    what was made and not yet taken. An exception of the iterator is raised in its place, and so is
    its end. The thread has CUDA streams of its own on `devices`; what it gives is in order with
    the consumer's stream.

    limit: the thread waits while so many rows wait.  waited: seconds that it did, so far.
    """

    def __init__(
        self, passes: Iterator[Pass], limit: int, devices: tuple[torch.device, ...]
    ) -> None:
        self.passes = passes
        self.limit = limit
        cards = dict.fromkeys(with_index(device) for device in devices if device.type == "cuda")
        self.streams = {device: torch.cuda.Stream(device) for device in cards}
        for device, stream in self.streams.items():  # after the weights have come
            stream.wait_stream(torch.cuda.current_stream(device))
        self.ready: deque[tuple[Pass, torch.cuda.Event | None]] = deque()
        self.rows = 0  # that wait
        self.error: BaseException | None = None
        self.ended = self.closed = self.interrupted = False
        self._waited, self._waits_since = 0.0, None
        # Its lock is re-entrant: a signal's handler may call `interrupt` while this thread has it.
        self.changed = threading.Condition()
        # A daemon: a read that never returns must not keep the process.
        self.thread = threading.Thread(target=self._work, name="kronsae-ahead", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[Pass]:
        return self

    def __next__(self) -> Pass:
        """The next pass. Raises Interrupted, at once, after `interrupt`."""
        with self.changed:
            while not (self.ready or self.ended or self.interrupted):
                self.changed.wait()
            if self.interrupted:
                raise Interrupted
            if not self.ready:
                raise self.error or StopIteration
            done, event = self.ready.popleft()
            self.rows -= done.rows.shape[0]
            self.changed.notify_all()
        if event is not None:
            stream = torch.cuda.current_stream(done.rows.device)
            stream.wait_event(event)
            done.rows.record_stream(stream)  # not to be reused before this stream is done with it
        return done

    @property
    def waited(self) -> float:
        """Seconds that the thread waited for the consumer to take something."""
        with self.changed:
            since = self._waits_since
            return self._waited + (0.0 if since is None else time.monotonic() - since)

    def interrupt(self) -> None:
        """Let the consumer wait no longer; may be called from a signal's handler."""
        with self.changed:
            self.interrupted = True
            self.changed.notify_all()

    def close(self) -> bool:
        """End the thread after the pass it is at; whether it has ended (see PATIENCE)."""
        with self.changed:
            patience = 0 if self.closed else PATIENCE
            self.closed = True
            self.changed.notify_all()
        self.thread.join(patience)
        return not self.thread.is_alive()

    def _work(self) -> None:
        with ExitStack() as stack:
            # The last one entered is the thread's device: the language model's.
            for stream in self.streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            try:
                for done in self.passes:
                    if not self._give(done):
                        return
            except BaseException as error:  # the consumer's business
                self.error = error
            finally:
                with self.changed:
                    self.ended = True
                    self.changed.notify_all()

    def _give(self, done: Pass) -> bool:
        """Hand a pass over, and wait for room; whether to go on."""
        stream = self.streams.get(done.rows.device)
        event = None if stream is None else stream.record_event()
        with self.changed:
            self.ready.append((done, event))
            self.rows += done.rows.shape[0]
            self.changed.notify_all()
            self._waits_since = time.monotonic()
            while self.rows >= self.limit and not self.closed:
                self.changed.wait()
            self._waited += time.monotonic() - self._waits_since
            self._waits_since = None
            return not self.closed
