"""What a run with contexts has more: a column beside perturbations, pairs and edges by context, and ``contexts.csv``."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pandas as pd

from crlseq.data import splits
from crlseq.data.contexts import gene_and_context
from crlseq.data.dataset import PerturbSeqData
from crlseq.discovery.ordering import DIFFER_FDR, Ordering
from crlseq.discovery.result import Discovery
from crlseq.pipeline.fitted import FittedRun
from crlseq.pipeline.pairs import pair_table
from crlseq.readout.contexts import context_table
from crlseq.readout.programs import encode
from crlseq.run.tables import program_names


def with_contexts(run: FittedRun, data: PerturbSeqData, found: Discovery | None, scale: np.ndarray) -> FittedRun:
    """The run with what differs between contexts; as it is without contexts. ``scale`` (p,) of the latents' programs."""
    contexts = data.labels.contexts
    if contexts is None:
        return run
    about = {
        "key": contexts.key,
        "names": list(contexts.names),
        "pairs_tested": 0,
        "pairs_differ": 0,
        "pairs_error": None,
    }
    pairs, edges = run.pairs, run.edges.assign(context="")
    ordering = None if found is None else found.ordering
    if ordering is not None and ordering.differ is not None and pairs is not None:
        own = [
            pair_table(one.pairs, ordering.robust & False, np.sign(scale)).assign(context=name)
            for name, one in zip(contexts.names, ordering.contexts, strict=False)
        ]
        differ = ordering.differ <= DIFFER_FDR
        assert ordering.differ_error is not None
        others = ordering.differ_error[np.isfinite(ordering.differ) & ~differ]
        about |= {"pairs_tested": int(np.isfinite(ordering.differ).sum()), "pairs_differ": int(differ.sum())}
        about["pairs_error"] = float(np.median(others)) if len(others) else None
        pairs = _by_context(pairs, own, differ)
        if ordering.contexts and run.info["identification"]["verdict"] != "not identified":
            edges = _edges_by_context(edges, ordering, contexts.names, np.sign(scale))
    target = run.interventions["program"].map({name: i for i, name in enumerate(program_names(len(scale)))})
    table = context_table(data, _latents(run, data, found, scale), target.fillna(-1).to_numpy(int))
    return replace(
        run, interventions=_named(run.interventions), effect_rows=_named(run.effects), pairs=pairs, edges=edges, contexts=table,
        info=run.info | {"contexts": about},
    )  # fmt: skip


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the context of each perturbation beside it."""
    own = table.copy()
    own.insert(1, "context", [gene_and_context(name)[1] for name in table["perturbation"]])
    return own


def _latents(run: FittedRun, data: PerturbSeqData, found: Discovery | None, scale: np.ndarray) -> np.ndarray:
    """(cells, p) programs of the training and validation cells: as they were discovered, or as the network reads them."""
    index = np.flatnonzero(np.isin(data.split, (splits.TRAIN, splits.VALIDATION)) & (data.condition >= 0))
    raw = encode(run.model, data, index)
    if found is not None and found.latents.shape[1] == len(scale):
        index, raw = found.index, found.latents
    latents = np.zeros((len(data.split), len(scale)))
    latents[index] = raw / scale
    return latents


def _by_context(pairs: pd.DataFrame, own: list[pd.DataFrame], differ: np.ndarray) -> pd.DataFrame:
    """Pairs that differ (p, p) with a row per context, the others with one for all."""
    off = ~np.eye(len(differ), dtype=bool)
    apart = differ[off]
    parts = [pairs[~apart].assign(context=""), *(table[apart] for table in own)]
    return pd.concat(parts).sort_index(kind="stable").reset_index(drop=True) if apart.any() else parts[0]


def _edges_by_context(
    edges: pd.DataFrame, ordering: Ordering, names: tuple[str, ...], sign: np.ndarray
) -> pd.DataFrame:
    """Edges of pairs that differ as each context declares them, in standard deviations of programs over all controls; the
    strongest first, none that closes a cycle.
    """
    assert ordering.differ is not None
    differ, programs = ordering.differ <= DIFFER_FDR, program_names(len(sign))
    total = np.linalg.inv(np.eye(len(sign)) - ordering.direct.effect * ordering.declared)
    deviation = np.sqrt((total**2).sum(0))
    place = {name: i for i, name in enumerate(programs)}
    shared = np.array(
        [differ[place[a], place[b]] for a, b in zip(edges["source"], edges["target"], strict=True)], dtype=bool
    )
    kept, rows = edges[~shared], list[dict[str, object]]()
    verdict = edges["identified"].iloc[0] if len(edges) else "partly identified"
    for context, one in zip(names, ordering.contexts, strict=True):
        graph = nx.DiGraph(zip(kept["source"], kept["target"], strict=True))
        graph.add_nodes_from(programs)
        weight = one.direct.effect * np.outer(sign * deviation, sign / deviation)
        found = np.argwhere(one.declared & differ)
        for k, i in sorted(found.tolist(), key=lambda edge: -abs(one.direct.effect[tuple(edge)])):
            if nx.has_path(graph, programs[i], programs[k]):
                continue
            graph.add_edge(programs[k], programs[i])
            rows.append({
                "source": programs[k], "target": programs[i], "weight": float(weight[k, i]), "support": np.nan,
                "identified": verdict, "context": context,
            })  # fmt: skip
    own = pd.DataFrame(rows, columns=list(edges.columns)).astype({"weight": float, "support": float})
    return pd.concat([kept, own], ignore_index=True) if len(own) else kept.reset_index(drop=True)
