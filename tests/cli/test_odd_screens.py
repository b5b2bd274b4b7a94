"""Odd but valid screens: every one is fitted through the command line or in memory, and comes out complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import crlseq
from crlseq.errors import InputError
from crlseq.run.run import Run
from tests.support import FAST, SINGLES, dense, fit_file, fit_h5ad, invoke, relabelled, small_screen, succeeds

# --- labels

WEIRD = [
    "A/B",
    "it's",
    'say "so"',
    "Δ-γ é 漢字",
    "<script>alert(1)</script>",
    "tab\there",
    "-x",
    "a~b^c",
    "#1",
    "%s{0}",
    "[bold]x[/bold]",
    ":warning:",
]


@pytest.mark.parametrize("weird", [WEIRD[:6], WEIRD[6:]])
def test_weird_labels(tmp_path: Path, weird: list[str]) -> None:
    run = fit_h5ad(relabelled(**dict(zip(SINGLES, weird, strict=True))), tmp_path, method="straighten", bootstrap=2)
    assert sorted(run.interventions["perturbation"]) == sorted(weird)
    page = (tmp_path / "RUN" / "report.html").read_text()
    assert page.count("<script") == 1  # the page's own
    kept = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad")
    assert set(kept.obs["perturbation"]) == {"control", *weird}
    assert set(kept.uns["crlseq"]["interventions"].index) == set(weird)
    for words in (["interventions"], ["dag"], ["programs"], []):
        succeeds("inspect", *words, tmp_path / "RUN")
    listed = json.loads(invoke("inspect", "interventions", tmp_path / "RUN", "--json").out)
    assert sorted(row["perturbation"] for row in listed) == sorted(weird)
    succeeds("check", tmp_path / "screen.h5ad")


def test_labels_called_na_are_dropped_and_counted(tmp_path: Path) -> None:
    run = fit_h5ad(relabelled(g0="NA", g1="nan"), tmp_path)
    assert sorted(run.interventions["perturbation"]) == SINGLES[2:]
    assert "Cells labelled 'NA' are excluded (30)." in run.info["notes"]


@pytest.mark.parametrize("kind", [int, "category"])
def test_integer_labels(tmp_path: Path, kind: Any) -> None:
    adata = relabelled(control="0", **{name: str(i + 1) for i, name in enumerate(SINGLES)})
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(int).astype(kind)
    run = fit_h5ad(adata, tmp_path, "--perturbation-key", "perturbation", "--control-label", 0)
    assert sorted(run.interventions["perturbation"]) == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("string", [True, False])
def test_bytes_labels(tmp_path: Path, string: bool) -> None:
    adata = relabelled()
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    with h5py.File(tmp_path / "screen.h5ad", "r+") as handle:
        del handle["obs/perturbation"]
        column = handle["obs"].create_dataset("perturbation", data=labels.astype("S"))
        column.attrs["encoding-type"] = "string-array" if string else "array"
        column.attrs["encoding-version"] = "0.2.0"
    assert sorted(fit_file(tmp_path / "screen.h5ad").interventions["perturbation"]) == SINGLES


def test_bytes_labels_in_memory(tmp_path: Path) -> None:
    adata = relabelled()
    adata.obs["perturbation"] = adata.obs["perturbation"].str.encode("utf-8")
    run = crlseq.fit(adata, tmp_path / "RUN", **FAST)
    assert sorted(run.interventions["perturbation"]) == SINGLES


def test_nullable_strings(tmp_path: Path) -> None:
    adata = relabelled()
    labels = adata.obs["perturbation"].astype("string")
    labels.iloc[3] = pd.NA
    adata.obs["perturbation"] = labels
    adata.obs["age"] = pd.array([1, None] * (len(adata) // 2), dtype="Int64")
    run = fit_h5ad(adata, tmp_path)
    assert run.info["notes"][0] == "Cells labelled 'missing' are excluded (1)."
    kept = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad")
    assert kept.obs["perturbation"].isna().sum() == 1
    assert str(kept.obs["age"].dtype) == "Int64"


def test_unused_levels(tmp_path: Path) -> None:
    adata = relabelled()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype("category").cat.add_categories(["NT", "never"])
    assert sorted(fit_h5ad(adata, tmp_path).interventions["perturbation"]) == SINGLES


def test_gears_labels(tmp_path: Path) -> None:
    adata = relabelled()
    labels = adata.obs["perturbation"].to_numpy()
    forward = np.where(np.arange(len(labels)) % 2 == 0, labels + "+ctrl", "ctrl+" + labels)
    adata.obs["condition"] = np.where(labels == "control", "ctrl", forward)
    adata.obs.loc[adata.obs["perturbation"] == "g5", "condition"] = "g1+g0"
    del adata.obs["perturbation"]
    run = fit_h5ad(adata, tmp_path, "--hold-out", "ctrl+g4", "--hold-out", "g1+g0")
    assert sorted(run.interventions["perturbation"]) == ["g0", "g1", "g2", "g3"]
    tested = {row["name"]: row["cells"] for row in run.info["conditions"]}
    assert tested["g0+g1"] == {"test": 30}
    assert any("g4" in note for note in run.info["notes"])


def test_triples(tmp_path: Path) -> None:
    run = fit_h5ad(relabelled(g3="g0+g1", g4="g2+g1+g0", g5="g2+g0+g1"), tmp_path)
    names = [row["name"] for row in run.info["conditions"]]
    assert names == ["control", "g0", "g1", "g2", "g0+g1", "g0+g1+g2"]
    assert sorted(run.interventions["perturbation"]) == ["g0", "g1", "g2"]


def test_perturbations_in_combinations_alone(tmp_path: Path) -> None:
    run = fit_h5ad(relabelled(g5="g0+g9"), tmp_path, method="straighten")
    alone = run.interventions.set_index("perturbation").loc["g9"]
    assert alone["n_cells"] == 0
    assert np.isnan(alone["p_value"])
    assert np.isnan(alone["fdr"])
    assert "–" not in invoke("inspect", "interventions", tmp_path / "RUN").out


def test_a_label_that_is_a_combination_only_if_split(tmp_path: Path) -> None:
    run = fit_h5ad(relabelled(g5="g0+g1"), tmp_path, "--separator", "")
    assert "g0+g1" in set(run.interventions["perturbation"])


# --- genes


def test_gene_names(tmp_path: Path) -> None:
    adata = small_screen()
    odd = ["NA", "nan", "HLA-A/B", "", "None", "1", "2.5", "<img src=x onerror=alert(1)>", 'é,"x"', "null"]
    adata.var_names = [*odd, *adata.var_names[len(odd) :]]
    run = fit_h5ad(adata, tmp_path)
    assert set(run.programs["gene"]) == set(adata.var_names)
    assert "<img" not in (tmp_path / "RUN" / "report.html").read_text()
    kept = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad")
    assert list(kept.var_names) == list(adata.var_names)
    ranked = kept.uns["crlseq"]["names"]["P0"]
    first = run.programs[run.programs["program"] == "P0"].sort_values("loading", ascending=False)
    assert list(ranked) == list(first["gene"])
    np.testing.assert_allclose(kept.uns["crlseq"]["scores"]["P0"], first["loading"], rtol=1e-6)


def test_silent_genes_are_dropped_aloud(tmp_path: Path) -> None:
    adata = small_screen()
    x = dense(adata)
    x[:, [3, 8]] = 0
    adata.X = x
    run = fit_h5ad(adata, tmp_path)
    assert "2 of 40 genes are zero in every cell and are excluded." in run.info["notes"]
    assert not {"gene3", "gene8"} & set(run.programs["gene"])
    kept = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad")
    assert kept.varm["crlseq_programs"].shape == (40, 2)
    assert not kept.varm["crlseq_programs"][[3, 8]].any()
    assert list(np.flatnonzero(~kept.var["crlseq_fitted"])) == [3, 8]


def test_gene_list(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("# markers\ngene7\n\n  gene2 \ngene7\ngene30\r\n")
    run = fit_h5ad(small_screen(), tmp_path, "--genes", tmp_path / "genes.txt")
    assert run.info["preprocessing"]["genes"] == ["gene2", "gene7", "gene30"]


@pytest.mark.parametrize("values", ["counts", "log", "continuous"])
def test_most_variable_genes(tmp_path: Path, values: str) -> None:
    adata = small_screen(noise="counts" if values != "continuous" else "gaussian")
    if values == "log":
        adata.X = np.log1p(dense(adata))
    run = fit_h5ad(adata, tmp_path, "--n-top-genes", 12)
    assert run.info["preprocessing"]["values"] == values
    assert len(run.info["preprocessing"]["genes"]) == 12
    assert run.info["preprocessing"]["gene_choice"] == "12 most variable of 40 genes"


def test_all_genes(tmp_path: Path) -> None:
    assert len(fit_h5ad(small_screen(), tmp_path, "--n-top-genes", "all").info["preprocessing"]["genes"]) == 40


# --- matrices


def unsorted(x: np.ndarray) -> sp.csr_matrix:
    """CSR with every row's indices in falling order."""
    m = sp.csr_matrix(x)
    for a, b in zip(m.indptr[:-1], m.indptr[1:], strict=True):
        m.indices[a:b], m.data[a:b] = m.indices[a:b][::-1].copy(), m.data[a:b][::-1].copy()
    m.has_sorted_indices = False
    return m


def doubled(x: np.ndarray) -> sp.csr_matrix:
    """CSR with every value given as the sum of two, and stored zeros."""
    rows, columns = np.nonzero(x)
    values = x[rows, columns]
    row = np.concatenate([rows, rows, [0]])
    order = np.argsort(row, kind="stable")
    data = np.concatenate([values - 1, np.ones(len(values)), [0]])[order]
    indices = np.concatenate([columns, columns, [0]])[order]
    return sp.csr_matrix((data, indices, np.searchsorted(row[order], np.arange(len(x) + 1))), shape=x.shape)


MATRICES: dict[str, Callable[[np.ndarray], Any]] = {
    "dense": lambda x: x,
    "fortran": np.asfortranarray,
    "float16": lambda x: x.astype(np.float16),
    "int64": lambda x: x.astype(np.int64),
    "uint8": lambda x: x.astype(np.uint8),
    "big-endian": lambda x: x.astype(">f4"),
    "big-endian integers": lambda x: x.astype(">i4"),
    "csr": sp.csr_matrix,
    "csr array": sp.csr_array,
    "csc": sp.csc_matrix,
    "csr int64": lambda x: sp.csr_matrix(x.astype(np.int64)),
    "unsorted": unsorted,
    "doubled": doubled,
}


@pytest.fixture(scope="module")
def few_counts() -> ad.AnnData:
    """Counts below 256, so that every type holds them exactly."""
    adata = small_screen(depth=200.0, seed=3)
    adata.X = np.minimum(dense(adata), 250.0).astype(np.float32)
    return adata


@pytest.fixture(scope="module")
def reference(few_counts: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit_h5ad(few_counts.copy(), tmp_path_factory.mktemp("reference"))


def same_tables(a: Run, b: Run) -> None:
    for name, table in a.tables().items():
        other = b.tables()[name]
        texts = dict.fromkeys(other.select_dtypes(exclude="number"), object)  # an empty table has no text to tell by
        pd.testing.assert_frame_equal(table.astype(texts), other.astype(texts), check_exact=True)


@pytest.mark.parametrize("kind", list(MATRICES))
def test_matrix_kinds_give_the_same_run(few_counts: ad.AnnData, reference: Run, tmp_path: Path, kind: str) -> None:
    adata = few_counts.copy()
    adata.X = MATRICES[kind](dense(few_counts))
    before = adata.X.copy()
    same_tables(fit_h5ad(adata, tmp_path), reference)
    kept = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad")
    assert kept.X.dtype == before.dtype
    assert type(kept.X) is type(ad.read_h5ad(tmp_path / "screen.h5ad").X)
    np.testing.assert_array_equal(dense(kept), dense(few_counts))


def test_big_endian_sparse_file_is_refused(few_counts: ad.AnnData, tmp_path: Path) -> None:
    """As anndata and scipy refuse it."""
    adata = few_counts.copy()
    adata.X = sp.csr_matrix(dense(few_counts))
    adata.write_h5ad(tmp_path / "screen.h5ad")
    with h5py.File(tmp_path / "screen.h5ad", "r+") as handle:
        for name, kind in {"data": ">f8", "indices": ">i4", "indptr": ">i8"}.items():
            values = handle[f"X/{name}"][:]
            del handle[f"X/{name}"]
            handle[f"X/{name}"] = values.astype(kind)
    with pytest.raises(InputError, match="dtype >f8"):
        crlseq.fit(tmp_path / "screen.h5ad", **FAST)


@pytest.mark.parametrize("sparse", [False, True])
def test_zarr(few_counts: ad.AnnData, reference: Run, tmp_path: Path, sparse: bool) -> None:
    adata = few_counts.copy()
    if sparse:
        adata.X = sp.csr_matrix(adata.X)
    adata.write_zarr(tmp_path / "screen.zarr")
    same_tables(fit_file(tmp_path / "screen.zarr"), reference)


def test_in_memory_view_and_backed(few_counts: ad.AnnData, reference: Run, tmp_path: Path) -> None:
    options: dict[str, Any] = FAST
    kept = few_counts.copy()
    same_tables(crlseq.fit(few_counts, tmp_path / "A", **options), reference)
    assert list(few_counts.obs.columns) == list(kept.obs.columns)
    assert not few_counts.obsm.keys() - kept.obsm.keys()
    wide = ad.concat([few_counts, few_counts], index_unique="-")
    wide.obs["perturbation"] = wide.obs["perturbation"].astype(str)
    view = wide[: len(few_counts)]
    assert view.is_view
    same_tables(crlseq.fit(view, tmp_path / "B", **options), reference)
    kinds = {
        "dense": dense(few_counts),
        "csr": sp.csr_matrix(dense(few_counts)),
        "csc": sp.csc_matrix(dense(few_counts)),
    }
    for name, x in kinds.items():
        adata = few_counts.copy()
        adata.X = x
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        backed = ad.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
        same_tables(crlseq.fit(backed, tmp_path / name, **options), reference)
        backed.file.close()
    in_memory = crlseq.fit(few_counts, **options)
    same_tables(in_memory, reference)
    assert in_memory.path is None


def test_a_layer_without_x(few_counts: ad.AnnData, reference: Run, tmp_path: Path) -> None:
    adata = ad.AnnData(None, few_counts.obs, few_counts.var, layers={"counts": few_counts.X})
    same_tables(fit_h5ad(adata, tmp_path, "--layer", "counts"), reference)
    assert ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad").X is None
    same_tables(crlseq.fit(adata, tmp_path / "again", layer="counts", **FAST), reference)


def test_layer_beside_x(few_counts: ad.AnnData, reference: Run, tmp_path: Path) -> None:
    adata = few_counts.copy()
    adata.layers["counts"] = sp.csr_matrix(dense(few_counts))
    adata.X = np.log1p(dense(few_counts))
    assert fit_h5ad(adata, tmp_path).info["preprocessing"]["values"] == "log"
    same_tables(fit_file(tmp_path / "screen.h5ad", "--layer", "counts", "--force"), reference)


def test_a_layer_called_with_a_slash_is_refused_not_lost(few_counts: ad.AnnData) -> None:
    adata = few_counts.copy()
    adata.layers["a"] = adata.X
    with pytest.raises(InputError, match="no layer 'a/b'"):
        crlseq.fit(adata, layer="a/b", **FAST)
