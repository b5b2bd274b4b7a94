"""Files that are there whole or not at all, and what stands in their place that is no file."""

from __future__ import annotations

import errno
import os
import platform
import re
import select
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crlseq.errors import InputError

# NAME.HOST-PID.tmp is what a process writes to that is to become NAME; earlier versions left out the host, or both.
_TEMPORARY = re.compile(r"(?:\.(?:(?P<host>[\w-]+)-)?(?P<pid>\d+))?\.tmp$")
_HOST = re.sub(r"[^\w-]", "-", platform.node())[:40] or "host"
MAX_TEXT, PATIENCE = 64 << 20, 60.0  # bytes of a list, and seconds until a pipe has its first
DAY = 86400.0  # seconds after which a temporary file that nobody wrote to is left over, whoever made it
KINDS = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"))
NOT_SYNCED = (errno.EACCES, errno.EINVAL, errno.EBADF)  # what systems answer that sync no folders, or these ones


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` at the end of the block, or is removed.

    A link at `path` is replaced, not followed. InputError if it cannot be written, or a device, pipe or socket is there.
    """
    refuse_special(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as beside:
            yield beside
    except (OSError, RuntimeError) as error:
        hint = "Check the path, its permissions and the disk."
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"{path} cannot be written: {reason}.", hint) from error


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """As `written_whole`, into a folder that is there, and with errors as they come."""
    beside = path.with_name(f"{path.name}.{_HOST}-{os.getpid()}.tmp")
    try:
        for left in _left_over(path):
            left.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)  # a link that somebody put there
        yield beside
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # a path that cannot be written cannot be cleaned up either
            beside.unlink(missing_ok=True)


def final_name(name: str) -> str:
    """What a temporary file is to be called; the name itself of any other file."""
    return _TEMPORARY.sub("", name)


def _left_over(path: Path) -> Iterator[Path]:
    """Temporary files of processes that were killed while they wrote `path`."""
    for name in os.listdir(path.parent):
        if (found := _TEMPORARY.search(name)) is None or final_name(name) != path.name:
            continue
        with suppress(OSError):  # its process has just renamed it
            old = time.time() - (path.parent / name).lstat().st_mtime > DAY
            if old or (found["host"] == _HOST and not _runs(int(found["pid"]))):
                yield path.parent / name


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def refuse_special(path: Path) -> None:
    """Refuse, by `InputError`, a device, pipe or socket: it cannot be replaced, and may never end when it is read."""
    with suppress(OSError):  # nothing is there, or may be seen
        mode = path.stat().st_mode
        for is_one, kind in KINDS:
            if is_one(mode):
                raise InputError(f"{path} is a {kind}, not a file.", "Give the path of a file.")


def not_for_ever(path: str, flags: int) -> int:
    """Opener for `open`; OSError for a device, which may have no end, and for a pipe that nobody writes to."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    mode, reason = os.fstat(handle).st_mode, ""
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        reason = "it is a device, not a file"
    elif stat.S_ISFIFO(mode) and not select.select([handle], [], [], PATIENCE)[0]:
        reason = f"nothing was written to this pipe for {PATIENCE:.0f} seconds"
    if reason:
        os.close(handle)
        raise OSError(errno.EINVAL, reason)
    os.set_blocking(handle, True)
    return handle


def read_text(path: Path) -> str:
    """UTF-8 of a file or pipe; OSError if it cannot be read or is larger than `MAX_TEXT`, ValueError if it is no text."""
    with open(path, "rb", opener=not_for_ever) as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise OSError(errno.EFBIG, f"it has more than {MAX_TEXT >> 20} MiB")
    return content.decode("utf-8-sig")


def sync(path: Path) -> None:
    """Have the disk hold what was written, or of a folder the names in it, before anything says that it does."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in NOT_SYNCED and path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_SYNCED or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """`sync` of all that a folder holds, and of itself."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def refuse_existing(target: Path, force: bool) -> None:
    """Refuse, by `InputError`, a place where something is that is not to be replaced."""
    if os.path.lexists(target) and not force:
        raise InputError(f"The output {target} exists.", "Choose another --output, or replace it with --force.")


def refuse_links_outside(folder: Path) -> None:
    """Refuse, by `InputError`, a folder with a link that leads out of it, whose content would be another's, or a pipe."""
    inside = folder.resolve()
    for file in sorted(folder.rglob("*")):
        refuse_special(file)
        if file.is_symlink() and not file.resolve().is_relative_to(inside):
            hint = "Replace the link by a copy of its target."
            raise InputError(f"{file} is a link that leads out of {folder}.", hint)
