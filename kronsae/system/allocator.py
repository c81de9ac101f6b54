"""Memory that tensors on a CPU free: the C library's malloc keeps it for the next ones."""

import ctypes
import os

THRESHOLDS = {"M_MMAP_THRESHOLD": (-3, 2**28), "M_TRIM_THRESHOLD": (-1, 2**30)}
"""Parameters of glibc's mallopt, with their numbers there and our values in bytes."""
GIVEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
"""Variables by which a user says the like."""


def keep_freed_memory() -> bool:
    """Let malloc keep blocks of up to 256 MiB that are freed, and up to 1 GiB of them in all.

    By default glibc gives blocks above 32 MiB back at once, and Linux clears the pages of the next
    one: a step then spends a tenth of its time on them, and the language model as much.
    Returns whether it could: not with another C library, nor where the user has set variables of
    malloc.
    """
    if any(os.environ.get(name) for name in GIVEN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc, or Windows
        return False
    return all(mallopt(number, value) for number, value in THRESHOLDS.values())
