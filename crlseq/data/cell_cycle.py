"""Scores of the cell cycle: how much a cell transcribes the genes of a phase, beside other genes as highly expressed.

Genes of Tirosh et al. 2016 (Science 352:189). The score is that of ``scanpy.tl.score_genes_cell_cycle`` (Satija et al. 2015),
with all genes of a bin of expression as the reference in place of some that are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from crlseq.data.matrix import Screen
from crlseq.data.names import ENSEMBL, GeneNames
from crlseq.data.preprocess import Preprocessing
from crlseq.errors import InputError

S_GENES = (
    "MCM5", "PCNA", "TYMS", "FEN1", "MCM2", "MCM4", "RRM1", "UNG", "GINS2", "MCM6", "CDCA7", "DTL", "PRIM1", "UHRF1",
    "MLF1IP", "HELLS", "RFC2", "RPA2", "NASP", "RAD51AP1", "GMNN", "WDR76", "SLBP", "CCNE2", "UBR7", "POLD3", "MSH2",
    "ATAD2", "RAD51", "RRM2", "CDC45", "CDC6", "EXO1", "TIPIN", "DSCC1", "BLM", "CASP8AP2", "USP1", "CLSPN", "POLA1",
    "CHAF1B", "BRIP1", "E2F8",
)  # fmt: skip
G2M_GENES = (
    "HMGB2", "CDK1", "NUSAP1", "UBE2C", "BIRC5", "TPX2", "TOP2A", "NDC80", "CKS2", "NUF2", "CKS1B", "MKI67", "TMPO",
    "CENPF", "TACC3", "FAM64A", "SMC4", "CCNB2", "CKAP2L", "CKAP2", "AURKB", "BUB1", "KIF11", "ANP32E", "TUBB4B", "GTSE1",
    "KIF20B", "HJURP", "CDCA3", "HN1", "CDC20", "TTK", "CDC25C", "KIF2C", "RANGAP1", "NCAPD2", "DLGAP5", "CDCA2", "CDCA8",
    "ECT2", "KIF23", "HMMR", "AURKA", "PSRC1", "ANLN", "LBR", "CKAP5", "CENPE", "CTCF", "NEK2", "G2E3", "GAS2L3", "CBX5",
    "CENPA",
)  # fmt: skip
PHASES = {"S_score": S_GENES, "G2M_score": G2M_GENES}
RENAMED = {"MLF1IP": "CENPU", "FAM64A": "PIMREG", "HN1": "JPT1"}  # since
FEWEST = 10  # genes of a phase
BINS, SAMPLED = 25, 2000  # of expression, which is that of so many cells


def cell_cycle_scores(
    screen: Screen, record: Preprocessing, cells: np.ndarray, targets: Sequence[str]
) -> dict[str, np.ndarray]:
    """Scores (cells of the screen,) by the names in `PHASES`, of normalised expression; ``cells`` are those that are looked at.

    That a knock-out lowers its own transcript is no arrest: ``targets`` are left out of a phase that has `FEWEST` other genes.
    InputError if fewer than `FEWEST` genes of a phase are measured.
    """
    names = GeneNames.of(screen.var)
    genes = {phase: _places(names, symbols) for phase, symbols in PHASES.items()}
    hit = _places(names, targets)
    if any(len(own) < FEWEST for own in genes.values()):
        counts = [f"{len(own)} of {len(PHASES[phase])} genes of {phase}" for phase, own in genes.items()]
        what = f"cell-cycle needs {FEWEST} genes of each phase, and this screen has {' and '.join(counts)}."
        if names.symbol_column is None and any(ENSEMBL.fullmatch(name) for name in names.index[:FEWEST]):
            raise InputError(what, "Add the genes' symbols as a column of var: these are Ensembl identifiers.")
        raise InputError(what, "Name columns of obs with scores of the cell cycle instead.")
    rows = screen.sample(cells, SAMPLED)[1]
    mean = np.asarray(record.apply(rows).mean(0)).ravel()
    weights = sp.csc_matrix(np.stack([_weights(mean, own, hit) for own in genes.values()], axis=1))
    scores = np.zeros((screen.n_cells, len(genes)))
    for at, block in screen.blocks():
        scores[at] = (record.apply(block) @ weights).toarray()
    return dict(zip(genes, scores.T, strict=True))


def phases(s: np.ndarray, g2m: np.ndarray) -> np.ndarray:
    """(cells,) the phase that scores tell, as ``scanpy.tl.score_genes_cell_cycle`` does: that of the higher score, G1 below 0."""
    return np.where((s < 0) & (g2m < 0), "G1", np.where(g2m > s, "G2M", "S"))


def _places(names: GeneNames, symbols: Sequence[str]) -> np.ndarray:
    found = (names.find(symbol) or names.find(RENAMED.get(symbol, symbol)) for symbol in symbols)
    return np.unique([place for places in found for place in places]).astype(int)


def _weights(mean: np.ndarray, genes: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """(all genes,) of a score: the mean of ``genes`` less that of the others in their bins of expression, by rank of ``mean``."""
    own = np.setdiff1d(genes, hit)
    own = own if len(own) >= FEWEST else genes
    rank = np.argsort(np.argsort(mean, kind="stable"), kind="stable")
    bins = rank * BINS // len(mean)
    reference = np.setdiff1d(np.flatnonzero(np.isin(bins, bins[own])), genes)
    weights = np.zeros(len(mean))
    weights[own] = 1 / len(own)
    weights[reference] = -1 / max(len(reference), 1)
    return weights
