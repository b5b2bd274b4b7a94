"""Vectors of genes from the screen itself: with what a gene rises and falls in control cells."""

from __future__ import annotations

import numpy as np

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.embeddings import Embeddings
from crlseq.errors import InputError

MAX_CELLS, N_COMPONENTS = 3000, 20


def coexpression(data: PerturbSeqData) -> Embeddings:
    """Vectors (fitted genes, d) of the fitted genes, d <= `N_COMPONENTS`: correlations with components of control cells.

    Principal components of training controls, of genes scaled to variance 1 within each batch, so that batches are no
    co-expression; of those beyond what chance makes of independent genes. InputError if there are none.
    """
    cells = data.cells(0, splits.TRAIN)
    cells = cells[np.linspace(0, len(cells) - 1, min(MAX_CELLS, len(cells))).astype(int)]
    x, batch = np.asarray(data.dense(cells), dtype=float), data.batch[cells]
    for b in np.unique(batch):
        x[batch == b] -= x[batch == b].mean(0)
    scale = np.linalg.norm(x, axis=0)
    varies = scale > 1e-9
    if not varies.any():
        raise InputError(
            "The control cells do not vary, so genes have no co-expression.", "Give a table of gene vectors."
        )
    x = np.where(varies, x / np.where(varies, scale, 1.0), 0.0)
    _, values, axes = np.linalg.svd(x, full_matrices=False)
    # What independent genes would reach at most by chance (Marchenko and Pastur 1967): beyond it there is co-expression.
    kept = np.flatnonzero(values[:N_COMPONENTS] ** 2 > (1 + np.sqrt(varies.sum() / len(cells))) ** 2)
    if not len(kept):
        raise InputError("No genes vary together in the control cells.", "Give a table of gene vectors.")
    vectors = (values[kept, None] * axes[kept]).T[varies]
    vectors *= np.where(vectors[np.abs(vectors).argmax(0), np.arange(len(kept))] < 0, -1.0, 1.0)  # signs are arbitrary
    genes = tuple(np.array(data.preprocessing.genes, dtype=object)[varies])
    return Embeddings(genes, vectors.astype(np.float32).astype(float))
