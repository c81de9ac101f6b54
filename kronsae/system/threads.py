"""Threads on processors that others use, too: how many there are, and how they wait.

Imports no torch: what it sets in the environment, OpenMP reads when torch is loaded.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that say how threads of OpenMP wait for each other."""
BRIEFLY = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
"""Sleep after some tens of microseconds of spinning (GNU's OpenMP), or at once (others').

2,000 turns are about as long as the gaps between a step's parallel operations. On two processors
a small step beside one and two busy processes takes 1.6 and 2.9 times its time; with 30,000 turns
3.6 and 4.7 times, and quiet 0.9 of it (`benchmarks.busy` measures).
"""
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that say how many there are."""


def wait_briefly() -> None:
    """Let the threads of a command of ours sleep where they wait long for each other.

    They spin by default. Where another program runs on their processors, one of them then waits
    for a processor that another wastes: a training step takes 10 times as long, or more.
    What a user has set stays. Where torch is loaded it would come too late.
    """
    if _is_command() and "torch" not in sys.modules and not waiting():
        os.environ.update(BRIEFLY)


def _is_command() -> bool:
    """Whether this program is `kronsae ...` or (while the package is imported) `python -m ...`."""
    return sys.argv[:1] == ["-m"] or Path((sys.argv or [""])[0]).stem == "kronsae"


def waiting() -> str:
    """How threads wait, as in the environment: "OMP_WAIT_POLICY=passive"; "" if it says nothing."""
    return " ".join(f"{name}={os.environ[name]}" for name in POLICIES if os.environ.get(name))


@contextmanager
def limited_threads() -> Iterator[None]:
    """Use no more threads than processors meanwhile, unless the user has said how many."""
    import torch

    if any(os.environ.get(name) for name in COUNTS):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, int(processors()))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processors(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Processors that this process may use: its affinity, and the quota of its control groups.

    root: where these are mounted. With a quota, more threads would be stopped all at once for a
    part of each period.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    return min([float(count), *_quotas(root)])


def _quotas(root: Path, own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Quotas, in processors, of the control groups that this process is in (of both versions)."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, names = root, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            folder, names = root / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):  # a limit of each holds
            try:
                words = [w for name in names for w in (folder / group / name).read_text().split()]
                quota, period = map(float, words)  # "max" where there is none: a ValueError
            except (OSError, ValueError):
                continue
            if quota > 0 and period > 0 and math.isfinite(quota):
                yield quota / period
