"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

from crlseq.errors import InputError

UNFINISHED = Event()  # set where HDF5 could not finish a file
_HDF5 = re.compile(r"errno = (\d+)")  # in what it says of a disk, beside the time, descriptors and addresses


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` at the end of the block, or is removed.

    A link at `path` is replaced, not followed. InputError if it cannot be written.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)  # of a process that was killed, or a link that somebody put there
        yield beside
        sync(beside)
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # h5py's at a full disk is a RuntimeError
        hint = "Check the path, its permissions and the disk."
        raise InputError(f"{path} cannot be written: {_reason(error)}.", hint) from error
    finally:
        with suppress(OSError):  # a path that cannot be written cannot be cleaned up either
            beside.unlink(missing_ok=True)


@contextmanager
def by_hdf5() -> Iterator[None]:
    """A full disk makes HDF5 raise a RuntimeError, which is an OSError everywhere else."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and not of_full_disk(error):
            raise
        raise OSError(_reason(error)) from error


def of_full_disk(error: BaseException | None) -> bool:
    """Whether HDF5 says that it could not write, whose file cannot be closed any more either."""
    found = isinstance(error, OSError | RuntimeError) and _HDF5.search(str(error)) is not None
    if found:
        UNFINISHED.set()
    return found


def _reason(error: OSError | RuntimeError) -> str:
    """Why a file could not be written, in words."""
    if of_full_disk(error) and (said := _HDF5.search(str(error))):
        return os.strerror(int(said[1]))
    return getattr(error, "strerror", None) or str(error).partition("\n")[0].rstrip(".")


def sync(path: Path) -> None:
    """Have the disk hold what was written, before a new name says that it does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_existing(target: Path, force: bool) -> None:
    """Refuse, by `InputError`, a place where something is that is not to be replaced."""
    if os.path.lexists(target) and not force:
        raise InputError(f"The output {target} exists.", "Choose another --output, or replace it with --force.")


def refuse_links_outside(folder: Path) -> None:
    """Refuse, by `InputError`, a folder with a link that leads out of it: its content would be another's, and harmed."""
    inside = folder.resolve()
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() and not file.resolve().is_relative_to(inside):
            hint = "Replace the link by a copy of its target."
            raise InputError(f"{file} is a link that leads out of {folder}.", hint)
