"""A screen without any effect: no programs, no graph, no training, and every command says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import crlseq
from crlseq.cli.export import KINDS
from crlseq.export.registry import FORMATS
from crlseq.run.columns import COLUMNS
from crlseq.run.run import Run
from tests.support import Answer, dense, invoke, small_screen, succeeds

SAYS = "None of the 6 perturbations has a detectable effect"
NEVER = ("learned by gradient", "converged", "0 of 6 perturbations have", "not identified", "NaN", "nan")


def null_screen() -> ad.AnnData:
    """Labels drawn at random."""
    adata = small_screen()
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    adata.obs["perturbation"] = pd.Categorical(np.random.default_rng(0).permutation(labels))
    return adata


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("null") / "screen.h5ad"
    null_screen().write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def fitted(source: Path) -> tuple[Path, Answer]:
    return source.parent / "RUN", invoke("fit", source, "--output", source.parent / "RUN")


@pytest.fixture
def run(fitted: tuple[Path, Answer]) -> Run:
    return crlseq.load(fitted[0])


def test_the_fit_says_so_and_claims_nothing(fitted: tuple[Path, Answer]) -> None:
    folder, answer = fitted
    assert answer.code == 0 and SAYS in answer.err and "SD of control cells" in answer.err
    assert not any(words in answer.err for words in NEVER), answer.err
    assert {path.name for path in folder.iterdir()} == {
        *("run.json", "model.safetensors", "crlseq.h5ad", "report.html", "dag.graphml", "dag.json", "effects.csv"),
        *(f"{name}.csv" for name in COLUMNS),
    }
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in COLUMNS}
    assert {name: len(table) for name, table in tables.items()} == {
        "programs": 0, "dag": 0, "history": 0, "interventions": 6, "evaluation": 6,
    }  # fmt: skip
    assert all(set(columns) <= set(tables[name]) for name, columns in COLUMNS.items())
    own = tables["interventions"]
    assert own[["program", "weight", "shift", "retention", "noise_scale", "support"]].isna().all(axis=None)
    assert (own["fdr"] > 0.05).all() and (own["n_cells"] == 30).all()
    held_out = tables["evaluation"]
    assert (held_out["mmd2"] == held_out["mmd2_no_change"]).all() and (held_out["l2"] == held_out["l2_no_change"]).all()
    assert json.loads((folder / "dag.json").read_text())["nodes"] == []


@pytest.mark.parametrize(
    "options",
    [{"method": name} for name in ("linear", "gradient", "straighten")]
    + [{"n_latents": 3}, {"preset": "paper"}, {"decoder": "sparse", "ensemble": 2}, {"dtype": "float64"}],
    ids=str,
)
def test_whatever_is_asked_for(options: dict[str, Any], tmp_path: Path) -> None:
    run = crlseq.fit(null_screen(), tmp_path / "RUN", **options)
    assert (run.info["n_latents"], run.program_names, len(run.edges)) == (0, [], 0)
    assert run.info["identification"]["verdict"] == "not identified"
    assert run.facts.training.epochs_run == 0
    again = crlseq.load(tmp_path / "RUN")
    assert again.tables().keys() == run.tables().keys()
    virtual = run.predict("g0", n_cells=20)
    assert (virtual.varm["crlseq_effect"] == 0).all() and (virtual.varm["crlseq_effect_upper"] >= 0).all()


@pytest.mark.parametrize(
    "words", ["summary", "programs", "dag", "pairs", "interventions", "ancestry", "history", "summary --json"]
)
def test_inspect(fitted: tuple[Path, Answer], words: str) -> None:
    name, *more = words.split()
    answer = succeeds("inspect", name, fitted[0], *more)
    assert "Traceback" not in answer.err
    never = [text for text in NEVER if text != "not identified" or not more]  # the verdict itself, as a value
    assert not any(text in answer.out + answer.err for text in never)
    if name in ("summary", "programs", "dag", "pairs"):
        assert "has a detectable effect" in answer.out + answer.err


def test_a_program_that_is_not_there(fitted: tuple[Path, Answer]) -> None:
    for words in (("program", fitted[0], "P0"), ("programs", fitted[0], "--program", "P0")):
        answer = invoke("inspect", *words)
        assert answer.code == 3 and "no perturbation has a detectable effect" in answer.err


def test_the_report(fitted: tuple[Path, Answer]) -> None:
    page = (fitted[0] / "report.html").read_text()
    assert SAYS in page and page.count("no detectable effect, no target claimed") == 6
    assert 'id="programs"' not in page and 'id="graph"' not in page and 'id="loss"' not in page
    assert not any(words in page for words in NEVER[:4])


@pytest.mark.parametrize("kind", KINDS)
def test_plots(fitted: tuple[Path, Answer], tmp_path: Path, kind: str) -> None:
    one = {"volcano": ("--perturbation", "g0"), "violin": ("--program", "P0")}.get(kind, ())
    succeeds("plot", fitted[0], kind, *one, "--output", tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    nothing = ("No perturbation", "No network", "0 of 6 perturbations", "No gene surely", "g0: 0 of 40 genes change")
    assert any(word in text for word in nothing)


@pytest.mark.parametrize("name", FORMATS)
def test_exports(fitted: tuple[Path, Answer], tmp_path: Path, name: str) -> None:
    succeeds("export", fitted[0], "--format", name, "--output", tmp_path / f"x{FORMATS[name].suffix}")


def test_predictions_are_control_cells(fitted: tuple[Path, Answer], run: Run, tmp_path: Path) -> None:
    out = tmp_path / "virtual.h5ad"
    answer = succeeds("predict", fitted[0], "-p", "g0", "-p", "g1+g0", "--counterfactual", "--output", out)
    assert "the predicted cells are the control cells" in answer.err
    assert "0 of 40 genes change; total change 0.000" in answer.err and "nan" not in answer.err
    virtual, cells = ad.read_h5ad(out), ad.read_h5ad(fitted[0] / "crlseq.h5ad")
    assert virtual.obs["perturbation"].value_counts().to_dict() == {"control": 100, "g0": 100, "g0+g1": 100}
    own = cells[virtual.obs["cell"]]
    assert (own.obs["perturbation"] == "control").all()
    measured = np.asarray(run.preprocessing.apply(own.X).todense())
    np.testing.assert_allclose(dense(virtual), measured, rtol=1e-6)
    error = virtual.varm["crlseq_effect_upper"][:, 0] / 1.959964
    control, treated = (
        np.asarray(run.preprocessing.apply(cells[(cells.obs["perturbation"] == name) & (cells.obs["crlseq_split"] == "train")].X).todense())
        for name in ("control", "g0")
    )  # fmt: skip
    expected = np.sqrt(control.var(0, ddof=1) / len(control) + treated.var(0, ddof=1) / len(treated))
    np.testing.assert_allclose(error, expected, rtol=1e-4)  # how large an effect may be that was not detected


def test_evaluate_says_so(fitted: tuple[Path, Answer]) -> None:
    assert "control cells: no change" in succeeds("evaluate", fitted[0]).err


def test_the_run_is_repeated(fitted: tuple[Path, Answer]) -> None:
    succeeds("rerun", fitted[0])


def test_annotated_cells_have_no_programs(fitted: tuple[Path, Answer]) -> None:
    adata = ad.read_h5ad(fitted[0] / "crlseq.h5ad")
    assert adata.obsm["X_crlseq"].shape == (280, 0) and adata.varm["crlseq_programs"].shape == (40, 0)
    assert adata.var["crlseq_fitted"].all()


def test_sets_and_vectors_are_of_no_use(source: Path, tmp_path: Path) -> None:
    gmt, vectors = tmp_path / "sets.gmt", tmp_path / "vectors.csv"
    gmt.write_text(
        "".join(f"S{k}\tx\t" + "\t".join(f"gene{i}" for i in range(8 * k, 8 * k + 8)) + "\n" for k in range(4))
    )
    vectors.write_text("gene,a,b\n" + "".join(f"g{i},{i % 3},{i % 2}\n" for i in range(8)))
    words = ("--gene-sets", gmt, "--embeddings", vectors)
    succeeds("fit", source, "--output", tmp_path / "RUN", *words)
    run = crlseq.load(tmp_path / "RUN")
    assert run.pathways is None and run.extrapolation is None and crlseq.enrich(run, gmt).empty


def test_one_effect_is_enough(write: Callable[[ad.AnnData], Path], tmp_path: Path) -> None:
    adata = null_screen()
    adata.X = dense(adata)
    adata.X[(adata.obs["perturbation"] == "g3").to_numpy(), :10] *= 4
    run = crlseq.fit(write(adata), tmp_path / "RUN", method="linear", bootstrap=0)
    assert (run.interventions["fdr"] <= 0.05).sum() == 1 and run.program_names == ["P0"]
    assert run.info["sensitivity"] is None and run.facts.discovery is not None
