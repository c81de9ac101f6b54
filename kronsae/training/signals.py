"""Handling of SIGTERM, SIGINT and SIGHUP in training: the step is finished, everything saved."""

import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from kronsae.commandline import STOPS
from kronsae.system.parallel import RankLost


@dataclasses.dataclass
class Stop:
    """The signal that asks a run to stop, once it has come."""

    received: int | None = None


@contextmanager
def note_signals(interrupt: Callable[[], None], saves: bool = True) -> Iterator[Stop]:
    """Note the first signal of `STOPS` and call `interrupt`; a second one acts as usual.

    saves: whether something is saved then, for the message.
    An ignored signal stays ignored, as SIGHUP is under nohup.
    """
    stop = Stop()
    earlier: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.received = number
        interrupt()
        restore()
        name = signal.Signals(number).name
        saving = " and saving" if saves else ""
        message = f"\n{name}: finishing this step{saving} (again to stop at once)"
        # It may come in the middle of another print, or because the terminal was closed.
        with suppress(RuntimeError, OSError, ValueError):
            print(message, file=sys.stderr)

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    with suppress(ValueError):  # only the main thread handles signals
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                earlier[number] = signal.signal(number, handle)
    try:
        yield stop
    except RankLost:
        usual = None if stop.received is None else earlier.get(stop.received)
        if signal.SIGTERM in earlier:  # torchrun now ends the others: let them say why first
            earlier[signal.SIGTERM] = signal.SIG_IGN
        if callable(usual):  # the others were stopped at once, and so is this one
            usual(stop.received, None)
        raise
    finally:
        restore()
