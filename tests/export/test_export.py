"""What `crlseq export` writes, opened by the tools that it is written for."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import anndata as ad
import matplotlib as mpl
import networkx as nx
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import crlseq
from crlseq.config import make_config
from crlseq.data.dataset import read_data
from crlseq.data.perturbations import read_perturbations
from crlseq.export.graph import to_cyjs, to_dot
from crlseq.export.registry import FORMATS, write
from crlseq.run.graph import dag_graph
from crlseq.run.run import Run
from crlseq.run.schema import Identification
from crlseq.run.tables import edge_table
from crlseq.storage.csv import EXACT
from tests.support import check_refusal, dense, fit_h5ad, invoke, small_screen, succeeds
from tests.synthetic import program_row, synthetic_run

mpl.use("Agg")

EVIL = 'a "quoted" \\name\\, <b>&amp;</b>\n{x|y} -> é\\'


def exported(folder: Path, name: str, path: Path) -> Path:
    answer = invoke("export", folder, "--format", name, "--output", path)
    assert (answer.code, answer.out) == (0, ""), answer.err
    return path


@pytest.fixture(scope="module")
def annotated(run_folder: Path) -> ad.AnnData:
    return ad.read_h5ad(run_folder / "crlseq.h5ad")


@pytest.fixture
def odd_dag() -> nx.DiGraph[str]:
    """Three programs, the first with a label that every format has to escape; edges 0.5 and -2."""
    weights = np.array([[0.0, 0.5, 0.0], [0.0, 0.0, -2.0], [0.0, 0.0, 0.0]])
    edges = edge_table(weights, weights != 0, np.array([[np.nan] * 3] * 3), "identified")
    labels = [EVIL, "plain", ""]
    programs = [program_row(k, labels[k], stability=0.5) for k in range(3)]
    return dag_graph(programs, edges, Identification(verdict="identified", reason='because of "it"'))


def test_every_format_can_be_asked_for() -> None:
    told = " ".join(invoke("export", "--help").out.split())
    for name in FORMATS:
        assert name in told


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_function_that_writes_it(name: str) -> None:
    module, function = FORMATS[name].function.split(".")
    assert callable(getattr(import_module(f"crlseq.export.{module}"), function))


def test_scanpy(annotated: ad.AnnData, finished: Run, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt
    import scanpy as sc

    adata = annotated.copy()
    sc.pp.neighbors(adata, use_rep="X_crlseq", n_neighbors=5)
    assert adata.obsp["connectivities"].shape == (740, 740)
    sc.tl.umap(adata, maxiter=5)
    assert adata.obsm["X_umap"].shape == (740, 2)
    assert len(sc.pl.embedding(adata, basis="X_crlseq", color=["perturbation", "crlseq_split"], show=False)) == 2
    shown = sc.pl.rank_genes_groups(adata, key="crlseq", n_genes=4, show=False)
    assert len(shown) == 3
    plt.close("all")
    table = sc.get.rank_genes_groups_df(adata, group=["P0", "P2"], key="crlseq")
    assert len(table) == 80 and table["pvals"].isna().all()
    loading = finished.programs.set_index(["program", "gene"])["loading"]
    expected = [loading[group, gene] for group, gene in zip(table["group"], table["names"], strict=True)]
    np.testing.assert_allclose(table["scores"], expected, rtol=1e-5)
    np.testing.assert_allclose(table["logfoldchanges"] * np.log(2), expected, rtol=1e-5, atol=1e-7)
    adata.write_h5ad(tmp_path / "again.h5ad")
    assert list(ad.read_h5ad(tmp_path / "again.h5ad").uns["crlseq"]["program_names"]) == ["P0", "P1", "P2"]


def test_cytoscape(run_folder: Path, finished: Run, tmp_path: Path, odd_dag: nx.DiGraph[str]) -> None:
    content = json.loads(exported(run_folder, "cyjs", tmp_path / "dag.cyjs").read_text())
    assert content["data"]["identified"] == finished.info["identification"]["verdict"]
    assert [node["data"]["id"] for node in content["elements"]["nodes"]] == finished.program_names
    back = nx.cytoscape_graph(json.loads(to_cyjs(odd_dag)))
    assert isinstance(back, nx.DiGraph)
    assert back.graph["reason"] == 'because of "it"' and back.nodes["P0"]["label"] == EVIL
    weights = {(a, b): about["weight"] for a, b, about in back.edges(data=True)}
    assert weights == {("P0", "P1"): 0.5, ("P1", "P2"): -2.0}
    assert back.edges["P0", "P1"]["interaction"] == "causes" and back.edges["P0", "P1"]["id"] == "P0->P1"


def test_graphviz(run_folder: Path, finished: Run, tmp_path: Path, odd_dag: nx.DiGraph[str]) -> None:
    pydot = pytest.importorskip("pydot", reason="pydot is not installed")
    (written,) = pydot.graph_from_dot_file(exported(run_folder, "dot", tmp_path / "dag.dot"))
    names = [node.get_name().strip('"') for node in written.get_nodes()]
    assert [name for name in names if name not in ("graph", "node")] == finished.program_names
    (graph,) = pydot.graph_from_dot_data(to_dot(odd_dag).decode())
    back = nx.nx_pydot.from_pydot(graph)
    edges = {(a.strip('"'), b.strip('"')): about["label"].strip('"') for a, b, about in back.edges(data=True)}
    assert edges == {("P0", "P1"): "0.50", ("P1", "P2"): "-2.00"}
    heads = [about.get("arrowhead") for _, _, about in back.edges(data=True)]
    assert heads == [None, "tee"]
    label = next(node for node in graph.get_nodes() if node.get_name() == '"P0"').get_label()
    # Escapes as Graphviz reads them: a quote, a backslash, a line break.
    inner = (
        label[1:-1]
        .replace("\\\\", "\0")
        .replace('\\"', '"')
        .replace("\\n", "\n")
        .replace("\0", "\\")
        .replace("&amp;", "&")
    )
    assert inner == "P0\n" + EVIL.replace("\n", " ")


def test_graphviz_draws_it(odd_dag: nx.DiGraph[str], tmp_path: Path) -> None:
    program = shutil.which("dot")
    if program is None:
        pytest.skip("Graphviz is not installed")
    (tmp_path / "dag.dot").write_bytes(to_dot(odd_dag))
    drawn = subprocess.run([program, "-Tsvg", tmp_path / "dag.dot"], capture_output=True, text=True, check=True).stdout
    assert "&lt;b&gt;&amp;amp;&lt;/b&gt;" in drawn and drawn.count('class="edge"') == 2


def test_decoupler(run_folder: Path, annotated: ad.AnnData, tmp_path: Path) -> None:
    dc = pytest.importorskip("decoupler", reason="decoupler is not installed")
    net = pd.read_csv(exported(run_folder, "network", tmp_path / "net.csv"))
    assert list(net.columns) == ["source", "target", "weight"] and not net.duplicated(["source", "target"]).any()
    # A cell that is a program's loadings scores highest for that program.
    wide = net.pivot(index="source", columns="target", values="weight").fillna(0.0)
    noise = np.random.default_rng(0).normal(scale=wide.to_numpy().std() / 5, size=wide.shape)
    scores, p_values = dc.mt.ulm(wide + noise, net=net, tmin=1)
    assert (scores.to_numpy().argmax(1) == np.arange(3)).all()
    assert (np.diag(p_values.loc[wide.index, wide.index]) < 1e-6).all()
    dc.mt.ulm(annotated, net=net, tmin=1)
    assert annotated.obsm["score_ulm"].shape == (740, 3)


def test_gene_sets_for_gseapy(run_folder: Path, finished: Run, tmp_path: Path) -> None:
    gseapy = pytest.importorskip("gseapy", reason="gseapy is not installed")
    sets = gseapy.read_gmt(str(exported(run_folder, "gmt", tmp_path / "programs.gmt")))
    assert set(sets) <= {f"{name}_{way}" for name in finished.program_names for way in ("up", "down")}
    loading = finished.programs.set_index(["program", "gene"])["loading"]
    for name, genes in sets.items():
        program, way = name.split("_")
        own = loading[program] * (1 if way == "up" else -1)
        assert genes == own[own > 0].sort_values(ascending=False).index[:4].tolist()  # a tenth of 40 genes
    rankings = exported(run_folder, "rnk", tmp_path / "rankings")
    assert sorted(file.name for file in rankings.iterdir()) == ["P0.rnk", "P1.rnk", "P2.rnk"]
    own = next(name for name in sets if name.startswith("P0"))
    found = gseapy.prerank(
        str(rankings / "P0.rnk"), {own: sets[own]}, min_size=1, permutation_num=20, outdir=None, no_plot=True, seed=0
    ).res2d
    assert np.sign(float(found["ES"].iloc[0])) == (1 if own.endswith("up") else -1)
    table = pd.read_csv(rankings / "P1.rnk", sep="\t", header=None, **EXACT)
    assert table[1].is_monotonic_decreasing
    np.testing.assert_array_equal(table[1], loading["P1"][table[0]].to_numpy())


def test_names_with_tabs_stay_in_their_fields(tmp_path: Path) -> None:
    run = synthetic_run(2, 4, names=["a\tb", "c", "d", "e"], genes=["g\t1", "g\n2", "g3", "g4", "g5", "g6"])
    run = replace(run, path=tmp_path)
    write(run, "gmt", tmp_path / "x.gmt")
    lines = (tmp_path / "x.gmt").read_text().splitlines()
    assert [len(line.split("\t")) for line in lines] == [3] * len(lines)  # a tenth of 6 genes is one
    write(run, "rnk", tmp_path / "rnk")
    assert len((tmp_path / "rnk" / "P0.rnk").read_text().splitlines()) == 6


@pytest.fixture(scope="module")
def guided_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of counts with Ensembl genes, symbols, guide counts, a triple, and cells of no known perturbation."""
    folder = tmp_path_factory.mktemp("guided")
    adata = small_screen(n_doubles=1)
    names = adata.obs["perturbation"].astype(str).to_numpy()
    names[100:112] = "g0+g1+g2"
    guides = ["NTg1", *(f"G{i}g1" for i in range(6))]
    counts = np.zeros((adata.n_obs, 7), dtype=np.int64)
    for cell, name in enumerate(names):
        for part in name.split("+"):
            counts[cell, 0 if part == "control" else 1 + int(part[1:])] = 20
    counts[-1] = 0
    adata.obsm["guides"] = pd.DataFrame(counts, index=adata.obs_names, columns=guides)
    adata.var["gene_symbol"] = [f"S{i}" for i in range(adata.n_vars)]
    adata.obs["cell_type"] = "THP-1"
    del adata.obs["perturbation"]
    fit_h5ad(adata, folder, "--guide-counts", "guides")
    return folder / "RUN"


def test_mudata(guided_folder: Path, tmp_path: Path) -> None:
    mudata = pytest.importorskip("mudata", reason="mudata is not installed")
    path = exported(guided_folder, "h5mu", tmp_path / "screen.h5mu")
    back = mudata.read_h5mu(path)
    assert list(back.mod) == ["rna", "guide"]
    rna, guide = back["rna"], back["guide"]
    assert rna.obsm["X_crlseq"].shape == (rna.n_obs, 2) and "crlseq" in rna.uns
    assert list(guide.var_names) == ["NTg1", *(f"G{i}g1" for i in range(6))]
    assert guide.var["perturbation"].tolist() == ["control", *(f"G{i}" for i in range(6))]
    np.testing.assert_array_equal(dense(guide), rna.obsm["guides"].to_numpy())
    # And in again: the same cells get the same perturbations.
    again = read_data(path, make_config(guide_counts="guide").data, 0)
    expected = rna.obs["crlseq_perturbation"].astype(str).to_numpy()
    assert again.guides is not None
    assert np.asarray(again.guides.labels).tolist() == expected.tolist()


def test_without_mudata_the_extra_is_named(run_folder: Path, tmp_path: Path) -> None:
    with mock.patch("crlseq.export.registry.find_spec", return_value=None):
        answer = invoke("export", run_folder, "--format", "h5mu", "--output", tmp_path / "x.h5mu")
    check_refusal(*answer, 2, "mudata", ".[mudata]")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "key", "control", "style", "double"),
    [
        ("pertpy", "perturbation", "control", "pertpy/scPerturb", "G{}+G{}"),
        ("gears", "condition", "ctrl", "GEARS", "G{}+G{}"),
    ],
)
def test_conventions_of_others(
    guided_folder: Path, tmp_path: Path, name: str, key: str, control: str, style: str, double: str
) -> None:
    path = tmp_path / "cells.h5ad"
    answer = succeeds("export", guided_folder, "--format", name, "--output", path)
    adata, fitted = ad.read_h5ad(path), ad.read_h5ad(guided_folder / "crlseq.h5ad")
    labels = fitted.obs["crlseq_perturbation"].astype(str)
    known = ~labels.isin(["unassigned", "multiple"])
    assert (~known).sum() == 13  # a cell without guides, and the triples: guides of three genes are ambiguous
    assert "13 cells carry no known perturbation" in answer.err
    assert list(adata.obs_names) == list(fitted.obs_names[known])
    single = {"pertpy": "{}", "gears": "{}+ctrl"}[name]
    expected = [
        control if label == "control" else label if "+" in label else single.format(label) for label in labels[known]
    ]
    assert adata.obs[key].tolist() == expected
    assert any("+G" in label for label in expected)
    # log1p of counts per cell, scaled to the fit's total; counts kept beside.
    counts = dense(ad.AnnData(adata.layers["counts"]))
    np.testing.assert_array_equal(counts, dense(fitted[known]))
    total = json.loads((guided_folder / "run.json").read_text())["preprocessing"]["target_sum"]
    np.testing.assert_allclose(dense(adata), np.log1p(counts / counts.sum(1, keepdims=True) * total), rtol=1e-5)
    assert sp.issparse(adata.X) and adata.X.dtype == np.float32
    # And in again, detected as what it is.
    back = read_perturbations(adata.obs[[key]])
    assert (back.key, back.control_label, back.style) == (key, control, style)
    first = read_perturbations(fitted.obs[["crlseq_perturbation"]], "crlseq_perturbation")
    assert back.names == first.names and back.conditions == first.conditions
    np.testing.assert_array_equal(back.condition, first.condition[known])


def test_gears_finds_what_it_needs(guided_folder: Path, tmp_path: Path) -> None:
    """What `PertData.new_data_process` of GEARS reads: these columns, and two parts in every label but the control's."""
    adata = ad.read_h5ad(exported(guided_folder, "gears", tmp_path / "gears.h5ad"))
    assert adata.var["gene_name"].tolist() == [f"S{i}" for i in range(adata.n_vars)]
    assert (adata.obs["cell_type"] == "THP-1").all()
    parts = adata.obs["condition"].astype(str).str.split("+").map(len)
    assert (parts[adata.obs["condition"] != "ctrl"] == 2).all() and (parts == 1).any()


def test_pertpy_counts_perturbations(guided_folder: Path, tmp_path: Path) -> None:
    adata = ad.read_h5ad(exported(guided_folder, "pertpy", tmp_path / "pertpy.h5ad"))
    assert set(adata.obs["nperts"][adata.obs["perturbation"] == "control"]) == {0}
    assert set(adata.obs["nperts"]) == {0, 1, 2}


def test_triples_are_beyond_gears(guided_folder: Path, tmp_path: Path) -> None:
    adata = ad.read_h5ad(guided_folder / "crlseq.h5ad")
    labels = adata.obs["crlseq_perturbation"].astype(str).to_numpy()
    labels[-12:] = "G0+G1+G2"
    adata.obs["crlseq_perturbation"] = labels
    del adata.var["gene_symbol"], adata.obs["cell_type"]
    adata.write_h5ad(tmp_path / "crlseq.h5ad")
    notes = write(replace(crlseq.load(guided_folder), path=tmp_path), "gears", tmp_path / "gears.h5ad")
    assert any("12 cells carry more than two perturbations" in note for note in notes)
    back = ad.read_h5ad(tmp_path / "gears.h5ad")
    assert back.n_obs == adata.n_obs - 12 - 12  # and as many that are ambiguous
    assert back.var["gene_name"].tolist() == list(adata.var_names) and (back.obs["cell_type"] == "cell").all()


# Keys and kinds of MultiQC's documented custom content, for tables and general statistics.
ABOUT = {
    "id": str,
    "section_name": str,
    "description": str,
    "plot_type": str,
    "pconfig": dict,
    "headers": dict,
    "data": dict,
}
COLUMN = {"title", "description", "format", "scale", "namespace"}


def test_multiqc_custom_content(run_folder: Path, finished: Run, tmp_path: Path) -> None:
    folder = exported(run_folder, "multiqc", tmp_path / "multiqc")
    files = {file.name: json.loads(file.read_text()) for file in folder.iterdir()}
    assert set(files) == {"crlseq_mqc.json", "crlseq_general_mqc.json"}
    table, general = files["crlseq_mqc.json"], files["crlseq_general_mqc.json"]
    assert (table["plot_type"], general["plot_type"]) == ("table", "generalstats")
    for content in files.values():
        assert all(isinstance(value, ABOUT[key]) for key, value in content.items())
        assert list(content["data"]) == ["RUN"]
        (row,) = content["data"].values()
        assert set(row) <= set(content["headers"])
        assert all(isinstance(value, str | int | float) for value in row.values())
        for header in content["headers"].values():
            assert {"title"} <= set(header) <= COLUMN
            header.get("format", "{}").format(1.0)
    assert table["data"]["RUN"]["programs"] == 3 and table["data"]["RUN"]["perturbations"] == 7
    assert general["data"]["RUN"]["graph"] == finished.info["identification"]["verdict"]
    assert table["data"]["RUN"]["cells"] == 740 and table["data"]["RUN"]["genes"] == 40


def test_a_run_that_lies_nowhere(screen: ad.AnnData, tmp_path: Path) -> None:
    with pytest.raises(crlseq.CrlseqError, match="never written"):
        write(synthetic_run(2, 4), "dot", tmp_path / "x")
    found: Any = replace(synthetic_run(2, 4), path=tmp_path)
    with pytest.raises(crlseq.CrlseqError, match="no format 'docx'"):
        write(found, "docx", tmp_path / "x")
    with pytest.raises(crlseq.CrlseqError, match=r"no .*crlseq\.h5ad"):
        write(found, "pertpy", tmp_path / "x")


def test_perturbations_programs_and_genes_as_one_network(finished: Run, run_folder: Path, tmp_path: Path) -> None:
    path = exported(run_folder, "cytoscape", tmp_path / "network.cyjs")
    graph = nx.cytoscape_graph(json.loads(path.read_text()))
    kinds = nx.get_node_attributes(graph, "kind")
    targeted = finished.interventions[finished.interventions["program"] != ""]
    assert {graph.nodes[n]["label"] for n, kind in kinds.items() if kind == "perturbation"} == set(
        targeted["perturbation"]
    )
    assert {n for n, kind in kinds.items() if kind == "program"} == set(finished.program_names)
    first = targeted.iloc[0]
    edge = graph.edges[f"perturbation {first['perturbation']}", first["program"]]
    assert (edge["interaction"], edge["weight"]) == ("shifts", pytest.approx(first["shift"]))
    top = finished.programs[(finished.programs["program"] == "P0") & (finished.programs["rank"] <= 10)]
    loads = {
        b: values["weight"] for a, b, values in graph.edges(data=True) if a == "P0" and values["interaction"] == "loads"
    }
    assert loads == pytest.approx({f"gene {row['gene']}": row["loading"] for row in top.to_dict("records")})
    causes = {(a, b) for a, b, values in graph.edges(data=True) if values["interaction"] == "causes"}
    assert causes == set(finished.dag.edges)
