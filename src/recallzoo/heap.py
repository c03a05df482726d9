"""Memory that is freed stays with the process.

glibc gives memory back to the system when enough of it is free, and the system clears each page of
what it hands out next when that is first touched. A step on a CPU takes and frees tensors of
megabytes all the time: small pretrainings spent a third of their time on that (docs/lab.md). The
price is room between blocks: up to a third more at the peak was seen (glibc 2.36, where an aligned
request does not fill a block of its size).
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
LARGEST_KEPT = (2**28, 2**25)
"""Size from which a block is the system's own; the second is the most that mallopt(3) promises to
take, with which models with larger tensors gain nothing."""
LARGEST_INT = 2**31 - 1
CHOSEN_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """From now on, in all of this process: for those of our own, not for one that imports us.

    False where it does nothing: the environment says how glibc is to allocate, or the C library is
    another one.
    """
    if any(os.environ.get(name) for name in CHOSEN_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT)
    return bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT)) and kept
