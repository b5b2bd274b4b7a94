"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

from crlseq.errors import InputError

UNFINISHED = Event()  # set where HDF5 could not finish a file


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` at the end of the block, or is removed.

    A link at `path` is replaced, not followed.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)  # of a process that was killed, or a link that somebody put there
        yield beside
        sync(beside)
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # h5py's at a full disk is a RuntimeError
        detail = getattr(error, "strerror", None) or str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"{path} cannot be written: {detail}.", "Check the path, its permissions and the disk."
        ) from error
    finally:
        with suppress(OSError):  # a path that cannot be written cannot be cleaned up either
            beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written, before a new name says that it does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_links_outside(folder: Path) -> None:
    """Refuse a folder with a link that leads out of it: what it says would be another's, and writing would harm them.

    Raises
    ------
    InputError
    """
    inside = folder.resolve()
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() and not file.resolve().is_relative_to(inside):
            raise InputError(
                f"{file} is a link that leads out of {folder}.", "Put a copy of what it stands for in its place."
            )
