"""A fit with the sparse decoder, from the file to what its programs are said to be."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import crlseq
from crlseq.run.run import Run
from tests.support import files_of, invoke, succeeds

G = 50


@pytest.fixture(scope="module")
def sparse_screen() -> ad.AnnData:
    return crlseq.simulate(
        n_latents=3, perturbations_per_latent=2, n_genes=G, cells_per_perturbation=80, n_control=300, noise="gaussian",
        loading_density=0.2, seed=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(sparse_screen: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = tmp_path_factory.mktemp("sparse")
    sparse_screen.write_h5ad(inputs / "screen.h5ad")
    words = [
        "--decoder",
        "sparse",
        "--n-latents",
        "3",
        "--bootstrap",
        "0",
        "--method",
        "linear",
        "--hold-out-cells",
        "0.1",
    ]
    succeeds("fit", inputs / "screen.h5ad", "--output", inputs / "RUN", *words)
    return inputs / "RUN"


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return crlseq.load(folder)


def test_programs_are_short_lists_with_anchors(run: Run) -> None:
    table = run.programs
    loading = table.pivot(index="program", columns="gene", values="loading")
    on = loading != 0
    assert on.sum(1).min() >= 1 and on.sum(1).max() < 0.6 * G
    expected = on & (on.sum() == 1)
    assert (table.pivot(index="program", columns="gene", values="anchor") == expected).all(axis=None)
    assert expected.any(axis=None)
    # The rank goes by |loading|, so that the list of a program comes first.
    for _, rows in table.groupby("program"):
        assert (rows.sort_values("rank")["loading"] != 0).is_monotonic_decreasing
    # A gene without a loading moves with what lies downstream, or not at all.
    without = table["loading"] == 0
    reached = {name: bool(run.described[name].downstream) for name in run.program_names}
    assert (table.loc[without & ~table["program"].map(reached), "total_effect"] == 0).all()


def test_the_record_says_how_sparse(run: Run) -> None:
    told = run.info["sparsity"]
    counts = (run.programs["loading"] != 0).groupby(run.programs["program"]).sum()
    assert told["genes"] == counts.tolist()
    assert told["anchors"] == run.programs.groupby("program")["anchor"].sum().tolist()
    assert all(0 < share < 1 for share in told["share"])
    assert run.info["config"]["model"]["decoder"] == "sparse"


def test_inspect_names_the_anchors(run: Run, folder: Path) -> None:
    rows = run.programs[run.programs["program"] == "P0"]
    anchors = rows[rows["anchor"]].sort_values("rank")["gene"].tolist()
    assert list(run.described["P0"].anchors or ()) == anchors
    told = json.loads(invoke("inspect", "program", folder, "P0", "--json").out)
    assert told["anchors"] == anchors
    shown = invoke("inspect", "programs", folder, "--top", G).out.splitlines()
    assert len(shown) == 1 + (run.programs["loading"] != 0).sum()


def test_all_that_flows_from_the_decoder_is_there(run: Run, folder: Path, sparse_screen: ad.AnnData) -> None:
    assert {path.name for path in folder.iterdir()} >= files_of(folder) - {"resume.pt"}
    predicted = run.predict("g0+g1")
    assert np.isfinite(np.asarray(predicted.X)).all()
    x = np.asarray(sparse_screen.X, dtype=np.float32)
    latents = run.latents(sparse_screen)
    controls = (sparse_screen.obs["perturbation"] == "control").to_numpy()
    assert latents[controls].std(0) == pytest.approx(np.ones(3), abs=0.1)
    assert x.shape[0] == len(latents)
    succeeds("inspect", folder)


def test_a_dense_run_has_no_anchors(finished: Run, run_folder: Path) -> None:
    assert finished.info["sparsity"] is None
    assert "anchor" not in finished.programs
    assert json.loads(invoke("inspect", "program", run_folder, "P0", "--json").out)["anchors"] is None


def test_random_weights_become_sparse(sparse_screen: ad.AnnData) -> None:
    """Without a likelihood's start: masks begin dense, and the spike grows steep on the way."""
    run = crlseq.fit(
        sparse_screen, decoder="sparse", method="gradient", n_latents=3, epochs=15, values="continuous", seed=1
    )
    genes = run.info["sparsity"]["genes"]
    assert max(genes) < G


def test_it_needs_gaussian_noise(sparse_screen: ad.AnnData, tmp_path: Path) -> None:
    sparse_screen.write_h5ad(tmp_path / "screen.h5ad")
    answer = invoke(
        "fit", tmp_path / "screen.h5ad", "--output", tmp_path / "RUN", "--preset", "paper", "--decoder", "sparse"
    )
    assert answer.code == 2
    assert "sparse decoder" in answer.err
    assert not (tmp_path / "RUN").exists()
