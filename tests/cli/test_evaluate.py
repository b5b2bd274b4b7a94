"""``crlseq evaluate``: tables, JSON, the CSV, and what it refuses."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

from tests.support import PREDICTORS, check_refusal, invoke, succeeds


def test_a_short_table_and_a_sentence_and_the_rest_in_a_file(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tables" / "conditions.csv"
    answer = succeeds("evaluate", run_folder, "--output", path)
    shown = pd.read_csv(io.StringIO(answer.out), sep="\t", dtype=str)
    assert list(shown.columns) == [
        "held out", "predictor", "pearson_delta", "l2", "r2_weighted_delta", "de_score", "discrimination", "mae"
    ]  # fmt: skip
    assert shown["predictor"].tolist() == [name for name in PREDICTORS if name != "dynamic_range"]
    numbers = shown.iloc[:, 2:].stack().dropna()
    assert max(len(re.sub(r"e.*|^-|^0\.0*|\.", "", text).lstrip("0")) for text in numbers) <= 3
    conditions = pd.read_csv(path)
    assert not any(column.startswith("legacy") for column in conditions)
    assert set(conditions["predictor"]) == set(PREDICTORS)
    mean = conditions.loc[conditions["predictor"] == "model", "l2"].mean()
    row = shown[shown["predictor"] == "model"].iloc[0]
    assert float(row["l2"]) == pytest.approx(mean, rel=5e-3) and float(row["l2"]) != mean
    lines = answer.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["held-out cells, 9 conditions", "Against the known truth"]
    assert "against the best baseline, the model is" in lines[0]
    assert {file.name for file in path.parent.iterdir()} == {"conditions.csv"}
    check_refusal(*invoke("evaluate", run_folder, "--output", path), 3, "exists", "--force")
    succeeds("evaluate", run_folder, "--output", path, "--force")


def test_json_and_legacy(run_folder: Path) -> None:
    found = json.loads(succeeds("evaluate", run_folder, "--json", "--legacy").out)
    assert set(found) == {"verdict", "notes", "summary", "comparisons", "conditions", "recovery"}
    assert {"legacy_r2", "legacy_mmd2", "legacy_rmse"} <= {row["metric"] for row in found["summary"]}
    no_change = [row for row in found["conditions"] if row["predictor"] == "no_change"]
    assert all(row["pearson_delta"] is None for row in no_change)  # NaN is no JSON


def test_other_cells(run_folder: Path, screen: ad.AnnData, tmp_path: Path) -> None:
    screen.copy().write_h5ad(tmp_path / "other.h5ad")
    answer = succeeds("evaluate", run_folder, "--data", tmp_path / "other.h5ad", "--json")
    assert "took part in the fit and are left out" in answer.err
    screen[screen.obs["perturbation"] != "control"].copy().write_h5ad(tmp_path / "lone.h5ad")
    check_refusal(*invoke("evaluate", run_folder, "--data", tmp_path / "lone.h5ad"), 3, "lone.h5ad", "control")


def test_refusals(run_folder: Path, tmp_path: Path) -> None:
    for words, said in (
        (["evaluate", tmp_path], "is not a run folder"),
        (["evaluate", run_folder, "--data", tmp_path / "nothing.h5ad"], "There is no file"),
        (["evaluate", run_folder, "--output", tmp_path], "is a folder"),
        (["evaluate", run_folder, "--output", run_folder / "evaluation.csv", "--force"], "is a part of the run"),
        (["report", run_folder, "--output", run_folder / "run.json", "--force"], "is a part of the run"),
        (
            ["export", run_folder, "--format", "json", "--output", run_folder / "run.json", "--force"],
            "is a part of the run",
        ),
    ):
        check_refusal(*invoke(*words), 3, said)


def test_predictions_of_another_tool(screen: ad.AnnData, run_folder: Path, tmp_path: Path) -> None:
    data, means = tmp_path / "measured.h5ad", tmp_path / "means.h5ad"
    screen.copy().write_h5ad(data)
    screen[screen.obs["perturbation"] != "control"].copy().write_h5ad(means)  # as cells
    answer = succeeds("evaluate", means, "--data", data, "--json")
    l2 = [row for row in json.loads(answer.out)["summary"] if row["predictor"] == "model" and row["metric"] == "l2"]
    assert l2[0]["mean"] == pytest.approx(0, abs=1e-5)
    for words, code, said in (
        (["evaluate", means], 2, "Name their file with --data"),
        (["evaluate", means, "--data", data, "--cross-validate"], 2, "need a run"),
        (["evaluate", run_folder, "--control-label", "control"], 2, "is for files of predictions"),
        (["evaluate", means, "--data", data, "--control-label", "nobody"], 3, "nobody"),
    ):
        check_refusal(*invoke(*words), code, said)
