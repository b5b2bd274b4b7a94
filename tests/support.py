"""What several test files share: the command line in this process, small screens, a run's files."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import anndata as ad
import numpy as np

import crlseq

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
SMALL: dict[str, Any] = {
    "n_latents": 3,
    "perturbations_per_latent": 2,
    "n_genes": 40,
    "cells_per_perturbation": 30,
    "n_control": 100,
    "depth": 800.0,
}
RUN_FILES = {
    *("run.json", "model.safetensors", "crlseq.h5ad", "resume.pt", "report.html", "dag.graphml", "dag.json"),
    *("programs.csv", "interventions.csv", "dag.csv", "history.csv", "evaluation.csv"),
}


def small_screen(**changes: Any) -> ad.AnnData:
    """A simulated screen of 280 cells and 40 genes; counts."""
    return crlseq.simulate(**{**SMALL, **changes})


def dense(adata: ad.AnnData) -> np.ndarray:
    """X as a dense float64 array."""
    return np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, dtype=float)


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int
    out: str
    err: str


def invoke(*words: object) -> Answer:
    """``crlseq WORDS`` in this process, through the entry point, with stdout and stderr no terminals."""
    from crlseq.cli.app import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    handler = signal.getsignal(signal.SIGTERM)
    argv = ["crlseq", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), mock.patch.dict(os.environ), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code: object = 0
        except SystemExit as done:
            code = done.code
        finally:
            signal.signal(signal.SIGTERM, handler)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    assert isinstance(code, int | None)
    return Answer(code or 0, *texts)


def environment(**changes: str) -> dict[str, str]:
    """Environment of a child process: this source tree, one thread."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **threads, **changes}


def command(*words: object) -> list[str]:
    """``python -m crlseq WORDS``."""
    return [sys.executable, "-m", "crlseq", *map(str, words)]


def spawn(*words: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """``crlseq WORDS`` in a child process."""
    return subprocess.run(command(*words), capture_output=True, text=True, env=environment(**env), cwd=cwd, timeout=120)


def files_below(folder: Path) -> set[str]:
    """Every file and folder below `folder`."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
