"""The place of a run: locked while it is written, whole or not there, nothing of anyone else's removed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from crlseq.errors import InputError
from crlseq.storage.files import refuse_existing, sync

TABLES = ("programs", "interventions", "dag", "history", "evaluation")  # each a file .csv
PAIRS, SECOND_TARGETS = "pairs.csv", "second_targets.csv"  # of fits that find targets by likelihood
INTERACTIONS = "interactions.csv"  # of fits with measured combinations
ENSEMBLE = "ensemble.csv"  # of fits with several seeds alone
PATHWAYS, GENE_SETS = "pathways.csv", "gene_sets.gmt"  # of fits with gene sets alone
IDENTITY = "identity.json"  # of an unfinished fit alone: what it fits
COMBINATIONS = "combinations.safetensors"  # of fits whose model knows noise
EMBEDDINGS = "embeddings.h5ad"  # of fits with embeddings alone
STAGE = "stage-{}.pt"  # result of a stage, of an unfinished fit alone
# What a folder with an unfinished run may hold; it is never emptied of anything else.
RUN_FILES = frozenset(
    {"lock", "resume.pt", "resume.previous.pt", "run.json", "model.safetensors", "crlseq.h5ad", "report.html"}
    | {
        "dag.graphml",
        "dag.json",
        COMBINATIONS,
        EMBEDDINGS,
        IDENTITY,
        ENSEMBLE,
        GENE_SETS,
        INTERACTIONS,
        PAIRS,
        PATHWAYS,
        SECOND_TARGETS,
        *(f"{name}.csv" for name in TABLES),
    }
)
ELSEWHERE = "Choose another --output."
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # what file systems without locks answer


def partial_of(target: Path) -> Path:
    """Where an unfinished run lies."""
    return target.with_name(target.name + ".partial")


def refuse_output(target: Path, resume: bool, force: bool) -> None:
    """Refuse, by `InputError`, a place that cannot be written, or that holds what would be lost."""
    if not target.name:
        raise InputError(f"The output {target} cannot be a run folder.", ELSEWHERE)
    partial = partial_of(target)
    try:
        ancestor = next(folder for folder in target.absolute().parents if folder.exists())
        exists, unfinished = os.path.lexists(target), partial.exists()
        foreign = sorted(file.name for file in partial.iterdir() if not _is_ours(file)) if unfinished else []
    except OSError as error:  # a name that is too long, a folder that may not be searched, a file called RUN.partial
        raise InputError(f"{target} cannot be written: {error.strerror}.", ELSEWHERE) from None
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise InputError(f"{target} cannot be written: {ancestor} is not a writable folder.", ELSEWHERE)
    refuse_existing(target, force)
    if exists and not (target / "run.json").is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists and is not a run of crlseq; it is left unchanged.", ELSEWHERE)
    if foreign:
        what = f"{partial} holds {foreign[0]!r}, which is not part of a run; nothing is removed."
        raise InputError(what, ELSEWHERE)
    if unfinished and not (resume or force):
        hint = "Continue with --resume, or start over with --force."
        raise InputError(f"There is an unfinished run in {partial}.", hint)


def _is_ours(file: Path) -> bool:
    name = file.name.removesuffix(".tmp")
    return (name in RUN_FILES or fnmatch(name, STAGE.format("*"))) and not file.is_dir() and not file.is_symlink()


def refuse_part_of_run(path: Path) -> None:
    """Refuse, by `InputError`, to replace a file of a finished run by what a later command makes."""
    if path.name in RUN_FILES and (path.resolve().parent / "run.json").is_file():
        raise InputError(f"{path} is a part of the run, which must stay as it was fitted.", ELSEWHERE)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file, which is gone at the end; InputError if another process holds it."""
    path = folder / "lock"
    with path.open("w") as lock:
        held = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        # The file may be one that another process has just removed.
        if not held or not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            hint = "Wait for it to end, or choose another --output."
            raise InputError(f"Another crlseq process is writing to {folder}.", hint)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # all of the folder may be gone


def empty(partial: Path) -> None:
    """Remove what a fit left in a locked folder."""
    for left in partial.iterdir():
        if left.name != "lock":
            left.unlink()


@contextmanager
def working_folder(partial: Path, resume: bool) -> Iterator[Path]:
    """The folder that becomes the run, locked against a second process; gone at the end if nothing was put into it.

    InputError if another process writes to it, or it cannot be written.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            if not resume:
                empty(partial)
            yield partial
    except OSError as error:
        hint = "Check the disk and its permissions."
        raise InputError(f"{partial} cannot be written: {error.strerror or error}.", hint) from error
    finally:
        with suppress(OSError):  # what is there is to be resumed
            if [file.name for file in partial.iterdir()] == [IDENTITY]:
                (partial / IDENTITY).unlink()
            partial.rmdir()


def move_into_place(partial: Path, target: Path) -> None:
    """Rename a locked folder; what lay at `target` is removed after that, and comes back if it cannot be done."""
    for file in partial.iterdir():
        sync(file)
    (partial / "lock").unlink(missing_ok=True)
    old = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.replace(old, target)
        raise
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)
