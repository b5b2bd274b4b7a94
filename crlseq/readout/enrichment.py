"""Which gene sets a program is about: by its top genes, by the ranking of all genes, by the perturbations that drive it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse, stats

from crlseq.data.genesets import read_gmt, refuse_unmatched
from crlseq.data.names import GeneNames
from crlseq.errors import InputError, UsageError, needs_extra
from crlseq.run.run import Run

OVER_REPRESENTATION, RANK, DRIVERS = "over-representation", "rank", "drivers"
MIN_SIZE, MAX_SIZE = 5, 500  # fitted genes of a set that is tested
MIN_PERTURBATIONS, MIN_DRIVERS = 3, 2  # of a set, and of a program; with fewer nothing could be told
SMALLEST = 1e-4  # share of the largest loading that the ranking counts any gene with
TOP_SHARE, TOP_MOST = 0.1, 100  # of the genes that rise, and of those that fall, by |loading|
_COLUMNS = [
    "program", "test", "direction", "gene_set", "description", "size", "overlap", "score", "p_value", "fdr", "genes",
]  # fmt: skip


def enrich(
    run: Run,
    gene_sets: str | Path | Mapping[str, Sequence[str]],
    *,
    n_top: int | None = None,
    min_size: int = MIN_SIZE,
    max_size: int = MAX_SIZE,
    seed: int = 0,
) -> pd.DataFrame:
    """Gene sets in which each program is enriched, by three tests; what was not measured counts in none of them.

    "over-representation": with G fitted genes, m of them in the set and n top genes of the program in one direction,
    ``P(X >= overlap)`` for X ~ hypergeometric(G, m, n). "rank": pre-ranked GSEA (Subramanian et al. 2005, PNAS) on the
    signed loadings of all G genes, with p-values by fgsea's multilevel sampling (Korotkevich et al. 2021, bioRxiv)
    through gseapy. "drivers": the hypergeometric test for the perturbations that target the program, among all that
    were fitted; programs with one driver, and sets with fewer than three perturbations, are not tested. All take
    genes to be exchangeable under the null; correlated genes are not, so small p-values are too small.

    Parameters
    ----------
    gene_sets
        A gmt file, or names of genes by the name of the set.
    n_top
        Top genes in each direction, by \\|loading\\|. None: a tenth of the fitted genes, 100 at most.
    min_size, max_size
        Sets with fewer or more fitted genes are not tested by their genes.

    Returns
    -------
    pandas.DataFrame
        ``program, test, direction, gene_set, description, size, overlap, score, p_value, fdr, genes``, by program,
        test and p-value. ``direction``: "up" where the set's genes rise with the program, "down" where they fall, empty
        for drivers. ``size`` (int): fitted genes, or perturbations, of the set. ``overlap`` (int) and ``genes``: those of
        them among the top genes, in the leading edge, or among the drivers, the strongest first, joined by ", ".
        ``score`` (float): overlap over expected overlap, or the normalised enrichment score. ``fdr``: over programs,
        sets and directions of a test; of ranks by Benjamini and Hochberg, of counts by `discrete_fdr`.

    Raises
    ------
    InputError
        If the file cannot be read or is malformed, or no set can be tested.
    UsageError
        If gseapy is not installed, or a size is out of range.

    Examples
    --------
    >>> import crlseq
    >>> sets = {"first": [f"gene{i}" for i in range(10)], "last": [f"gene{i}" for i in range(30, 40)]}
    >>> found = crlseq.enrich(crlseq.load("RUN"), sets)
    >>> sorted(set(found["gene_set"])), sorted(set(found["test"]))
    (['first', 'last'], ['over-representation', 'rank'])
    """
    if find_spec("gseapy") is None:
        raise needs_extra("Enrichment", "gseapy", "enrich")
    if not 1 <= min_size <= max_size or (n_top is not None and n_top < 1):
        raise UsageError("A number of genes is out of range.", "Give 1 <= min_size <= max_size and n_top of 1 or more.")
    if run.facts.without_effect:
        return pd.DataFrame(columns=_COLUMNS).astype({"size": int, "overlap": int})
    wide = run.programs.pivot(index="program", columns="gene", values="loading").loc[run.program_names]
    # A gene without a loading is one that the program does not move.
    genes, loading = wide.columns.to_numpy(dtype=object), np.nan_to_num(wide.to_numpy())
    perturbations = run.interventions["perturbation"].to_numpy(dtype=object)
    known = run.preprocessing.gene_names.only([*genes])
    names, by_gene, by_driver = _memberships(gene_sets, known, perturbations, min_size, max_size)
    genes = known.symbols
    n_top = n_top or min(TOP_MOST, max(1, round(TOP_SHARE * len(genes))))
    tops, drivers = [], []
    for index, program in enumerate(run.program_names):
        for direction, sign in (("up", 1.0), ("down", -1.0)):
            value = sign * loading[index]
            order = np.argsort(-value, kind="stable")
            last = value[order[min(n_top, len(order)) - 1]]  # with all that are equal to it: their order says nothing
            tops.append((index, direction, order[(value[order] >= last) & (value[order] > 0)]))
        own = np.flatnonzero(run.interventions["program"] == program)
        if len(own) >= MIN_DRIVERS:
            strength = run.interventions["shift"].abs().to_numpy()[own]
            drivers.append((index, "", own[np.argsort(-strength, kind="stable")]))
    found = pd.concat(
        [
            _over_represented(OVER_REPRESENTATION, genes, by_gene, tops),
            _ranked(genes, by_gene, loading, seed),
            _over_represented(DRIVERS, perturbations, by_driver, drivers),
        ],
        ignore_index=True,
    )
    found["fdr"] = np.nan
    for test, part in found.groupby("test"):
        counted = {OVER_REPRESENTATION: len(genes), DRIVERS: len(perturbations)}.get(str(test))
        p_value = part["p_value"].to_numpy()
        found.loc[part.index, "fdr"] = (
            stats.false_discovery_control(p_value)
            if counted is None
            else discrete_fdr(p_value, counted, part["size"].to_numpy(), part["n_chosen"].to_numpy())
        )
    # What is equally strong comes in the order of the file.
    order = np.lexsort((found["set"], -found["score"].abs(), found["p_value"], found["order"], found["index"]))
    found = found.iloc[order].reset_index(drop=True)
    found["program"] = np.array(run.program_names, dtype=object)[found["index"]]
    found["gene_set"], found["description"] = np.array(names, dtype=object)[found["set"]].T
    return found[_COLUMNS].astype({"size": int, "overlap": int})


def _table(test: str, index: int, direction: object, sets: np.ndarray, **columns: object) -> pd.DataFrame:
    order = [OVER_REPRESENTATION, RANK, DRIVERS].index(test)
    return pd.DataFrame({"index": index, "test": test, "order": order, "direction": direction, "set": sets, **columns})


def _over_represented(
    test: str, names: np.ndarray, member: sparse.csr_array, chosen: list[tuple[int, str, np.ndarray]]
) -> pd.DataFrame:
    """Every choice and set; sets without any of the chosen count among the tests, with a p-value of 1."""
    total, size = len(names), np.diff(member.indptr)
    sets = np.flatnonzero(size)
    tables = [_table(test, 0, "", sets[:0], size=[], overlap=[], score=[], p_value=[], genes=[], n_chosen=[])]
    for index, direction, own in chosen if len(sets) else []:
        hits = member[sets][:, own].sorted_indices()
        overlap, m = np.diff(hits.indptr), size[sets]
        listed = [", ".join(names[own[hit]]) for hit in np.split(hits.indices, hits.indptr[1:-1])]
        score = overlap * total / (m * max(len(own), 1))
        p_value = stats.hypergeom.sf(overlap - 1, total, m, len(own))
        tables.append(_table(test, index, direction, sets, size=m, overlap=overlap, score=score, p_value=p_value, genes=listed, n_chosen=len(own)))  # fmt: skip
    return pd.concat(tables[min(1, len(tables) - 1) :], ignore_index=True)


def discrete_fdr(p_value: np.ndarray, total: int, size: np.ndarray, n_chosen: np.ndarray) -> np.ndarray:
    """FDR of hypergeometric tests, that knows which p-values each of them can have at all.

    Doehler, Durand, Roquain, "New FDR bounds for discrete and heterogeneous tests", Electronic Journal of Statistics
    12, 2018 (procedure HSD). Of n drawn from N, three of which are in a set, no p-value is below that of all three, and
    such a test adds nothing to the false discoveries at smaller ones. With F_i(t) = P(p_i <= t) under the null, which
    is at most t, and p_(1) <= p_(2) <= ... the p-values of all tests,

        fdr_(k) = max_{j <= k} (1 / j) sum_i F_i(p_(j)) / (1 - F_i(p_(j))),     at most 1.

    ``p_value`` (tests,): ``P(X >= overlap)`` for X ~ hypergeometric(total, size, n_chosen).
    """
    level, place, count = np.unique(p_value, return_inverse=True, return_counts=True)
    sums = np.zeros(len(level))
    kinds, tests = np.unique(np.stack([size, n_chosen]).astype(int), axis=1, return_counts=True)
    for m, n, number in zip(*kinds, tests, strict=True):
        attainable = stats.hypergeom.sf(np.arange(min(m, n), -1, -1) - 1, total, m, n)
        index = np.searchsorted(attainable, level * (1 + 1e-9), side="right")
        chance = np.where(index > 0, attainable[index - 1], 0.0)
        sums += number * np.divide(chance, 1 - chance, out=np.full(len(level), np.inf), where=chance < 1)
    first = np.cumsum(count) - count + 1  # the place of the first of equal ones
    found: np.ndarray = np.minimum(np.maximum.accumulate(sums / first), 1.0)[place]
    return found


def _ranked(genes: np.ndarray, member: sparse.csr_array, loading: np.ndarray, seed: int) -> pd.DataFrame:
    import gseapy

    size = np.diff(member.indptr)
    # Numbers for names: gseapy changes the case of symbols.
    rows = np.split(member.indices, member.indptr[1:-1])
    # A set of all genes has none that it could rank before.
    sets = {f"S{i}": [f"G{j}" for j in row] for i, row in enumerate(rows) if 0 < len(row) < len(genes)}
    tables = [_table(RANK, 0, "", size[:0], size=[], overlap=[], score=[], p_value=[], genes=[])]
    for index, row in enumerate(loading):
        if not sets or row.min() == row.max():
            continue  # nothing to test, or no ranking
        order = np.argsort(-row, kind="stable")
        # Sets of genes that do not move at all have no running sum, and gseapy no answer to them.
        floor = SMALLEST * np.abs(row).max()
        value = np.where(np.abs(row) < floor, np.where(row < 0, -floor, floor), row)
        ranking = pd.Series(value[order], index=[f"G{j}" for j in order])
        with redirect_stderr(StringIO()):  # it warns of ties, whose order is that of the genes here
            found = gseapy.prerank(
                ranking, sets, min_size=1, max_size=len(genes), method="multilevel", ascending=None, threads=1,
                seed=seed, no_plot=True, outdir=None,
            ).res2d  # fmt: skip
        own = found["Term"].str[1:].astype(int).to_numpy()
        score, p_value = (
            found[name].astype(float).fillna(missing).to_numpy() for name, missing in (("NES", 0.0), ("NOM p-val", 1.0))
        )  # it has none where no sampled set had the sign
        edges = [np.array([gene[1:] for gene in edge.split(";") if gene], dtype=int) for edge in found["Lead_genes"]]
        listed = [", ".join(genes[edge[np.argsort(-np.abs(row[edge]), kind="stable")]]) for edge in edges]
        direction = np.where(found["ES"].astype(float) >= 0, "up", "down")
        tables.append(_table(RANK, index, direction, own, size=size[own], overlap=[len(edge) for edge in edges], score=score, p_value=p_value, genes=listed))  # fmt: skip
    return pd.concat(tables[min(1, len(tables) - 1) :], ignore_index=True)


def _memberships(
    gene_sets: str | Path | Mapping[str, Sequence[str]],
    genes: GeneNames,
    perturbations: np.ndarray,
    smallest: int,
    largest: int,
) -> tuple[list[tuple[str, str]], sparse.csr_array, sparse.csr_array]:
    """Names and descriptions of sets, (sets, G) and (sets, perturbations) what is in them; empty rows are not tested."""
    is_file = isinstance(gene_sets, str | os.PathLike)
    rows = read_gmt(Path(gene_sets)) if is_file else ((name, "", list(own)) for name, own in gene_sets.items())  # type: ignore[arg-type, union-attr]
    perturbation = {name: j for j, name in enumerate(perturbations)}
    by_place = {place: j for j, name in enumerate(perturbations) for place in genes.find(name)}
    names, seen, common = list[tuple[str, str]](), list[str](), False
    by_gene, by_driver = list[list[int]](), list[list[int]]()
    for name, description, own in rows:
        seen += own[: max(0, 200 - len(seen))]
        places = {each: genes.find(each) for each in own}
        found = sorted({place for each in own for place in places[each]})
        driving = sorted(
            {perturbation[each] for each in own if each in perturbation}
            | {by_place[place] for place in found if place in by_place}
        )
        common = common or bool(found)
        found = found if smallest <= len(found) <= largest else []
        driving = driving if len(driving) >= MIN_PERTURBATIONS else []
        if found or driving:
            names.append((name, description))
            by_gene.append(found)
            by_driver.append(driving)
    source = str(gene_sets) if is_file else "gene_sets"
    refuse_unmatched(source, seen, common, genes.index)
    if not names:
        raise InputError(
            f"No gene set of {source} holds {smallest} to {largest} of the {len(genes.index)} fitted genes.",
            "Fit more genes, or give other gene sets.",
        )
    return names, _matrix(by_gene, len(genes.index)), _matrix(by_driver, len(perturbations))


def _matrix(rows: list[list[int]], width: int) -> sparse.csr_array:
    starts = np.cumsum([0, *map(len, rows)])
    columns = np.concatenate([np.array(row, dtype=int) for row in rows])
    return sparse.csr_array((np.ones(len(columns), dtype=bool), columns, starts), shape=(len(rows), width))
