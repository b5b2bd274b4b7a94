"""Whitened components of cells, in which a program's effect is a straight line.

Counts: a negative-binomial factor model with a free intercept per cell (GLM-PCA, Townes et al. 2019, Genome Biology 20),

    x_ig ~ NB(mean exp(s_i + b_g + v_i l_g), variance mean + alpha mean^2),

by alternating Fisher scoring for the cells (v_i, s_i) and the genes (l_g, b_g). The free intercept ``s_i`` matters:
totals are a sum over genes, so that dividing by them adds the log-sum-exp of all programs, which is not linear
in the latents; with ``s_i`` estimated a log-linear mixing stays exactly linear. Components are whitened by the mean
information of a cell, so that measurement noise is about 1 in every direction, and rotated to principal axes.
Other values: principal components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData

Floats = NDArray[np.float64]
CHUNK = 1024
ROUNDS = 4  # alternations between cells and genes
MAX_STEPS = 20  # scoring steps of a cell once the genes are known; it takes about 6
TOLERANCE = 1e-3  # of a component's own deviation
MAX_LOADING_CELLS = 10_000  # loadings are estimated on at most so many cells
MAX_GENES = 1_000  # and on the genes that vary most beyond counting noise: the cost grows with genes and not with news
RIDGE_GENES = 1e-5  # per cell
MAX_ETA = 9.0
ENOUGH_CONTROLS = 20  # in a batch, to centre it on its own


def whitened_components(data: PerturbSeqData, n_components: int, seed: int) -> Floats:
    """(cells, q) components of every cell, centred on the control cells of its batch, overall deviation 1.

    Estimated on training cells alone; q is `n_components` or what genes and cells allow. Cells that take no part
    are 0. The perturbed genes themselves are left out: that a knock-out lowers its own transcript is its assay and
    no program, yet it would give every perturbation a direction of its own.
    """
    genes = np.flatnonzero(~np.isin(data.genes, data.perturbation_names))
    if len(genes) < 2:
        genes = np.arange(data.n_genes)
    used = np.flatnonzero(data.split != splits.UNUSED)
    trained = np.flatnonzero(data.split == splits.TRAIN)
    q = min(n_components, len(genes) - (data.totals is not None), len(trained) - 1)  # counts lose one to the size
    if len(trained) > MAX_LOADING_CELLS:
        rng = np.random.default_rng([seed, 7])
        trained = np.sort(rng.choice(trained, MAX_LOADING_CELLS, replace=False))
    scores = np.zeros((len(data.split), q))
    if data.totals is not None:
        scores[used] = count_components(lambda index: data.counts(index)[:, genes], trained, used, q)
    else:
        center, axes = _principal_axes(data.dense(trained)[:, genes].astype(np.float64), q)
        for rows in _chunks(len(used)):
            scores[used[rows]] = (data.dense(used[rows])[:, genes] - center) @ axes
    _centre_on_controls(scores, data, used)
    train = data.split == splits.TRAIN
    return scores / max(float((scores[train] - scores[train].mean(0)).std()), 1e-12)


def _centre_on_controls(scores: Floats, data: PerturbSeqData, used: np.ndarray) -> None:
    controls = data.cells(0, splits.TRAIN)
    overall = scores[controls].mean(0)
    for b in np.unique(data.batch[used]):
        own = controls[data.batch[controls] == b]
        cells = used[data.batch[used] == b]
        scores[cells] -= scores[own].mean(0) if len(own) >= ENOUGH_CONTROLS else overall


def count_components(
    counts: Callable[[np.ndarray], sp.csr_matrix], fitted: np.ndarray, cells: np.ndarray, n_components: int
) -> Floats:
    """(len(cells), n_components) whitened components of counts, loadings estimated on the cells `fitted`.

    Parameters
    ----------
    counts
        Cell indices to their counts (cells, genes).

    Notes
    -----
    Cost: cells x genes x n_components^2, genes at most `MAX_GENES`.
    """
    x, genes, axes = _select(counts(fitted), n_components)
    alpha = dispersion(x)
    loadings, intercept, prior = _fit_loadings(x, axes, alpha)
    scores = np.empty((len(cells), len(loadings)))
    information = np.zeros(x.shape[1])
    for rows in _chunks(len(cells)):
        part = counts(cells[rows])[:, genes].toarray().astype(np.float64)
        size = np.maximum(part.sum(1, keepdims=True), 1) / np.exp(intercept).sum()
        start = np.zeros((len(part), len(loadings)))
        scores[rows], s = _score(part, start, np.log(size), loadings, intercept, prior, alpha, MAX_STEPS)
        information += _moments(part, s + intercept + scores[rows] @ loadings, alpha)[0].sum(0) / len(cells)
    # Whitening: v L with L L' the mean information of a cell about v, its intercept profiled out.
    centred = loadings - (loadings @ information)[:, None] / information.sum()
    precision = (centred * information) @ centred.T
    q = len(loadings)
    root = np.linalg.cholesky(precision + (1e-9 * np.trace(precision) / q + 1e-12) * np.eye(q))
    whitened = scores @ root
    axes = _principal_axes(whitened, q)[1]
    return np.asarray(whitened @ axes)


def dispersion(counts: Floats) -> float:
    """Common NB dispersion by moments: the lower quartile over genes, since biology only adds variance."""
    totals = counts.sum(1, keepdims=True)
    size = totals / np.median(totals)
    rate = counts / size
    mean, variance = rate.mean(0), rate.var(0)
    used = mean > 0.1
    if not used.any():
        return 0.1
    each = (variance[used] - mean[used] * (1 / size).mean()) / mean[used] ** 2
    return float(np.clip(np.quantile(each, 0.25), 1e-3, 2))


def _select(counts: sp.csr_matrix, n_components: int) -> tuple[Floats, np.ndarray, Floats]:
    """Dense counts of the genes that vary most, those genes, and principal axes of their residuals."""
    detected = np.flatnonzero(np.asarray((counts > 0).sum(0)).ravel() > 0)
    x = counts[:, detected].toarray().astype(np.float64)
    x = x[x.sum(1) > 0]  # a cell without any of these genes has no size, and says nothing about loadings
    size = x.sum(1, keepdims=True) / np.median(x.sum(1))
    intercept = np.log((x / size).mean(0))
    z = np.clip((x / size / np.exp(intercept) - 1) * _residual_weight(intercept, dispersion(x)), -6, 6)
    kept = np.sort(np.argsort(-z.var(0), kind="stable")[:MAX_GENES])
    x = x[:, kept]
    return x[x.sum(1) > 0], detected[kept], _principal_axes(z[:, kept], min(n_components, len(kept)))[1]


def _residual_weight(intercept: Floats, alpha: float) -> Floats:
    """1 / sd of a relative residual of an average cell."""
    rate = np.exp(intercept)
    return np.asarray(np.sqrt(rate / (1 + alpha * rate)))


def _fit_loadings(x: Floats, axes: Floats, alpha: float) -> tuple[Floats, Floats, Floats]:
    """Loadings (q, genes), intercepts (genes,) and prior precisions (q,) by alternating scoring."""
    n, g = x.shape
    q = axes.shape[1]
    size = x.sum(1, keepdims=True) / np.median(x.sum(1))
    s, b = np.log(size), np.log((x / size).mean(0))
    weight = _residual_weight(b, alpha)
    z = np.clip((x / size / np.exp(b) - 1) * weight, -6, 6)
    v, loadings = (z - z.mean(0)) @ axes, (axes / weight[:, None]).T
    for i in range(ROUNDS):
        prior = 1 / np.maximum((v**2).mean(0), 1e-3)
        for rows in _chunks(n):
            v[rows], s[rows] = _score(x[rows], v[rows], s[rows], loadings, b, prior, alpha, 2 if i == 0 else 1)
        mean = v.mean(0)
        b, v = b + mean @ loadings, v - mean
        h = np.zeros((g, (q + 1) ** 2))
        gradient = np.zeros((g, q + 1))
        for rows in _chunks(n):
            w, score = _moments(x[rows], s[rows] + b + v[rows] @ loadings, alpha)
            design = np.column_stack([v[rows], np.ones(len(w))])
            h += w.T @ (design[:, :, None] * design[:, None]).reshape(len(w), -1)
            gradient += score.T @ design
        ridge = RIDGE_GENES * n * np.eye(q + 1)
        step = np.clip(np.linalg.solve(h.reshape(g, q + 1, q + 1) + ridge, gradient[..., None])[..., 0], -1, 1)
        loadings, b = loadings + step[:, :q].T, b + step[:, q]
    return loadings, b, 1 / np.maximum((v**2).mean(0), 1e-3)


def _score(
    x: Floats, v: Floats, s: Floats, loadings: Floats, b: Floats, prior: Floats, alpha: float, steps: int
) -> tuple[Floats, Floats]:
    """Fisher scoring of cells: components (n, q) and intercepts (n, 1)."""
    q, g = loadings.shape
    design = np.vstack([loadings, np.ones(g)])  # (q + 1, g)
    products = (design[:, None] * design[None]).reshape((q + 1) ** 2, g).T
    limit = 3 / np.sqrt(prior.min())
    for _ in range(steps):
        w, score = _moments(x, s + b + v @ loadings, alpha)
        h = (w @ products).reshape(-1, q + 1, q + 1) + np.diag(np.append(prior, 0) + 1e-6)
        gradient = score @ design.T
        gradient[:, :q] -= v * prior
        step = np.clip(np.linalg.solve(h, gradient[..., None])[..., 0], -limit, limit)
        v, s = v + step[:, :q], s + step[:, q:]
        if (np.abs(step[:, :q]) * np.sqrt(prior)).max() < TOLERANCE:
            break
    return v, s


def _moments(x: Floats, eta: Floats, alpha: float) -> tuple[Floats, Floats]:
    """Working weights and scores of negative-binomial counts with log mean `eta`."""
    mean = np.exp(np.clip(eta, -12, MAX_ETA))
    return mean / (1 + alpha * mean), (x - mean) / (1 + alpha * mean)


def _principal_axes(values: Floats, n_components: int) -> tuple[Floats, Floats]:
    """Mean (features,) and first principal axes (features, n_components)."""
    center = values.mean(0)
    centred = values - center
    return center, np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :n_components]


def _chunks(n: int) -> Iterator[slice]:
    return (slice(i, min(n, i + CHUNK)) for i in range(0, n, CHUNK))
