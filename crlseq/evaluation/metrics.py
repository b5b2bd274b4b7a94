"""Metrics of predicted against measured conditions; definitions and sources in each docstring.

Mean expressions come as (genes,) for one condition or (conditions, genes) for many; every metric is then one number
or one number per condition. NaN where a metric is undefined. Changes are taken against means of real control cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import cdist

from crlseq.model.losses import Kernel, mmd_squared, multi_kernel, squared_distances

MMD_KERNELS = 5
CHUNK = 1024
LEGACY_BATCH, LEGACY_BANDWIDTH, LEGACY_KERNELS = 32, 1000.0, 10  # of Zhang et al. 2023


def l2_distance(predicted: np.ndarray, measured: np.ndarray) -> Any:
    """|predicted - measured| of mean expressions."""
    return np.linalg.norm(predicted - measured, axis=-1)


def rmse(predicted: np.ndarray, measured: np.ndarray) -> Any:
    """Root of the mean squared difference of mean expressions: L2 / sqrt(genes)."""
    return l2_distance(predicted, measured) / np.sqrt(predicted.shape[-1])


def pearson_delta(predicted: np.ndarray, measured: np.ndarray, reference: np.ndarray) -> Any:
    """corr(predicted - reference, measured - reference) over genes; NaN if either does not vary.

    The reference is the mean of controls, or that of perturbed cells (Systema: Vinas Torne et al. 2025, Nature
    Biotechnology), which leaves out what perturbations have in common.
    """
    a, b = predicted - reference, measured - reference
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    norm = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    # Changes that are rounding errors of the means are none.
    size = np.maximum(np.abs(predicted), np.abs(measured)).max(-1)
    varies = np.minimum(np.abs(a).max(-1), np.abs(b).max(-1)) > 1e-12 * size
    return np.where(varies, (a * b).sum(-1) / np.where(varies, norm, 1.0), np.nan)[()]


def r2_delta(predicted: np.ndarray, measured: np.ndarray, control: np.ndarray) -> Any:
    """1 - |predicted - measured|^2 / |d - mean(d)|^2 over genes, d = measured - control; not clipped."""
    change = measured - control
    total = ((change - change.mean(-1, keepdims=True)) ** 2).sum(-1)
    left = ((predicted - measured) ** 2).sum(-1)
    return np.where(total > 0, 1 - left / np.where(total > 0, total, 1.0), np.nan)[()]


def sign_agreement(predicted: np.ndarray, measured: np.ndarray, control: np.ndarray, genes: np.ndarray) -> Any:
    """Share of the genes marked in bool `genes` whose predicted change has the measured sign; a change of 0 has none."""
    agree = (np.sign(predicted - control) * np.sign(measured - control) > 0) & genes
    n = genes.sum(-1)
    return np.where(n > 0, agree.sum(-1) / np.maximum(n, 1), np.nan)[()]


def mean_absolute_error(predicted: np.ndarray, measured: np.ndarray) -> Any:
    """Mean absolute difference of mean expressions: ``mae`` of the Virtual Cell Challenge and of cell-eval."""
    return np.abs(predicted - measured).mean(-1)


def weighted_mse(predicted: np.ndarray, measured: np.ndarray, weights: np.ndarray) -> Any:
    """Sum of w (predicted - measured)^2 over sum of w, over genes (Mejia et al. 2025, arXiv 2506.22641); NaN without weights."""
    total = weights.sum(-1)
    left = (weights * (predicted - measured) ** 2).sum(-1)
    return np.where(total > 0, left / np.where(total > 0, total, 1.0), np.nan)[()]


def weighted_r2_delta(predicted: np.ndarray, measured: np.ndarray, reference: np.ndarray, weights: np.ndarray) -> Any:
    """R^2_w(delta) of Mejia et al. 2025: 1 - sum w (predicted - measured)^2 / sum w (d - mean_w(d))^2; not clipped.

    d = measured - reference; the reference is the mean of perturbed cells.
    """
    change, total = measured - reference, weights.sum(-1, keepdims=True)
    mean = (weights * change).sum(-1, keepdims=True) / np.where(total > 0, total, 1.0)
    spread = (weights * (change - mean) ** 2).sum(-1)
    left = (weights * (predicted - measured) ** 2).sum(-1)
    return np.where(spread > 0, 1 - left / np.where(spread > 0, spread, 1.0), np.nan)[()]


def gene_weights(t: np.ndarray) -> np.ndarray:
    """Weights (..., genes) of Mejia et al. 2025 from t statistics: |t|, its least and largest put at 0 and 1, squared."""
    size = np.abs(t)
    least, most = size.min(-1, keepdims=True), size.max(-1, keepdims=True)
    return np.asarray(np.where(most > least, (size - least) / np.where(most > least, most - least, 1.0), 0.0) ** 2)


def de_score(strength: np.ndarray, significant: np.ndarray) -> np.ndarray:
    """Share of the n `significant` genes that are among the n with the greatest `strength` of prediction, (conditions,).

    The ``overlap_at_N`` of cell-eval, which the Virtual Cell Challenge has as its DE score, for predictors of means: these
    have no test of their own, and are called significant in the order of |change| over its measured standard error. NaN
    where no gene is significant.
    """
    n = significant.sum(-1)
    found = np.full(len(strength), np.nan)
    for i in np.flatnonzero(n):
        top = np.argpartition(-strength[i], n[i] - 1)[: n[i]]
        found[i] = (significant[i, top] & (strength[i, top] > 0)).sum() / n[i]
    return found


def dynamic_range(score: np.ndarray, worst: np.ndarray, perfect: float) -> np.ndarray:
    """(score - worst) / (perfect - worst), within -1 and 1: the dynamic range fraction of Miller et al. 2025.

    `score` is a ceiling's and `worst` that of a prediction without information: 0 says that a metric cannot tell them apart.
    """
    room = perfect - worst
    return np.asarray(np.where(room != 0, (score - worst) / np.where(room != 0, room, 1.0), np.nan)).clip(-1.0, 1.0)


class Rivals(NamedTuple):
    """The measured rows (rivals, genes) that predictions could be closer to, and which (n, rivals) is a row's own."""

    measured: np.ndarray
    own: np.ndarray


def centroid_accuracy(predicted: np.ndarray, measured: np.ndarray, rivals: Rivals | None = None) -> np.ndarray:
    """(n, genes) each: share of the other measured rows that are farther (Euclidean) from row i than its own."""
    others, own = rivals or Rivals(measured, np.eye(len(measured), dtype=bool))
    n = (~own).sum(1)
    farther = (_distances(predicted, others, 2) > l2_distance(predicted, measured)[:, None]) & ~own
    return np.where(n > 0, farther.sum(1) / np.maximum(n, 1), np.nan)


def perturbation_discrimination(
    predicted: np.ndarray, measured: np.ndarray, left_out: Sequence[np.ndarray], rivals: Rivals | None = None
) -> np.ndarray:
    """1 - rank / n of the own condition among all n by L1 distance of changes (n, genes); rank 0 is the nearest.

    `left_out`: genes that row i does not use, its target genes, as indices or bool (as in cell-eval, Arc Institute 2025):
    who predicts these alone tells conditions apart and knows nothing else.
    """
    others, own = rivals or Rivals(measured, np.eye(len(measured), dtype=bool))
    distance, to_own = _distances(predicted, others, 1), np.abs(predicted - measured).sum(1)
    for i, genes in enumerate(left_out):
        distance[i] -= np.abs(predicted[i, genes] - others[:, genes]).sum(1)
        to_own[i] -= np.abs(predicted[i, genes] - measured[i, genes]).sum()
    # Differences of sums are off by their rounding, and a rival that is as far is not nearer.
    nearer = (distance < (to_own - 1e-12 * np.abs(to_own))[:, None]) & ~own
    n = (~own).sum(1)
    return np.where(n > 0, 1 - nearer.sum(1) / (n + 1), np.nan)


def _distances(a: np.ndarray, b: np.ndarray, p: int) -> np.ndarray:
    """(n, m) distances by absolute values (1) or squares (2); of rows that are all alike, of what knows no condition, once."""
    alike = len(a) > 1 and bool((a == a[0]).all())
    own = a[:1] if alike else a
    if p == 1:  # by so many genes as the processor's cache holds of all rows
        parts = [cdist(own[:, i : i + CHUNK], b[:, i : i + CHUNK], "cityblock") for i in range(0, b.shape[1], CHUNK)]
    found = np.sum(parts, axis=0) if p == 1 else torch.cdist(torch.tensor(own), torch.from_numpy(b)).numpy()
    return np.asarray(np.repeat(found, len(a), axis=0) if alike else found)


def legacy_scores(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """``legacy_mmd2``, ``legacy_r2`` and ``legacy_rmse`` as Zhang et al. 2023 print them, for comparison with such tables.

    Cells (n, genes) in pairs, in batches of 32, averaged over whole batches: biased MMD^2 with ten fixed kernels; R^2 of
    absolute means, clipped at 0, the variance being that of the prediction; and the root of mean squared differences
    between paired cells over that of the measured values. Near-perfect R^2 needs no prediction at all.
    """
    found, kernel = [], Kernel(LEGACY_BANDWIDTH, LEGACY_KERNELS, unbiased=False)
    size = min(LEGACY_BATCH, len(measured))
    for start in range(0, len(measured) - size + 1, size):
        x, y = predicted[start : start + size], measured[start : start + size]
        a, b = x.mean(0), y.mean(0)
        mmd = mmd_squared(torch.from_numpy(x), torch.from_numpy(y), kernel)
        r2 = max(1 - float(((a - b) ** 2).sum() / ((a - a.mean()) ** 2).sum()), 0.0)
        found.append((float(mmd), r2, float(np.sqrt(((x - y) ** 2).mean() / (y**2).mean()))))
    return dict(zip(("legacy_mmd2", "legacy_r2", "legacy_rmse"), map(float, np.mean(found, axis=0)), strict=True))


class Sample:
    """Cells (n, genes) and the squared distances among them, which several comparisons share."""

    def __init__(self, cells: np.ndarray, within: torch.Tensor | None = None) -> None:
        self.cells = torch.from_numpy(cells).double()
        self.within = squared_distances(self.cells, self.cells).fill_diagonal_(0) if within is None else within

    def moved(self, change: np.ndarray) -> Sample:
        """Every cell moved by the same `change` (genes,), which leaves the distances among them."""
        return Sample(self.cells.numpy() + change, self.within)


def two_samples(a: Sample, b: Sample, bandwidth: float) -> tuple[float, float]:
    """Unbiased MMD^2 (Gretton et al. 2012) with five kernels around `bandwidth`, and energy distance.

    The energy distance 2 E|x - y| - E|x - x'| - E|y - y'| is without pairs of a cell with itself, too: a U-statistic
    (Székely and Rizzo 2013), 0 on average for cells of one distribution, and so at times negative.
    """
    between = squared_distances(a.cells, b.cells)
    mmd = energy = 0.0
    for sample in (a, b):
        n, kernels = len(sample.cells), multi_kernel(sample.within, bandwidth, MMD_KERNELS)
        mmd += float(kernels.sum() - n * MMD_KERNELS) / (n * (n - 1))  # each kernel is 1 on the diagonal
        energy -= float(sample.within.sqrt().sum()) / (n * (n - 1))
    mmd -= 2 * float(multi_kernel(between, bandwidth, MMD_KERNELS).mean())
    return mmd, energy + 2 * float(between.sqrt().mean())
