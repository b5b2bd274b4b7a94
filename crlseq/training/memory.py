"""Whether memory ran out, of the machine or of a device."""

from __future__ import annotations

from crlseq.errors import InputError

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
