"""Differences of score functions under linear mixing: one intervention for each program, equations of any form.

With y = M u, the difference between environment k and control cells is d_k(y) = M^-T grad_u [log p_k(u) - log p_0(u)], and an
intervention on program k changes log p(u_k | parents) alone: in the latents' coordinates it is 0 but for k and its parents.

1. Row k of H, for u = H y, is the leading eigenvector of R_k = E[d_k d_k'] over control cells: program k, mixed with parents.
2. D[j, k] = (H^-T R_k H^-1)_jj is 0 unless j is k or upstream of it: an order and edges.
3. Under a hard intervention u_k depends on nothing upstream: regress it in cells of environment k on what comes before it,
   take that off row k, and compute D again: j is a parent of k.

Source: Varici, Acarturk, Shanmugam, Kumar and Tajer 2025, "Score-based causal representation learning: linear and general
transformations", JMLR 26(112), algorithm LSCALE-I. That the differences are the gradients of a classifier, that other cells give
each factor of R, and errors by a jackknife over groups of cells are ours.
Assumes: components are linear in the programs; each program has exactly one perturbation.
Identified: under hard interventions programs and graph; under soft ones programs mixed with what is upstream of them, and
who is upstream of whom. The two cannot be told apart: hard ones have to be asked for, and otherwise ancestry alone is claimed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t

from crlseq.discovery.factor_result import REASON, factor_result, start_with
from crlseq.discovery.methods import Programs
from crlseq.discovery.orientation import before
from crlseq.discovery.score_differences import Products, groups_of, precisions, products
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer, Verdict, judge_scores

AT_MOST: Answer = "identified"
SURE = 2.0  # standard errors of D at an edge: of its square root, the size of the effect, that is four
CHANCE = 0.005  # of a direction that is not told
LEAST = 0.2  # effect of a parent, in standard deviations of the noise: less explains under 4 % of the variance

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Recovered:
    """Programs u = H y of variance 1 over control cells, numbered as the interventions."""

    directions: Floats  # (p, p) H
    effects: Floats  # (p, p) D
    order: Ints  # (p,) sources first
    left: (
        float  # largest D of an intervention on what comes after its program, as a share of that and its own: ideally 0
    )


def find(task: Task) -> Programs:
    """Programs and graph of as many programs as there are perturbations with an effect."""
    start = start_with(task, "score-linear")
    p, used, hard = start.n_latents, start.cells.train.numpy(), task.kind != "soft"
    y, environment = start.cells.values[used, :p].double().numpy(), start.cells.environment[used].numpy()
    of_groups = products(y, environment, task.seed, start.cells.noise)
    found, error = with_errors(y, environment, of_groups, hard, start.cells.noise)
    edges, verdict = judged(found, error, of_groups, y[environment == 0], task.kind == "hard")
    graph = torch.from_numpy(weights(y[environment == 0] @ found.directions.T, edges) * verdict.grants_graph)
    target = np.full(len(task.effect), -1)
    target[start.environments] = np.arange(p)
    directions = torch.from_numpy(found.directions.T)
    return Programs(p, REASON, factor_result(task, start, directions, verdict, graph, target))


def with_errors(
    y: Floats, environment: Ints, of_groups: Products, hard: bool, noise: float | None = None, mixed: bool = True
) -> tuple[Recovered, Floats]:
    """What cells ``y`` (n, p) of environments (n,) give, whose score differences have the second moments ``of_groups``; and
    standard errors (p, p) of D by a jackknife over groups. Not ``mixed``: y are the programs already.
    """
    p, group = y.shape[1], groups_of(environment, of_groups.n)

    def recovered(without: int | None, order: Ints | None) -> Recovered:
        kept = group != without
        covariances = np.linalg.inv(precisions(y[kept], environment[kept], p, noise)).astype(np.float64)
        return recover(of_groups.mean(without), covariances, hard, order, mixed)

    found = recovered(None, None)
    return found, jackknife(np.array([recovered(g, found.order).effects for g in range(of_groups.n)]))


def jackknife(without: Floats) -> Floats:
    """Standard errors of a statistic, from its values without each of the groups."""
    error: Floats = np.sqrt((len(without) - 1) * np.var(without, axis=0))
    return error


def recover(r: Floats, covariances: Floats, hard: bool, order: Ints | None = None, mixed: bool = True) -> Recovered:
    """Programs of second moments ``r`` (p, p, p) of score differences and ``covariances`` (p + 1, p, p) of the environments,
    control cells first; in a given order, or in that of `order_of`. Not ``mixed``: the coordinates are the programs.
    """
    h = leading(r, covariances[0]) if mixed else np.eye(len(r))
    if order is None:
        order = order_of(effects(r, h))
    if hard and mixed:
        first = h.copy()
        for step, k in enumerate(order):
            before = order[:step]
            own = first @ covariances[k + 1] @ first.T
            h[k] -= np.linalg.solve(own[np.ix_(before, before)], own[before, k]) @ first[before]
    h /= np.sqrt(np.einsum("ki,ij,kj->k", h, covariances[0], h))[:, None]
    d = effects(r, h)
    after = np.argsort(order)[:, None] > np.argsort(order)
    size = np.maximum(d, 0)
    beyond = (size * after).sum(0)
    return Recovered(h, d, order, float((beyond / np.maximum(beyond + np.diag(size), 1e-300)).max()))


def leading(r: Floats, covariance: Floats) -> Floats:
    """(p, q) leading eigenvectors of ``r`` (p, q, q) in coordinates in which control cells, of this covariance, are white."""
    root = np.linalg.cholesky(covariance)
    found: Floats = np.linalg.eigh(root.T @ r @ root)[1][:, :, -1] @ np.linalg.inv(root)
    return found


def effects(r: Floats, h: Floats) -> Floats:
    """D (p, p): mean square of component j of the score difference of environment k, in latents u = H y."""
    inverse = np.linalg.inv(h)
    found: Floats = np.einsum("ij,kil,lj->jk", inverse, r, inverse)
    return found


def order_of(d: Floats) -> Ints:
    """An order (p,) of the interventions: each time that whose D has least on those that are left."""
    left, order = list(range(len(d))), list[int]()
    while left:
        outside = [d[[j for j in left if j != k], k].sum() for k in left]
        order.append(left.pop(int(np.argmin(outside))))
    return np.array(order)


def declared(found: Recovered, error: Floats) -> tuple[NDArray[np.bool_], int]:
    """Edges (p, p), j -> k: what comes before k in the order and has an effect beyond its error; and how many such effects
    there are of what comes after k, which chance and a wrong model make.
    """
    seen = (found.effects > LEAST**2) & (found.effects > SURE * error)
    place = np.argsort(found.order)
    before = place[:, None] < place
    return seen & before, int((seen & before.T).sum())


def judged(
    found: Recovered, error: Floats, of_groups: Products, controls: Floats, hard: bool
) -> tuple[NDArray[np.bool_], Verdict]:
    """Edges (p, p) whose direction is told, and what they may be called; ``controls`` (n, p) are in the coordinates of
    ``of_groups``, ``hard`` if such interventions were asked for.
    """
    edges, against = declared(found, error)
    turned = undirected(edges, found.order, of_groups, np.cov(controls.T).reshape(edges.shape))
    edges &= ~turned
    return edges, judge_scores(found.left, int(edges.sum()), against, hard, of_groups.described, int(turned.sum()))


def undirected(edges: NDArray[np.bool_], order: Ints, of_groups: Products, covariance: Floats) -> NDArray[np.bool_]:
    """Edges (p, p) whose direction the score differences do not tell, in coordinates in which control cells have this
    ``covariance`` (p, p).

    If k came before j, the score differences of k and of all m - 1 programs before it would lie in m dimensions, whatever the
    mixing; in the order that is claimed those of j and these m - 1 do. So the (m + 1)-th eigenvalue of the sum of their R must be
    greater for k than for j by more than chance. It is not where an intervention is degenerate, its score difference having one
    direction in all cells (a shift under linear equations): the condition of the theory, "interventional regularity".
    """
    root, found = np.linalg.cholesky(covariance), np.zeros_like(edges)
    r = np.array([root.T @ of_groups.mean(without) @ root for without in (None, *range(of_groups.n))])
    least = t.isf(CHANCE, of_groups.n - 1)
    for j, k in np.argwhere(edges).tolist():
        turned = before(edges, order.tolist(), j, k)
        upstream = turned[: turned.index(k)]
        beyond = [np.linalg.eigvalsh(r[:, [*upstream, last]].sum(1))[:, -2 - len(upstream)] for last in (k, j)]
        apart = beyond[0] - beyond[1]
        found[j, k] = apart[0] <= least * jackknife(apart[1:])
    return found


def weights(u: Floats, edges: NDArray[np.bool_]) -> Floats:
    """Weights (p, p) of edges: the linear part of what parents do, by least squares over latents ``u`` (n, p) of controls."""
    centred, found = u - u.mean(0), np.zeros(edges.shape)
    for k in range(len(edges)):
        parents = np.flatnonzero(edges[:, k])
        found[parents, k] = np.linalg.lstsq(centred[:, parents], centred[:, k], rcond=None)[0]
    return found
