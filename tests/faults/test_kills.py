"""Processes that are killed while they write, or are slow: what was there stays, and the next command goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import crlseq
from crlseq.errors import InputError
from crlseq.pipeline import fit as fitting
from crlseq.storage import runfolder
from crlseq.storage.files import _HOST, written_whole
from tests.support import Answer, files_of, in_a_fork, invoke, succeeds

WORDS = ("--method", "gradient", "--epochs", 1, "--n-latents", 2)
KILLED = 137


def kill(*_: object) -> None:
    os._exit(KILLED)


def fit(source: Path, run: Path, *more: object, killed: Callable[[], object] | None = None) -> Answer:
    """A fit, by a process of its own that `killed` has end somewhere."""
    words = ("fit", source, "--output", run, *WORDS, *more)
    return invoke(*words) if killed is None else in_a_fork(killed, *words)


def seed_of(run: Path) -> int:
    return int(crlseq.load(run).facts.seed)


def beside(run: Path) -> list[str]:
    return sorted(path.name for path in run.parent.iterdir())


@pytest.fixture
def finished(screen_file: Path, tmp_path: Path) -> Path:
    """A run in a folder of its own, with a file that somebody added."""
    run = tmp_path / "place" / "RUN"
    assert fit(screen_file, run).code == 0
    (run / "added.csv").write_text("x")
    return run


# --- while files are written


def unfinished_report() -> None:
    """In a child: ends the process when half of the report is written."""

    def write(_: object, path: Path) -> None:
        with written_whole(path) as half:
            half.write_text("<html>")
            kill()

    fitting.write_report = write  # type: ignore[assignment]


@pytest.mark.parametrize("how", ["--resume", "--force"])
def test_a_fit_killed_while_the_report_is_written_goes_on(screen_file: Path, tmp_path: Path, how: str) -> None:
    run = tmp_path / "RUN"
    assert fit(screen_file, run, killed=unfinished_report).code == KILLED
    assert [*(tmp_path / "RUN.partial").glob("report.html.*.tmp")]
    answer = fit(screen_file, run, how)
    assert answer.code == 0, answer.err
    assert beside(run) == ["RUN"] and {path.name for path in run.iterdir()} == files_of(run)


def test_what_dead_writers_left_is_removed_and_of_living_ones_is_not(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    names = {
        f"x.csv.{_HOST}-{child}.tmp": False,
        f"x.csv.{child}.tmp": True,  # of an earlier version, which did not say on which machine
        f"x.csv.elsewhere-{child}.tmp": True,
        f"x.csv.{_HOST}-{os.getppid()}.tmp": True,
        f"y.csv.{_HOST}-{child}.tmp": True,
        "x.csv.old-1.tmp": False,
        "x.csv.tmp.csv": True,
    }
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / "x.csv.old-1.tmp", (0, 0))
    with written_whole(tmp_path / "x.csv") as file:
        file.write_text("1")
    assert {name for name in names if (tmp_path / name).exists()} == {name for name, stays in names.items() if stays}
    assert (tmp_path / "x.csv").read_text() == "1"


# --- while one run takes the place of another


def ends_after_the_exchange() -> None:
    runfolder.os.rename = kill  # type: ignore[assignment]


def test_a_replaced_run_is_whole_at_any_moment(screen_file: Path, finished: Path) -> None:
    answer = fit(screen_file, finished, "--force", "--seed", 1, killed=ends_after_the_exchange)
    if answer.code == 0:
        pytest.skip("this system cannot exchange two names")
    assert answer.code == KILLED
    assert seed_of(finished) == 1 and beside(finished) == ["RUN", "RUN.partial"]
    assert fit(screen_file, finished, "--seed", 1, "--resume").code == 0  # it is finished
    refused = fit(screen_file, finished, "--seed", 2)
    assert refused.code == 3 and "exists" in refused.err
    answer = fit(screen_file, finished, "--force", "--seed", 2)
    assert answer.code == 0, answer.err
    assert seed_of(finished) == 2 and beside(finished) == ["RUN"]
    assert {path.name for path in finished.iterdir()} == files_of(finished)


def test_without_an_exchange_the_next_command_moves_the_new_run(screen_file: Path, finished: Path) -> None:
    rename = os.rename

    def ends_between_two_renames() -> None:
        runfolder._exchange = lambda one, other: False  # type: ignore[assignment]
        runfolder.os.rename = lambda a, b: kill() if Path(a).name == "RUN.partial" else rename(a, b)  # type: ignore[assignment]

    assert fit(screen_file, finished, "--force", "--seed", 1, killed=ends_between_two_renames).code == KILLED
    old = next(name for name in beside(finished) if ".replaced-" in name)
    assert beside(finished) == ["RUN.partial", old]
    with pytest.raises(InputError, match=f"not finished.*The run that it replaces is {old}"):
        crlseq.load(finished)
    answer = fit(screen_file, finished, "--seed", 1, "--resume")
    assert answer.code == 0, answer.err
    assert seed_of(finished) == 1 and beside(finished) == ["RUN"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_move_that_fails_leaves_the_old_run(
    screen_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if Path(source).name == "RUN.partial":
            raise KeyboardInterrupt
        rename(source, target)

    def exchange_fails(one: Path, other: Path) -> bool:
        if exchange:
            raise KeyboardInterrupt
        return False

    with monkeypatch.context() as patch:
        patch.setattr(runfolder.os, "rename", fails)
        patch.setattr(runfolder, "_exchange", exchange_fails)
        with pytest.raises(KeyboardInterrupt):
            crlseq.fit(screen_file, finished, method="gradient", epochs=1, n_latents=2, seed=1, force=True)
    assert seed_of(finished) == 0 and (finished / "added.csv").exists()
    assert not (finished / "lock").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_an_output_is_locked_until_after_the_rename(
    screen_file: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """The rename is delayed: a second process with --force meanwhile is refused, and the first ends whole."""
    answers: list[Answer] = []
    rename, swap = os.rename, runfolder._exchange

    def second() -> None:
        if not answers:
            answers.append(fit(screen_file, finished, "--force", "--seed", 2))

    def slow_exchange(one: Path, other: Path) -> bool:
        second()
        return exchange and swap(one, other)

    def slow_rename(source: Path, target: Path) -> None:
        second()
        rename(source, target)

    monkeypatch.setattr(runfolder, "_exchange", slow_exchange)
    monkeypatch.setattr(runfolder.os, "rename", slow_rename)
    assert fit(screen_file, finished, "--force", "--seed", 1).code == 0
    assert answers[0].code == 3 and "Another crlseq process is writing" in answers[0].err
    assert seed_of(finished) == 1 and {path.name for path in finished.iterdir()} == files_of(finished)
    assert beside(finished) == ["RUN"]


def test_a_store_whose_replacement_was_killed(screen_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "place" / "STORE"
    succeeds("prepare", screen_file, "--output", store)
    words = ("prepare", screen_file, "--output", store, "--seed", 1, "--force")
    answer = in_a_fork(ends_after_the_exchange, *words)
    if answer.code == 0:
        pytest.skip("this system cannot exchange two names")
    old = store.with_name("STORE.partial") / "store"
    (old / "X" / "data" / "c" / "99").write_bytes(b"of the old one")
    succeeds(*words, "--resume")
    assert beside(store) == ["STORE"] and not (store / "X" / "data" / "c" / "99").exists()
    succeeds("check", store)


# --- power cuts


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was synced and renamed, in order."""
    found: list[tuple[str, str]] = []
    sync, rename, replace, swap = os.fsync, os.rename, os.replace, runfolder._exchange

    def fsync(handle: int) -> None:
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(one: Any, other: Any, **more: Any) -> Any:
            found.append(("rename", Path(other).name))
            return function(one, other, **more)

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", named(rename))
    monkeypatch.setattr(os, "replace", named(replace))
    monkeypatch.setattr(runfolder, "_exchange", named(swap))
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
def test_what_is_said_to_be_written_survives_a_power_cut(
    screen_file: Path, tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    """Content is synced before the name, and the folder with the name before the command says so."""
    place = tmp_path / "place"
    for more in ((), ("--force",)):
        steps.clear()
        assert fit(screen_file, place / "RUN", *more).code == 0
        moved = steps.index(("rename", "RUN"))
        assert {("sync", name) for name in ("RUN.partial", *files_of(place / "RUN"))} <= {*steps[:moved]}
        assert ("sync", "place") in steps[moved:]
        saved = steps.index(("rename", "resume.pt"))
        assert steps[saved + 1] == ("sync", "RUN.partial")
    steps.clear()
    succeeds("prepare", screen_file, "--output", place / "STORE")
    moved = steps.index(("rename", "STORE"))
    assert {("sync", "store"), ("sync", "zarr.json"), ("sync", "crlseq.json")} <= {*steps[:moved]}
    assert ("sync", "place") in steps[moved:]


def test_a_file_is_synced_before_and_its_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    sync = os.fsync

    def fsync(handle: int) -> None:
        seen.append((tmp_path / "x.csv").exists())
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with written_whole(tmp_path / "x.csv") as file:
        file.write_text("1")
    assert seen == [False, True]


def test_a_folder_that_cannot_be_synced_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems."""
    import errno

    sync = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with written_whole(tmp_path / "x.csv") as file:
        file.write_text("1")
    assert (tmp_path / "x.csv").read_text() == "1"


# --- what is in the place of an output


def test_a_pipe_or_device_is_not_replaced(linear_folder: Path, screen_file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    run = tmp_path / "RUN"
    shutil.copytree(linear_folder, run)
    (run / "report.html").unlink()
    os.mkfifo(run / "report.html")
    for name in ("pipe", "link", "null"):
        output = ("--output", tmp_path / name, "--force")
        for words in (
            ("predict", linear_folder, "-p", "g0", *output),
            ("export", linear_folder, "--format", "gmt", *output),
            ("report", linear_folder, *output),
            ("simulate", *output),
            ("fit", screen_file, *output),
            ("prepare", screen_file, *output),
            ("report", run),
        ):
            answer = invoke(*words)
            assert answer.code == 3 and "not a file" in answer.err, (words, answer.err)
    assert (tmp_path / "pipe").is_fifo() and (run / "report.html").is_fifo()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "null").is_symlink()
