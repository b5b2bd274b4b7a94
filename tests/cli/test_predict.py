"""``crlseq predict``: files, refusals and the summary."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from crlseq.prediction.changes import top_changes
from tests.support import check_refusal, files_below, invoke, succeeds


def test_file(run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "virtual.h5ad"
    words = ("predict", run_folder, "-p", "g1+g0", "--perturbation", "g6", "--n-cells", 50, "--output", output)
    answer = succeeds(*words)
    assert answer.out == ""
    assert "'g6' has no detectable effect" in answer.err
    virtual = ad.read_h5ad(output)
    assert virtual.shape == (100, 40)
    assert virtual.obs["perturbation"].unique().tolist() == ["g0+g1", "g6"]
    assert virtual.obs["predicted"].all()
    assert files_below(tmp_path) == {"new", "new/virtual.h5ad"}

    before = output.read_bytes()
    check_refusal(*invoke(*words), 3, "exists", "--force")
    assert output.read_bytes() == before
    assert invoke(*words, "--force", "--seed", 1, "--quiet").err == ""
    assert output.read_bytes() != before


def test_hit_cells(run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "virtual.h5ad"
    succeeds("predict", run_folder, "-p", "g0", "--hit-cells", "-o", output, "--quiet")
    assert ad.read_h5ad(output).obs["hit"].all()


def test_summary(run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "virtual.h5ad"
    answer = succeeds("predict", run_folder, "-p", "g0", "--counterfactual", "--n-cells", 30, "-o", output, "--json")
    said = json.loads(answer.out)
    assert said["n_cells"] == 30 and said["output"] == str(output)
    (row,) = said["predictions"]
    assert row["perturbation"] == "g0" and row["seen"] == "fitted" and row["composition"] < 1e-12
    assert "reversibility" in answer.err
    assert ad.read_h5ad(output).n_obs == 60


def test_other_cells(run_folder: Path, screen: ad.AnnData, tmp_path: Path) -> None:
    others = screen[::3].copy()
    others.write_h5ad(tmp_path / "others.h5ad")
    output = tmp_path / "virtual.h5ad"
    answer = succeeds("predict", run_folder, "-p", "g0", "--from", tmp_path / "others.h5ad", "-o", output)
    n = int((others.obs["perturbation"] == "control").sum())
    assert f"{n} of the {others.n_obs} cells" in answer.err
    assert ad.read_h5ad(output).n_obs == n


def test_the_genes_that_change_most_are_named(run_folder: Path, tmp_path: Path) -> None:
    """By hand from the file: differences of natural logarithms, and half widths of intervals over 1.96."""
    output = tmp_path / "virtual.h5ad"
    answer = invoke("predict", run_folder, "-p", "g0", "-p", "g3", "--output", output, "--json")
    virtual = ad.read_h5ad(output)
    for k, name in enumerate(("g0", "g3")):
        effect, upper = (virtual.varm[f"crlseq_{of}"][:, k] for of in ("effect", "effect_upper"))
        order = sorted(range(virtual.n_vars), key=lambda gene: -abs(effect[gene]))[:10]
        expected = [
            f"{virtual.var_names[gene]} {effect[gene]:+.2f} ± {(upper - effect)[gene] / 1.96:.2f}" for gene in order
        ]
        said = f"{name} changes these genes most (change of log expression ± standard error): {', '.join(expected)}."
        assert said in answer.err.splitlines()
        rows = json.loads(answer.out)["predictions"][k]["genes"]
        assert [row["gene"] for row in rows] == [virtual.var_names[gene] for gene in order]
        assert rows[0]["change"] == pytest.approx(effect[order[0]])


def test_where_nothing_changes_no_gene_is_named() -> None:
    virtual = ad.AnnData(np.zeros((1, 2)), var=pd.DataFrame({"symbol": ["A", "B"]}, index=["ENSG1", "ENSG2"]))
    virtual.uns["crlseq_prediction"] = {"perturbations": np.array(["x", "y"])}
    for name, values in {
        "effect": [[0, 0], [0, 2]],
        "effect_lower": [[0, 0], [0, 1]],
        "effect_upper": [[1, 0], [0, 3]],
    }.items():
        virtual.varm[f"crlseq_{name}"] = np.array(values, dtype=float)
    assert top_changes(virtual, "x").empty
    found = top_changes(virtual, "y")
    assert found["gene"].tolist() == ["B"] and found["change"].tolist() == [2.0]
    assert found["error"].tolist() == pytest.approx([2 / (2 * 1.96)], rel=1e-4)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("g55", "Did you mean 'g5'?"),
        ("g7", "Fitted perturbations are g0"),
        ("g0+g0", "twice"),
        ("control", "is the control"),
        ("g0+ABC", "'ABC' in 'g0+ABC'"),
    ],
)
def test_refusals(run_folder: Path, tmp_path: Path, label: str, says: str) -> None:
    answer = invoke("predict", run_folder, "--perturbation", label, "--output", tmp_path / "virtual.h5ad")
    check_refusal(*answer, 3, says)
    assert files_below(tmp_path) == set()


def test_bad_places(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "virtual.h5ad"):
        check_refusal(*invoke("predict", run_folder, "-p", "g0", "-o", output), 3)
    for output in (run_folder / "crlseq.h5ad", run_folder / "run.json"):
        before = output.read_bytes()
        check_refusal(*invoke("predict", run_folder, "-p", "g0", "-o", output, "--force"), 3, "a part of the run")
        assert output.read_bytes() == before
    answer = invoke("predict", run_folder, "-p", "g0", "-o", tmp_path / "file", "--from", tmp_path / "file", "--force")
    check_refusal(*answer, 3, "an input of the prediction")
    check_refusal(*invoke("predict", run_folder, "-p", "g0", "-o", tmp_path / ("x" * 300)), 3, "cannot be written")
    check_refusal(*invoke("predict", tmp_path, "-p", "g0", "-o", tmp_path / "virtual.h5ad"), 3, "not a run folder")
    answer = invoke("predict", run_folder, "-p", "g0", "-o", tmp_path / "v.h5ad", "--from", tmp_path / "file")
    check_refusal(*answer, 3, "not a file that crlseq reads")
    assert files_below(tmp_path) == {"file"}


def test_nothing_half_written(run_folder: Path, tmp_path: Path) -> None:
    """A disk that fills up leaves what was there."""
    output = tmp_path / "virtual.h5ad"
    output.write_text("before")

    def full(adata: ad.AnnData, path: Path, compression: str | None = None) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with mock.patch("crlseq.storage.hdf5.write_h5ad", full):
        answer = invoke("predict", run_folder, "-p", "g0", "-o", output, "--force", "--quiet")
    check_refusal(*answer, 3, "No space left")
    assert files_below(tmp_path) == {"virtual.h5ad"} and output.read_text() == "before"
