"""Freed memory that goes back to the system."""

from __future__ import annotations

import ctypes

LARGE = 1 << 22
M_MMAP_THRESHOLD = -3  # of malloc.h


def return_large_blocks() -> None:
    """Have blocks from 4 MB on go back to the system as they are freed.

    glibc raises that bound to 32 MB by itself, and keeps what is below in a heap for each thread: a fit that reads in
    one thread and computes in another then holds twice what it uses.
    """
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def give_back() -> None:
    """Return what is freed: glibc keeps it, so that what reading took for a moment would stay with the whole fit."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        return
