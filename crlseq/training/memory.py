"""When freed memory goes back to the system, and whether it ran out.

glibc gives a freed block of 32 MB or more back at once, and fetching it again costs a page fault for every 4 kB: on a
virtual machine six times as long as the arithmetic. So a fit keeps what it frees, and gives it back between its stages.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

from crlseq.errors import InputError

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


# What torch says in errors of no type of their own: of the machine, of a device, and of the libraries on a device.
OF_TORCH = ("can't allocate memory", "cuda error: out of memory", "cuda out of memory", "_status_alloc_failed")


class ShortOfMemoryError(InputError):
    """There is too little memory for the smallest part of a fit."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a device: torch reports it in errors of its own."""
    said = str(error).casefold()
    by_torch = isinstance(error, RuntimeError) and any(words in said for words in OF_TORCH)
    # Of the loader, for libtorch and others.
    by_import = isinstance(error, ImportError) and ("failed to map segment" in said or "cannot allocate memory" in said)
    return by_torch or by_import or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
