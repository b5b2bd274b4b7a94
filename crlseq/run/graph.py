"""The DAG: as a networkx graph, GraphML and JSON, and which program lies upstream of which."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd

from crlseq.run.schema import PROGRAM_NUMBERS, Bootstrap, Identification, ProgramRow
from crlseq.storage.text import escaped, to_json

MIN_SUPPORT = 0.1  # ancestry below it is not listed


def dag_graph(programs: Sequence[ProgramRow], edges: pd.DataFrame, identification: Identification) -> nx.DiGraph[str]:
    """Programs as nodes, declared edges with weight (and support where there is one), the verdict on the graph."""
    graph: nx.DiGraph[str] = nx.DiGraph(identified=identification.verdict, reason=identification.reason)
    for program in programs:
        attributes = program.model_dump(include={"label", "drivers", "genes", *PROGRAM_NUMBERS}, exclude_none=True)
        graph.add_node(program.name, **attributes)
    for row in edges.to_dict("records"):
        attributes = {"weight": float(row["weight"]), "identified": str(row["identified"])}
        if not np.isnan(row["support"]):
            attributes["support"] = float(row["support"])
        if row.get("context"):  # of several the strongest has the weight
            before = graph.get_edge_data(row["source"], row["target"], {"weight": 0.0})
            if abs(before["weight"]) > abs(attributes["weight"]):
                attributes["weight"] = before["weight"]
            attributes["context"] = ", ".join(filter(None, [before.get("context"), row["context"]]))
        graph.add_edge(row["source"], row["target"], **attributes)
    return graph


def declared_order(graph: nx.DiGraph[str], pairs: pd.DataFrame | None) -> nx.DiGraph[str]:
    """Every program joined to all that are declared downstream of it: by a path of declared edges, or as a pair that is
    ``upstream``.
    """
    order: nx.DiGraph[str] = nx.transitive_closure_dag(graph)
    if pairs is not None:
        upstream = pairs[pairs["status"] == "upstream"]
        order.add_edges_from(zip(upstream["source"], upstream["target"], strict=True))
    return order


def ancestry(order: nx.DiGraph[str], pairs: pd.DataFrame | None, bootstrap: Bootstrap | None) -> pd.DataFrame:
    """``ancestor, descendant, declared, support, status``: pairs of programs that `declared_order` joins, that are
    ``likely``, or that have support of 0.1; ``status`` as in ``pairs.csv``.
    """
    names = list(order)
    support = np.full((len(names), len(names)), np.nan) if bootstrap is None else np.array(bootstrap.ancestor, float)
    known = {} if pairs is None else pairs.set_index(["source", "target"])["status"].to_dict()
    rows = [
        (a, b, order.has_edge(a, b), support[i, j], known.get((a, b), ""))
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if order.has_edge(a, b) or known.get((a, b)) == "likely" or support[i, j] >= MIN_SUPPORT
    ]
    return pd.DataFrame(rows, columns=["ancestor", "descendant", "declared", "support", "status"])


def graphml(graph: nx.DiGraph[str]) -> bytes:
    """GraphML of a DAG; characters that XML cannot hold are replaced."""
    clean: nx.DiGraph[str] = nx.DiGraph(**{key: plain_text(value) for key, value in graph.graph.items()})
    for node, values in graph.nodes(data=True):
        clean.add_node(node, **{key: plain_text(value) for key, value in values.items()})
    clean.add_edges_from(graph.edges(data=True))
    buffer = io.BytesIO()
    nx.write_graphml(clean, buffer)
    return buffer.getvalue()


def plain_text(value: Any) -> Any:
    """A string with control characters as escapes, and what else XML cannot hold replaced; anything else as it is."""
    return re.sub("[\ufffe\uffff]", "\ufffd", escaped(value)) if isinstance(value, str) else value


def dag_json(graph: nx.DiGraph[str]) -> str:
    """The DAG in networkx's node-link form, with the verdict under ``graph``."""
    return to_json(nx.node_link_data(graph, edges="edges"))


def dag_text(graph: nx.DiGraph[str]) -> str:
    """A DAG as text: every program with the edges that leave it, in topological order."""
    label, lines = nx.get_node_attributes(graph, "label"), []
    for name in graph:
        targets = sorted(graph.successors(name), key=lambda target: int(target[1:]))
        lines.append(f"{name}  {label[name]}")
        for target in targets:
            branch = "└" if target == targets[-1] else "├"
            edge = graph.edges[name, target]
            where = f" in {edge['context']}" if "context" in edge else ""
            lines.append(f"  {branch}─▶ {target}  {label[target]}  ({edge['weight']:+.2f}{where})")
    return "\n".join(lines) + "\n"
