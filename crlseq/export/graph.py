"""The DAG of the programs, for Cytoscape, networkx and Graphviz."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import networkx as nx

from crlseq._version import __version__
from crlseq.run.graph import dag_json, plain_text
from crlseq.run.graph import graphml as to_graphml
from crlseq.run.run import Run
from crlseq.run.summary import no_effect_in_words
from crlseq.run.tables import shown
from crlseq.storage.text import to_json

GENES = 10  # of a program, in a network


def verdict(run: Run) -> str:
    """Whether the data determine the graph, and why; of a screen without any effect, that there is none."""
    if run.facts.without_effect:
        return f"{no_effect_in_words(len(run.interventions))} There are no programs and no graph."
    found = run.facts.identification
    return f"The graph is {found.verdict}: {found.reason}"


def _format(content: Callable[[Run], bytes]) -> Callable[[Run, Path], list[str]]:
    """A format that is one file; users are told the verdict."""

    def write(run: Run, path: Path) -> list[str]:
        path.write_bytes(content(run))
        return [verdict(run)]

    return write


# GraphML and the JSON that `networkx.node_link_graph` reads are as they lie in the run's folder.
graphml = _format(lambda run: to_graphml(run.dag))
json = _format(lambda run: dag_json(run.dag).encode())
cyjs = _format(lambda run: to_cyjs(run.dag))
dot = _format(lambda run: to_dot(run.dag))
network = _format(lambda run: to_cyjs(perturbation_network(run)))


def perturbation_network(run: Run) -> nx.DiGraph[str]:
    """Perturbations that shift programs, programs that cause programs, and the strongest genes of each program.

    Nodes have ``kind`` and ``label``, edges ``interaction`` (shifts, causes, loads) and ``weight``: shift, weight of the
    edge, loading.
    """
    graph: nx.DiGraph[str] = nx.DiGraph(**run.dag.graph)
    for name, values in run.dag.nodes(data=True):
        graph.add_node(name, **values, kind="program")
    graph.add_edges_from((a, b, values | {"interaction": "causes"}) for a, b, values in run.dag.edges(data=True))
    targeted = run.interventions[(run.interventions["program"] != "") & run.interventions["shift"].notna()]
    for row in targeted.to_dict("records"):
        node = f"perturbation {row['perturbation']}"
        graph.add_node(node, kind="perturbation", label=row["perturbation"], n_cells=row["n_cells"])
        about = {name: row[name] for name in ("support", "fdr") if row[name] == row[name]}
        graph.add_edge(node, row["program"], interaction="shifts", weight=row["shift"], **about)
    genes = run.programs[(run.programs["rank"] <= GENES) & (run.programs["loading"].fillna(0) != 0)]
    for program, gene, called, loading in zip(
        genes["program"], genes["gene"], shown(genes), genes["loading"], strict=True
    ):
        graph.add_node(f"gene {gene}", kind="gene", label=called)
        graph.add_edge(program, f"gene {gene}", interaction="loads", weight=loading)
    return graph


def to_cyjs(graph: nx.DiGraph[str]) -> bytes:
    """A graph as Cytoscape.js JSON, which Cytoscape imports and `networkx.cytoscape_graph` reads."""
    content = nx.cytoscape_data(graph)
    content["data"] = {"name": "crlseq", **graph.graph}  # pairs in networkx, a table of the network in Cytoscape
    for edge in content["elements"]["edges"]:
        source, target = edge["data"]["source"], edge["data"]["target"]
        edge["data"] = {"interaction": "causes"} | edge["data"] | {"id": f"{source}->{target}"}
    return to_json({"generated_by": f"crlseq {__version__}", **content}).encode()


def to_dot(graph: nx.DiGraph[str]) -> bytes:
    """The DAG in Graphviz' language: programs with their labels, edges with weights, a bar at the end of negative ones."""
    verdict = f"The graph is {graph.graph['identified']}."
    lines = ["digraph crlseq {", f"  graph [rankdir=TB, label={_quoted(verdict)}];"]
    lines.append("  node [shape=box, style=rounded];")
    for node, values in graph.nodes(data=True):
        lines.append(f"  {_quoted(node)} [label={_quoted(node, values['label'])}];")
    for source, target, values in graph.edges(data=True):
        about = [f'label="{values["weight"]:.2f}"', f"penwidth={1 + min(abs(values['weight']), 3):.2f}"]
        about += ["arrowhead=tee"] if values["weight"] < 0 else []
        lines.append(f"  {_quoted(source)} -> {_quoted(target)} [{', '.join(about)}];")
    return ("\n".join([*lines, "}"]) + "\n").encode()


def _quoted(*lines: str) -> str:
    """Lines as a string of the DOT language, in which backslashes, quotes and what looks like an HTML entity mean more."""
    safe = (plain_text(line).replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") for line in lines)
    return '"' + "\\n".join(re.sub(r"&(?=#?\w+;)", "&amp;", line) for line in safe) + '"'
