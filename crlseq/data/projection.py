"""Principal components of a screen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData

MAX_CELLS = 10_000  # components are estimated on at most so many cells


@dataclass(frozen=True)
class Projection:
    """Scores (cells, q) = (x - center) @ axes; center (genes,), axes (genes, q)."""

    scores: np.ndarray
    center: np.ndarray
    axes: np.ndarray


def principal_components(data: PerturbSeqData, n_components: int, seed: int) -> Projection:
    """Float32 scores of every cell on principal components of the training cells; q <= `n_components`."""
    cells = np.flatnonzero(data.split == splits.TRAIN)
    if len(cells) > MAX_CELLS:
        cells = np.sort(np.random.default_rng([seed, 2]).choice(cells, MAX_CELLS, replace=False))
    q = min(n_components, data.n_genes, len(cells) - 1)
    if q < min(data.n_genes, len(cells)):
        pca = PCA(q, svd_solver="arpack", random_state=seed).fit(data.x[cells])  # leaves a sparse matrix sparse
    else:
        pca = PCA(q, svd_solver="full").fit(data.dense(cells))  # which ARPACK cannot: all components
    scores = np.empty((data.x.shape[0], q), dtype=np.float32)
    for rows, x in data.blocks(np.arange(len(scores))):
        scores[rows] = pca.transform(x)
    return Projection(scores, pca.mean_.astype(np.float64), pca.components_.T.astype(np.float64))
