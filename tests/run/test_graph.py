"""The DAG as networkx, GraphML and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import numpy as np

from crlseq.run.graph import dag_graph, dag_json, graphml
from crlseq.run.run import Run
from crlseq.run.schema import Identification
from crlseq.run.tables import edge_table
from tests.synthetic import program_row, synthetic_run, with_pairs


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


def test_ancestry_by_hand() -> None:
    """A path of edges and a pair that is upstream declare; what is likely, or has support of 0.1, is listed."""
    run = synthetic_run(5, 10, [(0, 1), (1, 2)])
    assert run.ancestry.drop(columns=["support", "status"]).to_numpy().tolist() == [
        ["P0", "P1", True], ["P0", "P2", True], ["P1", "P2", True],
    ]  # fmt: skip
    upstream = {"status": "upstream", "change": 0.4, "z": 8.0}
    known = {(0, 1): upstream, (0, 4): upstream, (3, 4): upstream | {"status": "likely"}}
    run = with_pairs(run, known)
    run.info["discovery"]["bootstrap"]["ancestor"][2][3] = 0.1
    table = run.ancestry.set_index(["ancestor", "descendant"])
    assert table["declared"].to_dict() == {
        ("P0", "P1"): True, ("P0", "P2"): True, ("P0", "P4"): True, ("P1", "P2"): True, ("P2", "P3"): False, ("P3", "P4"): False,
    }  # fmt: skip
    assert table["status"].tolist() == ["upstream", "excluded", "upstream", "excluded", "excluded", "likely"]
    assert table["support"].tolist() == [0.0, 0.0, 0.0, 0.0, 0.1, 0.0]


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
    assert back.nodes["P0"]["label"] == "a\\u0000b\\u001b[1m<&>\"' \ud7ff"
    assert nx.utils.graphs_equal(nx.node_link_graph(json.loads(dag_json(graph)), edges="edges"), graph)
    edges["support"] = [0.9, 0.2]
    supported = dag_graph(programs, edges, Identification(verdict="identified", reason="because"))
    assert supported.edges["P0", "P1"]["support"] == 0.9
