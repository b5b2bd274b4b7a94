"""Principal components of a screen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sklearn.decomposition import PCA

from crlseq.data import splits
from crlseq.data.cluster import mapped
from crlseq.data.dataset import Expression, PerturbSeqData

MAX_CELLS = 10_000  # components are estimated on at most so many cells


@dataclass(frozen=True)
class Projection:
    """Scores (cells, q) = (x - center) @ axes; center (genes,), axes (genes, q); and scores without what covariates do."""

    scores: np.ndarray
    center: np.ndarray
    axes: np.ndarray
    adjusted: np.ndarray


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
    pieces, start = data.pieces(np.arange(len(scores))), 0
    for own in mapped(partial(_scores, data.x, pca), pieces, torch.get_num_threads()):
        scores[start : start + len(own)] = own
        start += len(own)
    adjusted = scores if data.adjustment is None else data.adjustment.for_tests(scores)
    return Projection(scores, pca.mean_.astype(np.float64), pca.components_.T.astype(np.float64), adjusted)


def _scores(x: Expression, pca: PCA, cells: np.ndarray) -> np.ndarray:
    return np.asarray(pca.transform(x[cells]), dtype=np.float32)
