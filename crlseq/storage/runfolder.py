"""The place of a run: locked while it is written, whole or not there, nothing of anyone else's removed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatch
from pathlib import Path

from crlseq.errors import InputError, few, nearest
from crlseq.storage.files import final_name, refuse_existing, refuse_special, sync, sync_folder

TABLES = ("programs", "interventions", "dag", "history", "evaluation")  # each a file .csv
# Likewise, of fits with several seeds, gene sets, targets found by likelihood (both), measured combinations, guides,
# positions of genes, covariates, and contexts: `crlseq.run.schema.own_tables`.
OPTIONAL_TABLES = (
    *("ensemble", "pathways", "pairs", "second_targets", "interactions", "guides", "arms", "covariates", "contexts"),
)
EFFECTS = "effects.csv"  # since format 4
GENE_SETS = "gene_sets.gmt"  # of fits with gene sets alone
IDENTITY = "identity.json"  # of an unfinished fit alone: what it fits
COMBINATIONS = "combinations.safetensors"  # of fits whose model knows noise
EMBEDDINGS = "embeddings.h5ad"  # of fits with embeddings alone
STAGE = "stage-{}.pt"  # result of a stage, of an unfinished fit alone
# What a folder with an unfinished run may hold; it is never emptied of anything else.
RUN_FILES = frozenset({
    *("lock", "resume.pt", "resume.previous.pt", "run.json", "model.safetensors", "crlseq.h5ad", "report.html"),
    *("dag.graphml", "dag.json", COMBINATIONS, EFFECTS, EMBEDDINGS, IDENTITY, GENE_SETS),
    *(f"{name}.csv" for name in (*TABLES, *OPTIONAL_TABLES)),
})  # fmt: skip
ELSEWHERE = "Choose another --output."
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of fcntl.h and linux/fs.h
REMOVED = ".nfs"  # how NFS calls a file that was removed while it was open; it goes when it is closed
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # what file systems without locks answer


def partial_of(target: Path) -> Path:
    """Where an unfinished run lies."""
    target = target if target.name not in ("", "..") else Path(os.path.abspath(target))
    return target.parent / f"{target.name}.partial"


def default_output(source: str | Path) -> Path:
    """Where the run of a screen goes that nobody named: NAME-run in the working folder."""
    return Path(f"{Path(os.path.abspath(source)).stem or 'screen'}-run")


def is_run(folder: Path) -> bool:
    """Whether a finished run lies there."""
    try:
        return (folder / "run.json").is_file()
    except OSError:  # a name that is too long
        return False


def no_run(folder: Path) -> InputError:
    """That no run lies there; the hint is what to name or to do instead."""
    what = f"{folder} is not a run folder: it has no run.json."
    if folder.suffix in (".h5ad", ".h5mu", ".zarr", ".h5"):
        return InputError(what, f"That is a screen: `crlseq fit {folder}` makes a run of it.")
    if is_run(folder.parent):
        return InputError(what, f"Name the run itself: {folder.parent}.")
    with suppress(OSError):
        place = folder if folder.is_dir() else folder.parent
        if runs := sorted(str(each) for each in place.iterdir() if is_run(each)):
            close = nearest(str(folder), runs, 1) if place != folder else []
            return InputError(what, f"Did you mean {close[0]}?" if close else f"Runs in {place}: {few(runs)}.")
    return InputError(what, "Give the folder that `crlseq fit` wrote.")


def refuse_output(target: Path, resume: bool, force: bool) -> None:
    """Refuse, by `InputError`, a place that cannot be written, or that holds what would be lost."""
    if not target.name:
        raise InputError(f"The output {target} cannot be a run folder.", ELSEWHERE)
    partial = partial_of(target)
    try:
        refuse_special(target)
        ancestor = next(folder for folder in target.absolute().parents if folder.exists())
        exists, unfinished = os.path.lexists(target), partial.exists()
        ours = unfinished and not _is_replaced(target)
        foreign = sorted(file.name for file in partial.iterdir() if not _is_ours(file)) if ours else []
    except OSError as error:  # a name that is too long, a folder that may not be searched, a file called RUN.partial
        raise InputError(f"{target} cannot be written: {error.strerror}.", ELSEWHERE) from None
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise InputError(f"{target} cannot be written: {ancestor} is not a writable folder.", ELSEWHERE)
    refuse_existing(target, force)
    if exists and not (target / "run.json").is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists and is not a run of crlseq; it is left unchanged.", ELSEWHERE)
    if target.is_dir() and not os.access(target, os.W_OK):
        raise InputError(f"{target} cannot be written: it is not a writable folder.", ELSEWHERE)
    if foreign:
        what = f"{partial} holds {foreign[0]!r}, which is not part of a run; nothing is removed."
        raise InputError(what, ELSEWHERE)
    if unfinished and not (resume or force):
        hint = "Continue with --resume, or start over with --force."
        raise InputError(f"There is an unfinished run in {partial}.", hint)


def _is_ours(file: Path) -> bool:
    name = final_name(file.name)
    known = name in RUN_FILES or fnmatch(name, STAGE.format("*")) or name.startswith(REMOVED)
    return known and not file.is_dir() and not file.is_symlink()


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


def empty(partial: Path, of_temporaries: bool = False) -> None:
    """Remove what a fit left in a locked folder, or only what a killed process was writing there."""
    for left in partial.iterdir():
        kept = left.name == "lock" or left.name.startswith(REMOVED)
        if not kept and (not of_temporaries or final_name(left.name) != left.name):
            left.unlink()


@contextmanager
def working_folder(target: Path, resume: bool) -> Iterator[Path]:
    """The folder that becomes `target`, locked against a second process; gone at the end if nothing was put into it.

    InputError if another process writes to it, or it cannot be written.
    """
    partial = partial_of(target)
    try:
        _remove_replaced(target)
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            empty(partial, of_temporaries=resume)
            yield partial
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a file that the fit reads
            raise
        hint = "Check the disk and its permissions."
        raise InputError(f"{partial} cannot be written: {error.strerror or error}.", hint) from error
    finally:
        with suppress(OSError):  # what is there is to be resumed
            if [file.name for file in partial.iterdir()] == [IDENTITY]:
                (partial / IDENTITY).unlink()
            partial.rmdir()


def move_into_place(partial: Path, target: Path) -> None:
    """Rename a folder that is whole, and is locked until after that; what lay at `target` is then removed.

    Where the system can, the two folders change places in one step: there is a whole run at `target` at any moment, also
    if the process is killed. Elsewhere the old one is renamed first, and comes back if the new one cannot be; after a
    kill between the two `target` is absent, and `--resume` moves the new one. The next command that writes to `target`
    removes what a kill left of the old one.
    """
    sync_folder(partial)
    old = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    is_folder = target.is_dir() and not target.is_symlink()
    with locked(target) if is_folder else nullcontext():
        if is_folder:
            (target / IDENTITY).unlink(missing_ok=True)  # only what is new has one: see `_is_replaced`
        if not os.path.lexists(target):
            os.rename(partial, target)
        elif _exchange(partial, target):
            os.rename(partial, old)  # before it is unlocked: no other process may take it for an unfinished run
        else:
            _replace(partial, target, old)
        sync(target.parent)
    for name in ("lock", IDENTITY):
        (target / name).unlink(missing_ok=True)
    _remove_replaced(target)


def _exchange(one: Path, other: Path) -> bool:
    """Have two folders change places in one step; whether the system can (Linux, and not on every file system)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _replace(partial: Path, target: Path, old: Path) -> None:
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        if not os.path.lexists(target):
            os.rename(old, target)
        raise


def replaced_by(target: Path) -> list[Path]:
    """Folders beside `target` that lay there before, and were not removed since a process was killed."""
    own = re.compile(re.escape(target.name) + r"\.replaced-\d+")
    return [path for path in target.absolute().parent.glob("*.replaced-*") if own.fullmatch(path.name)]


def _is_replaced(target: Path) -> bool:
    """Whether the place of an unfinished run holds the one that was replaced, as after a kill between exchange and rename."""
    partial = partial_of(target)
    return target.exists() and (partial / "run.json").is_file() and not (partial / IDENTITY).exists()


def _remove_replaced(target: Path) -> None:
    if _is_replaced(target):
        partial = partial_of(target)
        with locked(partial):
            os.rename(partial, target.with_name(f"{target.name}.replaced-{os.getpid()}"))
    for old in replaced_by(target) if os.path.lexists(target) else []:  # else it is the only one
        if old.is_symlink():
            old.unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
