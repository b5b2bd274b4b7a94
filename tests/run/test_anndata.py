"""AnnData keys: what scanpy gets."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from crlseq.run.run import Run


@pytest.fixture(scope="module")
def annotated(run_folder: Path) -> ad.AnnData:
    return ad.read_h5ad(run_folder / "crlseq.h5ad")


def test_keys(annotated: ad.AnnData, finished: Run) -> None:
    latents, programs = annotated.obsm["X_crlseq"], annotated.varm["crlseq_programs"]
    assert type(latents) is np.ndarray
    assert type(programs) is np.ndarray
    assert (latents.shape, latents.dtype) == ((740, 3), np.float32)
    assert (programs.shape, programs.dtype) == ((40, 3), np.float32)
    assert set(annotated.obs["crlseq_split"]) == {"train", "validation", "test"}
    assert annotated.var["crlseq_fitted"].dtype == bool
    wide = finished.programs.pivot(index="gene", columns="program", values="loading")
    np.testing.assert_array_equal(programs, wide.loc[annotated.var_names].to_numpy(np.float32))


def test_uns(annotated: ad.AnnData, finished: Run) -> None:
    uns = annotated.uns["crlseq"]
    assert list(uns["program_names"]) == ["P0", "P1", "P2"]
    assert (uns["adjacency"].shape, uns["adjacency"].dtype) == ((3, 3), np.float64)
    np.testing.assert_array_equal(uns["adjacency"], finished.adjacency)
    interventions = uns["interventions"]
    assert list(interventions.index) == [f"g{i}" for i in range(7)]
    pd.testing.assert_series_equal(
        interventions["shift"].reset_index(drop=True), finished.interventions["shift"], check_exact=True
    )
    assert interventions["program"].tolist() == finished.interventions["program"].tolist()
    assert interventions.loc["g6", "program"] == "" and np.isnan(interventions.loc["g6", "weight"])
    assert uns["names"].dtype.names == uns["scores"].dtype.names == ("P0", "P1", "P2")
    assert len(uns["names"]) == 40
    loading = finished.programs.set_index(["program", "gene"])["loading"]
    for name in ("P0", "P1", "P2"):
        assert (np.diff(uns["scores"][name]) <= 0).all()
        np.testing.assert_allclose(
            uns["scores"][name], [loading[name, str(gene)] for gene in uns["names"][name]], rtol=1e-6
        )
    assert uns["params"]["preset"] == "default"
    assert uns["params"]["epochs"] == 3
    assert uns["identified"] == finished.info["identification"]["verdict"]
    assert json.loads(uns["run_json"]) == finished.info


def test_the_input_is_untouched(annotated: ad.AnnData, screen: ad.AnnData) -> None:
    assert (annotated.X != screen.X).nnz == 0
    assert annotated.X.dtype == screen.X.dtype
    np.testing.assert_array_equal(annotated.obsm["true_latents"], screen.obsm["true_latents"])
    np.testing.assert_array_equal(annotated.uns["truth"]["adjacency"], screen.uns["truth"]["adjacency"])
    obs, var = annotated.obs.drop(columns=["crlseq_split", "crlseq_hit"]), annotated.var.drop(columns="crlseq_fitted")
    for table, before in ((obs, screen.obs), (var, screen.var)):
        named = table.set_axis(table.index.astype(before.index.dtype))  # from pandas 3 on a file's names are texts
        pd.testing.assert_frame_equal(named, before, check_categorical=False, check_dtype=table is var)
    assert set(annotated.obsm) == {"true_latents", "X_crlseq"}
    assert set(annotated.uns) == {"truth", "crlseq"}


def test_the_matrix_is_copied_byte_by_byte(run_folder: Path, screen_file: Path) -> None:
    with h5py.File(run_folder / "crlseq.h5ad") as new, h5py.File(screen_file) as old:
        for name in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(new["X"][name][:], old["X"][name][:])
        assert dict(new["X"].attrs)["encoding-type"] == dict(old["X"].attrs)["encoding-type"]
