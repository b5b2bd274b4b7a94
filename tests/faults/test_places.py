"""Places that cannot be written or change meanwhile, damaged checkpoints, losses that explode: nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import crlseq
from crlseq.errors import ConvergenceError, InputError
from crlseq.pipeline.progress import Progress, _Display
from crlseq.storage.checkpoint import load_checkpoint, mend_checkpoint, previous_of, save_checkpoint
from crlseq.training import trainer
from crlseq.training.learner import MAX_SLOWER, Learner
from tests.cli.test_repeat import results
from tests.support import after_epoch, at_stage, check_refusal, forked, in_a_fork, interrupt, invoke, succeeds

GRADIENT: dict[str, Any] = {"method": "gradient", "n_latents": 2, "epochs": 3, "batch_size": 16}


class StopError(Exception):
    """Stands for a kill, for which nothing is saved."""


def kill() -> None:
    raise StopError


@pytest.fixture(scope="module")
def whole(screen_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the fit ends with when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("whole") / "RUN"
    crlseq.fit(screen_file, folder, **GRADIENT)
    return results(folder)


# --- checkpoints


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    path = tmp_path / "resume.pt"
    rng = torch.Generator().manual_seed(0)
    for epoch in (1, 2):
        save_checkpoint(path, {"identity": "x", "epoch": epoch, "model": torch.randn(5000, generator=rng)})
    return path


def test_a_checkpoint_cut_anywhere_gives_way_to_the_one_before(two_checkpoints: Path) -> None:
    content, before = two_checkpoints.read_bytes(), previous_of(two_checkpoints).read_bytes()
    assert load_checkpoint(two_checkpoints)["epoch"] == 2 and not mend_checkpoint(two_checkpoints)
    cuts = [*range(0, len(content), 4096), len(content) - 1]
    assert len(cuts) > 5
    for cut in cuts:
        two_checkpoints.write_bytes(content[:cut])
        previous_of(two_checkpoints).write_bytes(before)
        with pytest.raises(InputError, match="cannot be read"):
            load_checkpoint(two_checkpoints)
        assert mend_checkpoint(two_checkpoints)
        assert load_checkpoint(two_checkpoints)["epoch"] == 1


def test_a_flipped_bit_is_seen(two_checkpoints: Path) -> None:
    content = two_checkpoints.read_bytes()
    for at in np.random.default_rng(0).integers(len(content), size=50):
        two_checkpoints.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(InputError, match="cannot be read"):
            load_checkpoint(two_checkpoints)


def test_a_process_killed_between_two_renames_left_the_one_before(two_checkpoints: Path) -> None:
    two_checkpoints.unlink()
    assert mend_checkpoint(two_checkpoints)
    assert load_checkpoint(two_checkpoints)["epoch"] == 1


def test_a_fit_goes_on_from_the_checkpoint_before(
    screen_file: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(StopError):
        crlseq.fit(screen_file, tmp_path / "RUN", progress=after_epoch(2, kill), **GRADIENT)
    (tmp_path / "RUN.partial" / "resume.pt").write_bytes(b"cut")
    notes: list[str] = []
    run = crlseq.fit(screen_file, tmp_path / "RUN", resume=True, progress=Progress(note=notes.append), **GRADIENT)
    assert run.path is not None
    assert [note for note in notes if note not in run.info["notes"]] == [
        "The last checkpoint is damaged; the fit continues from the one before."
    ]
    assert results(run.path) == whole


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_interrupt_writes_the_last_whole_epoch(
    screen_file: Path, whole: dict[str, bytes], tmp_path: Path, epoch: int
) -> None:
    """Before the first epoch as well; checkpoints on time are five seconds apart, which these epochs do not last."""
    with pytest.raises(KeyboardInterrupt):
        crlseq.fit(screen_file, tmp_path / "RUN", progress=after_epoch(epoch, interrupt), **GRADIENT)
    saved = load_checkpoint(tmp_path / "RUN.partial" / "resume.pt")
    assert saved["epoch"] == epoch - 1
    assert [record["epoch"] for record in saved["learners"][0]["history"]] == list(range(epoch))
    run = crlseq.fit(screen_file, tmp_path / "RUN", resume=True, **GRADIENT)
    assert run.path is not None and results(run.path) == whole


# --- places


def test_two_processes_on_one_output(screen_file: Path, tmp_path: Path) -> None:
    """The second is refused while the first still reads; nothing of the first is touched."""
    answers = []

    def second() -> None:
        for option in ([], ["--force"], ["--resume"]):
            answers.append(invoke("fit", screen_file, "--output", tmp_path / "RUN", *option))

    crlseq.fit(screen_file, tmp_path / "RUN", progress=at_stage("reading the screen", second), **GRADIENT)
    assert [answer.code for answer in answers] == [3, 3, 3]
    assert "unfinished run" in answers[0].err
    assert all("Another crlseq process is writing" in answer.err for answer in answers[1:])


def test_an_output_that_another_process_finished_meanwhile(
    screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crlseq.pipeline import fit as fitting

    monkeypatch.setattr(fitting, "refuse_output", lambda target, resume, force: (tmp_path / "RUN").mkdir())
    with pytest.raises(InputError, match="exists"):
        crlseq.fit(screen_file, tmp_path / "RUN", **GRADIENT)
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


def test_an_output_removed_meanwhile(screen_file: Path, tmp_path: Path) -> None:
    remove = at_stage("writing", lambda: shutil.rmtree(tmp_path / "RUN.partial"))
    with pytest.raises(InputError, match=r"RUN\.partial cannot be written: No such file"):
        crlseq.fit(screen_file, tmp_path / "RUN", progress=remove, **GRADIENT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replaced", [False, True])
def test_an_input_changed_meanwhile(screen_file: Path, tmp_path: Path, replaced: bool) -> None:
    source = tmp_path / "screen.h5ad"
    shutil.copy(screen_file, source)

    def change() -> None:
        if replaced:
            shutil.copy(source, tmp_path / "other")
        with h5py.File(tmp_path / "other" if replaced else source, "r+") as handle:
            handle["X/data"][0] += 1
        if replaced:
            (tmp_path / "other").replace(source)

    with pytest.raises(InputError, match="was changed while it was fitted"):
        crlseq.fit(source, tmp_path / "RUN", progress=at_stage("training the network", change), **GRADIENT)
    assert not (tmp_path / "RUN").exists()


def test_an_input_touched_meanwhile_is_the_same(screen_file: Path, tmp_path: Path) -> None:
    shutil.copy(screen_file, tmp_path / "screen.h5ad")
    touch = at_stage("training the network", (tmp_path / "screen.h5ad").touch)
    crlseq.fit(tmp_path / "screen.h5ad", tmp_path / "RUN", progress=touch, **GRADIENT)


def test_an_output_removed_between_two_checkpoints(
    screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    remove = after_epoch(1, lambda: shutil.rmtree(tmp_path / "RUN.partial"))
    with pytest.raises(InputError, match=r"RUN\.partial cannot be written: No such file"):
        crlseq.fit(screen_file, tmp_path / "RUN", progress=remove, **GRADIENT)
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_set_back(
    screen_file: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By years, in the middle of a fit, of which the files' times tell nothing true."""
    from datetime import UTC, datetime, timedelta

    from crlseq.pipeline import fit as fitting

    class Clock(datetime):
        now_at = datetime(2026, 1, 1, tzinfo=UTC)

        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            cls.now_at -= timedelta(days=1000)
            return cls.now_at

    source = tmp_path / "screen.h5ad"
    shutil.copy(screen_file, source)
    monkeypatch.setattr(fitting, "datetime", Clock)
    monkeypatch.setattr("time.time", lambda: 1000.0)
    back = at_stage("training the network", lambda: os.utime(source, (0, 0)))
    run = crlseq.fit(source, tmp_path / "RUN", progress=back, **GRADIENT)
    assert run.path is not None
    assert 0 <= run.info["seconds"] < 3600
    assert run.info["finished"] < run.info["started"]
    assert results(run.path) == whole


@pytest.mark.parametrize("limit", [20_000, 400_000])
def test_a_full_disk(screen_file: Path, tmp_path: Path, limit: int) -> None:
    """Files may not grow beyond a limit, at a checkpoint or in the copy of the cells; with room the fit goes on."""
    words = ["fit", screen_file, "--output", tmp_path / "RUN", "--method", "gradient", "--epochs", 2]
    full = in_a_fork(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), *words)
    lines = [line for line in full.err.splitlines() if line.startswith(("crlseq:", "  Check"))]
    check_refusal(full.code, full.out, "\n".join(lines), 3, "cannot be written", "Check the disk")
    assert not (tmp_path / "RUN").exists()
    succeeds(*words, *(["--resume"] if (tmp_path / "RUN.partial").exists() else []))


# --- losses


def explode(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> list[int]:
    """Validation that finds NaN in some of the epochs that are tried; a list that grows with them."""
    end, seen = Learner.end, list[int]()

    def exploding(self: Learner, epoch: int, n_epochs: int) -> bool:
        seen.append(epoch)
        if when(len(seen)):
            self.validation_terms = dict.fromkeys(self.validation_terms, torch.tensor(float("nan")))
        return end(self, epoch, n_epochs)

    monkeypatch.setattr(Learner, "end", exploding)
    return seen


def test_a_loss_that_explodes_once_is_done_again_with_smaller_steps(
    screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = explode(monkeypatch, lambda n: n == 2)
    notes: list[str] = []
    run = crlseq.fit(screen_file, tmp_path / "RUN", progress=Progress(note=notes.append), **GRADIENT)
    assert [note for note in notes if "loss" in note] == [
        "The loss is not finite in epoch 2; it is repeated with a quarter of the learning rate."
    ]
    assert run.history["epoch"].tolist() == [0, 1, 2] and len(seen) == 4
    assert np.isfinite(run.history.to_numpy()).all()
    assert load_checkpoint(run.path / "resume.pt")["learners"][0]["slower"] == 1  # type: ignore[operator]


def test_a_hopeless_fit_keeps_its_history(screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = explode(monkeypatch, lambda n: n > 1)
    with pytest.raises(ConvergenceError, match=r"epoch 2, even with a learning rate 1024 times smaller"):
        crlseq.fit(screen_file, tmp_path / "RUN", **GRADIENT)
    assert len(seen) == 1 + 1 + MAX_SLOWER
    saved = load_checkpoint(tmp_path / "RUN.partial" / "resume.pt")
    assert len(saved["learners"][0]["history"]) == 1


# --- signals at any moment, to the whole command


def stopped_at(number: int) -> None:
    """Makes this process wait for `signal.SIGCONT` when the stage with a number begins."""
    show = _Display.stage

    def stage(self: _Display, text: str) -> None:
        before = self.number
        show(self, text)
        if before < self.number == number:
            signal.raise_signal(signal.SIGSTOP)

    _Display.stage = stage  # type: ignore[method-assign]


def test_signals_at_any_moment_of_a_fit(screen_file: Path, tmp_path: Path) -> None:
    """Two in a row, each later into the fit; then it goes on to the end of an undisturbed one."""
    words = ["--method", "gradient", "--epochs", 12, "--batch-size", 16, "--n-latents", 2]
    succeeds("fit", screen_file, "--output", tmp_path / "whole", *words)
    fit = ["fit", screen_file, "--output", tmp_path / "RUN", *words, "--resume"]
    for number, stage in ((signal.SIGTERM, 2), (signal.SIGKILL, 3)):
        reads, writes = os.pipe()

        def begin(writes: int = writes, stage: int = stage) -> None:
            os.dup2(writes, 2)
            stopped_at(stage)

        child = forked(begin, *fit)
        os.close(writes)
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        os.kill(child, number)
        os.kill(child, signal.SIGCONT)
        with open(reads) as stderr:
            said = stderr.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (-9 if number == signal.SIGKILL else 130), said
        assert "Traceback" not in said
        assert not (tmp_path / "RUN").exists()
    succeeds(*fit)
    assert results(tmp_path / "RUN") == results(tmp_path / "whole")
    assert json.loads((tmp_path / "RUN" / "run.json").read_text())["training"]["epochs_run"] == 12
