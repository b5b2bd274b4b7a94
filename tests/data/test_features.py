"""Matrices that hold guides and antibodies beside genes, repeated names, and cells without counts."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

import crlseq
from crlseq.config import DataConfig
from crlseq.data.dataset import read_data
from crlseq.data.matrix import open_screen
from tests.support import dense, invoke, small_screen


def with_guides(adata: ad.AnnData, column: str = "feature_types") -> ad.AnnData:
    """The screen with a guide a perturbation and two antibodies between its genes."""
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    rng, targets = np.random.default_rng(0), sorted(set(labels))
    guides = np.stack([np.where(labels == target, rng.poisson(40, len(labels)), 0) for target in targets], axis=1)
    antibodies = rng.poisson(200, (len(labels), 2))
    kinds = {"Gene Expression": adata.n_vars, "CRISPR Guide Capture": len(targets), "Antibody Capture": 2}
    var = pd.DataFrame(
        {column: np.repeat(list(kinds), list(kinds.values()))},
        index=[*adata.var_names, *(f"{'NT' if t == 'control' else t}_g1" for t in targets), "CD3", "CD4"],
    )
    order = np.random.default_rng(1).permutation(len(var))
    x = sp.csr_matrix(np.hstack([dense(adata), guides, antibodies]))[:, order]
    return ad.AnnData(x.astype(np.float32), obs=adata.obs, var=var.iloc[order])


def test_only_genes_are_fitted(tmp_path: Path) -> None:
    alone = small_screen()
    with_guides(alone).write_h5ad(tmp_path / "both.h5ad")
    both = ad.read_h5ad(tmp_path / "both.h5ad")
    for source in (tmp_path / "both.h5ad", both):
        data = read_data(source, DataConfig(n_top_genes="all"), 0)
        expected = read_data(
            alone[:, [g for g in both.var_names if g in alone.var_names]], DataConfig(n_top_genes="all"), 0
        )
        assert data.genes == expected.genes
        np.testing.assert_array_equal(data.dense(np.arange(280)), expected.dense(np.arange(280)))
        assert data.notes[0] == (
            "40 variables are genes and are fitted; 2 of type 'Antibody Capture' and 7 of type 'CRISPR Guide Capture' are "
            "not genes and are left out. --guide-counts 'CRISPR Guide Capture' assigns cells by these guides."
        )


def test_results_stand_beside_all_variables(tmp_path: Path) -> None:
    with_guides(small_screen()).write_h5ad(tmp_path / "both.h5ad")
    run = crlseq.fit(tmp_path / "both.h5ad", tmp_path / "run", method="linear", n_latents=2, bootstrap=0)
    written = ad.read_h5ad(tmp_path / "run" / "crlseq.h5ad")
    assert written.shape == (280, 49)
    genes = written.var["feature_types"] == "Gene Expression"
    assert not written.varm["crlseq_programs"][~genes].any() and written.var["crlseq_fitted"].sum() <= 40
    own = run.programs[run.programs["program"] == "P1"].set_index("gene")["loading"]
    found = pd.Series(written.varm["crlseq_programs"][:, 1], written.var_names)[own.index]
    np.testing.assert_allclose(found, own, rtol=1e-6)


def test_guides_of_the_matrix_assign_cells(tmp_path: Path) -> None:
    both = with_guides(small_screen(), "feature_type")
    truth = both.obs.pop("perturbation").astype(str).to_numpy()
    both.write_h5ad(tmp_path / "both.h5ad")
    for source in (both, tmp_path / "both.h5ad"):
        data = read_data(source, DataConfig(guide_counts="CRISPR Guide Capture"), 0)
        assert [data.condition_names[c] for c in data.condition] == truth.tolist()


@pytest.mark.parametrize("types", [["a", "b"], ["Gene Expression"] * 2, ["protein_coding", "lncRNA"]])
def test_columns_that_tell_nothing_of_features(types: list[str]) -> None:
    adata = small_screen()
    adata.var["feature_types"] = np.resize(types, adata.n_vars)
    with open_screen(adata) as screen:
        assert screen.n_genes == 40 and not screen.notes


def test_cells_without_counts_are_excluded() -> None:
    adata = small_screen()
    x = dense(adata)
    x[[7, 9, 200]] = 0
    adata.X = x
    data = read_data(adata, DataConfig(), 0)
    assert (data.condition[[7, 9, 200]] == -1).all() and (np.delete(data.condition, [7, 9, 200]) >= 0).all()
    assert "Cells without counts are excluded (3)." in data.notes
    assert data.labels.dropped == {"without counts": 3}


def test_repeated_names_get_a_number(tmp_path: Path) -> None:
    adata = small_screen()
    adata.var_names = ["gene0", "gene0", *adata.var_names[2:]]
    adata.obs_names = ["a", "a", *adata.obs_names[2:]]
    adata.write_h5ad(tmp_path / "screen.h5ad")
    run = crlseq.fit(tmp_path / "screen.h5ad", tmp_path / "run", method="linear", n_latents=2, bootstrap=0)
    assert run.info["notes"][:2] == [
        "Repeated cell names get a number (1, first 'a').", "Repeated gene names get a number (1, first 'gene0')."
    ]  # fmt: skip
    assert {"gene0", "gene0-1"} <= {*run.programs["gene"]}
    written = ad.read_h5ad(tmp_path / "run" / "crlseq.h5ad")
    assert written.obs["crlseq_split"].notna().all() and written.var["crlseq_fitted"].iloc[:2].all()
    again = crlseq.load(tmp_path / "run").annotate(adata)
    assert (again.obs["crlseq_split"].astype(str).to_numpy() == written.obs["crlseq_split"].astype(str)).all()


def test_what_cell_ranger_writes(tmp_path: Path) -> None:
    both = with_guides(small_screen())
    folder = tmp_path / "filtered_feature_bc_matrix"
    folder.mkdir()
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(both.X.T.astype(int)))
    (folder / "barcodes.tsv").write_text("".join(f"{name}\n" for name in both.obs_names))
    lines = [f"{name}\t{name}\t{kind}\n" for name, kind in both.var["feature_types"].items()]
    (folder / "features.tsv").write_text("".join(lines))
    for file in folder.iterdir():
        import gzip

        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    truth = both.obs["perturbation"].astype(str).to_numpy()
    data = read_data(folder, DataConfig(guide_counts="CRISPR Guide Capture"), 0)
    assert [data.condition_names[c] for c in data.condition] == truth.tolist()
    options = ("--guide-counts", "CRISPR Guide Capture", "--method", "linear", "--n-latents", 2, "--bootstrap", 0)
    answer = invoke("fit", folder, "--output", tmp_path / "run", *options)
    assert answer.code == 0, answer.err
    assert ad.read_h5ad(tmp_path / "run" / "crlseq.h5ad").shape == (280, 49)
