"""Direct edges among pairs that are known to be ordered: a sparse G and hidden causes that explain what interventions change.

    minimise  sum_ki ( (E + Omega T)[k, i] / error[k, i] )^2,      T = (I - G)^-1,

over G on ordered pairs and the covariances of Omega on pairs that are seen both ways (hidden common causes), by damped
Gauss-Newton; edges that are not worth their price go, the cheapest first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crlseq.discovery.changes import Changes
from crlseq.discovery.hits import Floats
from crlseq.discovery.pairs import Bools
from crlseq.storage.stage_cache import cached_on_disk

PRICE = 12.0  # chi-square that an edge must be worth
LEAST_ERROR = 0.03  # linear equations are no better than that
STEPS = 30


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


def direct_edges(found: Changes, ordered: Bools, both: Bools) -> Direct:
    """G within the pairs ``ordered`` (p, p), which hold no cycle, and Omega on the pairs ``both`` (p, p), symmetric."""
    p = len(found.e)
    error = np.hypot(found.e_error, LEAST_ERROR)
    seen = np.isfinite(error) & ~np.eye(p, dtype=bool)
    pairs = [(j, k) for j, k in zip(*np.nonzero(both | both.T), strict=True) if j < k]
    edges = list(zip(*np.nonzero(ordered & seen), strict=True))
    start = np.concatenate(
        [[-found.e[edge] for edge in edges], [-(found.e[a, b] + found.e[b, a]) / 2 for a, b in pairs]]
    )
    while True:
        theta, covariance, square = _fit(found.e, error, seen, edges, pairs, start)
        worth = theta[: len(edges)] ** 2 / np.diag(covariance)[: len(edges)]
        if not len(edges) or worth.min() >= PRICE:
            break
        gone = int(worth.argmin())
        edges.pop(gone)
        start = np.delete(theta, gone)
    effect, deviation, hidden = np.zeros((p, p)), np.full((p, p), np.nan), np.zeros((p, p))
    for i, edge in enumerate(edges):
        effect[edge], deviation[edge] = theta[i], np.sqrt(covariance[i, i])
    for value, (a, b) in zip(theta[len(edges) :], pairs, strict=True):
        hidden[a, b] = hidden[b, a] = value
    freedom = max(1, int(seen.sum()) - len(theta))
    return Direct(effect, deviation, hidden, square / freedom)


def _fit(
    e: Floats, error: Floats, seen: Bools, edges: list[tuple[int, int]], pairs: list[tuple[int, int]], theta: Floats
) -> tuple[Floats, Floats, float]:
    """Parameters of the edges and of the pairs, their covariance, and chi-square."""
    damping, (rest, jacobian) = 1e-3, _residuals(e, error, seen, edges, pairs, theta)
    for _ in range(STEPS if len(theta) else 0):
        h, gradient, before = jacobian.T @ jacobian, jacobian.T @ rest, rest @ rest
        step = -np.linalg.solve(h + damping * np.diag(np.diag(h)) + 1e-9 * np.eye(len(h)), gradient)
        trial = _residuals(e, error, seen, edges, pairs, theta + step)
        if trial[0] @ trial[0] > before:
            damping *= 5
            if damping > 1e6:
                break
            continue
        theta, (rest, jacobian), damping = theta + step, trial, max(damping / 5, 1e-9)
        if before - rest @ rest < 1e-6 * (1 + before):
            break
    covariance = np.linalg.inv(jacobian.T @ jacobian + 1e-9 * np.eye(len(theta)))
    return theta, covariance.astype(np.float64), float(rest @ rest)


def _residuals(
    e: Floats, error: Floats, seen: Bools, edges: list[tuple[int, int]], pairs: list[tuple[int, int]], theta: Floats
) -> tuple[Floats, Floats]:
    """(E + Omega T) / error of the entries ``seen`` (m,), and derivatives (m, parameters)."""
    p = len(e)
    g, omega = np.zeros((p, p)), np.eye(p)
    for value, edge in zip(theta, edges, strict=False):
        g[edge] = value
    for value, (a, b) in zip(theta[len(edges) :], pairs, strict=True):
        omega[a, b] = omega[b, a] = value
    total = np.linalg.inv(np.eye(p) - g)
    left = omega @ total
    columns = [np.outer(left[:, j], total[k]) for j, k in edges]
    for a, b in pairs:
        both = np.zeros((p, p))
        both[a], both[b] = total[b], total[a]
        columns.append(both)
    scaled = [(column / error)[seen] for column in columns]
    jacobian = np.stack(scaled, 1) if scaled else np.zeros((int(seen.sum()), 0))
    return ((e + left) / error)[seen], jacobian
