"""SIGTERM and SIGINT while a run trains: the step in progress is finished, and everything saved."""

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from kronsae.system.parallel import RankLost


@dataclasses.dataclass
class Stop:
    received: int | None = None


@contextmanager
def note_signals(interrupt: Callable[[], None]) -> Iterator[Stop]:
    """Note the first SIGTERM or SIGINT, and interrupt, instead of dying; a second acts as usual."""
    stop = Stop()
    earlier: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.received = number
        interrupt()
        for each, handler in earlier.items():
            signal.signal(each, handler)
        name = signal.Signals(number).name
        words = f"\n{name}: finishing this step and saving (again to stop at once)"
        with suppress(RuntimeError):  # it came in the middle of another print
            print(words, file=sys.stderr)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            earlier[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: signals are somebody else's business
        pass
    try:
        yield stop
    except RankLost:
        usual = earlier.get(stop.received)
        if signal.SIGTERM in earlier:  # torchrun now ends the others: let them say why first
            earlier[signal.SIGTERM] = signal.SIG_IGN
        if callable(usual):  # the others were stopped at once, and so is this one
            usual(stop.received, None)
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
