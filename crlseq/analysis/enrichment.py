"""Which gene sets a program is about: by its top genes, by the ranking of all genes, by the perturbations that drive it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse, stats

from crlseq.errors import InputError, UsageError

if TYPE_CHECKING:
    from crlseq.run import Run

OVER_REPRESENTATION, RANK, DRIVERS = "over-representation", "rank", "drivers"
MIN_SIZE, MAX_SIZE = 5, 500  # fitted genes of a set that is tested
MIN_PERTURBATIONS, MIN_DRIVERS = 3, 2  # of a set, and of a program; with fewer nothing could be told
TOP_SHARE, TOP_MOST = 0.1, 100  # of the genes that rise, and of those that fall, by |loading|
MAX_LINE, MAX_FILE = 4_000_000, 500_000_000  # bytes: ten times what the largest collections take
_ENSEMBL = re.compile(r"ENS[A-Z]{0,6}G\d{11}")
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
    run
        A fitted screen.
    gene_sets
        A gmt file, or names of genes by the name of the set.
    n_top
        Top genes in each direction, by \\|loading\\|. None: a tenth of the fitted genes, 100 at most.
    min_size, max_size
        Sets with fewer or more fitted genes are not tested by their genes.
    seed
        Of the sampling.

    Returns
    -------
    pandas.DataFrame
        ``program, test, direction, gene_set, description, size, overlap, score, p_value, fdr, genes``, by program,
        test and p-value. ``direction``: "up" where the set's genes rise with the program, "down" where they fall, empty
        for drivers. ``size`` (int): fitted genes, or perturbations, of the set. ``overlap`` (int) and ``genes``: those of
        them among the top genes, in the leading edge, or among the drivers, the strongest first, joined by ", ".
        ``score`` (float): overlap over expected overlap, or the normalised enrichment score. ``fdr``:
        Benjamini-Hochberg over programs, sets and directions of a test.

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
        raise UsageError("Enrichment needs gseapy, which is not installed.", "pip install 'crlseq[enrich]'.")
    if not 1 <= min_size <= max_size or (n_top is not None and n_top < 1):
        raise UsageError("A number of genes is out of range.", "Give 1 <= min_size <= max_size and n_top of 1 or more.")
    wide = run.programs.pivot(index="program", columns="gene", values="loading").loc[run.program_names]
    genes, loading = wide.columns.to_numpy(dtype=object), wide.to_numpy()
    perturbations = run.interventions["perturbation"].to_numpy(dtype=object)
    names, by_gene, by_driver = _memberships(gene_sets, genes, perturbations, min_size, max_size)
    n_top = n_top or min(TOP_MOST, max(1, round(TOP_SHARE * len(genes))))
    tops, drivers = [], []
    for index, program in enumerate(run.program_names):
        for direction, sign in (("up", 1.0), ("down", -1.0)):
            order = np.argsort(-sign * loading[index], kind="stable")[:n_top]
            tops.append((index, direction, order[sign * loading[index, order] > 0]))
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
    found["fdr"] = found.groupby("test")["p_value"].transform(stats.false_discovery_control)
    # What is equally strong comes in the order of the file.
    order = np.lexsort((found["set"], -found["score"].abs(), found["p_value"], found["order"], found["index"]))
    found = found.iloc[order].reset_index(drop=True)
    found["program"] = np.array(run.program_names, dtype=object)[found["index"]]
    found["gene_set"], found["description"] = np.array(names, dtype=object)[found["set"]].T
    return found[_COLUMNS]


def _table(test: str, index: int, direction: object, sets: np.ndarray, **columns: object) -> pd.DataFrame:
    order = [OVER_REPRESENTATION, RANK, DRIVERS].index(test)
    return pd.DataFrame({"index": index, "test": test, "order": order, "direction": direction, "set": sets, **columns})


def _over_represented(
    test: str, names: np.ndarray, member: sparse.csr_array, chosen: list[tuple[int, str, np.ndarray]]
) -> pd.DataFrame:
    """Every choice and set; sets without any of the chosen count among the tests, with a p-value of 1."""
    total, size = len(names), np.diff(member.indptr)
    sets = np.flatnonzero(size)
    tables = [_table(test, 0, "", sets[:0], size=[], overlap=[], score=[], p_value=[], genes=[])]
    for index, direction, own in chosen if len(sets) else []:
        hits = member[sets][:, own].sorted_indices()
        overlap, m = np.diff(hits.indptr), size[sets]
        told = [", ".join(names[own[hit]]) for hit in np.split(hits.indices, hits.indptr[1:-1])]
        score = overlap * total / (m * max(len(own), 1))
        p_value = stats.hypergeom.sf(overlap - 1, total, m, len(own))
        tables.append(_table(test, index, direction, sets, size=m, overlap=overlap, score=score, p_value=p_value, genes=told))  # fmt: skip
    return pd.concat(tables[min(1, len(tables) - 1) :], ignore_index=True)


def _ranked(genes: np.ndarray, member: sparse.csr_array, loading: np.ndarray, seed: int) -> pd.DataFrame:
    import gseapy

    size = np.diff(member.indptr)
    # Numbers for names: gseapy changes the case of symbols.
    rows = np.split(member.indices, member.indptr[1:-1])
    sets = {f"S{i}": [f"G{j}" for j in row] for i, row in enumerate(rows) if len(row)}
    tables = [_table(RANK, 0, "", size[:0], size=[], overlap=[], score=[], p_value=[], genes=[])]
    for index, row in enumerate(loading):
        if not sets or row.min() == row.max():
            continue  # nothing to test, or no ranking
        order = np.argsort(-row, kind="stable")
        ranking = pd.Series(row[order], index=[f"G{j}" for j in order])
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
        told = [", ".join(genes[edge[np.argsort(-np.abs(row[edge]), kind="stable")]]) for edge in edges]
        direction = np.where(found["ES"].astype(float) >= 0, "up", "down")
        tables.append(_table(RANK, index, direction, own, size=size[own], overlap=[len(edge) for edge in edges], score=score, p_value=p_value, genes=told))  # fmt: skip
    return pd.concat(tables[min(1, len(tables) - 1) :], ignore_index=True)


def _memberships(
    gene_sets: str | Path | Mapping[str, Sequence[str]],
    genes: np.ndarray,
    perturbations: np.ndarray,
    smallest: int,
    largest: int,
) -> tuple[list[tuple[str, str]], sparse.csr_array, sparse.csr_array]:
    """Names and descriptions of sets, (sets, G) and (sets, perturbations) what is in them; empty rows are not tested."""
    is_file = isinstance(gene_sets, str | os.PathLike)
    rows = _read_gmt(Path(gene_sets)) if is_file else ((name, "", list(own)) for name, own in gene_sets.items())  # type: ignore[arg-type, union-attr]
    gene, perturbation = ({name: j for j, name in enumerate(all_)} for all_ in (genes, perturbations))
    names, seen, common = list[tuple[str, str]](), list[str](), False
    by_gene, by_driver = list[list[int]](), list[list[int]]()
    for name, description, own in rows:
        seen += own[: max(0, 200 - len(seen))]
        found, driving = (sorted({place[each] for each in own if each in place}) for place in (gene, perturbation))
        common = common or bool(found)
        found = found if smallest <= len(found) <= largest else []
        driving = driving if len(driving) >= MIN_PERTURBATIONS else []
        if found or driving:
            names.append((name, description))
            by_gene.append(found)
            by_driver.append(driving)
    source = str(gene_sets) if is_file else "gene_sets"
    if not seen:
        raise InputError(f"There is no gene set in {source}.", "Give a gmt file: a gene set a line.")
    if not common:
        raise InputError(
            f"No gene set of {source} holds a gene that was fitted: its genes are {_naming(seen)}, those of the run "
            f"{_naming(genes)}.",
            "Give gene sets with the names of the run's genes, or fit the screen with theirs.",
        )
    if not names:
        raise InputError(
            f"No gene set of {source} holds {smallest} to {largest} of the {len(genes)} fitted genes.",
            "Fit more genes, or give other gene sets.",
        )
    return names, _matrix(by_gene, len(genes)), _matrix(by_driver, len(perturbations))


def _matrix(rows: list[list[int]], width: int) -> sparse.csr_array:
    starts = np.cumsum([0, *map(len, rows)])
    columns = np.concatenate([np.array(row, dtype=int) for row in rows])
    return sparse.csr_array((np.ones(len(columns), dtype=bool), columns, starts), shape=(len(rows), width))


def _read_gmt(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Name, description (unless it is a link) and genes of each line; one line is in memory at a time."""
    at, read = dict[str, int](), 0
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number, read = number + 1, read + len(line)
                where = f"Line {number} of {path}"
                if len(line) > MAX_LINE or read > MAX_FILE:
                    raise InputError(f"{where} is beyond the size of a gmt file.", f"Give one of at most {MAX_FILE:,} bytes, {MAX_LINE:,} a line.")  # fmt: skip
                if not line.strip():
                    continue
                name, *rest = (part.strip() for part in line.decode("utf-8-sig").split("\t"))
                if not name or len(rest) < 2:
                    raise InputError(f"{where} is not a gene set in gmt format.", "A line holds a name, a description and genes, with tabs between them.")  # fmt: skip
                if name in at:
                    raise InputError(f"{where} repeats the name of the gene set in line {at[name]}.", "Give each gene set a name of its own.")  # fmt: skip
                at[name] = number
                description, *genes = rest
                yield name, "" if description.startswith(("http:", "https:")) else description, [*filter(None, genes)]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", "Give a gmt file.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"Line {number} of {path} is not UTF-8 text.", "Give a gmt file, unpacked.") from error


def _naming(genes: Sequence[str] | np.ndarray) -> str:
    """``Ensembl identifiers (such as ENSG00000115415)``."""
    some = sorted({str(gene) for gene in genes[:200]})
    counts = {
        "Ensembl identifiers": sum(bool(_ENSEMBL.match(gene)) for gene in some),
        "Entrez identifiers": sum(gene.isdecimal() for gene in some),
        "symbols in capitals": sum(gene.isupper() and not _ENSEMBL.match(gene) for gene in some),
    }
    kind = max(counts, key=lambda name: counts[name])
    return f"{kind if 2 * counts[kind] > len(some) else 'symbols'} (such as {some[0][:40]})"
