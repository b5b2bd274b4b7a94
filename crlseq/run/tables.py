"""Tables of programs, interventions and edges."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crlseq.data.names import GeneNames
from crlseq.run.schema import DETECTABLE_FDR

LABEL_DRIVERS = 3
DIGITS = 6  # of a table that is large


def program_names(n: int) -> list[str]:
    """P0, P1, ... in the order of `crlseq.discovery.numbering`."""
    return [f"P{k}" for k in range(n)]


def program_table(
    genes: GeneNames, loading: np.ndarray, total_effect: np.ndarray, sparse: bool = False
) -> pd.DataFrame:
    """``program, gene, loading, total_effect, rank``; loadings (p, G); rank 1 is the largest |loading|.

    Also ``symbol`` where genes are named by identifiers and have symbols, and of a sparse decoder ``anchor``: whether the
    gene is loaded on this program and on no other.
    """
    p, n = loading.shape
    rows, columns = np.repeat(np.arange(p), n), np.argsort(-np.abs(loading), axis=1, kind="stable").ravel()
    loaded = loading != 0
    anchor = {"anchor": (loaded & (loaded.sum(0) == 1))[rows, columns]} if sparse else {}
    return pd.DataFrame({
        "program": np.repeat(program_names(p), n),
        "gene": np.asarray(genes.index, dtype=object)[columns],
        **({} if genes.symbol_column is None else {"symbol": genes.symbols[columns]}),
        "loading": loading[rows, columns],
        "total_effect": total_effect[rows, columns],
        "rank": np.tile(np.arange(1, n + 1), p),
        **anchor,
    })  # fmt: skip


def shown(programs: pd.DataFrame) -> pd.Series:
    """What to call the genes of a table of programs: their symbols, where it has them."""
    return programs["symbol" if "symbol" in programs else "gene"]


def by_program(interventions: pd.DataFrame, shift: pd.Series) -> pd.DataFrame:
    """Perturbations by the number of their program, those without one last, and within it by falling ``shift``."""
    number = pd.to_numeric(interventions["program"].str[1:]).fillna(np.inf)
    return interventions.iloc[np.lexsort((-shift.to_numpy(), number.to_numpy()))]


def significant(values: np.ndarray) -> np.ndarray:
    """Values rounded to six significant digits: what a table that is large carries."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.abs(values))))
        rounded = np.round(values * scale) / scale
    exact = (scale > 0) & (scale <= 1e22)  # greater powers of ten are no doubles
    small = np.isfinite(scale) & ~exact
    rounded[small] = [float(f"{value:.{DIGITS}g}") for value in values[small]]
    return np.where(exact | small, rounded, values)


def effect_matrix(effects: pd.DataFrame) -> pd.DataFrame | None:
    """Changes of ``effects.csv`` as genes by perturbations; None where the table has the significant genes alone."""
    genes, perturbations = effects["gene"].unique(), effects["perturbation"].unique()
    if len(effects) < len(genes) * len(perturbations):
        return None
    return effects.pivot(index="gene", columns="perturbation", values="change")[perturbations]


def program_labels(interventions: pd.DataFrame, n_programs: int) -> list[str]:
    """A readable name for each program: its strongest perturbations with a detectable effect."""
    labels = []
    for name in program_names(n_programs):
        drivers = interventions[(interventions["program"] == name) & (interventions["fdr"] <= DETECTABLE_FDR)]
        order = drivers["shift"].abs().sort_values(ascending=False, kind="stable").index
        strongest = [str(value) for value in drivers.loc[order, "perturbation"][:LABEL_DRIVERS]]
        more = len(order) - len(strongest)
        labels.append(", ".join(strongest) + (f" +{more}" if more else "") if strongest else "no driver")
    return labels


def edge_table(weights: np.ndarray, declared: np.ndarray, support: np.ndarray, verdict: str) -> pd.DataFrame:
    """``source, target, weight, support, identified``: the declared edges; weights, declared and support (p, p)."""
    names = np.asarray(program_names(len(weights)), dtype=object)
    source, target = np.nonzero(declared)
    return pd.DataFrame({
        "source": names[source],
        "target": names[target],
        "weight": weights[source, target],
        "support": support[source, target],
        "identified": np.full(len(source), verdict, dtype=object),
    })  # fmt: skip
