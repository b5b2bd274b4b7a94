"""The benchmark of a GPU: every part answers, here on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT, environment


def test_every_part_answers(tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "scripts" / "benchmark_gpu.py", "--device", "cpu", "--small", "--epochs", "2"]
    done = subprocess.run(
        [*words, "--output", tmp_path / "gpu.json"], capture_output=True, text=True, env=environment(), check=False, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [name for name, part in found.items() if isinstance(part, dict) and "failed" in part] == []
    assert found["one seed twice"] is True and found["norman"]["epochs"] == 2
    assert 0 < found["norman"]["step"] < found["norman"]["epoch"] < found["norman"]["seconds"]
    assert sum(found["norman"]["stages"].values()) < found["norman"]["seconds"]
    assert "skipped" in found["tests"] and found["limits"]["bytes"] > 0
