"""``crlseq evaluate``: tables, JSON, the CSV, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import anndata as ad
import pandas as pd

from crlseq.evaluation.compare import PREDICTORS
from tests.support import check_refusal, invoke


def test_summary_into_a_pipe_and_conditions_into_a_file(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tables" / "conditions.csv"
    answer = invoke("evaluate", run_folder, "--output", path)
    assert answer.code == 0, answer.err
    summary = pd.read_csv(io.StringIO(answer.out), sep="\t")
    assert list(summary.columns) == ["group", "predictor", "metric", "n", "mean", "low", "high"]
    assert set(summary["predictor"]) == set(PREDICTORS)
    conditions = pd.read_csv(path)
    assert not any(column.startswith("legacy") for column in conditions)
    mean = conditions.loc[conditions["predictor"] == "model", "l2"].mean()
    row = summary[(summary["predictor"] == "model") & (summary["metric"] == "l2")].iloc[0]
    assert abs(row["mean"] - mean) < 1e-9
    assert row["low"] < row["mean"] < row["high"]
    assert (
        "counterfactuals: composition error" in answer.err and "Against the known truth: target accuracy" in answer.err
    )
    assert "half of a condition's cells predict the other half with Pearson delta" in answer.err
    assert "held-out cells: better than" in answer.err and "Pearson delta" in answer.err
    assert {file.name for file in path.parent.iterdir()} == {"conditions.csv"}
    again = invoke("evaluate", run_folder, "--output", path)
    check_refusal(again.code, again.out, again.err, 3, "exists", "--force")
    assert invoke("evaluate", run_folder, "--output", path, "--force").code == 0


def test_json_and_legacy(run_folder: Path) -> None:
    answer = invoke("evaluate", run_folder, "--json", "--legacy")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert set(found) == {"verdict", "notes", "summary", "comparisons", "conditions", "recovery"}
    assert {"legacy_r2", "legacy_mmd2", "legacy_rmse"} <= {row["metric"] for row in found["summary"]}
    no_change = [row for row in found["conditions"] if row["predictor"] == "no_change"]
    assert all(row["pearson_delta"] is None for row in no_change)  # NaN is no JSON


def test_other_cells(run_folder: Path, screen: ad.AnnData, tmp_path: Path) -> None:
    screen.copy().write_h5ad(tmp_path / "other.h5ad")
    answer = invoke("evaluate", run_folder, "--data", tmp_path / "other.h5ad", "--json")
    assert answer.code == 0, answer.err
    assert "took part in the fit and are left out" in answer.err
    screen[screen.obs["perturbation"] != "control"].copy().write_h5ad(tmp_path / "lone.h5ad")
    lone = invoke("evaluate", run_folder, "--data", tmp_path / "lone.h5ad")
    check_refusal(lone.code, lone.out, lone.err, 3, "lone.h5ad", "control")


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
        answer = invoke(*words)
        check_refusal(answer.code, answer.out, answer.err, 3, said)
