"""A screen with contexts through the command line: files, tables, words, predictions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import pytest

import crlseq
from crlseq.data.dataset import read_data
from crlseq.experiments.crossvalidation import fitted_key, fold_config, read_screen
from tests.support import files_of, invoke, refused


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three programs, twelve perturbations; a third of them and an edge differ in ``context1``."""
    path = tmp_path_factory.mktemp("contexts") / "screen.h5ad"
    adata = crlseq.simulate(
        n_latents=3, n_genes=80, cells_per_perturbation=240, n_control=900, expected_parents=0.7, contexts=2, own_shifts=1 / 3,
        own_edges=1, context_scale=0.3, depth=3000.0, seed=4,
    )  # fmt: skip
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def run(screen: Path) -> Path:
    folder = screen.parent / "RUN"
    words = ("--method", "linear", "--n-latents", 3, "--bootstrap", 0, "--hold-out-cells", 0.2)
    answer = invoke("fit", screen, "--output", folder, "--context-key", "context", *words)
    assert answer.code == 0, answer.err
    assert "act differently in context0 and context1" in answer.err
    return folder


def test_the_run_says_which_shifts_differ(screen: Path, run: Path) -> None:
    found = crlseq.load(run)
    assert {file.name for file in run.iterdir()} == files_of(run) - {"resume.pt"}  # nothing is trained
    assert (run / "contexts.csv").exists()
    shifts = ad.read_h5ad(screen).uns["truth"]["shift_by_context"]
    differ = set(shifts.index[shifts["context0"] != shifts["context1"]])
    assert found.contexts is not None and len(differ) == 4
    called = set(found.contexts.loc[found.contexts["fdr"] <= 0.05, "perturbation"])
    assert called == differ
    assert found.facts.contexts is not None and found.facts.contexts.names == ["context0", "context1"]


def test_perturbations_of_one_gene_share_their_program(run: Path) -> None:
    found = crlseq.load(run).interventions
    assert set(found["context"]) == {"context0", "context1"}
    acting = found[found["program"] != ""]
    assert (acting.groupby(acting["perturbation"].str.split("@").str[0])["program"].nunique() == 1).all()
    assert "context" in crlseq.load(run).effects


def test_pairs_and_edges_have_a_row_per_context_where_contexts_differ(run: Path) -> None:
    found = crlseq.load(run)
    assert found.pairs is not None and found.facts.contexts is not None
    apart = found.pairs[found.pairs["context"] != ""]
    assert len(apart) == 2 * found.facts.contexts.pairs_differ > 0
    assert set(found.edges["context"]) <= {"", "context0", "context1"}
    own = found.edges[found.edges["context"] != ""]
    assert len(own) and set(own["context"]) == {"context1"}  # the simulated edge
    assert found.dag.edges[own["source"].iloc[0], own["target"].iloc[0]]["context"] == "context1"


@pytest.mark.parametrize("table", ["summary", "interventions", "contexts", "pairs", "dag", "ancestry"])
def test_inspect_shows_contexts(run: Path, table: str) -> None:
    answer = invoke("inspect", table, run)
    assert answer.code == 0, answer.err
    assert invoke("inspect", table, run, "--json").code == 0
    if table in ("summary", "interventions", "contexts"):
        assert "of 12 perturbations act differently in context0 and context1 (FDR ≤ 0.05)" in answer.out + answer.err
    if table == "interventions":
        assert "contexts_differ" in answer.out.splitlines()[0]


def test_a_perturbation_of_a_context_is_predicted_and_judged(run: Path, tmp_path: Path) -> None:
    answer = invoke(
        "predict", run, "--perturbation", "g1@context1", "--output", tmp_path / "virtual.h5ad", "--n-cells", 30
    )
    assert answer.code == 0, answer.err
    assert "g1@context1 (fitted)" in answer.err
    assert invoke("evaluate", run, "--output", tmp_path / "EVAL").code == 0
    assert "Perturbations in two contexts" in (run / "report.html").read_text()


def test_folds_and_halves_read_the_labels_as_the_fit_did(run: Path) -> None:
    fitted = crlseq.load(run)
    screen, labels = read_screen(fitted)
    assert (screen.obs[fitted_key(fitted)].astype(str) == screen.obs["perturbation"].astype(str)).all()
    data = read_data(screen, fold_config(fitted, labels).data, 0)
    assert data.perturbation_names == tuple(fitted.interventions["perturbation"].sort_values())


def test_without_a_context_key_there_is_no_table(run: Path, tmp_path: Path, screen: Path) -> None:
    checked = invoke("check", screen, "--context-key", "context", "--json")
    assert checked.code == 0 and "--context-key context" in json.loads(checked.out)["command"]


def test_what_is_no_context_is_refused(screen: Path, tmp_path: Path) -> None:
    alone = tmp_path / "screen.h5ad"
    alone.symlink_to(screen)
    refused(alone, alone, "--context-key", "stim", says=("no column 'stim' for --context-key",))
    refused(alone, alone, "--context-key", "perturbation", code=2, says=("holds the perturbations",))
