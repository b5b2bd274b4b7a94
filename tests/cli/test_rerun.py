"""``crlseq rerun``: nothing differs, or the first difference is named."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

import crlseq
from crlseq.experiments.rerun import ORDER, causes, differences
from crlseq.storage.runfolder import RUN_FILES
from tests.support import check_refusal, edit_info, edited, invoke, spawn, succeeds

FIT = ["--method", "gradient", "--epochs", 2, "--n-latents", 2, "--hold-out-cells", 0.2]


@pytest.fixture(scope="module")
def fitted(screen_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    shutil.copy(screen_file, folder / "screen.h5ad")
    with chdir(folder):
        succeeds("fit", "screen.h5ad", "--output", "RUN", *FIT)
    return folder


@pytest.fixture
def copies(fitted: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run twice."""
    for name in ("a", "b"):
        shutil.copytree(fitted / "RUN", tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def first_of(folders: tuple[Path, Path]) -> str:
    return str(next(differences(*folders)))


def test_all_that_a_fit_computes_is_compared() -> None:
    """But for checkpoints, what a fit was given, and the report, which shows times."""
    others = {"lock", "identity.json", "resume.pt", "resume.previous.pt", "gene_sets.gmt", "report.html"}
    assert {*ORDER} == RUN_FILES - others


def test_the_same_from_another_folder(fitted: Path, tmp_path: Path) -> None:
    done = spawn("rerun", fitted / "RUN", "--json", cwd=tmp_path, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"identical": True, "differences": [], "causes": []}
    assert done.stderr.endswith("Identical: losses, weights, tables, graph and latents.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_a_device_that_is_not_here(fitted: Path, tmp_path: Path) -> None:
    """It claims to be of a GPU; it is repeated on the CPU, which is what it was fitted on, and then with another seed."""
    shutil.copytree(fitted / "RUN", tmp_path / "RUN")
    config = json.loads((tmp_path / "RUN" / "run.json").read_text())["config"]
    config["training"]["device"] = "cuda"
    edit_info(tmp_path / "RUN", device="cuda:0", config=config)
    words = ["rerun", tmp_path / "RUN", "--data", fitted / "screen.h5ad"]
    same = succeeds(*words)
    assert "The run was fitted on cuda:0, and is repeated on the CPU. --device cuda:0 cannot be used: " in same.err
    config["training"]["seed"] = 1
    edit_info(tmp_path / "RUN", config=config)
    other = invoke(*words, "--quiet")
    assert other.code == 4
    assert "Probable causes: the device was cuda:0 and is cpu." in other.err


def test_another_result_is_told(fitted: Path, tmp_path: Path) -> None:
    """The run claims another seed, version and platform than it was fitted with, and its input has moved."""
    shutil.copytree(fitted / "RUN", tmp_path / "RUN")
    info = json.loads((tmp_path / "RUN" / "run.json").read_text())
    info["config"]["training"]["seed"] = 1
    changes = {
        "version": "0.0.1",
        "packages": {**info["packages"], "torch": "2.4.0"},
        "machine": {**info["machine"], "cores": None},
        "processes": 2,
    }
    edit_info(tmp_path / "RUN", config=info["config"], input={**info["input"], "path": "gone.h5ad"}, **changes)
    words = ["rerun", tmp_path / "RUN", "--output", tmp_path / "AGAIN", "--quiet"]
    check_refusal(*invoke(*words), 3, "gone.h5ad does not exist", "--data")
    answer = invoke(*words, "--data", fitted / "screen.h5ad")
    assert answer.code == 4, answer.err
    first, then, why = answer.err.splitlines()
    assert (
        first.startswith("Different. First in history.csv, row 1 (epoch 0), column ") and "differences up to" in first
    )
    assert "model.safetensors" in then and "crlseq.h5ad" in then
    for word in ("crlseq was 0.0.1", "torch was 2.4.0", "number of processes was 2 and is 1", "cores was None"):
        assert word in why
    assert crlseq.load(tmp_path / "AGAIN").info["seed"] == 1
    check_refusal(*invoke(*words, "--data", fitted / "screen.h5ad"), 3, "exists")


def test_another_input_is_refused(fitted: Path, tmp_path: Path) -> None:
    with edited(fitted / "screen.h5ad", tmp_path / "other.h5ad") as handle:
        handle["X/data"][0] += 1
    answer = invoke("rerun", fitted / "RUN", "--data", tmp_path / "other.h5ad", "--quiet")
    check_refusal(*answer, 3, "not the file that", "SHA-256")
    itself = invoke("rerun", fitted / "RUN", "--output", fitted / "RUN", "--force", "--quiet")
    check_refusal(*itself, 3, "is the run itself")


def test_a_run_of_cells_in_memory(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted / "RUN", tmp_path / "RUN")
    edit_info(tmp_path / "RUN", input={"path": "in memory", "sha256": "", "n_cells": 740, "n_genes": 40})
    check_refusal(*invoke("rerun", tmp_path / "RUN", "--quiet"), 3, "data in memory", "--data")
    succeeds("rerun", tmp_path / "RUN", "--quiet", "--data", fitted / "screen.h5ad")


def test_a_cell_of_a_table(copies: tuple[Path, Path]) -> None:
    assert list(differences(*copies)) == []
    table = pd.read_csv(copies[1] / "programs.csv", dtype=str)
    table.loc[3, "loading"] = str(float(table.loc[3, "loading"]) + 0.5)
    gene = table.loc[3, "program"]
    table.to_csv(copies[1] / "programs.csv", index=False)
    assert f"programs.csv, row 4 (program {gene}), column loading: " in first_of(copies)
    assert "(differences up to 0.5)" in first_of(copies)
    table.iloc[:-1].to_csv(copies[1] / "programs.csv", index=False)
    assert first_of(copies) == f"programs.csv, the number of rows: {len(table)} became {len(table) - 1}"
    table.drop(columns="rank").to_csv(copies[1] / "programs.csv", index=False)
    assert "programs.csv, the columns: " in first_of(copies)
    (copies[1] / "programs.csv").unlink()
    assert first_of(copies) == "programs.csv, the whole file: there became missing"


def test_a_number_of_a_tensor(copies: tuple[Path, Path]) -> None:
    weights = load_file(copies[1] / "model.safetensors")
    weights["scm.graph"] = weights["scm.graph"].copy()
    before = weights["scm.graph"][1, 0]
    weights["scm.graph"][1, 0] += 0.25
    save_file(weights, copies[1] / "model.safetensors")
    after = weights["scm.graph"][1, 0]
    assert first_of(copies) == (
        f"model.safetensors, tensor scm.graph at [1, 0]: {before!s} became {after!s} (differences up to 0.25)"
    )


def test_latents_and_the_record(copies: tuple[Path, Path]) -> None:
    with h5py.File(copies[1] / "crlseq.h5ad", "r+") as handle:
        handle["obsm/X_crlseq"][5, 1] += 1
        handle["X/data"][0] += 1  # the input's, whose digest is compared
    assert first_of(copies).startswith("crlseq.h5ad, obsm/X_crlseq at [5, 1]: ")
    info = json.loads((copies[1] / "run.json").read_text())
    info["programs"][1]["scale"] += 1.0
    edit_info(copies[1], programs=info["programs"], seconds=1e6, command="another", started="never")
    found = [str(one) for one in differences(*copies)]
    assert found[0].startswith("run.json, programs[1].scale: ") and found[0].endswith("(differences up to 1)")
    assert len(found) == 2


def test_missing_values_are_the_same(copies: tuple[Path, Path]) -> None:
    for folder in copies:
        with h5py.File(folder / "crlseq.h5ad", "r+") as handle:
            handle["obsm/X_crlseq"][0, 0] = np.nan
    assert list(differences(*copies)) == []


def test_no_cause_where_nothing_was_otherwise(fitted: Path) -> None:
    facts = crlseq.load(fitted / "RUN").facts
    assert list(causes(facts, facts)) == []
    assert list(causes(facts, facts.model_copy(update={"threads": 64}))) == [
        f"the number of threads was {facts.threads} and is 64"
    ]
