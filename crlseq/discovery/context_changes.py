"""Does what interventions change differ between contexts, pair by pair?

An edge that one context has alone turns the mean shifts of its source there, so that coordinates which all contexts share are
exogenous in none. Each context therefore has axes of its own, from its own perturbations; their units are those of the
shared programs. With E over Var(x_k) in each context (`crlseq.discovery.changes`) and its errors, chi-square about the mean

    Q[k, i] = sum_c (E_c[k, i] - mean)^2 / (error_c[k, i]^2 + E_c[k, i]^2 V_c[k]),

V_c being the relative squared error of Var(x_k), tells whether contexts differ (Cochran 1954, Biometrics 10:101). A part
of Var(x_k), measurement noise and background, does not follow the program's own noise: as large as `LEVEL` leaves, it is a
part of V_c where Var(x_k) is not what it is over all controls.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from crlseq.discovery.axes import exogenous_axes
from crlseq.discovery.changes import Changes, measure_changes
from crlseq.discovery.direct_edges import LEVEL
from crlseq.discovery.effects import benjamini_hochberg
from crlseq.discovery.hits import Floats

Ints = NDArray[np.int64]


def changes_by_context(
    y: Floats, environment: Ints, targets: Ints, axes: Floats, context: Ints
) -> tuple[list[Changes], Floats]:
    """What interventions change in each context, and the relative squared errors (contexts, p) of Var(x_k) there.

    Cells ``y`` (n, q) of ``environment`` and ``context`` (n,); ``targets`` (K,) and shared ``axes`` (q, p) of the programs.
    """
    found, errors = [], []
    for c in np.unique(context):
        own = context == c
        some, there = y[own], environment[own]
        x = (some - some[there == 0].mean(0)) @ _own_axes(some, there, targets, axes)
        found.append(measure_changes(x, there, targets, np.zeros(len(x), dtype=np.int64)))
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


def _own_axes(y: Floats, environment: Ints, targets: Ints, axes: Floats) -> Floats:
    """Axes (q, p) of one context in the units of the shared ones, whose lines programs without a perturbation here keep."""
    p = axes.shape[1]
    count = np.bincount(environment, minlength=len(targets) + 1)[1:]
    acting = count > 1  # in this context
    known = np.bincount(targets[acting], minlength=p) > 0
    number = np.concatenate([[0], np.where(acting, np.cumsum(acting), -1)])[environment]
    spread = np.cov(y[environment == 0].T).reshape(y.shape[1], -1)
    lines = _lines(exogenous_axes(y[number >= 0], number[number >= 0], targets[acting], p)[1], spread)
    lines /= np.diag(lines @ axes)[:, None]
    lines[~known] = _lines(axes, spread)[~known]
    precision = np.linalg.pinv(spread)
    own: Floats = precision @ lines.T @ np.linalg.pinv(lines @ precision @ lines.T)
    return own


def _lines(axes: Floats, spread: Floats) -> Floats:
    """How components move with each program (p, q), by the covariance of controls (q, q): axes are made of it."""
    lines: Floats = np.linalg.pinv(axes.T @ spread @ axes) @ axes.T @ spread
    return lines
