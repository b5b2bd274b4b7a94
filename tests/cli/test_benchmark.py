"""``crlseq benchmark`` through the entry point; the fits are those of `tests/test_benchmark.py` and left out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crlseq.errors import ConvergenceError
from tests.support import check_refusal, files_below, invoke


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `crlseq.fit` is asked for; every fit fails at once."""
    calls: list[dict[str, Any]] = []

    def failing(source: Any, **options: Any) -> Any:
        calls.append(options)
        raise ConvergenceError("The loss is not finite.", "Lower the learning rate.")

    monkeypatch.setattr("crlseq.experiments.fits.fit", failing)
    return calls


def run(folder: Path, *options: object) -> Any:
    return invoke("benchmark", "--output", folder, "--scenario", "linear-gaussian", "--method", "default", *options)


def test_table_to_stdout_messages_to_stderr(tmp_path: Path, given: list[dict[str, Any]]) -> None:
    answer = run(tmp_path / "B", "--seeds", "2,4-5", "--threads", 1)
    assert answer.code == 0, answer.err
    header, *rows = (line.split("\t") for line in answer.out.splitlines())
    assert header[:5] == ["scenario", "method", "runs", "failed", "ancestor_f1"]
    assert [row[:4] for row in rows] == [
        ["linear-gaussian", "default", "3", "3"],
        ["linear-gaussian", "random", "3", "0"],
        ["linear-gaussian", "empty", "3", "0"],
    ]
    assert [options["seed"] for options in given] == [2, 4, 5] and given[0]["threads"] == 1
    assert answer.err.count("failed: The loss is not finite.") == 3
    assert "linear-gaussian, seed 4, default" in answer.err
    assert (tmp_path / "B" / "benchmark.png").stat().st_size > 0


def test_json_and_quiet(tmp_path: Path, given: list[dict[str, Any]]) -> None:
    answer = run(tmp_path / "B", "--seeds", "0", "--json", "--quiet", "--n-latents", "auto")
    assert (answer.code, answer.err) == (0, "")
    records = json.loads(answer.out)
    assert [record["method"] for record in records] == ["default", "random", "empty"]
    assert records[0]["shd"] is None and records[2]["shd_q25"] == records[2]["shd"]
    assert given[0]["n_latents"] is None


@pytest.mark.parametrize("seeds", ["", "a", "3-1", "1,,2", "-1", "1.5", "0-"])
def test_seeds_that_are_none(tmp_path: Path, seeds: str) -> None:
    check_refusal(*run(tmp_path / "B", f"--seeds={seeds}"), 2, "0-7")
    assert not files_below(tmp_path)


@pytest.mark.parametrize(("option", "value"), [("--scenario", "easy"), ("--method", "best"), ("--n-latents", "7")])
def test_unknown_names(tmp_path: Path, option: str, value: str) -> None:
    check_refusal(*run(tmp_path / "B", option, value), 2, value)
    assert not files_below(tmp_path)


def test_other_settings_are_refused(tmp_path: Path, given: list[dict[str, Any]]) -> None:
    assert run(tmp_path / "B", "--seeds", "0").code == 0
    check_refusal(*run(tmp_path / "B", "--seeds", "0", "--n-latents", "auto"), 3, "'known' there and 'auto' here")
    assert len(given) == 1


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("crlseq.experiments.fits.fit", interrupted)
    answer = run(tmp_path / "B", "--seeds", "0")
    assert (answer.code, answer.out) == (130, "")
    assert "the same command continues" in answer.err and "--resume" not in answer.err
    assert not (tmp_path / "B" / "lock").exists()
