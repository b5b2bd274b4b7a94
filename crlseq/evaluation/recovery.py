"""Scores of a fit against a known truth: targets, partition, ancestry, edges, pairs, penetrance, latents.

Programs have no names in the truth, so each is matched to one true latent: the one-to-one matching that most
single perturbations agree with (Hungarian method). Edges of matched programs are compared after that renaming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from crlseq.data.files import open_store, readable
from crlseq.discovery.edges import reachable
from crlseq.errors import InputError
from crlseq.evaluation.representation import Floats, representation_scores, standardised
from crlseq.run.run import Run

Graph = NDArray[np.bool_]

LATENT_SCORES = ("mcc", "dci_disentanglement", "dci_completeness", "dci_informativeness", "irs")
PAIR_SCORES = (
    *("upstream_precision", "upstream_recall", "likely_precision", "likely_recall", "both_ways", "excluded_wrong"),
)
# Numbers whose sums over screens give pooled precisions and recalls.
EDGE_COUNTS = ("edges_true", "edges_right", "edges_wrong")
PAIR_COUNTS = ("pairs_true", "upstream_right", "upstream_wrong", "likely_right", "likely_wrong")
N_RANDOM_GRAPHS = 1000  # the mean F1 of random graphs is then known to about 0.003
BORDERS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # lower ends of the bins of supports; the last one ends with 1


def score_recovery(
    interventions: pd.DataFrame,
    edges: pd.DataFrame,
    truth: Mapping[str, Any],
    latents: Floats | None = None,
    true_latents: Floats | None = None,
    pairs: pd.DataFrame | None = None,
) -> dict[str, float]:
    """``target_accuracy, ari, mcc``, `EDGE_COUNTS`, the scores of `representation_scores` and `graph_scores` and, where the
    tables of a run have them, those of `pair_scores` and ``penetrance_error``.

    An intervention with an empty or missing program claims no target. An edge that touches an unmatched program adds one
    to ``shd`` and is one of the ``edges_wrong``; it joins no pair of true latents, so precision and recall do not see it.
    ``truth`` has ``adjacency`` (p, p), row -> column, and ``target``, a table perturbation -> ``latent``, as
    `crlseq.data.simulate.simulate` writes them. Latents (cells, q) and true ones (cells, p) may be missing; their scores
    are NaN then.
    """
    adjacency = np.asarray(truth["adjacency"]) != 0
    targets = truth["target"]["latent"].astype(int)
    claims = claims_of(interventions, targets.index)
    latent_of, accuracy = match_programs(claims, targets.to_numpy(), len(adjacency))
    found = np.zeros_like(adjacency)
    matched = edges[edges["source"].isin([*latent_of]) & edges["target"].isin([*latent_of])]
    for source, target in zip(matched["source"], matched["target"], strict=True):
        found[latent_of[source], latent_of[target]] = True
    scores = {"target_accuracy": accuracy, "ari": partition_agreement(claims, targets.to_numpy())}
    if "penetrance" in interventions and "penetrance" in truth["target"]:
        scores["penetrance_error"] = penetrance_error(interventions, truth["target"])
    right = int((found & adjacency).sum())
    scores |= dict(zip(EDGE_COUNTS, (int(adjacency.sum()), right, len(edges) - right), strict=True))
    scores |= {} if pairs is None else pair_scores(pairs, latent_of, adjacency)
    scores |= dict.fromkeys(LATENT_SCORES, float("nan"))
    if latents is not None and true_latents is not None and latents.shape[1]:
        scores |= {"mcc": mean_correlation(latents, true_latents), **representation_scores(latents, true_latents)}
    return scores | graph_scores(found, adjacency, len(edges) - len(matched))


def pair_scores(pairs: pd.DataFrame, latent_of: Mapping[str, int], adjacency: Graph) -> dict[str, float]:
    """`PAIR_SCORES` and `PAIR_COUNTS` of a table of ordered pairs of programs, ``source, target, status``.

    The truth are the pairs joined by a path of ``adjacency`` (p, p), row -> column; ``latent_of`` are the true latents of
    programs. ``upstream`` are pairs of that status, ``likely`` those of status upstream or likely; a pair of a program
    without a latent is wrong. ``both_ways`` is a number of unordered pairs. ``excluded_wrong`` is the share of excluded
    pairs of programs with latents that are joined. Shares of nothing are NaN.
    """
    ends = [pairs[name].map(latent_of) for name in ("source", "target")]
    known = ends[0].notna() & ends[1].notna()
    joined = np.zeros(len(pairs), dtype=bool)
    source, target = (end[known].to_numpy(dtype=int) for end in ends)
    joined[known] = ancestral = closure(adjacency)[source, target]
    n_true, status = int(closure(adjacency).sum()), pairs["status"]
    scores: dict[str, float] = {"pairs_true": n_true}
    for name, claimed in {"upstream": status == "upstream", "likely": status.isin(["upstream", "likely"])}.items():
        right, n = int((claimed & joined).sum()), int(claimed.sum())
        scores |= {f"{name}_right": right, f"{name}_wrong": n - right}
        scores |= {f"{name}_precision": _share(right, n), f"{name}_recall": _share(right, n_true)}
    both = pairs.loc[status == "both ways", ["source", "target"]]
    excluded = (status == "excluded")[known]
    scores["both_ways"] = len({frozenset(pair) for pair in both.itertuples(index=False)})
    return scores | {"excluded_wrong": _share(int((excluded & ancestral).sum()), int(excluded.sum()))}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def penetrance_error(interventions: pd.DataFrame, targets: pd.DataFrame) -> float:
    """Mean |penetrance - true share of hit cells| over the perturbations that have both; NaN if none has."""
    found = pd.Series(interventions["penetrance"].to_numpy(dtype=float), interventions["perturbation"].astype(str))
    true = pd.Series(targets["penetrance"].to_numpy(dtype=float), targets.index.astype(str))
    return float((found.reindex(true.index) - true).abs().mean())


def gene_list_scores(
    programs: pd.DataFrame, latents: Floats, true_latents: Floats, truth: Mapping[str, Any]
) -> dict[str, float]:
    """Gene lists of programs against those that made the cells: ``list_precision, list_recall, program_length``.

    A program's list are the genes with a loading other than 0; programs are matched to true latents as in
    `mean_correlation`, and precision and recall are of all lists together; NaN where nothing is listed, or the truth has
    no ``loaded`` (true latents, genes), bool. Programs come in the order of the latents.
    """
    if programs.empty:
        return dict.fromkeys(("list_precision", "list_recall", "program_length"), float("nan"))
    listed = programs[programs["loading"] != 0].groupby("program")["gene"].agg(set)
    scores = {"list_precision": float("nan"), "list_recall": float("nan")}
    if "loaded" in truth:
        loaded, names = truth["loaded"], list(dict.fromkeys(programs["program"]))
        _, (mine, true) = _match_latents(latents, true_latents)
        lists = [listed.get(names[i], set()) for i in mine]
        made = [set(loaded.columns[loaded.iloc[j]]) for j in true]
        both = sum(len(a & b) for a, b in zip(lists, made, strict=True))
        n_listed, n_true = (sum(map(len, sets)) for sets in (lists, made))
        scores = {"list_precision": both / n_listed, "list_recall": both / n_true} if n_listed and n_true else scores
    return {**scores, "program_length": float(listed.map(len).sum() / programs["program"].nunique())}


def match_programs(
    claims: list[str | None], targets: NDArray[np.integer[Any]], n_latents: int
) -> tuple[dict[str, int], float]:
    """True latent of each program by the Hungarian method on shared perturbations, and the target accuracy.

    ``claims`` (K,) are programs that perturbations target, None for none, which counts as wrong; ``targets`` (K,) their
    true latents. Programs that share no perturbation with their latent are left out. The accuracy is the share of
    perturbations whose program is matched to their latent.
    """
    programs = sorted({claim for claim in claims if claim is not None})
    shared = np.zeros((n_latents, len(programs)))
    for claim, target in zip(claims, targets, strict=True):
        if claim is not None:
            shared[target, programs.index(claim)] += 1
    rows, columns = linear_sum_assignment(shared, maximize=True)
    latent_of = {programs[c]: int(r) for r, c in zip(rows, columns, strict=True) if shared[r, c] > 0}
    return latent_of, float(shared[rows, columns].sum() / max(len(claims), 1))


def partition_agreement(claims: list[str | None], targets: NDArray[np.integer[Any]]) -> float:
    """Adjusted Rand index of the perturbations by program (each alone without a claim) and latent (Hubert, Arabie 1985)."""
    clusters = [("alone", str(i)) if claim is None else ("program", claim) for i, claim in enumerate(claims)]
    codes, _ = pd.factorize(pd.Series(clusters, dtype=object))
    return float(adjusted_rand_score(targets, codes))


def mean_correlation(latents: Floats, true_latents: Floats) -> float:
    """MCC: mean over true latents of |Pearson correlation| with the latent matched to each.

    Latents (cells, q) are matched one to one to true latents (cells, p) such that the sum of |correlation| is
    largest; a true latent that none is left for counts as 0, and so does a latent that does not vary.
    """
    correlation, matched = _match_latents(latents, true_latents)
    return float(correlation[matched].sum() / true_latents.shape[1])


def _match_latents(
    latents: Floats, true_latents: Floats
) -> tuple[Floats, tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]]:
    """|Correlation| (q, p), and the pairs of the matching."""
    correlation = np.abs(standardised(latents).T @ standardised(true_latents)) / len(latents)
    return correlation, linear_sum_assignment(correlation, maximize=True)


def graph_scores(found: Graph, true: Graph, n_unmatched: int = 0) -> dict[str, float]:
    """Precision, recall and F1 of ancestors and of edges, structural Hamming distance.

    Both graphs (p, p) bool, row -> column. Ancestry is the transitive closure. The distance counts ordered pairs
    that differ, so a reversed edge counts twice, plus `n_unmatched` edges outside the true latents.
    """
    scores = {}
    for name, (a, b) in {"ancestor": (closure(found), closure(true)), "edge": (found, true)}.items():
        both, n_found, n_true = int((a & b).sum()), int(a.sum()), int(b.sum())
        # Nothing to find, or nothing found: right if the truth is empty too.
        scores[f"{name}_precision"] = both / n_found if n_found else float(n_true == 0)
        scores[f"{name}_recall"] = both / n_true if n_true else 1.0
        scores[f"{name}_f1"] = 2 * both / (n_found + n_true) if n_found + n_true else 1.0
    return scores | {"shd": float((found != true).sum() + n_unmatched)}


def closure(graph: Graph) -> Graph:
    """Transitive closure (p, p): j is an ancestor of k != j if a path leads from j to k."""
    return np.asarray(reachable(torch.from_numpy(graph)).numpy()) & ~np.eye(len(graph), dtype=bool)


def random_graph_scores(true: Graph, n: int = N_RANDOM_GRAPHS, seed: int = 0) -> dict[str, float]:
    """Mean `graph_scores` over `n` DAGs of uniformly random order, with as many random edges along it as the truth has."""
    rng = np.random.default_rng(seed)
    (before, after), drawn = np.triu_indices(len(true), 1), []
    for _ in range(n):
        kept, order = rng.permutation(len(before))[: int(true.sum())], rng.permutation(len(true))
        graph = np.zeros_like(true, dtype=bool)
        graph[order[before[kept]], order[after[kept]]] = True
        drawn.append(graph_scores(graph, true))
    return {name: float(np.mean([scores[name] for scores in drawn])) for name in drawn[0]}


def claims_of(interventions: pd.DataFrame, perturbations: pd.Index) -> list[str | None]:
    """Program of each perturbation of the truth; None where the table has none, or lacks the perturbation."""
    program = interventions.set_index("perturbation")["program"]
    program.index = program.index.astype(str)
    return [None if pd.isna(name) or name == "" else str(name) for name in program.reindex(perturbations.astype(str))]


def edge_supports(
    support: Sequence[Sequence[float]], interventions: pd.DataFrame, truth: Mapping[str, Any]
) -> pd.DataFrame:
    """Every ordered pair of programs, the ``support`` (p, p) of its edge row -> column, and whether that edge is ``true``.

    Programs are matched to latents as in `score_recovery`; no edge of one without a latent is true.
    """
    share, adjacency = np.asarray(support, dtype=float), np.asarray(truth["adjacency"]) != 0
    targets = truth["target"]["latent"].astype(int)
    latent_of, _ = match_programs(claims_of(interventions, targets.index), targets.to_numpy(), len(adjacency))
    latent = np.array([latent_of.get(f"P{i}", -1) for i in range(len(share))])
    source, target = np.nonzero(~np.eye(len(share), dtype=bool))
    known = (latent[source] >= 0) & (latent[target] >= 0)
    return pd.DataFrame({
        "source": [f"P{i}" for i in source], "target": [f"P{i}" for i in target],
        "support": share[source, target], "true": known & adjacency[latent[source], latent[target]],
    })  # fmt: skip


def calibration(supports: pd.DataFrame) -> pd.DataFrame:
    """Pairs, true edges, their share and the mean support by bin of support: ``support`` (lower end), ``mean_support``,
    ``pairs``, ``true``, ``share_true``. Calibrated supports have a share near their mean; bins without pairs are left out.
    """
    which = np.searchsorted(BORDERS, supports["support"].to_numpy() + 1e-9, side="right") - 1
    rows = []
    for i in np.unique(which)[::-1]:
        inside = supports[which == i]
        rows.append({
            "support": BORDERS[i], "mean_support": float(inside["support"].mean()), "pairs": len(inside),
            "true": int(inside["true"].sum()), "share_true": float(inside["true"].mean()),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=["support", "mean_support", "pairs", "true", "share_true"])


def known_recovery(run: Run, data: str | Path | ad.AnnData | None) -> tuple[dict[str, float] | None, list[str]]:
    """`score_recovery` of a run and notes; None where neither `data` nor the run's own file has a truth.

    Latents are those of every cell of that file, none if it has no true ones: they are read off cells alike, fitted or not.
    """
    for source in (data, run.path and run.path / "crlseq.h5ad"):
        if source is None:
            continue
        truth, true_latents = _read(source)
        if truth is None:
            continue
        if not _is_truth(truth):
            return None, ["uns['truth'] is not in the format of `crlseq simulate` and is ignored."]
        notes, latents = [], None
        try:
            latents = None if true_latents is None or run.facts.without_effect else run.latents(source)
        except InputError as error:  # genes are missing: targets and graph can be scored all the same
            notes.append(f"No latents are scored: {error.message}")
        return score_recovery(run.interventions, run.edges, truth, latents, true_latents, run.pairs), notes
    return None, []


def _read(source: str | Path | ad.AnnData) -> tuple[Any, np.ndarray | None]:
    if isinstance(source, ad.AnnData):
        return source.uns.get("truth"), source.obsm.get("true_latents")
    with open_store(Path(source)) as store, readable(str(source), "the truth"):
        truth, latents = (
            ad.io.read_elem(store[slot][name]) if slot in store and name in store[slot] else None
            for slot, name in (("uns", "truth"), ("obsm", "true_latents"))
        )
    return truth, latents


def _is_truth(truth: Any) -> bool:
    if not isinstance(truth, Mapping) or not {"adjacency", "target"} <= truth.keys():
        return False
    shape, target = np.shape(truth["adjacency"]), truth["target"]
    square = len(shape) == 2 and shape[0] == shape[1]
    return square and isinstance(target, pd.DataFrame) and "latent" in target
