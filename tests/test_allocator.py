"""Memory that tensors free is kept for the next ones, where the C library can do so."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from kronsae.system import allocator
from kronsae.system.allocator import GIVEN, keep_freed_memory

FAULTS = """
import resource
import torch
from kronsae.system.allocator import keep_freed_memory

torch.set_num_threads(1)
kept, faults = keep_freed_memory(), []
for _ in range(8):
    torch.empty(2**24).fill_(1)  # 64 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(kept, faults[-1] - faults[-2])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("given", [{}, {"MALLOC_MMAP_THRESHOLD_": "1000000"}])
def test_a_block_takes_the_pages_of_the_one_before(given):
    """Unless the user says how malloc keeps memory."""
    environment = {name: value for name, value in os.environ.items() if name not in GIVEN} | given
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    assert kept == str(not given)
    assert (int(faults) < 20) == (not given), faults


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_other_c_libraries_are_left_alone(monkeypatch, error):
    def library(name):
        raise error

    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", library)
    assert not keep_freed_memory()


def test_an_old_glibc_refuses(monkeypatch):
    """It takes no threshold above 32 MiB."""

    class Library:
        mallopt = staticmethod(lambda number, value: 0)

    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert not keep_freed_memory()
