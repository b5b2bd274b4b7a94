"""Principal components of a screen, and how many directions its perturbations move the mean in."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData

TRACY_WIDOM_99 = 2.02  # 99th percentile of the Tracy-Widom law for real data
MAX_CELLS = 50_000  # components are estimated on at most so many cells


def principal_components(data: PerturbSeqData, n_components: int, seed: int) -> np.ndarray:
    """(cells, q) float64 scores of every cell on components of the training cells; q <= `n_components`."""
    cells = np.flatnonzero(data.split == splits.TRAIN)
    if len(cells) > MAX_CELLS:
        cells = np.sort(np.random.default_rng([seed, 2]).choice(cells, MAX_CELLS, replace=False))
    q = min(n_components, data.n_genes - 1, len(cells) - 1)
    pca = PCA(q, svd_solver="arpack", random_state=seed).fit(data.x[cells])
    return np.asarray(pca.transform(data.x), dtype=np.float64)


def effect_rank(scores: np.ndarray, data: PerturbSeqData) -> int:
    """Number of independent directions in which perturbations move the mean beyond sampling noise.

    With cells whitened by the covariance within conditions, the matrix with rows
    ``sqrt(n_c) (mean_c - grand mean)`` has independent standard normal noise; its singular values above the
    largest that noise alone would give (Johnstone 2001, Annals of Statistics 29: square root of
    (sqrt(K) + sqrt(q))^2 plus the 99 % Tracy-Widom deviation) are effects. At least 1, at most the number of
    single perturbations.
    """
    groups = [cells for cells in data.cells_by_condition(splits.TRAIN) if len(cells) >= 2]
    counts = np.array([len(cells) for cells in groups], dtype=float)
    means = np.stack([scores[cells].mean(0) for cells in groups])
    centered = np.concatenate([scores[cells] - mean for cells, mean in zip(groups, means, strict=True)])
    values, vectors = np.linalg.eigh(centered.T @ centered / max(1.0, counts.sum() - len(groups)))
    kept = values > values.max() * 1e-10
    whitening = vectors[:, kept] / np.sqrt(values[kept])
    deviations = np.sqrt(counts)[:, None] * (means - counts @ means / counts.sum()) @ whitening
    k, q = np.sqrt(len(groups) - 1), np.sqrt(kept.sum())
    edge = (k + q) ** 2 + TRACY_WIDOM_99 * (k + q) * (1 / k + 1 / q) ** (1 / 3)
    rank = int((np.linalg.svd(deviations, compute_uv=False) ** 2 > edge).sum())
    return min(max(rank, 1), len(data.perturbation_names))
