"""Standard output and error that may be full, closed or without a reader: progress is dropped, lost results are an error."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

import typer

from crlseq.errors import InputError
from crlseq.storage.interrupts import NOT_HERE


class _Stream(io.FileIO):
    """Drops what cannot be written; with `failure`, which makes an exception of it, that is raised once.

    Nothing is left to fail when Python ends.
    """

    def __init__(self, handle: int, failure: Callable[[OSError], Exception] | None, instead_of: TextIO | None) -> None:
        super().__init__(handle, "w", closefd=False)
        # What it stands in for would close the handle if nobody held it.
        self.failure, self.lost, self.instead_of = failure, False, instead_of

    def write(self, data: Any) -> int:
        """To the stream, or nowhere."""
        if not self.lost:
            try:
                return super().write(data) or 0
            except OSError as error:
                if self.failure is not None:
                    self.lost = True
                    raise self.failure(error) from error
        return len(data)


# Else what was just written would be written again: its buffer has not heard of it.
NOT_HERE.add(_Stream.write.__code__)


def suit_streams() -> None:
    """Put streams into the place of `sys.stdout` and `sys.stderr` that do not fail a command for what it says.

    What has no descriptor, as in a notebook or a test, stays.
    """
    for handle in range(3):  # else the next file that is opened gets the number, and what is printed
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    sys.stdout = _suited(sys.stdout, 1, _lost_results)
    sys.stderr = _suited(sys.stderr, 2, None)


def _suited(stream: TextIO | None, handle: int, failure: Callable[[OSError], Exception] | None) -> TextIO:
    encoding = "utf-8"
    if stream is not None:
        if not isinstance(stream, io.TextIOWrapper):
            return stream
        try:
            handle, encoding = stream.fileno(), stream.encoding
        except OSError:
            # A name that cannot be shown is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
            return stream
        with suppress(OSError):
            stream.flush()
    lines = failure is None or os.isatty(handle)
    return io.TextIOWrapper(
        io.BufferedWriter(_Stream(handle, failure, stream)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=lines,
    )


def _lost_results(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):  # the reader has seen enough, such as `head`
        return typer.Exit()
    what = f"The results cannot be written to the standard output: {error.strerror}."
    return InputError(what, "Check where it leads, and the disk.")
