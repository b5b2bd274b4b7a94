"""The place of a run: locked while it is written, whole or not there, nothing of anyone else's removed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crlseq.errors import InputError
from crlseq.run import ENSEMBLE, TABLES

# What a folder with an unfinished run may hold; it is never emptied of anything else.
RUN_FILES = frozenset(
    {
        "lock",
        "resume.pt",
        "run.json",
        "model.safetensors",
        "crlseq.h5ad",
        "report.html",
        "dag.graphml",
        "dag.json",
        ENSEMBLE,
    }
    | {f"{name}.csv" for name in TABLES}
)


def partial_of(target: Path) -> Path:
    """Where an unfinished run lies."""
    return target.with_name(target.name + ".partial")


def refuse_output(target: Path, resume: bool, force: bool) -> None:
    """Refuse a place that cannot be written, or that holds what would be lost.

    Raises
    ------
    InputError
    """
    if not target.name:
        raise InputError(f"The output {target} is no place for a run.", "Choose another --output.")
    partial = partial_of(target)
    try:
        ancestor = next(folder for folder in target.absolute().parents if folder.exists())
        exists, unfinished = os.path.lexists(target), partial.exists()
        foreign = sorted(file.name for file in partial.iterdir() if not _is_ours(file)) if unfinished else []
    except OSError as error:  # a name that is too long, a folder that may not be searched, a file called RUN.partial
        raise InputError(f"{target} cannot be written: {error.strerror}.", "Choose another --output.") from None
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise InputError(
            f"{target} cannot be written: {ancestor} is no folder that may be written to.", "Choose another --output."
        )
    if exists and not force:
        raise InputError(f"The output {target} exists.", "Choose another --output, or replace it with --force.")
    if exists and not (target / "run.json").is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists and is not a run of crlseq; it is left alone.", "Choose another --output.")
    if foreign:
        raise InputError(
            f"{partial} holds {foreign[0]!r}, which is no part of a run; it is left alone.", "Choose another --output."
        )
    if unfinished and not (resume or force):
        raise InputError(
            f"There is an unfinished run in {partial}.", "Go on with --resume, or start over with --force."
        )


def _is_ours(file: Path) -> bool:
    return file.name.removesuffix(".tmp") in RUN_FILES and not file.is_dir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file, which is gone at the end.

    Raises
    ------
    InputError
        If another process holds it.
    """
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"Another crlseq is writing to {folder}.", "Wait for it, or choose another --output."
            ) from None
        try:
            yield
        finally:
            (folder / "lock").unlink()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to: renamed at the end, removed after an error."""
    beside = path.with_name(path.name + ".tmp")
    try:
        yield beside
        beside.replace(path)
    finally:
        if beside.exists():
            beside.unlink()


@contextmanager
def working_folder(partial: Path | None, resume: bool) -> Iterator[Path | None]:
    """The folder that becomes the run, locked against a second process."""
    if partial is None:
        yield None
        return
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            if not resume:
                for left in partial.iterdir():
                    if left.name != "lock":
                        left.unlink()
            yield partial
    except OSError as error:
        raise InputError(
            f"{partial} cannot be written: {error.strerror or error}.", "Check the disk and its permissions."
        ) from error


def move_into_place(partial: Path, target: Path) -> None:
    """Rename; what lay at `target` is removed after that."""
    old = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)
