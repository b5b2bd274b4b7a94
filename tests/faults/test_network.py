"""File systems of networks: files that another machine sees late or stale, and open files that cannot be removed.

Stand-ins inside a child process: an audit hook answers ESTALE where Python opens one of the files, and what is removed
while it is open gets a name that begins with `.nfs`, as NFS does it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import crlseq
from crlseq.storage import runfolder
from tests.faults.test_kills import KILLED, WORDS, beside, fit, unfinished_report
from tests.support import files_of, in_a_fork


def late(*names: str, error: int = errno.ESTALE) -> Callable[[], None]:
    """In a child: files of these names cannot be opened, though folders list them."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            path, flags = os.fspath(arguments[0]), arguments[2]
            if os.path.basename(path) in names and isinstance(flags, int) and not flags & (os.O_WRONLY | os.O_RDWR):
                raise OSError(error, os.strerror(error), path)

    return lambda: sys.addaudithook(hook)


def silly_renames() -> None:
    """In a child: a file that this process has open gets another name instead of being removed; no locks, no exchange."""
    unlink, number = os.unlink, iter(range(1000))

    def renamed(path: os.PathLike[str] | str, **how: object) -> None:
        handles = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        if os.path.abspath(path) in {os.readlink(handle) for handle in handles if os.path.lexists(handle)}:
            os.rename(path, os.path.join(os.path.dirname(path), f".nfs{next(number):04}"))
        else:
            unlink(path, **how)  # type: ignore[arg-type]

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    os.unlink = os.remove = renamed  # type: ignore[assignment]
    runfolder.fcntl.flock = no_locks  # type: ignore[assignment]
    runfolder._exchange = lambda *_: False


@pytest.fixture
def unfinished(screen_file: Path, tmp_path: Path) -> Path:
    """Where a fit is to write that was killed before its report."""
    run = tmp_path / "place" / "RUN"
    assert fit(screen_file, run, killed=unfinished_report).code == KILLED
    return run


def test_what_another_machine_sees_late_ends_in_a_sentence_or_is_computed_again(
    screen_file: Path, unfinished: Path
) -> None:
    names = sorted(path.name for path in unfinished.with_name("RUN.partial").iterdir())
    assert {"identity.json", "resume.pt"} <= set(names)
    for name in names:
        answer = in_a_fork(late(name), "fit", screen_file, "--output", unfinished, *WORDS, "--resume")
        assert answer.code in (0, 3), (name, answer.err)
        assert "A fault" not in answer.err and "Traceback" not in answer.err, (name, answer.err)
        if answer.code == 0:
            assert beside(unfinished) == ["RUN"], name
            break
    again = fit(screen_file, unfinished, "--resume")
    assert again.code == 0, again.err
    assert {path.name for path in unfinished.iterdir()} == files_of(unfinished)


@pytest.mark.parametrize("error", [errno.ESTALE, errno.ENOENT])
def test_a_file_of_a_run_that_is_stale_is_named(screen_file: Path, tmp_path: Path, error: int) -> None:
    run = tmp_path / "RUN"
    assert fit(screen_file, run).code == 0
    for name in ("run.json", "programs.csv", "interventions.csv", "dag.csv", "effects.csv"):
        answer = in_a_fork(late(name, error=error), "inspect", run)
        assert answer.code in (0, 3), (name, answer.err)
        assert "A fault" not in answer.err and "Traceback" not in answer.err, (name, answer.err)
        assert answer.code == 0 or name in answer.err or "not a run folder" in answer.err, (name, answer.err)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the stand-in looks into /proc")
def test_open_files_that_cannot_be_removed_are_in_nobodys_way(screen_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "place" / "RUN"
    for words in ((), ("--force", "--seed", 1)):
        answer = in_a_fork(silly_renames, "fit", screen_file, "--output", run, *WORDS, *words)
        assert answer.code == 0, answer.err
    left = {path.name for path in run.iterdir()} - files_of(run)
    assert all(name.startswith(".nfs") for name in left), left
    assert crlseq.load(run).facts.seed == 1
    answer = fit(screen_file, run, "--force", "--seed", 2)
    assert answer.code == 0, answer.err
    assert beside(run) == ["RUN"] and {path.name for path in run.iterdir()} == files_of(run)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the stand-in looks into /proc")
def test_an_unfinished_run_with_such_names_goes_on(screen_file: Path, unfinished: Path) -> None:
    (unfinished.with_name("RUN.partial") / ".nfs000000000001").touch()
    answer = fit(screen_file, unfinished, "--resume")
    assert answer.code == 0, answer.err
    assert beside(unfinished) == ["RUN"]
