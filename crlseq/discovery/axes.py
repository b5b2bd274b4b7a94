"""Exogenous coordinates of programs: mean shifts of the perturbations of program i lie along axis i.

    s_cj ~ (1 - rho) N(mu_ij, v_cj) + rho N(mu_ij, v_cj + tau^2)

for the slope s_cj of the shift of perturbation c, which targets i, towards axis j. Its second targets are outliers of few
slopes, so that they do not turn axis i; conditions that differ in everything (batches) are outliers in all, and widen the
error of the axis. rho and tau are common to the screen and found by EM (Dempster, Laird and Rubin 1977).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from crlseq.discovery.hits import Floats

SHIFT_SPREAD = 0.15  # by which unit shifts of one target differ beyond sampling, where the first axes are chosen
ROUNDS, STEPS, SETTLED = 8, 30, 1e-4
GRID = 121  # points over which a consensus is integrated
OUTLIERS, OUTLIER_SIZE = 0.2, 0.05  # start of rho and of tau^2
RARE = (1.0, 9.0)  # outlying and other slopes that the prior of rho is worth
LEAST_SIZE = 0.003  # of tau^2
SIMILAR, SAME = 0.9, 0.97  # cosines of lines: parts of one program have those, parents and children hardly the first
NO_VARIANCE = 1e-12  # of the largest of a component


@dataclass(frozen=True)
class Consensus:
    """What the perturbations of a target have in common."""

    mean: Floats  # (p, p) mu
    variance: Floats  # (p, p) of mu
    outliers: float  # rho; 0 where no target has several perturbations
    size: float  # tau


def exogenous_axes(
    y: Floats, environment: NDArray[np.int64], targets: NDArray[np.int64], p: int
) -> tuple[Floats, Floats]:
    """Coordinates ``x = (y - center) @ axes``: center (q,), axes (q, p), x of unit variance over controls.

    ``y`` (n, q) cells, ``environment`` (n,) 0 for control and c + 1 for perturbation c, ``targets`` (K,). One direction a
    target, on which its perturbations agree; generalised least squares by the covariance of controls.
    """
    k = len(targets)
    n = np.maximum(np.bincount(environment, minlength=k + 1), 1)
    mean = environment_means(y, environment, k + 1)
    white = _whitening(y[environment == 0])
    shift = (mean[1:] - mean[0]) @ white
    basis = _first_basis(shift, targets, n[1:], p)
    for _ in range(ROUNDS):
        gram = np.linalg.pinv(basis @ basis.T)
        along = shift @ basis.T @ gram
        own = _own(along, targets)
        variance = np.diag(gram) * (1 / n[1:] + 1 / n[0])[:, None] / own[:, None] ** 2
        turn = consensus(along / own[:, None], variance, targets, p).mean
        np.fill_diagonal(turn, 1)
        before, basis = basis, turn @ basis
        basis /= np.linalg.norm(basis, axis=1, keepdims=True)
        if np.abs(basis - before).max() < SETTLED:
            break
    axes = white @ np.linalg.pinv(basis)
    control = (y[environment == 0] - mean[0]) @ axes
    return mean[0], axes / np.maximum(control.std(0), 1e-300)


def consensus(slope: Floats, variance: Floats, targets: NDArray[np.int64], p: int) -> Consensus:
    """The slopes (p, p) that the perturbations of each target share, from all slopes (K, p) and their variances (K, p).

    Posterior mean and variance under the mixture above, so that disagreement among few perturbations leaves both in
    doubt. A target without a perturbation has mean 0 and variance 1.
    """
    member = targets == np.arange(p)[:, None]
    several = (member.sum(1) > 1)[targets][:, None] & (np.arange(p) != targets[:, None])
    center = np.stack([np.median(slope[own], axis=0) if own.sum() > 2 else np.zeros(p) for own in member])
    few = (member.sum(1) <= 2)[:, None]
    weight = member / 1.0
    start = (weight @ (slope / (variance + OUTLIER_SIZE / 2))) / np.maximum(
        weight @ (1 / (variance + OUTLIER_SIZE / 2)), 1e-12
    )
    center = np.where(few, start, center)
    outliers, size, w = OUTLIERS, OUTLIER_SIZE, 1 / variance
    for _ in range(STEPS):
        square = (slope - center[targets]) ** 2
        wide = variance + size
        against = np.log((1 - outliers) / outliers) + 0.5 * np.log(wide / variance)
        odd = 1 / (1 + np.exp(np.clip(against - 0.5 * square * (1 / variance - 1 / wide), -50, 50)))
        w = (1 - odd) / variance + odd / wide
        center = (weight @ (w * slope)) / np.maximum(weight @ w, 1e-12)
        before = outliers
        if several.any():
            total = float(odd[several].sum())
            outliers = float(np.clip((total + RARE[0]) / (several.sum() + sum(RARE)), 0.01, 0.95))
            beyond = float((odd * np.maximum(square - variance, 0))[several].sum())
            size = max((beyond + OUTLIER_SIZE) / (total + 1), LEAST_SIZE)
        if abs(outliers - before) < SETTLED * before:
            break
    mean, spread = center, np.ones((p, p))
    for i, own in enumerate(member):
        if own.any():
            mean[i], spread[i] = _posterior(slope[own], variance[own], outliers, size)
            spread[i] = np.maximum(spread[i], 1 / w[own].sum(0))
    return Consensus(mean, spread, outliers if several.any() else 0.0, float(np.sqrt(size)))


def shifts_outside(y: Floats, x: Floats, environment: NDArray[np.int64]) -> float:
    """Chi-square a degree of freedom of mean shifts of cells ``y`` (n, q) outside the axes of ``x`` (n, p); 1 by chance.

    Much more means that conditions differ in what no program explains, as batches do.
    """
    n = np.bincount(environment)
    there = n[1:] > 1
    if y.shape[1] <= x.shape[1] or not there.any():
        return 1.0
    total = 0.0
    for values, sign in ((y, 1.0), (x, -1.0)):
        mean = environment_means(values, environment, len(n))
        shift = mean[1:][there] - mean[0]
        white = shift @ _whitening(values[environment == 0])
        total += sign * float(((white**2).sum(1) / (1 / n[1:][there] + 1 / n[0])).sum())
    return float(total / (there.sum() * (y.shape[1] - x.shape[1])))


def alike(axes: Floats, cosine: float) -> NDArray[np.bool_]:
    """Pairs of programs (p, p) whose lines, along which components (q,) move with them, have more than this cosine."""
    line = np.linalg.pinv(axes)
    line /= np.maximum(np.linalg.norm(line, axis=1, keepdims=True), 1e-300)
    same: NDArray[np.bool_] = (np.abs(line @ line.T) > cosine) & ~np.eye(len(line), dtype=bool)
    return same


def _whitening(y: Floats) -> Floats:
    """Root W (q, q) of the inverse covariance of cells (n, q), cov^-1 = W W'; directions without variance are left out."""
    value, vector = np.linalg.eigh(np.cov(y.T).reshape(y.shape[1], -1))
    there = value > NO_VARIANCE * max(float(value[-1]), 1e-300)
    white: Floats = vector * np.where(there, 1 / np.sqrt(np.where(there, value, 1)), 0)
    return white


def environment_means(y: Floats, environment: NDArray[np.int64], n: int) -> Floats:
    """Means (n, q) of the cells ``y`` (cells, q) of each environment; 0 without cells."""
    share = 1 / np.maximum(np.bincount(environment, minlength=n), 1)
    rows = sp.csr_matrix((share[environment], (environment, np.arange(len(y)))), shape=(n, len(y)))
    return np.asarray(rows @ y, dtype=np.float64)


def _first_basis(shift: Floats, targets: NDArray[np.int64], n: NDArray[np.int64], p: int) -> Floats:
    """One direction (p, q) a target: the leading one of its perturbations' unit shifts, so that the strongest does not
    decide. A program without perturbations gets one that is orthogonal to the others.
    """
    basis = np.zeros((p, shift.shape[1]))
    size = np.maximum(np.linalg.norm(shift, axis=1), 1e-12)
    weight = 1 / (shift.shape[1] / (n * size**2) + SHIFT_SPREAD**2)
    there = np.bincount(targets, minlength=p) > 0
    for i in np.flatnonzero(there):
        own = targets == i
        unit = shift[own] / size[own, None]
        basis[i] = np.linalg.svd(unit * np.sqrt(weight[own, None]), full_matrices=False)[2][0]
    if not there.all():
        basis[~there] = np.linalg.svd(basis[there])[2][-(p - there.sum()) :]
    return basis


def _own(along: Floats, targets: NDArray[np.int64]) -> Floats:
    """Shifts (K,) along each perturbation's own axis, off 0."""
    own = along[np.arange(len(targets)), targets]
    return np.where(np.abs(own) < 1e-6, 1e-6, own)


def _posterior(slope: Floats, variance: Floats, outliers: float, size: float) -> tuple[Floats, Floats]:
    """Mean and variance (p,) of the consensus of slopes (n, p) under a flat prior, on a grid."""
    deviation = np.sqrt(variance)
    low, high = (slope - 4 * deviation).min(0), (slope + 4 * deviation).max(0)
    if len(slope) == 1:  # nothing says that this one is no outlier
        low, high = low - 4 * np.sqrt(size), high + 4 * np.sqrt(size)
    grid = low + (high - low) * np.linspace(0, 1, GRID)[:, None]
    square = (slope - grid[:, None]) ** 2
    wide = variance + size
    inside = np.log(1 - outliers) - 0.5 * np.log(variance) - 0.5 * square / variance
    outside = np.log(outliers) - 0.5 * np.log(wide) - 0.5 * square / wide
    weight = np.logaddexp(inside, outside).sum(1)
    weight = np.exp(weight - weight.max(0))
    weight /= weight.sum(0)
    mean = (weight * grid).sum(0)
    spread: Floats = (weight * (grid - mean) ** 2).sum(0)
    return mean, spread
