"""Principal components of a screen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import LinearOperator, svds

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
    rows = data.x[cells]
    center = rows.mean(0) if isinstance(rows, np.ndarray) else data.moments(cells)[0].astype(np.float32)
    if q < min(data.n_genes, len(cells)):
        axes = _leading(rows, center, q, seed)
    else:  # which ARPACK cannot: all components
        axes = np.linalg.svd(data.dense(cells) - center, full_matrices=False)[2][:q]
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1))
    scores = np.empty((data.x.shape[0], q), dtype=np.float32)
    pieces, start = data.pieces(np.arange(len(scores))), 0
    for own in mapped(partial(_scores, data.x, center, axes), pieces, torch.get_num_threads()):
        scores[start : start + len(own)] = own
        start += len(own)
    adjusted = scores if data.adjustment is None else data.adjustment.for_tests(scores)
    return Projection(scores, center.astype(np.float64), axes.T.astype(np.float64), adjusted)


def _leading(x: sp.csr_matrix | np.ndarray, center: np.ndarray, q: int, seed: int) -> np.ndarray:
    """Leading axes (q, genes) of cells about their `center` (genes,) by Lanczos steps, which leave a sparse matrix sparse.

    Threads share the rows, those of the transpose too: no sum depends on how many there are.
    """
    threads, v0 = torch.get_num_threads(), np.random.RandomState(seed).uniform(-1, 1, min(x.shape))
    if isinstance(x, np.ndarray):
        return np.asarray(svds(x - center, q, v0=v0)[2][::-1])

    def shared(matrix: sp.csr_matrix) -> list[Any]:
        edges = np.linspace(0, matrix.shape[0], threads + 1).astype(int)
        return [matrix[start:stop] for start, stop in pairwise(edges)]

    cells, genes = shared(x), shared(sp.csr_matrix(x.T))
    with ThreadPoolExecutor(threads) as pool:

        def product(parts: list[Any], v: np.ndarray) -> np.ndarray:
            return np.concatenate([*pool.map(lambda part: part @ v, parts)])

        def forward(v: np.ndarray) -> np.ndarray:
            return np.asarray(product(cells, v) - center @ v)

        def back(u: np.ndarray) -> np.ndarray:
            return np.asarray(product(genes, u) - np.multiply.outer(center, u.sum(0)))

        centred = LinearOperator(x.shape, dtype=x.dtype, matvec=forward, matmat=forward, rmatvec=back, rmatmat=back)
        return np.asarray(svds(centred, q, v0=v0)[2][::-1])


def _scores(x: Expression, center: np.ndarray, axes: np.ndarray, cells: np.ndarray) -> np.ndarray:
    return np.asarray(x[cells] @ axes.T - center @ axes.T, dtype=np.float32)
