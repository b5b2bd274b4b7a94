"""Which edges of a likelihood could as well point the other way.

Of an edge j -> k, an order of the programs with j before k and one with k before j are compared, each with all edges along
it: both have as many parameters. The direction is told by the cells if the first is worth more than the price of an edge,

    2 N (nll_reversed - nll) / dispersion  >=  log N,

or, among many programs, than the chi-square that chance gives `FALSE_CALLS` of all p (p - 1) possible edges. So it is where
interventions on either end show it. Interventions that change little but a variance may not: then two graphs describe the
cells alike, and single edges of either are sure and wrong half of the time.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from torch import Tensor

from crlseq.discovery.edges import Edges, reachable
from crlseq.discovery.likelihood import Solution
from crlseq.discovery.misfit import misfit
from crlseq.discovery.moments import DTYPE
from crlseq.discovery.pairs import FALSE_CALLS

STEPS = 30

Bools = NDArray[np.bool_]


def undirected(edges: Edges, known: Bools) -> Bools:
    """Edges (p, p) of a DAG whose direction the cells do not tell; those ``known`` (p, p) from elsewhere are not tried."""
    graph, solution = (edges.adjacency != 0).numpy(), edges.solution
    found = np.zeros_like(graph)
    doubtful = np.argwhere(graph & ~known)
    if not len(doubtful):
        return found
    order, cells = topological(graph), float(solution.model.moments.counts.sum())
    price = price_of(len(graph), cells) * misfit(solution).dispersion / (2 * cells)
    along = solution.refitted(mask=all_along(order), steps=STEPS)
    for j, k in doubtful.tolist():
        mask = all_along(before(graph, order, j, k))
        starts: tuple[Solution, Solution] = (along, solution)  # one alone may stop at a maximum near its own direction
        least = min(float(start.refitted(mask=mask, steps=STEPS).nll[0]) for start in starts)
        found[j, k] = least - float(along.nll[0]) < price
    return found


def price_of(p: int, cells: float) -> float:
    """Twice the log-likelihood over the dispersion that the direction of an edge between p programs must be worth."""
    return max(math.log(cells), float(chi2.isf(FALSE_CALLS / (p * (p - 1)), 1)))


def topological(graph: Bools) -> list[int]:
    """An order of the programs of a DAG (p, p), sources first."""
    left, order = list(range(len(graph))), list[int]()
    while left:
        order.append(next(k for k in left if not graph[left, k].any()))
        left.remove(order[-1])
    return order


def before(graph: Bools, order: list[int], j: int, k: int) -> list[int]:
    """The order of a DAG (p, p) with k before j in place of j before k: just before it, with what must come before k."""
    reach = reachable(torch.from_numpy(graph)).numpy()
    at, until = order.index(j), order.index(k)
    between = order[at + 1 : until]
    ancestors = [m for m in between if reach[m, k] and not reach[j, m]]
    others = [m for m in between if m not in ancestors]
    return [*order[:at], *ancestors, k, j, *others, *order[until + 1 :]]


def all_along(order: list[int]) -> Tensor:
    """Mask (1, p, p) of all edges along an order."""
    place = torch.tensor(np.argsort(order))
    return (place[:, None] < place).to(DTYPE)[None]
