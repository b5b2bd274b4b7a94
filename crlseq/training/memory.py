"""When freed memory goes back to the system.

glibc gives a freed block of 32 MB or more back at once, and fetching it again costs a page fault for every 4 kB: on a
virtual machine the systems of 30 programs took six times as long in page faults as in arithmetic. So a fit keeps what it
frees, and gives it back between its stages.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = 1 << 30
RETURNED = 1 << 22


def keep_blocks() -> None:
    """Have blocks below 1 GB stay with the process as they are freed."""
    _set(M_MMAP_THRESHOLD, KEPT)
    _set(M_TRIM_THRESHOLD, KEPT)


def return_blocks() -> None:
    """Have blocks from 4 MB on go back: reading in one thread and computing in another would hold twice what they use."""
    _set(M_MMAP_THRESHOLD, RETURNED)
    _set(M_TRIM_THRESHOLD, RETURNED)


def give_back() -> None:
    """Return what is freed: else what reading took for a moment would stay with the whole fit."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def _set(parameter: int, value: int) -> None:
    try:
        ctypes.CDLL(None).mallopt(parameter, value)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a device: torch tells of it in errors of its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
