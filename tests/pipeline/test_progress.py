"""What a fit says while it runs: a log by hand, from Python, before the imports, and where nothing can be written."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

import crlseq
from crlseq.config import make_config
from crlseq.pipeline.progress import clock, shown, stages_of
from tests.support import FAST, command, environment

RECORD = {"epoch": 3.0, "mmd": 0.25, "reconstruction": 12.3456, "kl": 1.0, "total": 5.0}


class Clock:
    """In place of `time.monotonic`."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("crlseq.pipeline.progress.time.monotonic", found)
    return found


def test_a_log_has_a_line_a_stage_and_one_whenever_half_a_minute_has_passed(
    at: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown(make_config(), quiet=False) as progress:
        progress.stage("reading the screen")  # again
        for stage, now in (("testing effects", 112), ("finding the programs", 113), ("fitting the likelihood", 170)):
            at.now = now
            progress.stage(stage)
        progress.stage("straightening the latents")
        for step in range(5):  # 40 s each, from the second 1 on: 0, 25, 50 % after 1, 41, 81 s
            at.now = 171 + 40 * step
            progress.within(step, 4)
        at.now = 340
        progress.within(0, 2)  # a loop of its own
        progress.note("A name like \x1b[31m is made visible.")
    assert capsys.readouterr().err.splitlines() == [
        "• stage 1 of 8: reading the screen",
        "• stage 2 of 8: testing effects (after 12 s)",
        "• stage 3 of 8: finding the programs (after 13 s)",
        "• stage 4 of 8: fitting the likelihood (after 1:10)",
        "• stage 4 of 8: straightening the latents (after 1:10)",
        "  25 %, 2:00 left, 1:51 elapsed",
        "  50 %, 1:20 left, 2:31 elapsed",
        "  75 %, 40 s left, 3:11 elapsed",
        "  0 %, 4:00 elapsed",
        "  A name like \\x1b[31m is made visible.",
    ]


def test_epochs_are_said_with_their_losses(at: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Those before an interrupt come at once, and tell nothing of how long the others take."""
    with shown(make_config(method="gradient"), quiet=False) as progress:
        progress.stage("training the network")
        progress.epoch(RECORD, 10)  # epoch 4
        at.now += 60
        progress.epoch({**RECORD, "epoch": 6, "validation_total": 7.0}, 10)
    assert capsys.readouterr().err.splitlines() == [
        "• stage 1 of 5: reading the screen",
        "• stage 3 of 5: training the network (after 0 s)",
        "  70 %, 60 s left, 60 s elapsed; epoch 7 of at most 10: mmd 0.25, reconstruction 12.35, kl 1, validation 7",
    ]


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0 s"), (59.9, "60 s"), (60.6, "1:01"), (3599.6, "1:00:00")])
def test_clock(seconds: float, told: str) -> None:
    assert clock(seconds) == told


@pytest.mark.parametrize(
    "options", [FAST, {"method": "linear", "n_latents": 2, "bootstrap": 2}], ids=["gradient", "linear"]
)
def test_every_stage_is_said_once_from_python(
    screen_file: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    crlseq.fit(screen_file, progress=True, **options)
    err = capsys.readouterr().err
    stages = stages_of(make_config(**options), written=False)
    said = [line.split(" (after")[0] for line in err.splitlines() if line.startswith("•")]
    expected = [f"• stage {i} of {len(stages)}: {stage}" for i, stage in enumerate(stages, 1)]
    assert [line for line in said if "bootstrapping" not in line] == expected
    crlseq.fit(screen_file, **FAST)
    assert capsys.readouterr().err == ""


def test_the_first_line_comes_before_torch_is_imported(screen_file: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit(7)")
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    words = command("fit", screen_file, "--output", tmp_path / "RUN")
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 7
    assert done.stderr == "• stage 1 of 8: reading the screen\n"


class Full(io.StringIO):
    """Cannot be written to."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_progress_that_cannot_be_written_fails_no_fit(screen_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    assert crlseq.fit(screen_file, progress=True, **FAST).program_names == ["P0", "P1"]


def test_a_log_stays_a_log_where_colours_are_forced(screen_file: Path) -> None:
    """As batch systems and continuous integration do."""
    code = f"import crlseq; crlseq.fit({str(screen_file)!r}, progress=True, method='gradient', n_latents=2, epochs=1)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(FORCE_COLOR="1"), timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr and "• stage 4 of 4: reading off the results (after " in done.stderr
