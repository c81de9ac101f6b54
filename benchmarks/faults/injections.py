"""Faults of a run: signals after some processor time, and death at a file operation.

Moments are given in processor time, not in seconds: what a process has done by then depends little
on what else the machine does.
"""

import builtins
import errno
import io
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OPERATIONS = ("mkdir", "replace", "rename", "fsync", "truncate", "unlink", "rmdir")
"""Functions of `os` by which files change, or reach the disk: between two of them lies every state
that a folder can be found in."""


class Spots:
    """Counts file operations in this process, and kills it at one of them.

    last: number of the operation to die at, counted from 1; None only counts.
    after: die when it is done; else before it.
    A file of tensors counts as well: `after` is then when half of it is written.
    """

    def __init__(self, last: int | None = None, after: bool = False) -> None:
        self.last, self.after = last, after
        self.count = 0

    def install(self) -> None:
        """Count for good: meant for a process that ends after the one thing it does."""
        import safetensors.torch

        save_file = safetensors.torch.save_file

        def save_half(tensors: Any, path: Any, *args: Any) -> None:
            save_file(tensors, path, *args)
            if self.count == self.last:
                os.truncate(path, Path(path).stat().st_size // 2)

        safetensors.torch.save_file = self._counted(save_half)
        for name in OPERATIONS:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            here = self.count == self.last
            if here and not self.after:
                die()
            result = operation(*args, **kwargs)
            if here:
                die()
            return result

        return counted


class Fault(NamedTuple):
    """A fault that happens to a run; by default, nothing happens."""

    signals: Sequence[tuple[float, int]] = ()
    """(Processor seconds of the first process, signal) to send, in turn."""
    victims: Sequence[int] | None = None
    """Ranks that get them; None: all."""
    spots: Spots | None = None
    """Counts, or kills, in the first process."""
    prepare: Callable[[], None] = lambda: None
    """Called in each process, before the command."""
    seconds: float = 300
    """The run ends within so many, or is killed, with TimeoutError."""


def die() -> None:
    """kill -9 of this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # a signal to oneself may come a moment later


def limit_file_size(size: int) -> None:
    """Let no file of this process grow beyond so many bytes: writes fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def refuse_writes(number: int, after: int) -> None:
    """Let all file operations of this process fail with an error, once `after` of them were made.

    number: EROFS, as of a file system that became read-only, or ENOSPC of a full one. What is
    removed can still be removed on a full one.
    """
    count, kept = [0], ("unlink", "rmdir", "truncate") if number == errno.ENOSPC else ()

    def refusing(operation: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if writes(*args, **kwargs):
                count[0] += 1
                if count[0] > after:
                    raise OSError(number, os.strerror(number), str(args[0]))
            return operation(*args, **kwargs)

        return run

    def opens_to_write(path: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> bool:
        return not isinstance(path, int) and not set(str(mode)).isdisjoint("wax+")

    builtins.open = io.open = refusing(open, opens_to_write)  # type: ignore[assignment]
    for name in OPERATIONS:
        if name not in kept:
            setattr(os, name, refusing(getattr(os, name), lambda *args, **kwargs: True))


def print_to(where: str, size: int = 0) -> None:
    """Let what this process prints go to a file; or to "| head", which reads `size` bytes."""
    if where == "| head":
        reading, writing = os.pipe()
        threading.Thread(target=_head, args=(reading, size), daemon=True).start()
    else:
        writing = os.open(where, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(writing, stream)
    os.close(writing)


def _head(pipe: int, size: int) -> None:
    while size > 0 and (read := os.read(pipe, size)):
        size -= len(read)
    os.close(pipe)


def print_in(encoding: str) -> None:
    """Let this process print in an encoding, as PYTHONIOENCODING does."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=encoding, errors="strict")  # type: ignore[union-attr]


def processor_seconds(pid: int) -> float:
    """Processor time that the main thread of a process has used; 0 if the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def wait(pids: Sequence[int], fault: Fault) -> tuple[int, ...]:
    """Exit statuses of child processes, as `os.waitstatus_to_exitcode` gives them.

    Sends them the signals of a fault. Raises TimeoutError, after killing them, if they have not
    ended in time.
    """
    victims = set(pids) if fault.victims is None else {pids[rank] for rank in fault.victims}
    left, ended = list(fault.signals), {}
    end = time.monotonic() + fault.seconds
    while running := set(pids) - ended.keys():
        for pid in running:
            child, status = os.waitpid(pid, os.WNOHANG)
            if child:
                ended[pid] = os.waitstatus_to_exitcode(status)
        while left and pids[0] not in ended and processor_seconds(pids[0]) >= left[0][0]:
            _, number = left.pop(0)
            for pid in victims - ended.keys():
                os.kill(pid, number)
        if time.monotonic() > end:
            for pid in set(pids) - ended.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"processes {list(pids)} did not end in {fault.seconds:g} s")
        time.sleep(0.002)
    return tuple(ended[pid] for pid in pids)
