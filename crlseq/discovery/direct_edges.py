"""Direct edges among pairs that are known to be ordered: a sparse G and hidden causes that explain what interventions change.

    minimise  sum_ki ( (E + Omega T D)[k, i] / error[k, i] )^2 + sum_k ( (Omega[k, k] - level) / SPREAD )^2
              + ( (level - LEVEL) / LEVEL_SPREAD )^2,              T = (I - G)^-1,  D = diag(1 / T[i, i]),

over G on pairs that are ordered or in a cycle (D is 1 without one: an intervention opens it), Omega on the diagonal and
on pairs with a hidden common cause, and the level, by damped Gauss-Newton. Edges that are not worth their price go, the
cheapest first, a quarter of them at a time. The diagonal of Omega is the share of a program's variance over control cells
that is its own, times the share of its parents' effect that an intervention takes away: with it at 1, where it is less, a
chain j -> k -> i asks for an edge j -> i. An edge that was dropped may leave its effect to an ancestor's: one is direct if it
is worth its price beside free edges of all that it may go through (`beside_mediators`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from crlseq.discovery.changes import Changes
from crlseq.discovery.hits import Floats
from crlseq.discovery.pairs import POWER, SEEN, SIZE, Bools, Pairs
from crlseq.storage.stage_cache import cached_on_disk

PRICE = 12.0  # chi-square that an edge must be worth
PRICE_BESIDE = 9.0  # the same beside edges of every program that it may go through
LEAST_ERROR = 0.03  # linear equations are no better than that
LEVEL, LEVEL_SPREAD, SPREAD = 0.75, 0.25, 0.1
LEAST_OWN, MOST_OWN = 0.1, 1.0  # of Omega's diagonal
MISFIT_PRIOR = 10.0  # degrees of freedom at a misfit of 1: that of few programs is in part chance
NEEDED = 2.0  # standard errors of an edge that was found by likelihood
SILENT = 0.15  # change of a variance that says nothing
STEPS = 50


@cached_on_disk()
@dataclass(frozen=True)
class Direct:
    """Direct effects G (p, p), row -> column, in standard deviations of control cells, with standard errors; covariances
    (p, p) of hidden causes; chi-square per degree of freedom.
    """

    effect: Floats
    error: Floats
    hidden: Floats
    misfit: float

    def reordered(self, order: NDArray[np.int64]) -> Direct:
        """The same with programs in another order (p,)."""
        both = np.ix_(order, order)
        return Direct(self.effect[both], self.error[both], self.hidden[both], self.misfit)


@dataclass(frozen=True)
class _Problem:
    """What is fitted to what: parameters theta are the edges, the hidden pairs, Omega's diagonal and its level."""

    e: Floats
    error: Floats
    seen: Bools
    edges: list[tuple[int, int]]
    pairs: list[tuple[int, int]]

    def start(self) -> Floats:
        """E itself."""
        p, e = len(self.e), self.e
        direct = [-e[edge] / LEVEL for edge in self.edges]
        return np.array([*direct, *(-(e[a, b] + e[b, a]) / 2 for a, b in self.pairs), *[LEVEL] * (p + 1)])

    def matrices(self, theta: Floats) -> tuple[Floats, Floats]:
        """G and Omega."""
        p, n = len(self.e), len(self.edges)
        g, omega = np.zeros((p, p)), np.diag(theta[-p - 1 : -1])
        for value, edge in zip(theta[:n], self.edges, strict=True):
            g[edge] = value
        for value, (a, b) in zip(theta[n : -p - 1], self.pairs, strict=True):
            omega[a, b] = omega[b, a] = value
        return g, omega

    def residuals(self, theta: Floats) -> tuple[Floats, Floats]:
        """(E + Omega T D) / error of the entries ``seen`` and the priors (m,), and derivatives (m, parameters)."""
        p = len(self.e)
        g, omega = self.matrices(theta)
        total = np.linalg.inv(np.eye(p) - g)
        own = np.diag(total)
        left = omega @ total / own
        columns = [
            (np.outer(left[:, j] * own[j], total[k]) - left * total[:, j] * total[k]) / own for j, k in self.edges
        ]
        for a, b in self.pairs:
            both = np.zeros((p, p))
            both[a], both[b] = total[b] / own, total[a] / own
            columns.append(both)
        columns += list(np.eye(p)[:, :, None] * (total / own)[:, None])
        jacobian = np.zeros((int(self.seen.sum()) + p + 1, len(theta)))
        for i, column in enumerate(columns):
            jacobian[: -p - 1, i] = (column / self.error)[self.seen]
        diagonal, level = theta[-p - 1 : -1], theta[-1]
        jacobian[-p - 1 : -1, -p - 1 : -1] = np.eye(p) / SPREAD
        jacobian[-p - 1 : -1, -1] = -1 / SPREAD
        jacobian[-1, -1] = 1 / LEVEL_SPREAD
        prior = np.append((diagonal - level) / SPREAD, (level - LEVEL) / LEVEL_SPREAD)
        return np.append(((self.e + left) / self.error)[self.seen], prior), jacobian

    def fit(self, theta: Floats) -> tuple[Floats, Floats, float]:
        """Parameters, their covariance, and chi-square."""
        damping, now = 1e-3, self.residuals(theta)
        for _ in range(STEPS):
            rest, jacobian = now
            h, gradient, before = jacobian.T @ jacobian, jacobian.T @ rest, float(rest @ rest)
            step = np.linalg.solve(h + damping * np.diag(np.diag(h)), gradient)
            new = np.asarray(theta - step, dtype=np.float64)
            new[-len(self.e) - 1 :] = np.clip(new[-len(self.e) - 1 :], LEAST_OWN, MOST_OWN)
            trial = self.residuals(new)
            after = float(trial[0] @ trial[0])
            if after > before:
                damping *= 5
                if damping > 1e6:
                    break
                continue
            theta, now, damping = new, trial, max(damping / 5, 1e-9)
            if before - after < 1e-6 * (1 + before):
                break
        rest, jacobian = now
        covariance = np.linalg.inv(jacobian.T @ jacobian + 1e-9 * np.eye(len(theta)))
        return theta, np.asarray(covariance, dtype=np.float64), float(rest @ rest)

    def worth(self, theta: Floats, covariance: Floats) -> Floats:
        """Chi-square (edges,) of Omega[j, j] G[j, k], the change that an edge makes: Omega may be uncertain, it is not."""
        row = np.array([len(theta) - len(self.e) - 1 + j for j, _ in self.edges], dtype=int)
        edge = np.arange(len(row))
        own, g = theta[row], theta[: len(row)]
        variance = own**2 * covariance[edge, edge] + g**2 * covariance[row, row] + 2 * own * g * covariance[edge, row]
        chi_square: Floats = (own * g) ** 2 / variance
        return chi_square

    def without(self, gone: NDArray[np.int64]) -> _Problem:
        """The same without these edges."""
        return replace(self, edges=[edge for i, edge in enumerate(self.edges) if i not in set(gone.tolist())])

    def misfit(self, square: float, prior: float = 0.0) -> float:
        """Chi-square per degree of freedom, with ``prior`` of them at 1."""
        return (square + prior) / (max(1, int(self.seen.sum()) - len(self.edges) - len(self.pairs)) + prior)


def _problem(e: Floats, error: Floats, edges: Bools, hidden: Bools) -> _Problem:
    """Edges (p, p) and hidden pairs (p, p), symmetric, to be fitted to E."""
    error = np.hypot(error, LEAST_ERROR)
    seen = np.isfinite(error) & ~np.eye(len(error), dtype=bool)
    pairs = [(j, k) for j, k in zip(*np.nonzero(hidden | hidden.T), strict=True) if j < k]
    return _Problem(e, error, seen, list(zip(*np.nonzero(edges & seen), strict=True)), pairs)


def direct_edges(found: Changes, ordered: Bools, hidden: Bools) -> Direct:
    """G within the pairs ``ordered`` (p, p) and Omega on the pairs ``hidden`` (p, p), symmetric."""
    p = len(found.e)
    problem = _problem(found.e, found.e_error, ordered, hidden)
    start = problem.start()
    while True:
        theta, covariance, square = problem.fit(start)
        n, worth = len(problem.edges), problem.worth(theta, covariance)
        if not n or worth.min() >= PRICE:
            break
        gone = np.argsort(worth, kind="stable")[: max(1, int((worth < PRICE).sum()) // 4)]
        problem, start = problem.without(gone), np.delete(theta, gone)
    effect, omega = problem.matrices(theta)
    deviation = np.full((p, p), np.nan)
    for i, edge in enumerate(problem.edges):
        deviation[edge] = np.sqrt(covariance[i, i])
    return Direct(effect, deviation, omega - np.diag(np.diag(omega)), problem.misfit(square))


def beside_mediators(found: Changes, direct: Direct, reach: Bools, possible: Bools) -> Bools:
    """Edges j -> i (p, p) of ``direct`` that are worth their price beside free edges k -> i, where ``possible`` (p, p), of
    every k that j may ``reach`` (p, p).

    The price grows with the misfit beyond 1, and errors do: what the fit leaves is no noise, and may lie in one edge.
    """
    edges = direct.effect != 0
    left: Bools = edges.copy()
    for i in np.flatnonzero(edges.any(0)).tolist():
        own = np.flatnonzero(edges[:, i]).tolist()
        more = edges.copy()
        more[:, i] |= reach[own].any(0) & possible[:, i]
        problem = _problem(found.e, found.e_error, more, direct.hidden != 0)
        theta, covariance, square = problem.fit(problem.start())
        worth = dict(zip(problem.edges, problem.worth(theta, covariance), strict=True))
        price = PRICE_BESIDE * max(1.0, problem.misfit(square, MISFIT_PRIOR)) ** 2
        left[own, i] = [worth[j, i] >= price for j in own]
    return left


def unconfirmed(pairs: Pairs, edges: Bools, alike: Bools, straightened: bool = False) -> Bools:
    """Those of ``edges`` (p, p), found in another way, that what interventions change does not need, and could have shown.

    With E fitted by all of them, such an edge is within `NEEDED` standard errors of 0, although its pair is decided, or an
    effect of `SIZE` would be seen with 80 % power, or one of its programs is ``alike`` (p, p) another: a program in two
    parts has no E, and false edges. A network that ``straightened`` leaves bends, which the likelihood takes for edges:
    there all must be beyond `SEEN` standard errors.
    """
    problem = _problem(-pairs.change, pairs.error, edges, np.zeros_like(edges))
    theta, covariance, _ = problem.fit(problem.start())
    double = np.flatnonzero(alike.any(0))
    doubtful, needed = ~pairs.have("undecided") | straightened, SEEN if straightened else NEEDED
    doubtful[double] = doubtful[:, double] = True
    against: Bools = edges & ~problem.seen & doubtful
    for i, (edge, worth) in enumerate(zip(problem.edges, problem.worth(theta, covariance), strict=True)):
        size = abs(theta[i] * theta[edge[0] - len(edges) - 1])
        shown = (NEEDED + POWER) * size < SIZE * np.sqrt(worth)
        against[edge] = worth < needed**2 and (doubtful[edge] or shown)
    return against


def through_silent(found: Changes, direct: Direct, known: Bools) -> Bools:
    """Edges j -> i (p, p) that may go through a parent k of i whose own parents no intervention shows.

    An intervention on k that changes nothing, not even Var(x_k), is a mere shift where the screen's others also change the
    noise of their targets; then nothing is known of j -> k. Pairs ``known`` (p, p) are ordered: k upstream of j is no link.
    """
    p = len(found.e)
    size = np.abs(found.e)
    noise = found.cut - np.where(size > SEEN * found.e_error, found.e**2, 0).sum(0)
    shown = (size > SEEN * found.e_error).any(0)
    others = noise[shown & np.isfinite(noise)]
    if not len(others) or abs(np.median(others)) < SILENT:
        return np.zeros((p, p), dtype=bool)
    silent = ~shown & ~(np.abs(found.cut) > SILENT)
    parents = (direct.effect != 0) & silent[:, None]
    through = (~known.T & ~np.eye(p, dtype=bool)).astype(float) @ parents > 0
    unknown: Bools = through & (direct.effect != 0)
    return unknown
