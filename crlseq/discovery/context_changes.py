"""Does what interventions change differ between contexts, pair by pair?

An edge that one context has alone turns the mean shifts of its source and of what is upstream of it there, so that coordinates
which all contexts share are exogenous in none. Other axes stay as they are, and are known better from all contexts. So each
axis i is turned towards k in context c by what the slopes m_c[i, k] of its perturbations' shifts say, with variances v_c:

    m_c ~ N(mu, v_c)              with probability 1 - pi: contexts share the axis, which is turned nowhere,
    m_c ~ N(mu, v_c + tau^2)      with probability pi:     each has its own;

mu has a flat prior, and pi and tau are common to all i and k (EM; Efron and Morris 1972). Units are those of the shared programs. With
E over Var(x_k) in each context (`crlseq.discovery.changes`) and its errors, chi-square about the mean

    Q[k, i] = sum_c (E_c[k, i] - mean)^2 / (error_c[k, i]^2 + E_c[k, i]^2 V_c[k]),

V_c being the relative squared error of Var(x_k), tells whether contexts differ (Cochran 1954, Biometrics 10:101). A part
of Var(x_k), measurement noise and background, does not follow the program's own noise: as large as `LEVEL` leaves, it is a
part of V_c where Var(x_k) is not what it is over all controls.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from crlseq.discovery.axes import Consensus, consensus, environment_means
from crlseq.discovery.changes import Changes, measure_changes
from crlseq.discovery.direct_edges import LEVEL
from crlseq.discovery.effects import benjamini_hochberg
from crlseq.discovery.hits import Floats

Ints = NDArray[np.int64]
STEPS, SETTLED = 100, 1e-6
OWN = (1.0, 9.0)  # slopes that are each context's own and shared ones that the prior of pi is worth
SIZE, LEAST_SIZE = 0.2**2, 0.07**2  # of tau^2: an effect of 0.3 that one of two contexts has, and a third of it


def changes_by_context(
    y: Floats, environment: Ints, targets: Ints, axes: Floats, context: Ints
) -> tuple[list[Changes], Floats]:
    """What interventions change in each context, and the relative squared errors (contexts, p) of Var(x_k) there.

    Cells ``y`` (n, q) of ``environment`` and ``context`` (n,); ``targets`` (K,) and shared ``axes`` (q, p) of the programs.
    """
    cells = [(y[own], environment[own]) for own in (context == c for c in np.unique(context))]
    cells = [(some - some[there == 0].mean(0), there) for some, there in cells]
    turns = _turns(*zip(*(_agreed(some @ axes, there, targets) for some, there in cells), strict=True))
    found, errors = [], []
    for (some, there), turn, variance in zip(cells, *turns, strict=True):
        x = some @ _turned_axes(some[there == 0], axes, turn)
        found.append(measure_changes(x, there, targets, np.zeros(len(x), dtype=np.int64), variance))
        square = x[there == 0] ** 2
        level = square.mean(0)
        errors.append(square.var(0) / len(square) / level**2 + ((1 - LEVEL) * (1 - 1 / level)) ** 2)
    return found, np.stack(errors)


def differences(found: list[Changes], level_error: Floats) -> tuple[Floats, Floats]:
    """FDR (p, p) of no difference between contexts, Benjamini-Hochberg over pairs, and the standard error (p, p) of the
    difference of two, on average; NaN where fewer than two can tell.
    """
    e = np.stack([one.e for one in found])
    variance = np.stack([one.e_error**2 for one in found]) + e**2 * level_error[:, :, None]
    weight = 1 / variance
    mean = (weight * e).sum(0) / np.maximum(weight.sum(0), 1e-300)
    freedom = (np.isfinite(variance).sum(0) - 1) * (1 - np.eye(e.shape[1], dtype=int))
    told, fdr = freedom > 0, np.full(e.shape[1:], np.nan)
    fdr[told] = benjamini_hochberg(chi2.sf((weight * (e - mean) ** 2).sum(0)[told], freedom[told]))
    finite = np.isfinite(variance)
    error = np.sqrt(2 * np.where(finite, variance, 0).sum(0) / np.maximum(finite.sum(0), 1))
    return fdr, np.where(told, error, np.nan)


def _agreed(x: Floats, environment: Ints, targets: Ints) -> tuple[Consensus, NDArray[np.bool_]]:
    """Slopes on which the perturbations of each program agree in the cells ``x`` (n, p) of a context, whose controls have mean
    0, and which programs (p,) have any there.
    """
    p, count = x.shape[1], np.bincount(environment, minlength=len(targets) + 1)
    there = np.flatnonzero(count[1:] > 1)
    mean = environment_means(x, environment, len(count))[1 + there]
    own = mean[np.arange(len(there)), targets[there]]
    own = np.where(np.abs(own) < 1e-6, 1e-6, own)[:, None]
    variance = (1 / count[1 + there] + 1 / count[0])[:, None] * x[environment == 0].var(0) / own**2
    agreed = consensus(mean / own, np.maximum(variance, 1e-12), targets[there], p)
    return agreed, np.bincount(targets[there], minlength=p) > 0


def _turns(agreed: tuple[Consensus, ...], known: tuple[NDArray[np.bool_], ...]) -> tuple[Floats, Floats]:
    """Posterior mean (contexts, p, p) of the turn of each axis (row) towards another, from the shared one, and its variance."""
    slope, variance = np.stack([one.mean for one in agreed]), np.stack([one.variance for one in agreed])
    there = np.stack(known)[:, :, None]
    told = (there.sum(0) > 1) & ~np.eye(slope.shape[1], dtype=bool)
    n = np.maximum(there.sum(0), 2)

    def marginal(size: float) -> tuple[Floats, Floats]:
        """Log-likelihood (p, p) of slopes whose contexts differ by a variance of ``size``, and mu."""
        weight = there / (variance + size)
        total = np.maximum(weight.sum(0), 1e-300)
        mu = (weight * slope).sum(0) / total
        spread = np.where(there, np.log(variance + size) + weight * (slope - mu) ** 2, 0).sum(0)
        return -0.5 * (spread + np.log(total)), mu

    shared = marginal(0.0)[0]
    center = (there * slope).sum(0) / n
    beyond = (there * ((slope - center) ** 2 / (n - 1) - variance / n)).sum(0)
    share, size = OWN[0] / sum(OWN), SIZE
    for _ in range(STEPS):
        own, mu = marginal(size)
        apart = told / (1 + (1 - share) / share * np.exp(np.clip(shared - own, -50, 50)))
        before = share
        share = float((apart.sum() + OWN[0]) / (told.sum() + sum(OWN)))
        size = max(float(((apart * np.maximum(beyond, 0)).sum() + SIZE) / (apart.sum() + 1)), LEAST_SIZE)
        if abs(share - before) < SETTLED:
            break
    turn = np.where(there, apart * (mu + (slope - mu) * size / (size + variance)), 0)
    doubt = np.where(there, apart * variance + (1 - apart) * apart * (turn / np.maximum(apart, 1e-12)) ** 2, variance)
    return turn, doubt * (1 - np.eye(len(told)))


def _turned_axes(control: Floats, axes: Floats, turn: Floats) -> Floats:
    """Shared axes (q, p) turned (p, p) in the context of these controls (n, q), by how components move with each program there."""
    spread = np.cov(control.T).reshape(len(axes), -1)
    lines = (np.eye(len(turn)) + turn) @ _lines(axes, spread)
    precision = np.linalg.pinv(spread)
    own: Floats = precision @ lines.T @ np.linalg.pinv(lines @ precision @ lines.T)
    return own


def _lines(axes: Floats, spread: Floats) -> Floats:
    """How components move with each program (p, q), by the covariance of controls (q, q): axes are made of it."""
    lines: Floats = np.linalg.pinv(axes.T @ spread @ axes) @ axes.T @ spread
    return lines
