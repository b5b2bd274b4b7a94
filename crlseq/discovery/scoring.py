"""Quasi-Newton scoring of any model of means and covariances.

    minimise     sum_c w_c / 2 * ( log|S_c| + tr L_c (C_c + d_c' d_c) ),     d_c = y_c - m_c,  L_c = S_c^-1,  w_c = n_c / N
    gradient     sum_c  a' E_c b + e_c' dm                     for dS_c = a b' + b a' and dm_c
    information  sum_c w_c ( (a' L_c c)(b' L_c d) + (a' L_c d)(b' L_c c) + dm' L_c dm* )     for two parameters
    with         E_c = w_c (L_c - L_c (C_c + d_c' d_c) L_c),     e_c = -w_c L_c d_c

``y_c``, ``C_c``, ``n_c``: mean, covariance and count of environment ``c``. A gradient costs q^3 per environment; the
information of P parameters and its Cholesky factor cost P^3 / 3, hundreds of times as much. So a factor is kept while it
serves, and limited-memory BFGS updates tell what the curvature is beyond it (Nocedal 1980, Mathematics of Computation 35).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from crlseq.discovery.moments import DTYPE, Moments

MAX_STEP = 1.5  # largest change of a parameter in one step
MAX_STEPS = 300  # most cost a gradient alone; where a model does not hold, flat valleys take so many
MEMORY = 25  # steps after which the information is made anew
NEAR = 0.9  # share of a step that is within bounds; less, and it is made anew too
FIRST_DAMPING, LEAST_DAMPING = 1e-2, 1e-9
TOLERANCE = 1e-4  # log-likelihood units over all cells: a ten-thousandth of what decides anything
SHORT = 0.1  # of a step that led uphill
EASE, HARDEN = 4, 6  # of the damping by a step of a fresh information that led downhill, and by one that did not
NO_HOPE = 1e7  # damping at which a search gives up


class Score(Protocol):
    """Of one set of P parameters, per cell."""

    theta: Tensor  # (P,) where it was asked for, or better: what has a best value given the others may have it
    searched: Tensor  # (P,) bool: those that have not, and go where a step leads
    nll: Tensor  # (), infinite where it is undefined
    gradient: Tensor  # (P,), 0 for parameters that are held fixed

    @property
    def moving(self) -> Tensor:
        """Places (M,) of those that may move."""

    def information(self) -> Tensor:
        """Expected information (M, M) of what moves, positive semidefinite with a positive diagonal; lower triangle."""


@dataclass(frozen=True)
class Factor:
    """Cholesky factor ``root`` (M, M) of a curvature of the parameters ``moving`` (M,)."""

    root: Tensor
    moving: Tensor

    @staticmethod
    def damped(score: Score, damping: float) -> Factor | None:
        """Of the information with as much of its diagonal on top; None where it has none."""
        information = score.information()
        information.diagonal().mul_(1 + damping).add_(1e-9)
        root, failed = torch.linalg.cholesky_ex(information)
        return None if bool(failed) else Factor(root, score.moving)

    @staticmethod
    def exact(score: Score) -> Factor:
        """Of the information, with as much of its diagonal on top as rounding about 0 takes."""
        return Factor(positive_root(score.information()), score.moving)

    def solved(self, gradient: Tensor) -> Tensor:
        """The inverse of the curvature times a gradient (P,); 0 where nothing moves."""
        step = torch.zeros_like(gradient)
        half = torch.linalg.solve_triangular(self.root, gradient[self.moving, None], upper=False)
        step[self.moving] = torch.linalg.solve_triangular(self.root.T, half, upper=True)[:, 0]
        return step

    def without(self, gone: Tensor) -> Factor:
        """The same with the parameters ``gone`` (P,) held fixed; they are among the last that move."""
        kept = ~gone[self.moving]
        n = int((~kept).nonzero()[0]) if not bool(kept.all()) else len(kept)  # before the first that goes
        last = self.root[n:, n:]
        own = torch.linalg.cholesky((last @ last.T)[kept[n:]][:, kept[n:]])
        root = torch.zeros(n + len(own), n + len(own), dtype=DTYPE)
        root[:n, :n], root[n:, :n], root[n:, n:] = self.root[:n, :n], self.root[n:, :n][kept[n:]], own
        return Factor(root, self.moving[kept])


def positive_root(information: Tensor) -> Tensor:
    """Cholesky factor (P, P) of an information (its lower triangle), with as much of its diagonal on top as rounding about
    0 takes. The information is overwritten.
    """
    diagonal = information.diagonal().clone()
    root = information
    for power in range(-9, 1):
        information.diagonal().copy_(diagonal * (1 + 10.0**power))
        root, failed = torch.linalg.cholesky_ex(information)
        if not failed:
            break
    return root


class _Curvature:
    """A factor with the last steps' BFGS updates."""

    def __init__(self, factor: Factor) -> None:
        self.factor = factor
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def solved(self, gradient: Tensor) -> Tensor:
        """Its inverse times a gradient (P,), by the two-loop recursion."""
        left, along = gradient.clone(), []
        for step, change, product in reversed(self.pairs):
            along.append((step @ left) / product)
            left -= along[-1] * change
        found = self.factor.solved(left)
        for (step, change, product), a in zip(self.pairs, reversed(along), strict=True):
            found += (a - (change @ found) / product) * step
        return found

    def learn(self, step: Tensor, change: Tensor) -> None:
        """What a step changed of the gradient."""
        product = step @ change
        if bool(product > 0):
            self.pairs.append((step, change, product))


def solve(
    score: Callable[[Tensor], Score], theta: Tensor, cells: float, steps: int = MAX_STEPS, factor: Factor | None = None
) -> tuple[Score, bool]:
    """The score where the way downhill from ``theta`` (P,) ends, and whether it converged.

    A step is that of Levenberg-damped scoring with BFGS updates. The information is made anew where a step led nowhere or
    was cut short, and after `MEMORY` steps. ``factor``: of a curvature to begin with. The number of ``cells`` turns objective
    and information per cell into those of the data.
    """
    at, damping = score(theta), FIRST_DAMPING
    curvature = None if factor is None else _Curvature(factor)
    for _ in range(steps):
        if damping > NO_HOPE:
            break
        fresh = curvature is None
        if curvature is None:
            made = Factor.damped(at, damping)
            if made is None:
                damping *= HARDEN
                continue
            curvature = _Curvature(made)
        step = -curvature.solved(at.gradient)
        if -0.5 * float(at.gradient @ step) * cells < TOLERANCE and bool(torch.isfinite(at.nll)):
            return at, True
        within = min(1.0, MAX_STEP / float(step[at.searched].abs().max().clamp_min(1e-300)))
        there, whole = _downhill(score, at, within * step)
        if fresh:
            damping = max(damping / EASE, LEAST_DAMPING) if whole else max(damping * HARDEN, FIRST_DAMPING)
        if there is None:
            curvature = None
            continue
        curvature.learn(there.theta - at.theta, there.gradient - at.gradient)
        at = there
        if within < NEAR or len(curvature.pairs) == MEMORY:
            curvature = None
    return at, False


def _downhill(score: Callable[[Tensor], Score], at: Score, step: Tensor) -> tuple[Score | None, bool]:
    """The score after a step that leads downhill, and whether it is the whole one; else after a part, as far as a parabola
    through what is known goes down. None if that leads nowhere.
    """
    there = score(at.theta + step)
    gained = float(at.nll - there.nll)
    if gained > 0:
        return there, True
    promised = -0.5 * float(at.gradient @ step)
    there = score(at.theta + max(SHORT, promised / (2 * promised - gained)) * step)
    return there if bool(there.nll < at.nll) else None, False


class Deviations:
    """How environments deviate from means (..., C, q) and covariances (..., C, q, q) of a model: ``nll`` (...,) per cell,
    ``precision`` L (..., C, q, q), ``by_covariance`` E (..., C, q, q), ``by_mean`` e (..., C, q); ``failed`` (...,) where
    a covariance is not positive.
    """

    def __init__(self, moments: Moments, mean: Tensor, covariance: Tensor) -> None:
        weight = moments.weight()
        root, failed = torch.linalg.cholesky_ex(covariance)
        self.precision, self.failed = torch.cholesky_inverse(root), (failed > 0).any(-1)
        d = moments.means - mean
        fitted = self.precision @ (moments.covariances + d[..., :, None] * d[..., None, :])
        half = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * fitted.diagonal(dim1=-2, dim2=-1).sum(-1)
        self.nll = (half * weight).sum(-1)
        self.by_covariance = weight[:, None, None] * (self.precision - fitted @ self.precision)
        self.by_mean = -weight[:, None] * (self.precision @ d[..., None])[..., 0]
