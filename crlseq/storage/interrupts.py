"""Signals that end a command: raised in the main thread until it takes them, and enforced if it cannot.

A `KeyboardInterrupt` may be lost: raised in a destructor or in a callback of a library it is forgotten (Python would print a
traceback, which is left out), and a long call into C lets no handler run. So it is raised again every `AGAIN` seconds while
nobody deals with it, and after `PATIENCE` seconds the process ends where it stands, which costs no more than a kill does: nothing is ever half-written.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FrameType

from crlseq.storage.hdf5 import Target

INTERRUPTED = 130
AGAIN, PATIENCE = 0.5, 4.0  # seconds
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Code that is called by C code in the middle of something: the interrupt comes again. HDF5 takes an exception in these for
# a disk that failed, and crashes later.
NOT_HERE = {own.__code__ for own in vars(Target).values() if isinstance(getattr(own, "__code__", None), CodeType)}
SHOW_CURSOR = b"\x1b[?25h"  # progress bars hide it

_received = False


def received() -> bool:
    """Whether a signal to end has come, whatever became of the exception."""
    return _received


@contextmanager
def watched(farewell: str) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `KeyboardInterrupt` within the block; outside the main thread do nothing.

    SIGINT is watched even where the process was started with it ignored, as shells start jobs in the background of a
    script; SIGHUP is not, since that is what ``nohup`` is for. ``farewell`` goes to stderr where the process had to be ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _received
    _received = False
    numbers = [n for n in ENDING if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _handle) for number in (*numbers, signal.SIGALRM)}
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    wakeup = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)  # written to even while C code runs
    lost, sys.unraisablehook = sys.unraisablehook, _unraisable
    threading.Thread(target=_enforce, args=(reads, farewell.encode() + b"\n"), daemon=True).start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(wakeup)
        sys.unraisablehook = lost
        for number, handler in before.items():
            if signal.getsignal(number) is _handle:  # and not what the block put there
                signal.signal(number, handler)
        os.close(writes)  # ends the thread


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    _received = True
    signal.setitimer(signal.ITIMER_REAL, AGAIN)
    called_by_hdf5 = frame is not None and frame.f_code in NOT_HERE
    if not called_by_hdf5 and not _dealt_with():
        raise KeyboardInterrupt


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Print what cannot be raised, except an interrupt, which comes again."""
    error = unraisable.exc_value
    if not (_received and isinstance(error, KeyboardInterrupt)):
        sys.__unraisablehook__(unraisable)


def _dealt_with() -> bool:
    """Whether the code that the signal met is an ``except`` or ``finally`` that an interrupt led to."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _enforce(reads: int, farewell: bytes) -> None:
    """End the process `PATIENCE` seconds after the first signal, unless the block has ended by then."""
    with os.fdopen(reads, "rb", buffering=0) as pipe:
        while (byte := pipe.read(1)) and byte[0] not in ENDING:
            pass
        if not byte:
            return
        time.sleep(PATIENCE)
        os.set_blocking(pipe.fileno(), False)
        while (rest := pipe.read(512)) is not None:  # None: still open and nothing more to read
            if not rest:
                return
    with suppress(OSError):
        os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + farewell)
    os._exit(INTERRUPTED)
