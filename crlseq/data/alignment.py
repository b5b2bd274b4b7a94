"""Genes of other files beside those of a fit: found by name, filled where they are missing, and said aloud."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

from crlseq.data.matrix import Screen
from crlseq.data.preprocess import Preprocessing
from crlseq.errors import InputError

MIN_COMMON = 0.5  # share of the fitted genes below which a file is another measurement


@dataclass(frozen=True)
class Alignment:
    """``present`` indices of fitted genes that a file has, and their ``columns`` there; ``n_fitted`` of all."""

    present: np.ndarray
    columns: np.ndarray
    n_fitted: int

    def take(self, block: sp.csr_matrix) -> sp.csr_matrix:
        """(cells, present) values of normalised cells (cells, genes of the file)."""
        return block[:, self.columns]

    def filled(self, values: np.ndarray, fill: np.ndarray) -> np.ndarray:
        """(cells, fitted genes): `values` (cells, present), and `fill` (fitted genes,) where genes are missing."""
        whole = np.tile(np.asarray(fill, dtype=values.dtype), (len(values), 1))
        whole[:, self.present] = values
        return whole


def align(record: Preprocessing, screen: Screen) -> tuple[Alignment, list[str]]:
    """Find the fitted genes in a screen by name; sentences on what is missing there and what is dropped.

    InputError if fewer than half of the fitted genes are there.
    """
    places = screen.genes.get_indexer(pd.Index(record.genes))
    present, source = np.flatnonzero(places >= 0), screen.source
    n, missing = len(places), np.flatnonzero(places < 0)
    first = "".join(repr(record.genes[j]) for j in missing[:1])
    lacking = f"{source}: {len(missing)} of the {n} fitted genes are missing, first {first}."
    if len(present) < MIN_COMMON * n:
        raise InputError(lacking, "Give cells with the same genes under the same names.")
    notes = [f"{lacking} They get their mean over the fit's control cells."] if first else []
    dropped = screen.n_genes - len(present)
    if screen.n_genes > record.n_genes_in_file or (len(missing) and dropped):
        notes.append(f"{source}: {dropped} of its {screen.n_genes} genes were not fitted and are ignored.")
    if record.values == "counts" and screen.n_genes != record.n_genes_in_file:
        notes.append(
            f"{source} has {screen.n_genes} genes, the fitted file {record.n_genes_in_file}: counts are scaled by "
            "totals over the genes present."
        )
    return Alignment(present, places[present], n), notes
