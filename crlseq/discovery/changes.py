"""What interventions change in the covariance of programs: a closed form that shows who is upstream of whom.

Programs obey u = u G + z + shift (row vectors; z has covariance Omega), and the mean shift of an intervention on i points
along row i of T = (I - G)^-1. In coordinates x in which it lies along axis i, x are the exogenous variables of every
environment, but for x_i under do(i), which loses what its parents gave:

    E[k, i] = Cov(x_k, x_i | do(i), hit cells) - Cov(x_k, x_i | controls) = -(Omega T)[k, i],      k != i.

Whatever all environments share cancels: background that nobody perturbs, noise. A mere shift changes nothing, a soft
intervention a part; escaped cells scale it, since their mixture varies along the shift and touches Var(x_i) alone. A
second measure does not move when axis i is turned towards another program, which a second target does:

    F[k, i] = Cov(x_k, x_i | hit) - Var(x_i | hit) Cov(x_k, x_i | controls) / Var(x_i | controls).

Both come with standard errors: of cells (influence values), of perturbations of one target that differ beyond them, and
of axes that are turned. Source: this project; that covariances of interventional data identify a linear latent graph is
due to Squires et al. 2023, ICML.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crlseq.discovery.hits import Floats, Hit, hit_cells

MIN_SHIFT = 0.25  # standard deviations of control cells: a weaker perturbation says nothing about its target
MIN_CELLS = 10
SHIFT_SPREAD = 0.15  # by which unit shifts of one target differ beyond sampling, where weights are chosen
PRIOR_DEGREES = 4.0  # of freedom, that perturbations of a target agree
UNKNOWN_CUT = (-0.3, 0.4)  # change of Var(x_i) and its error where no perturbation shows it
MIN_CUT_ERROR = 0.05


@dataclass(frozen=True)
class Estimate:
    """A change (p,) seen in one perturbation, the variance (p,) that its own cells leave, and the influence of a control
    cell c on entry j as the coefficients (4, p) of c_i c_j, c_i^2, c_j and c_i.
    """

    value: Floats
    variance: Floats
    controls: Floats


@dataclass(frozen=True)
class Perturbed:
    """What one perturbation of program ``target`` changes."""

    target: int
    perturbation: int  # 0 .. K - 1
    n: int
    shift: Floats  # (p,) of hit cells where they are told apart
    hit: Hit
    along: Floats  # (p,) its cells' scores are x @ along
    covariance: Estimate  # E
    residual: Estimate | None  # F; None where hit cells are not told apart
    lean: Floats | None  # (p,) there: slopes in controls less those of the shift, by which F follows from E
    cut: tuple[float, float] | None  # change of Var(x_i) and its standard error


@dataclass(frozen=True)
class Changes:
    """E and F (p, p) of all pairs k -> i with standard errors, infinite where no perturbation can tell."""

    e: Floats
    e_error: Floats
    f: Floats
    f_error: Floats
    cut: Floats  # (p,) change of Var(x_i) in hit cells, NaN unknown
    cut_error: Floats
    tilt: float  # typical angle by which axes are turned beyond sampling
    by_target: list[list[Perturbed]]


def exogenous_axes(
    y: Floats, environment: NDArray[np.int64], targets: NDArray[np.int64], p: int
) -> tuple[Floats, Floats]:
    """Coordinates ``x = (y - center) @ axes``: center (q,), axes (q, p), x of unit variance over controls.

    ``y`` (n, q) cells, ``environment`` (n,) 0 for control and c + 1 for perturbation c, ``targets`` (K,). One direction a
    target: the leading one of its perturbations' unit shifts, so that the strongest does not decide; generalised least
    squares by the covariance of controls.
    """
    k = len(targets)
    n = np.bincount(environment, minlength=k + 1)[1:]
    mean = np.stack([y[environment == c].mean(0) for c in range(k + 1)])
    white = np.linalg.cholesky(np.linalg.inv(np.cov(y[environment == 0].T)))
    shift, basis = (mean[1:] - mean[0]) @ white, np.zeros((p, y.shape[1]))
    size = np.maximum(np.linalg.norm(shift, axis=1), 1e-12)
    weight = 1 / (y.shape[1] / (n * size**2) + SHIFT_SPREAD**2)
    for i in range(p):
        own = targets == i
        unit = shift[own] / size[own, None]
        basis[i] = np.linalg.svd(unit * np.sqrt(weight[own, None]), full_matrices=False)[2][0]
    axes = white @ np.linalg.pinv(basis)
    control = (y[environment == 0] - mean[0]) @ axes
    return mean[0], axes / control.std(0)


def measure_changes(x: Floats, environment: NDArray[np.int64], targets: NDArray[np.int64]) -> Changes:
    """E and F of exogenous coordinates ``x`` (n, p), centred on controls; the other arguments as in `exogenous_axes`."""
    p = x.shape[1]
    order = np.argsort(environment, kind="stable")
    cells = np.split(x[order], np.cumsum(np.bincount(environment, minlength=len(targets) + 1))[:-1])
    control = cells[0] - cells[0].mean(0)
    seen: list[list[Perturbed]] = [[] for _ in range(p)]
    inverse = np.linalg.inv(np.cov(control.T).reshape(p, p))
    for c, target in enumerate(targets):
        found = _measure(cells[c + 1], control, inverse, int(target), c)
        if found is not None:
            seen[target].append(found)
    cut, cut_error = _cuts(seen)
    e, f = np.zeros((p, p)), np.zeros((p, p))
    e_variance, f_variance = np.full((p, p), np.inf), np.full((p, p), np.inf)
    for i, group in enumerate(seen):
        if group:
            e[:, i], e_variance[:, i] = _pooled([one.covariance for one in group], control, i)
            residuals = [_residual(one, cut[i], cut_error[i]) for one in group]
            f[:, i], f_variance[:, i] = _pooled(residuals, control, i)
    np.fill_diagonal(e, 0)
    np.fill_diagonal(f, 0)
    turned, tilt = _turned(seen, len(control))
    leak = np.maximum(0, (turned @ e**2)[None] - turned[:, None] * e**2)
    known = np.where(np.isfinite(cut), cut**2, np.nanmedian(cut**2) if np.isfinite(cut).any() else 0.5)
    e_error, f_error = np.sqrt(e_variance + turned * known + leak), np.sqrt(f_variance + leak)
    return Changes(e, e_error, f, f_error, cut, cut_error, tilt, seen)


def _measure(cells: Floats, control: Floats, inverse: Floats, i: int, perturbation: int) -> Perturbed | None:
    """What a perturbation of ``i`` changes, from its cells and the controls (·, p), both centred on the controls' mean."""
    mean, n = cells.mean(0) if len(cells) else np.zeros(control.shape[1]), len(cells)
    if n < MIN_CELLS or abs(mean[i]) < MIN_SHIFT:
        return None
    along = inverse @ mean / (mean @ inverse @ mean)
    scores = cells @ along
    hit = hit_cells(scores, float((control @ along).var()))
    covariance = control.T @ control[:, i] / len(control)  # of x_i with all
    slope, none = covariance / covariance[i], np.zeros(len(covariance))
    if not hit.told:
        return _measure_all(cells, covariance, i, hit, along, perturbation)
    w = hit.posterior(scores)
    w /= w.sum()
    shift = w @ cells
    z = cells - shift
    product = z[:, [i]] * z
    value = w @ product
    variance = (w**2) @ (product - value) ** 2
    own = Estimate(value - covariance, variance, np.stack([none - 1, none, none, none]))
    rest = z[:, [i]] * (z - z[:, [i]] * slope)
    left = w @ rest
    scale = value[i] / covariance[i]
    residual = Estimate(left, (w**2) @ (rest - left) ** 2, np.stack([none - scale, slope * scale, none, none]))
    of_control = float((control[:, i] ** 2).var()) / len(control)
    cut = (float(value[i] - covariance[i]), float(np.sqrt(variance[i] + of_control)))
    return Perturbed(i, perturbation, n, shift, hit, along, own, residual, None, cut)


def _measure_all(cells: Floats, covariance: Floats, i: int, hit: Hit, along: Floats, perturbation: int) -> Perturbed:
    """The same of all cells, hit or not, in coordinates in which this perturbation's shift lies along x_i alone."""
    n, m = len(cells), cells.mean(0)
    lean, none = m / m[i], np.zeros(len(m))
    lean[i] = 0
    z = cells - m
    product = z[:, [i]] * (z - z[:, [i]] * lean)
    wider = float((z[:, i] ** 2).mean() - covariance[i])
    value = product.mean(0)
    influence = (product - value - wider * (z - z[:, [i]] * lean) / m[i]) / n
    coefficients = np.stack([none - 1, lean, none + wider / m[i], -wider * lean / m[i]])
    own = Estimate(value - (covariance - covariance[i] * lean), (influence**2).sum(0), coefficients)
    return Perturbed(i, perturbation, n, m, hit, along, own, None, covariance / covariance[i] - lean, None)


def _residual(one: Perturbed, cut: float, error: float) -> Estimate:
    """F of a perturbation; where its hit cells are not told apart, from E and the change of Var(x_i) in others."""
    if one.residual is not None:
        variance = one.residual.variance.copy()
        variance[one.target] = 1.0
        return Estimate(one.residual.value, variance, one.residual.controls)
    assert one.lean is not None
    cut, error = (cut, max(error, MIN_CUT_ERROR)) if np.isfinite(cut) else UNKNOWN_CUT
    value, variance = one.covariance.value - cut * one.lean, one.covariance.variance + (error * one.lean) ** 2
    variance[one.target] = 1.0
    return Estimate(value, variance, one.covariance.controls)


def _pooled(estimates: list[Estimate], control: Floats, i: int) -> tuple[Floats, Floats]:
    """Weighted mean (p,) over a target's perturbations; its variance, widened where they differ beyond their errors."""
    value = np.stack([one.value for one in estimates])
    weight = 1 / np.stack([one.variance for one in estimates])
    total = weight.sum(0)
    mean = (weight * value).sum(0) / total
    scatter = ((weight * (value - mean) ** 2).sum(0) + PRIOR_DEGREES) / (len(value) + PRIOR_DEGREES - 1)
    a, b, c, d = sum(w * one.controls for w, one in zip(weight, estimates, strict=True)) / total
    own = control[:, [i]]
    influence = (a * own + c) * control + b * own**2 + d * own
    return mean, np.maximum(1, scatter) / total + influence.var(0) / len(control)


def _cuts(seen: list[list[Perturbed]]) -> tuple[Floats, Floats]:
    """Change of Var(x_i) in hit cells (p,) and its standard error, NaN where no perturbation shows it."""
    cut, error = np.full(len(seen), np.nan), np.full(len(seen), np.nan)
    for i, group in enumerate(seen):
        shown = np.array([one.cut for one in group if one.cut is not None])
        if len(shown):
            weight = 1 / shown[:, 1] ** 2
            cut[i], error[i] = (weight @ shown[:, 0]) / weight.sum(), weight.sum() ** -0.5
    return cut, error


def _turned(seen: list[list[Perturbed]], n_control: int) -> tuple[Floats, float]:
    """Variance (p,) of the angle by which each axis may be turned, and the typical angle beyond sampling: directions of a
    target's perturbations differ by both.
    """
    noise, spread = np.zeros(len(seen)), []
    for i, group in enumerate(seen):
        if not group:
            continue
        noise[i] = np.mean([(1 / (one.n * one.hit.share) + 1 / n_control) / one.shift[i] ** 2 for one in group])
        if len(group) > 1:
            slopes = np.stack([np.delete(one.shift / one.shift[i], i) for one in group])
            if slopes.shape[1]:
                spread.append((slopes.var(0, ddof=1).mean() - noise[i], len(group) - 1))
    beyond = max(0.0, float(sum(a * b for a, b in spread) / sum(b for _, b in spread))) if spread else 0.0
    turned = np.array([(beyond + noise[i]) / len(group) if group else 0.0 for i, group in enumerate(seen)])
    return turned, beyond**0.5
