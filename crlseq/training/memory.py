"""Freed memory that goes back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return what is freed: glibc keeps it, so that what reading took for a moment would stay with the whole fit."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        return
