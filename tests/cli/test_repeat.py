"""One seed, one result, whatever the hash seed; runs that are killed go on to the same end."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crlseq
from crlseq.errors import InputError
from crlseq.training import trainer
from crlseq.training.objective import Objective
from tests.support import in_a_fork, invoke, relabelled, spawn, succeeds

SAME = [
    "model.safetensors",
    "programs.csv",
    "interventions.csv",
    "dag.csv",
    "history.csv",
    "evaluation.csv",
    "dag.graphml",
    "dag.json",
]


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SAME}


def test_one_seed_one_result_whatever_the_hash_seed(screen_file: Path, tmp_path: Path) -> None:
    """With the default method and number of programs, bootstrap included."""
    words = ["--epochs", 2, "--bootstrap", 2, "--batch-key", "batch", "--n-top-genes", 30]
    folder = tmp_path / "SPAWNED"
    done = spawn("fit", screen_file, "--output", folder, "--seed", 3, *words, PYTHONHASHSEED="12345")
    assert done.returncode == 0, done.stderr
    found = results(folder)
    assert b",0.5" in found["interventions.csv"] or b",1.0" in found["interventions.csv"]
    options: dict[str, Any] = {"epochs": 2, "bootstrap": 2, "batch_key": "batch", "n_top_genes": 30}
    in_process = crlseq.fit(screen_file, tmp_path / "RUN", seed=3, **options)
    assert in_process.path is not None and os.environ.get("PYTHONHASHSEED") != "12345"
    assert results(in_process.path) == found
    assert in_process.info["threads"] == 1  # choosing genes must not change it
    other = crlseq.fit(screen_file, tmp_path / "other", seed=4, **options)
    assert other.path is not None
    assert results(other.path)["model.safetensors"] != found["model.safetensors"]
    assert results(other.path)["programs.csv"] != found["programs.csv"]


# Commas for points, another dotted i, and text that is ASCII alone, as an old cluster has it.
LOCALES = {"tr_TR.utf8": "tr_TR.UTF-8", "de_DE.utf8": "de_DE.UTF-8"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Kiritimati"}


def test_one_result_in_every_locale(tmp_path: Path) -> None:
    """With names of genes, perturbations and files beyond ASCII."""
    adata = relabelled(g0="İ-ı-ß", g1="β/γ")
    adata.var_names = [f"GENE-ı{i}é" for i in range(adata.n_vars)]
    adata.write_h5ad(tmp_path / "Zählung.h5ad")
    listed = subprocess.run(["locale", "-a"], capture_output=True, text=True) if shutil.which("locale") else None
    installed = [LOCALES[name] for name in (listed.stdout.split() if listed else ()) if name in LOCALES]
    words = ["--method", "linear", "--n-latents", 2, "--bootstrap", 0, "--hold-out-cells", 0.3]
    succeeds("fit", tmp_path / "Zählung.h5ad", "--output", tmp_path / "Lauf", *words)  # in the locale of the tests
    found = [results(tmp_path / "Lauf")]
    for changes in (ASCII, *({"LC_ALL": name} for name in installed)):
        folder = tmp_path / f"Lauf-ü-{len(found)}"
        done = spawn("fit", tmp_path / "Zählung.h5ad", "--output", folder, *words, **changes)
        assert done.returncode == 0, done.stderr
        found.append(results(folder))
    assert all(one == found[0] for one in found[1:])
    assert "İ-ı-ß".encode() in found[0]["interventions.csv"] and "GENE-ı0é".encode() in found[0]["programs.csv"]


def test_thread_counts_change_rounding_alone(screen_file: Path, tmp_path: Path) -> None:
    """In float64 to 1e-6 of the largest value of a table's column."""
    options: dict[str, Any] = {"epochs": 3, "bootstrap": 2, "n_latents": 3, "dtype": "float64", "seed": 3}
    one, two = (crlseq.fit(screen_file, tmp_path / str(n), threads=n, **options) for n in (1, 2))
    assert (one.info["threads"], two.info["threads"]) == (1, 2)
    for name, table in one.tables().items():
        other = two.tables()[name]
        words = [column for column, kind in table.dtypes.items() if kind.kind in "Ob"]
        assert table[words].equals(other[words])
        for column in table.columns.drop(words)[table.drop(columns=words).notna().any()]:
            size = np.nanmax(np.abs(table[column]), initial=1e-30)
            np.testing.assert_allclose(
                other[column] / size, table[column] / size, atol=1e-6, err_msg=f"{name} {column}"
            )


# The default method: what the likelihood finds is found again when a fit goes on.
FIT: list[object] = ["--epochs", 6, "--batch-size", 16, "--n-latents", 3, "--bootstrap", 2, "--seed", 2]
GRADIENT: list[object] = ["--method", "gradient", "--epochs", 1]


@pytest.fixture(scope="module")
def whole(screen_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the fit ends with when nobody interrupts it."""
    folder = tmp_path_factory.mktemp("whole") / "RUN"
    succeeds("fit", screen_file, "--output", folder, *FIT)
    return results(folder)


def interrupt(words: list[object], number: signal.Signals, checkpoint_seconds: float = 5.0) -> tuple[int, str]:
    """A fit that sends itself a signal in the middle of its fourth epoch; its exit code and stderr."""
    # An epoch is 5 steps: 9 conditions of 54 cells in batches of 16 give 36 pieces, 8 a step.
    call, passes = Objective.__call__, itertools.count(1)

    def counted(self: Objective, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and next(passes) == 3 * 5 + 3:
            signal.raise_signal(number)
        return call(self, *arguments)

    def begin() -> None:
        trainer.CHECKPOINT_SECONDS = checkpoint_seconds
        Objective.__call__ = counted  # type: ignore[method-assign]

    answer = in_a_fork(begin, *words)
    return answer.code, answer.err


def unfinished(folder: Path) -> bool:
    partial = folder.with_name(folder.name + ".partial")
    return (partial / "resume.pt").exists() and not folder.exists()


@pytest.mark.parametrize(("checkpoint_seconds", "done"), [(0.0, 3), (100.0, 1)])
def test_killed_and_resumed(
    screen_file: Path, whole: dict[str, bytes], tmp_path: Path, checkpoint_seconds: float, done: int
) -> None:
    folder = tmp_path / "RUN"
    words = ["fit", screen_file, "--output", folder, *FIT]
    code, err = interrupt(words, signal.SIGKILL, checkpoint_seconds)
    assert code == -signal.SIGKILL, err
    assert unfinished(folder)
    assert torch.load(tmp_path / "RUN.partial" / "resume.pt", weights_only=True)["epoch"] == done - 1
    refused = invoke(*words)
    assert refused.code == 3
    assert "--resume" in refused.err
    assert "--force" in refused.err
    shown = invoke("inspect", folder)
    assert shown.code == 3
    assert "not finished" in shown.err
    other = invoke(*words, "--resume", "--epochs", 7)
    assert other.code == 3
    assert "other options" in other.err
    assert unfinished(folder)
    succeeds(*words, "--resume")
    assert results(folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]
    assert "finished already" in succeeds(*words, "--resume").err


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGINT])
def test_interrupted(screen_file: Path, whole: dict[str, bytes], tmp_path: Path, with_signal: signal.Signals) -> None:
    folder = tmp_path / "RUN"
    words = ["fit", screen_file, "--output", folder, *FIT]
    code, err = interrupt(words, with_signal)
    assert code == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("Interrupted.")
    assert "--resume" in err.splitlines()[-1]
    assert unfinished(folder)
    succeeds(*words, "--resume" if with_signal == signal.SIGTERM else "--force")
    assert results(folder) == whole


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_object(path: Path) -> None:
    torch.save({"identity": Path("x")}, path)


@pytest.mark.parametrize("damage", [damage_empty, damage_cut, damage_object])
def test_damaged_checkpoint(
    run_folder: Path, screen_file: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    (tmp_path / "RUN.partial").mkdir()
    shutil.copy(run_folder / "resume.pt", tmp_path / "RUN.partial")
    damage(tmp_path / "RUN.partial" / "resume.pt")
    answer = invoke("fit", screen_file, "--output", tmp_path / "RUN", "--resume", *GRADIENT)
    assert answer.code == 3, answer.err
    assert "Traceback" not in answer.err
    succeeds("fit", screen_file, "--output", tmp_path / "RUN", "--force", *GRADIENT)


def test_another_input_is_not_resumed(run_folder: Path, screen_file: Path, tmp_path: Path) -> None:
    (tmp_path / "RUN.partial").mkdir()
    shutil.copy(run_folder / "resume.pt", tmp_path / "RUN.partial")
    with pytest.raises(InputError, match="another input or other options"):
        crlseq.fit(screen_file, tmp_path / "RUN", resume=True, epochs=3, method="gradient")


def test_a_second_process_is_refused(screen_file: Path, tmp_path: Path) -> None:
    import fcntl

    partial = tmp_path / "RUN.partial"
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for option in ("--resume", "--force"):
            answer = invoke("fit", screen_file, "--output", tmp_path / "RUN", *GRADIENT, option)
            assert answer.code == 3
            assert "Another crlseq" in answer.err
    assert os.listdir(partial) == ["lock"]
