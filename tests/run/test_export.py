"""AnnData keys and graph files: what scanpy and networkx get."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import h5py
import networkx as nx
import numpy as np
import pandas as pd
import pytest

from crlseq.run.graph import dag_graph, dag_json, graphml
from crlseq.run.run import Run
from crlseq.run.schema import Identification
from crlseq.run.tables import edge_table, program_labels, program_table
from tests.support import invoke
from tests.synthetic import program_row


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
    obs, var = annotated.obs.drop(columns="crlseq_split"), annotated.var.drop(columns="crlseq_fitted")
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


def test_graph_files(run_folder: Path, finished: Run) -> None:
    read = {
        "graphml": nx.read_graphml(run_folder / "dag.graphml"),
        "json": nx.node_link_graph(json.loads((run_folder / "dag.json").read_text()), edges="edges"),
    }
    for graph in read.values():
        assert isinstance(graph, nx.DiGraph)
        assert nx.is_directed_acyclic_graph(graph)
        assert dict(graph.nodes(data=True)) == dict(finished.dag.nodes(data=True))
        assert list(graph.edges(data=True)) == list(finished.dag.edges(data=True))
        assert graph.graph["identified"] == finished.info["identification"]["verdict"]
        assert graph.graph["reason"] == finished.info["identification"]["reason"]
        assert list(graph.nodes) == finished.program_names
        for name in graph.nodes:
            assert {"label", "drivers", "genes"} <= graph.nodes[name].keys()
    edges = {(row["source"], row["target"]): row["weight"] for row in finished.edges.to_dict("records")}
    assert {(a, b): weight for a, b, weight in finished.dag.edges(data="weight")} == edges


def test_graph_by_hand() -> None:
    weights = np.array([[0.0, 0.5, 0.05], [0.0, 0.0, -2.0], [0.0, 0.0, 0.0]])
    edges = edge_table(weights, np.abs(weights) > 0.1, np.full((3, 3), np.nan), "not identified")
    assert edges.to_dict("list")["source"] == ["P0", "P1"]
    assert edges.to_dict("list")["target"] == ["P1", "P2"]
    assert edges["weight"].tolist() == [0.5, -2.0]
    assert edges["support"].isna().all()
    programs = [program_row(k, "a\x00b\x1b[1m<&>\"' \ud7ff", "é") for k in range(3)]
    graph = dag_graph(programs, edges, Identification(verdict="not identified", reason="because"))
    assert sorted(graph.edges) == [("P0", "P1"), ("P1", "P2")]
    back = nx.parse_graphml(graphml(graph).decode())
    assert back.nodes["P0"]["label"] == "a\ufffdb\ufffd[1m<&>\"' \ud7ff"
    assert nx.utils.graphs_equal(nx.node_link_graph(json.loads(dag_json(graph)), edges="edges"), graph)
    edges["support"] = [0.9, 0.2]
    supported = dag_graph(programs, edges, Identification(verdict="identified", reason="because"))
    assert supported.edges["P0", "P1"]["support"] == 0.9


def test_program_table_by_hand() -> None:
    loading = np.array([[0.1, -3.0, 2.0], [1.0, 1.0, 0.0]])
    table = program_table(("a", "b", "c"), loading, loading * 2)
    assert table["gene"].tolist() == ["b", "c", "a", "a", "b", "c"]
    assert table["rank"].tolist() == [1, 2, 3, 1, 2, 3]
    assert table["total_effect"].tolist() == [-6.0, 4.0, 0.2, 2.0, 2.0, 0.0]


def test_program_labels_by_hand() -> None:
    table = pd.DataFrame({
        "perturbation": ["a", "b", "c", "d", "e", "f"],
        "program": ["P0", "P0", "P0", "P0", "P1", "P0"],
        "shift": [1.0, -3.0, 2.0, 0.5, 9.0, 8.0],
        "fdr": [0.01, 0.05, 0.02, 0.001, 0.06, np.nan],
    })  # fmt: skip
    assert program_labels(table, 3) == ["b, c, a +1", "no driver", "no driver"]


@pytest.mark.parametrize("part", ["h5ad", "graphml", "json", "csv"])
def test_export_writes_each_part_again(run_folder: Path, tmp_path: Path, part: str) -> None:
    path = tmp_path / "sub" / f"out.{part}"
    words = ["export", run_folder, "--format", part, "--output", path]
    answer = invoke(*words)
    assert (answer.code, answer.out) == (0, ""), answer.err
    assert str(path) in answer.err
    original = {"graphml": "dag.graphml", "json": "dag.json"}
    if part in original:
        assert path.read_bytes() == (run_folder / original[part]).read_bytes()
    elif part == "csv":
        for file in path.iterdir():
            assert file.read_bytes() == (run_folder / file.name).read_bytes()
        assert len(list(path.iterdir())) == 5
    else:
        again, first = ad.read_h5ad(path), ad.read_h5ad(run_folder / "crlseq.h5ad")
        np.testing.assert_array_equal(again.obsm["X_crlseq"], first.obsm["X_crlseq"])
        assert again.obs["crlseq_split"].tolist() == first.obs["crlseq_split"].tolist()
        assert again.uns["crlseq"]["run_json"] == first.uns["crlseq"]["run_json"]
    refused = invoke(*words)
    assert (refused.code, refused.out) == (3, "")
    assert "--force" in refused.err
    assert invoke(*words, "--force").code == 0
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_export_says_whether_the_graph_is_identified(run_folder: Path, finished: Run, tmp_path: Path) -> None:
    answer = invoke("export", run_folder, "--format", "dot", "--output", tmp_path / "dag.dot")
    assert finished.info["identification"]["reason"] in answer.err


def test_export_that_cannot_be_written(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for words in (
        ["--format", "graphml", "--output", tmp_path / "file" / "x"],
        ["--format", "csv", "--output", tmp_path / "file", "--force"],
        ["--format", "h5ad", "--output", tmp_path, "--force"],
    ):
        answer = invoke("export", run_folder, *words)
        assert (answer.code, answer.out) == (3, ""), answer.err
        assert len(answer.err.splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not list(tmp_path.parent.glob("*.tmp"))
    assert (tmp_path / "file").read_text() == "mine"
    for words in (
        [],
        ["--format", "dot"],
        ["--output", tmp_path / "x"],
        ["--format", "docx", "--output", tmp_path / "x"],
    ):
        assert invoke("export", run_folder, *words).code == 2
