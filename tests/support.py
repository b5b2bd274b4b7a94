"""What several test files share: the command line in this process, small screens, a run's files."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import anndata as ad
import h5py
import numpy as np
import pandas as pd

import crlseq
from crlseq.data.perturbations import Perturbations
from crlseq.pipeline.progress import Progress
from crlseq.run.run import Run

ROOT = Path(__file__).parents[1]
SINGLES = [f"g{i}" for i in range(6)]
# For what is about files, labels and matrices: what the fit finds in them is not the point.
FAST: dict[str, Any] = {"method": "gradient", "epochs": 1, "n_latents": 2, "bootstrap": 0}
SMALL: dict[str, Any] = {
    "n_latents": 3,
    "perturbations_per_latent": 2,
    "n_genes": 40,
    "cells_per_perturbation": 30,
    "n_control": 100,
    "depth": 800.0,
}
# In the order of an evaluation's table.
PREDICTORS = (
    *("model", "no_change", "mean", "additive", "shrunk_additive", "matching_mean", "ridge"),
    *("split_half", "interpolated_duplicate", "dynamic_range", "sampling_floor"),
)
RUN_FILES = {
    *("run.json", "model.safetensors", "crlseq.h5ad", "resume.pt", "report.html", "dag.graphml", "dag.json"),
    *("programs.csv", "interventions.csv", "dag.csv", "history.csv", "evaluation.csv", "pairs.csv"),
    *("second_targets.csv", "effects.csv", "combinations.safetensors"),
}


def files_of(folder: Path) -> set[str]:
    """The files that a finished run has: pairs of programs only where targets were found by likelihood, and a checkpoint
    only where there is an effect to fit.
    """
    info = json.loads((folder / "run.json").read_text())
    unfitted = set() if info["n_latents"] else {"resume.pt"}
    law = info["combinations"]
    unfitted |= set() if law else {"combinations.safetensors"}
    measured = {"interactions.csv"} if law and law["n_measured"] else set()
    measured |= {"guides.csv"} if info["guides"] else set()
    measured |= {"arms.csv"} if info["positions"] else set()
    measured |= {"covariates.csv"} if info["config"]["data"]["covariates"] else set()
    measured |= {"contexts.csv"} if info.get("contexts") else set()
    return (RUN_FILES | measured) - unfitted - (set() if info["discovery"] else {"pairs.csv", "second_targets.csv"})


def small_screen(**changes: Any) -> ad.AnnData:
    """A simulated screen of 280 cells and 40 genes; counts."""
    return crlseq.simulate(**{**SMALL, **changes})


def clear_screen() -> ad.AnnData:
    """740 cells and 40 genes: six perturbations with clear effects, ``g6`` without any, two doubles, two batches."""
    adata = small_screen(cells_per_perturbation=60, n_control=260, depth=2000.0, n_doubles=2, n_batches=2, seed=1)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    labels[np.flatnonzero(labels == "control")[:60]] = "g6"
    adata.obs["perturbation"] = pd.Categorical(labels)
    return adata


def dense(adata: ad.AnnData) -> np.ndarray:
    """X as a dense float64 array."""
    return np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, dtype=float)


class Answer(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def invoke(*words: object) -> Answer:
    """``crlseq WORDS`` in this process, through the entry point, with stdout and stderr no terminals."""
    from crlseq.cli.app import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    argv = ["crlseq", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), mock.patch.dict(os.environ), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code: object = 0
        except SystemExit as done:
            code = done.code
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    assert isinstance(code, int | None)
    return Answer(code or 0, *texts)


def forked(begin: Callable[[], object], *words: object) -> int:
    """``crlseq WORDS`` in a child of this process, which has imported everything, after `begin`; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            from crlseq.cli.app import main

            sys.argv = ["crlseq", *map(str, words)]
            begin()
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(handle, "w")) for handle in (1, 2))
            try:
                main()
                code = 0
            except SystemExit as done:
                code = int(done.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def in_a_fork(begin: Callable[[], object], *words: object) -> Answer:
    """What `forked` answers into pipes; its code is negative if a signal ended it."""
    pipes = [os.pipe() for _ in range(2)]

    def connect() -> None:
        for handle, (_, writes) in enumerate(pipes, start=1):
            os.dup2(writes, handle)
        begin()

    child = forked(connect, *words)
    texts = []
    for _, writes in pipes:
        os.close(writes)
    for reads, _ in reversed(pipes):  # what goes to stdout is less than a pipe holds
        with open(reads, encoding="utf-8") as stream:
            texts.append(stream.read())
    return Answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), texts[1], texts[0])


@contextmanager
def edited(source: Path, path: Path) -> Iterator[h5py.File]:
    """A copy of an HDF5 file, open to be changed."""
    shutil.copy(source, path)
    with h5py.File(path, "r+") as handle:
        yield handle


def edit_info(run: Path, **changes: Any) -> None:
    """Change entries of ``run.json``; of one that is a mapping the keys that are given."""
    info = json.loads((run / "run.json").read_text())
    for name, value in changes.items():
        info[name] = {**info[name], **value} if isinstance(value, dict) else value
    (run / "run.json").write_text(json.dumps(info))


def at_stage(word: str, action: Callable[[], object]) -> Progress:
    """Progress that acts when a stage begins."""
    return Progress(stage=lambda text: action() if text.startswith(word) else None)


def after_epoch(number: int, action: Callable[[], object]) -> Progress:
    """Progress that acts after an epoch."""
    return Progress(epoch=lambda record, _: action() if record["epoch"] == number else None)


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


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


def check_refusal(code: int, out: str, err: str, expected: int, *words: str) -> None:
    """One sentence and one hint, a line each; nothing else."""
    assert code == expected, err
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if not line.startswith("• ")]
    assert len(lines) == 2, err
    message, hint = lines
    assert message.startswith("crlseq: ") and message.endswith("."), err
    assert "fault in crlseq" not in message
    assert hint.startswith("  ") and hint.endswith((".", "?")), err
    # No second sentence: a full stop, a space and a capital.
    assert not re.search(r"[a-z)]\. [A-Z]", message), err
    for word in words:
        assert word in err, err


def succeeds(*words: object) -> Answer:
    """``crlseq WORDS``, with exit code 0."""
    answer = invoke(*words)
    assert answer.code == 0, answer.err
    return answer


def refused(folder: Path, source: object, *options: object, code: int = 3, says: tuple[str, ...] = ()) -> None:
    """``crlseq fit SOURCE`` is refused and leaves no file."""
    before = files_below(folder.parent)
    answer = invoke("fit", source, "--output", folder.parent / "RUN", "--epochs", 1, *options)
    check_refusal(answer.code, answer.out, answer.err, code, *says)
    assert files_below(folder.parent) == before


def fit_file(path: Path, *options: object, method: str = "gradient", bootstrap: int = 0) -> Run:
    """Fit a file through the command line; every file of the run is there, and scanpy's reader opens the result."""
    folder = path.parent / "RUN"
    words = ["--method", method, "--bootstrap", bootstrap, "--epochs", 1, "--n-latents", 2, *options]
    assert succeeds("fit", path, "--output", folder, *words).out == ""
    assert {file.name for file in folder.iterdir()} == files_of(folder)
    assert not folder.with_name("RUN.partial").exists()
    annotated = ad.read_h5ad(folder / "crlseq.h5ad")
    run = crlseq.load(folder)
    assert annotated.obsm["X_crlseq"].shape == (run.info["input"]["n_cells"], 2)
    assert np.isfinite(annotated.obsm["X_crlseq"]).all()
    return run


def fit_h5ad(adata: ad.AnnData, folder: Path, *options: object, **kinds: Any) -> Run:
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(folder / "screen.h5ad")
    return fit_file(folder / "screen.h5ad", *options, **kinds)


def relabelled(**names: str) -> ad.AnnData:
    adata = small_screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace(names)
    return adata


def table(**columns: Any) -> pd.DataFrame:
    """Columns of labels; a string is split at blanks."""
    return pd.DataFrame({key: v.split() if isinstance(v, str) else v for key, v in columns.items()})


def labels(p: Perturbations) -> list[str]:
    """Canonical label of each cell; "-" where it is dropped."""
    return [p.condition_names[c] if c >= 0 else "-" for c in p.condition]
