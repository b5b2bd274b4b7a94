"""When freed memory goes back to the system.

glibc gives a freed block of 32 MB or more back at once, and fetching it again costs a page fault for every 4 kB: on a
virtual machine six times as long as the arithmetic. So a fit keeps what it frees, and gives it back between its stages.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT, RETURNED = 1 << 30, 1 << 22


def suit_allocator(streamed: bool) -> None:
    """Have freed blocks below 1 GB stay with the process, or, where a screen is read as training goes, below 4 MB.

    Reading in one thread and computing in another would else hold twice what they use.
    """
    for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        _of_glibc("mallopt", threshold, RETURNED if streamed else KEPT)


def give_back() -> None:
    """Return what is freed: else what reading took for a moment would stay with the whole fit."""
    _of_glibc("malloc_trim", 0)


def _of_glibc(function: str, *arguments: int) -> None:
    with suppress(AttributeError, OSError, TypeError):  # another C library
        getattr(ctypes.CDLL(None), function)(*arguments)
