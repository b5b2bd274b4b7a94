"""Whitened components of cells, in which a program's effect is a straight line.

Counts: a negative-binomial factor model with a free size per cell (`crlseq.discovery.factor_model`). With the size
estimated a log-linear mixing stays exactly linear; dividing by totals adds the log-sum-exp of all programs, which is not.
Components are whitened by the mean information of a cell, so that measurement noise is about 1 in every direction, and
rotated to principal axes. Other values: principal components, on the CPU.
"""

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from crlseq.data import splits
from crlseq.data.allocator import give_back
from crlseq.data.cluster import mapped, on_one_machine
from crlseq.data.dataset import Cells, Expression, PerturbSeqData, counts_of, dense_of
from crlseq.data.preprocess import Preprocessing
from crlseq.discovery.device import CPU, device_for
from crlseq.discovery.factor_model import (
    CHUNK,
    FactorModel,
    Information,
    chunks_of,
    fit_factors,
    low_rank_information,
    score,
)
from crlseq.errors import InputError
from crlseq.threads import on_threads

Floats = NDArray[np.float64]
Scores = NDArray[np.float32]  # of all cells: what is held of a screen of any size
MAX_STEPS = 20  # scoring steps of a cell once the genes are known; it takes about 6
# Precision of a cell's final components, of which their own would be 1: how far they are drawn towards 0 depends on the
# cell's counts, so that a shift would make false variance, and silenced genes a false loss of it. Some, for poor cells.
SCORE_PRIOR = 0.1
ROUNDS = 15  # of the fit of loadings, about; each makes `PRODUCTS` of cells and genes with pairs of components:
PRODUCTS = 4
MAX_LOADING_CELLS = 10_000  # loadings are estimated on at most so many cells
MAX_GENES = 1_000  # and on the genes that vary most beyond counting noise: the cost grows with genes and not with news
NULL = 1e-6  # of the leading variance: what a principal component has at least that is no rounding error
_ONE_READER = Lock()
ENOUGH_CONTROLS = 20  # in a batch, to centre it on its own


def whitened_components(
    data: PerturbSeqData, most: int, least: int, seed: int, device: torch.device = CPU
) -> tuple[Scores, float | None]:
    """(cells, q) components of every cell, centred on the control cells of its batch, without what covariates do,
    overall deviation 1; and their measurement noise, the same variance in every component, where it is known: in counts, and in values without noise.

    Estimated on training cells alone; q is what the data have beyond noise, from `least` to `most` as far as genes and
    cells allow. Cells that take no part are 0. Perturbed genes are left out: that a knock-out lowers its own transcript
    would give it a direction of its own. Components of many counts are computed on the `device` of the fit.
    """
    genes = np.setdiff1d(np.arange(data.n_genes), [gene for own in data.own_genes for gene in own])
    if len(genes) < 2:
        genes = np.arange(data.n_genes)
    used = np.flatnonzero(data.split != splits.UNUSED)
    trained = np.flatnonzero(data.split == splits.TRAIN)
    most = min(most, len(genes) - (data.totals is not None), len(trained) - 1)  # counts lose one to the size
    if len(trained) > MAX_LOADING_CELLS:
        rng = np.random.default_rng([seed, 7])
        trained = np.sort(rng.choice(trained, MAX_LOADING_CELLS, replace=False))
    noise: float | None = 1.0
    if data.totals is not None:
        counts = partial(_some_counts, data.x, data.preprocessing, genes)
        try:
            own = count_components(counts, trained, used, most, least, data.with_totals, device)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise _too_far_apart() from error
    else:
        own, noise = _principal_components(partial(_some_values, data.x, genes), trained, used, most, least)
    scores = np.zeros((len(data.split), own.shape[1]), dtype=np.float32)
    scores[used] = own
    _centre_on_controls(scores, data, used)
    if data.adjustment is not None:
        data.adjustment.take_off(scores, used)
    if not np.isfinite(scores).all():
        raise _too_far_apart()
    deviation = max(_deviation(scores, np.flatnonzero(data.split == splits.TRAIN)), 1e-12)
    scores /= deviation
    return scores, None if noise is None else noise / deviation**2


def _too_far_apart() -> InputError:
    what = "The values of these cells are too far apart: their components are not finite."
    return InputError(
        what, "Look at the largest value that `crlseq check` tells: a few huge ones may stand for missing ones."
    )


def _principal_components(
    values: Callable[[np.ndarray], Floats], fitted: np.ndarray, cells: np.ndarray, most: int, least: int
) -> tuple[Scores, float | None]:
    """Principal components of values, without those that are rounding errors; where there are such, that is the noise."""
    center, axes, variance = _principal_axes(values(fitted).astype(np.float64), most)
    floor = NULL * float(variance[0])
    kept = max(int((variance > floor).sum()), min(least, len(variance)))
    scores = np.empty((len(cells), kept), dtype=np.float32)
    chunks = list(chunks_of(len(cells)))
    made = mapped(partial(_projected, values, center, axes[:, :kept]), (cells[rows] for rows in chunks))
    for rows, own in zip(chunks, made, strict=True):
        scores[rows] = own
    return scores, floor if kept < len(variance) else None


def _centre_on_controls(scores: Scores, data: PerturbSeqData, used: np.ndarray) -> None:
    controls = data.cells(0, splits.TRAIN)
    overall = scores[controls].mean(0, dtype=np.float64)
    for b in np.unique(data.batch[used]):
        own = controls[data.batch[controls] == b]
        cells = used[data.batch[used] == b]
        center = scores[own].mean(0, dtype=np.float64) if len(own) >= ENOUGH_CONTROLS else overall
        for rows in chunks_of(len(cells)):
            scores[cells[rows]] -= center


def _deviation(scores: Scores, cells: np.ndarray) -> float:
    """Standard deviation about the cells' mean, over all components together."""
    squares, sums = 0.0, np.zeros(scores.shape[1])
    for rows in chunks_of(len(cells)):
        part = scores[cells[rows]].astype(np.float64)
        squares += float((part**2).sum())
        sums += part.sum(0)
    return float(np.sqrt(max(squares - float((sums**2).sum()) / len(cells), 0.0) / (len(cells) * scores.shape[1])))


def count_components(
    counts: Callable[[Any], sp.csr_matrix],
    fitted: np.ndarray,
    cells: np.ndarray,
    most: int,
    least: int = 1,
    of: Callable[[np.ndarray], Any] = lambda index: index,
    device: torch.device = CPU,
) -> Scores:
    """(len(cells), q) whitened components of counts, loadings estimated on the cells `fitted`, `least` <= q <= `most`.

    ``counts(of(index))`` gives those (cells, genes) of indices. Measurement noise is about 1 in every direction. Cost:
    cells x genes (at most `MAX_GENES`) x q^2 a round of the fit, which decides whether all is done on the `device`; on a
    cluster nothing is.
    """
    x, genes, axes = _select(counts(of(fitted)), most)
    give_back()  # several times the counts: threads have places of their own, and cannot use what this one freed
    if on_one_machine():
        pairs = (axes.shape[1] + 1) * (axes.shape[1] + 2) / 2
        device = device_for(2 * ROUNDS * PRODUCTS * x.shape[0] * x.shape[1] * pairs, device)
    else:
        device = CPU
    dense = torch.from_numpy(x.astype(np.float32).toarray()).to(device)
    threads = torch.get_num_threads()
    with on_threads(1):  # chunks share the threads, and no sum depends on how many there are
        model, v = fit_factors(dense, axes, dispersion(x), least, threads)
        guess = model.regression(dense, v)
        some = dense[:CHUNK]
        weights = model.working(some, v[: len(some)], model.log_size(some))[0]
        rough = low_rank_information(model.loadings, weights)
    q = v.shape[1]
    scores = np.empty((len(cells), q), dtype=np.float32)
    weight, sums, products = np.zeros(x.shape[1]), np.zeros(q), np.zeros((q, q))
    chunks = list(chunks_of(len(cells)))
    scored = partial(_scored, counts, genes, model, guess, rough)
    for rows, (v, own) in zip(chunks, mapped(scored, (of(cells[rows]) for rows in chunks), threads), strict=True):
        scores[rows] = v.numpy()
        sums += v.double().sum(0).numpy()
        products += (v.double().T @ v.double()).numpy()
        weight += own.numpy() / len(cells)
    information = model.information(torch.from_numpy(weight).to(device)).cpu().numpy()
    turned = _whitening(information, products - np.outer(sums, sums) / len(cells))
    for rows in chunks:
        scores[rows] = scores[rows].astype(np.float64) @ turned
    give_back()  # what threads freed, beside which the likelihood takes as much again
    return scores


def _scored(
    counts: Callable[[Any], sp.csr_matrix],
    genes: np.ndarray,
    model: FactorModel,
    guess: Tensor,
    rough: Information,
    cells: Any,
) -> tuple[Tensor, Tensor]:
    """Components (n, q) of cells, and the sum of their working weights (genes,)."""
    with _ONE_READER:
        own = counts(cells)
    part = torch.from_numpy(own[:, genes].astype(np.float32).toarray()).to(model.loadings.device)
    # Any start leads to the same end, for the likelihood is concave; this one halves the way.
    v, s, _ = score(part, model.residuals(part) @ guess, model.log_size(part), model, MAX_STEPS, SCORE_PRIOR, rough)
    return v.cpu(), model.working(part, v, s)[0].double().sum(0).cpu()


def _some_counts(x: Expression, record: Preprocessing, genes: np.ndarray, cells: Cells) -> sp.csr_matrix:
    return counts_of(x, record, cells)[:, genes]


def _some_values(x: Expression, genes: np.ndarray, index: np.ndarray) -> Floats:
    return np.asarray(dense_of(x, index)[:, genes])


def _projected(values: Callable[[np.ndarray], Floats], center: Floats, axes: Floats, index: np.ndarray) -> Floats:
    return (values(index) - center) @ axes


def _whitening(information: Floats, spread: Floats) -> Floats:
    """(q, q) from components drawn towards 0 to components of unit measurement noise on their principal axes.

    With J the mean information of a cell, components are drawn towards 0 by J (J + `SCORE_PRIOR` I)^-1.
    """
    value, vector = np.linalg.eigh(information)
    value = np.maximum(value, 1e-9 * value[-1] + 1e-12)
    white = vector * (np.sqrt(value) * (1 + SCORE_PRIOR / value))
    return np.asarray(white @ np.linalg.eigh(white.T @ spread @ white)[1][:, ::-1])


def dispersion(counts: Floats | sp.csr_matrix) -> float:
    """Common NB dispersion by moments: the lower quartile over genes, since biology only adds variance."""
    return _dispersion(*_relative(sp.csr_matrix(counts, dtype=np.float64)))


def _dispersion(size: Floats, rate: sp.csr_matrix) -> float:
    mean, variance = _moments_by_gene(rate, np.zeros(rate.shape[1]))
    used = mean > 0.1
    if not used.any():
        return 0.1
    each = (variance[used] - mean[used] * (1 / size).mean()) / mean[used] ** 2
    return float(np.clip(np.quantile(each, 0.25), 1e-3, 2))


def _relative(counts: sp.csr_matrix) -> tuple[Floats, sp.csr_matrix]:
    """Sizes (cells,) of median 1, and counts divided by them."""
    totals = np.asarray(counts.sum(1)).ravel()
    size = totals / np.median(totals)
    rate = counts.copy()
    rate.data /= np.repeat(size, np.diff(rate.indptr))
    return size, rate


def _moments_by_gene(x: sp.csr_matrix, zeros: Floats) -> tuple[Floats, Floats]:
    """Mean and variance (genes,) of values of which those stored nowhere are `zeros` (genes,)."""
    n, g = x.shape
    apart = x.data - zeros[x.indices]
    first, second = (np.bincount(x.indices, apart**power, minlength=g) / n for power in (1, 2))
    return zeros + first, second - first**2


def _select(counts: sp.csr_matrix, n_components: int) -> tuple[sp.csr_matrix, np.ndarray, Floats]:
    """Counts of the genes that vary most, those genes, and principal axes of their residuals."""
    detected = np.flatnonzero(counts.getnnz(0) > 0)
    x = sp.csr_matrix(counts[:, detected], dtype=np.float64)
    del counts  # each copy is as large as the cells
    if (x.getnnz(1) == 0).any():  # a cell without any of these genes has no size, and says nothing about loadings
        x = x[x.getnnz(1) > 0]
    size, rate = _relative(x)
    alpha = _dispersion(size, rate)
    mean = np.asarray(rate.mean(0)).ravel()
    weight = _residual_weight(mean, alpha)
    residual, zeros = rate, np.clip(-weight, -6, 6)
    residual.data = np.clip((rate.data / mean[rate.indices] - 1) * weight[rate.indices], -6, 6)
    kept = np.sort(np.argsort(-_moments_by_gene(residual, zeros)[1], kind="stable")[:MAX_GENES])
    residual.data -= zeros[residual.indices]
    values = residual[:, kept].toarray()
    values += zeros[kept]
    axes = _principal_axes(values, min(n_components, len(kept)))[1]
    x = x[:, kept]
    return x[x.getnnz(1) > 0], detected[kept], axes


def _residual_weight(rate: Floats, alpha: float) -> Floats:
    """1 / sd of a relative residual of an average cell."""
    return np.asarray(np.sqrt(rate / (1 + alpha * rate)))


def _principal_axes(values: Floats, n_components: int) -> tuple[Floats, Floats, Floats]:
    """Mean (features,), first principal axes (features, n_components) and their variances, the largest first.

    The values are left centred: they may be as large as the screen.
    """
    center = values.mean(0)
    values -= center
    n = values.shape[1]
    squares, axes = scipy.linalg.eigh(values.T @ values, subset_by_index=(max(0, n - n_components), n - 1))
    return center, axes[:, ::-1], squares[::-1] / len(values)
