"""The benchmark of a GPU: every part answers, here on the CPU and on a device that is not there, and none takes for ever."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crlseq.threads import on_threads
from tests.cuda.device import GIB, fake_cuda
from tests.support import ROOT, environment

sys.path.insert(0, str(ROOT / "scripts"))  # as of a script that is run
from scripts import benchmark_gpu as script


@pytest.mark.slow
def test_every_part_answers(tmp_path: Path) -> None:
    words = [
        sys.executable,
        script.__file__,
        *["--device", "cpu", "--small", "--epochs", "2", "--slower", "20", "--output"],
    ]
    done = subprocess.run(
        [*words, tmp_path / "gpu.json"], capture_output=True, text=True, env=environment(), check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [name for name, part in found.items() if isinstance(part, dict) and "failed" in part] == []
    assert found["one seed twice"] is True and found["norman"]["epochs"] == 2
    assert 0 < found["norman"]["step"] < found["norman"]["epoch"] < found["norman"]["seconds"]
    assert sum(found["norman"]["stages"].values()) < found["norman"]["seconds"]
    assert "skipped" in found["tests"] and found["limits"]["bytes"] > 0


def test_parts_ask_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those whose answer is of kernels, and the ensemble, which `tests/cuda/test_fits.py` has."""
    of_cuda = {
        "get_device_properties": lambda device: SimpleNamespace(name="H100", total_memory=80 * GIB, multi_processor_count=132),
        "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: GIB,
    }  # fmt: skip
    for name, value in of_cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(script, "SMALL", {"n_perturbed": 600, "n_control": 80, "n_genes": 40})
    monkeypatch.setattr(script, "FIT", {**script.FIT, "n_latents": 3, "method": "gradient"})
    monkeypatch.setattr(
        script, "timed", lambda *args, timed=script.timed, **options: timed(*args, **options | {"method": "gradient"})
    )
    found: dict[str, Any] = {}
    parts = script.parts_of("cuda", 2, True, found)
    with fake_cuda(), on_threads(1):
        script.ask(
            {name: part for name, part in parts.items() if name not in ("tests", "limits", "profile", "ensemble")},
            found,
            tmp_path / "gpu.json",
        )
    assert [part for part in found.values() if isinstance(part, dict) and "failed" in part] == []
    assert found["machine"]["device"] == "H100" and found["norman"]["peak memory"] == GIB
    assert found["one seed twice"] is True
    assert found["graphs"]["refused"] == [] and found["graphs"]["weights"] < 1e-3
    assert json.loads((tmp_path / "gpu.json").read_text()) == found


def test_no_part_takes_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(script.SECONDS.values()) < 8 * 60
    assert {*script.parts_of("cuda", 1, False, {})} == {*script.SECONDS}
    monkeypatch.setattr(script, "SECONDS", {"first": 0.05, "second": 1})
    found: dict[str, Any] = {}

    def endless() -> None:
        while True:
            with suppress(Exception):  # what a part does with errors of its own
                time.sleep(0.01)

    script.ask({"first": endless, "second": lambda: 2}, found, tmp_path / "gpu.json")
    assert found["first"]["failed"].startswith("OverTimeError: more than") and found["second"] == 2
