"""Precision matrices of environments in which each perturbation acts on any set of programs, which nobody says.

With y = M u and one intervention on each program, which is the same in all environments S_ek that have it,

    Theta_e = sum_k (1 - S_ek) a_k a_k' + S_ek v_k v_k',    control cells: S_0k = 0,

a_k the equation of program k in components and v_k what the intervention makes of it, both in span(h_1 .. h_k), u = H y in causal
order. The last program has an axis x on which no other equation depends, so that Theta_e x takes two values, one for each S_ek:

1. For all sets S of environments, the axis x of greatest likelihood; the axes and sets that leave the smallest deviance
   n_e log x' Theta_e x - N_0 log x' T_0 x - N_1 log x' T_1 x, T the inverse of the pooled covariance without and with S.
2. The same in what is orthogonal to x, up to the first program. The best of these are refined by the likelihood of all.
3. The deviance of all from unrestricted covariances is chi-squared if the model holds, and products of programs before another one
   say nothing of its noise. The graph is B = A V^-1.

Source: Varici, Acarturk, Shanmugam and Tajer 2024, "Linear causal representation learning from unknown multi-node interventions",
NeurIPS, arXiv 2406.05937 (UMNI-CRL). There integer combinations of score differences are searched for one of rank one from the
first program on; the search by likelihood from the last one on, and the test, are ours.
Assumes: components and equations are linear and normal; there are as many perturbations as programs, whose sets are linearly
independent; an intervention does the same to its program wherever it is.
Identified: programs, sets and graph under hard interventions; under soft ones programs mixed with what is upstream of them, and
ancestry. The two cannot be told apart: hard ones have to be asked for. Nothing where the model does not describe the
covariances, or where other sets describe them nearly as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, minimize
from scipy.stats import chi2
from torch import Tensor

from crlseq.discovery.factor_result import REASON, factor_result, start_with
from crlseq.discovery.methods import Programs
from crlseq.discovery.orientation import before
from crlseq.discovery.score_differences import groups_of, precisions
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import RIVAL, Answer, judge_multi_node
from crlseq.errors import InputError

AT_MOST: Answer = "identified"
MOST = 12  # programs: all 2^p sets are looked at
TRIED = 8  # sets that are refined in a step
KEPT = 6  # chains of steps that go on
SAME = 0.01  # squared sine of the angle between spaces that are the same
GROUPS = 20  # of cells, of which the jackknife leaves one out
SURE = 4.0  # standard errors of a weight that is an edge
LESS = 0.1  # deviance by which another order is better

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Chain:
    """Programs from some place of the causal order on."""

    deviance: float
    rest: Floats  # (k, p) orthonormal rows that span what comes before
    axes: Floats  # (p - k, p) orthonormal rows
    sets: Bools  # (K, p - k) perturbations of each


@dataclass(frozen=True)
class Recovered:
    """Programs u = H y in causal order."""

    flag: Floats  # (p, p) orthonormal rows, of which the first k span the equations of program k
    sets: Bools  # (K, p) whether a perturbation acts on a program
    deviance: float  # from unrestricted covariances
    directions: Floats  # (p, p) H, in units of the noise under intervention
    adjacency: Floats  # (p, p) weights, row -> column
    gain: Floats  # (K, p) log-likelihood a cell of perturbation on program over none


def find(task: Task) -> Programs:
    """Programs, graph and sets, of as many programs as there are perturbations with an effect."""
    start = start_with(task, "multi-node")
    p = start.n_latents
    if p > MOST:
        raise InputError(
            f"The method multi-node looks at all sets of up to {MOST} perturbations, and {p} have a detectable effect.",
            "Take another method.",
        )
    used = start.cells.train.numpy()
    y, environment = start.cells.values[used, :p].double().numpy(), start.cells.environment[used].numpy()
    s, n = covariances(y, environment, p, start.cells.noise), np.bincount(environment).astype(float)
    found, rival = recover(s, n)
    found, swapped = settled(found, s, n)
    edges = agreed(found, swapped, jackknife(y, environment, start.cells.noise, found), s, n)
    acts_on, hard = float(found.sets.sum(1).mean()), task.kind == "hard"
    verdict = judge_multi_node(p_value(found), curved(y, environment, found), rival, int(edges.sum()), acts_on, hard)
    weight = np.where(found.sets, found.gain, -1e9)
    target = np.full(len(task.effect), -1)
    perturbation, program = linear_sum_assignment(-weight)
    target[start.environments[perturbation]] = program
    graph = torch.from_numpy(found.adjacency * edges * verdict.grants_graph)
    directions = torch.from_numpy(found.directions.T)
    return Programs(p, REASON, factor_result(task, start, directions, verdict, graph, target))


def covariances(y: Floats, environment: NDArray[np.int64], k: int, noise: float | None) -> Floats:
    """(k + 1, p, p) of the environments 0 to k, without measurement noise."""
    found: Floats = np.linalg.inv(precisions(y, environment, k, noise)).astype(np.float64)
    return found


def recover(s: Floats, n: Floats) -> tuple[Recovered, float]:
    """The programs of covariances ``s`` (p + 1, p, p) of ``n`` (p + 1,) cells, control cells first, and by how much the deviance
    of the best solution with other sets is larger.
    """
    p = s.shape[1]
    white = np.linalg.inv(np.linalg.cholesky(s[0]))
    inner: Floats = white @ s @ white.T
    chains = [Chain(0.0, np.eye(p), np.zeros((0, p)), np.zeros((p, 0), dtype=bool))]
    for _ in range(p):
        longer = sorted((c for chain in chains for c in with_last(chain, inner, n)), key=lambda c: c.deviance)
        chains = distinct(longer)[:KEPT]
    solutions = [refined(chain.axes, chain.sets, inner, n) for chain in chains]
    first = min(solutions, key=lambda found: found.deviance)
    solutions += [refined(first.flag, sets, inner, n) for sets in neighbours(first, n)]
    best = min(solutions, key=lambda found: found.deviance)
    others = [found.deviance for found in solutions if not same_sets(found.sets, best.sets)]
    rival = min(others, default=np.inf) - best.deviance
    if np.linalg.matrix_rank(best.sets) < p:
        rival = 0.0  # programs that are perturbed alike may be mixed
    return replace(best, directions=best.directions @ white), rival


def neighbours(found: Recovered, n: Floats) -> list[Bools]:
    """The sets with one more or one less perturbation that lose least likelihood along the programs that were found."""
    changed = []
    for at in np.argsort(np.abs(found.gain) * n[1:, None], axis=None)[:TRIED]:
        sets = found.sets.copy()
        sets.flat[at] ^= True
        if sets.any(0).all():
            changed.append(sets)
    return changed


def with_last(chain: Chain, s: Floats, n: Floats) -> list[Chain]:
    """The chain with one program more before it: the `TRIED` sets of smallest deviance."""
    s = chain.rest @ s @ chain.rest.T
    theta, k = np.linalg.inv(s).astype(np.float64), s.shape[1]
    sets = (np.arange(1, 2 ** (len(s) - 1))[:, None] >> np.arange(len(s) - 1) & 1).astype(bool)
    hit = np.column_stack([np.zeros(len(sets), dtype=bool), sets])
    weights = np.stack([~hit, hit]) * n  # (2, sets, environments)
    sizes = weights.sum(-1)

    def pooled(matrices: Floats) -> Floats:  # (2, sets, k, k)
        flat: Floats = weights @ matrices.reshape(len(matrices), -1) / sizes[..., None]
        return flat.reshape(*sizes.shape, k, k)

    mean, inverse = pooled(theta), np.linalg.inv(pooled(s))
    scatter = np.einsum("e,eij->ij", n, theta @ theta) - (sizes[..., None, None] * mean @ mean).sum(0)
    axes = np.linalg.eigh(scatter)[1][:, :, 0]  # Theta_e x varies least within a set and outside it
    of_each = np.einsum("ti,eij,tj->te", axes, theta, axes)
    of_pools = np.einsum("ti,gtij,tj->gt", axes, inverse, axes)
    deviance = np.log(of_each) @ n - (sizes * np.log(of_pools)).sum(0)
    found = []
    for t in np.argsort(deviance)[:TRIED]:
        matrices, signed = np.concatenate([theta, inverse[:, t]]), np.concatenate([n, -sizes[:, t]])
        left, x = _minimum(partial(_log_forms, matrices=matrices, weights=signed), axes[t], float(n.sum()))
        x /= np.linalg.norm(x)
        rest = np.linalg.svd(x[None])[2][1:] @ chain.rest
        own = np.vstack([x @ chain.rest, chain.axes]), np.column_stack([sets[t], chain.sets])
        found.append(Chain(chain.deviance + left, rest, *own))
    return found


def _log_forms(x: Floats, matrices: Floats, weights: Floats) -> tuple[float, Floats]:
    """sum_e w_e log x' M_e x, and its gradient."""
    along = matrices @ x
    form = along @ x
    return float(weights @ np.log(form)), 2 * (weights / form) @ along


def _minimum(objective: Callable[[Floats], tuple[float, Floats]], start: Floats, scale: float) -> tuple[float, Floats]:
    """Smallest value of an objective with a gradient, and where it is."""

    def scaled(x: Floats) -> tuple[float, Floats]:
        value, gradient = objective(x)
        return value / scale, gradient / scale

    result = minimize(scaled, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-13, "gtol": 1e-9})
    return float(result.fun) * scale, result.x


def distinct(chains: list[Chain]) -> list[Chain]:
    """The first of those that found the same programs with the same sets, in whatever order."""
    kept: list[Chain] = []
    for chain in chains:
        alike = (other for other in kept if same_sets(chain.sets, other.sets))
        if not any(((chain.rest @ other.rest.T) ** 2).sum() > len(chain.rest) - SAME for other in alike):
            kept.append(chain)
    return kept


def same_sets(one: Bools, other: Bools) -> bool:
    """Whether programs (columns) are perturbed alike, in whatever order."""
    return sorted(one.T.tolist()) == sorted(other.T.tolist())


def along(directions: Floats, sets: Bools, s: Floats, n: Floats) -> Recovered:
    """The solution of greatest likelihood near programs in causal order along ``directions`` (p, p), of given sets."""
    white = np.linalg.inv(np.linalg.cholesky(s[0]))
    flag = np.linalg.qr((directions @ np.linalg.inv(white)).T)[0].T
    found = refined(flag, sets, white @ s @ white.T, n)
    return replace(found, directions=found.directions @ white)


def settled(found: Recovered, s: Floats, n: Floats) -> tuple[Recovered, list[Recovered]]:
    """The solution after neighbours in the causal order changed places while that is more likely, and the p - 1 solutions
    in which the i-th changes places with the next.
    """
    while True:
        orders = [swap(i, len(found.flag)) for i in range(len(found.flag) - 1)]
        swapped = [along(found.directions[order], found.sets[:, order], s, n) for order in orders]
        best = min(swapped, key=lambda each: each.deviance, default=found)
        if best.deviance >= found.deviance - LESS:
            return found, swapped
        found = best


def swap(i: int, p: int) -> NDArray[np.int64]:
    """The order 0 .. p - 1 in which i and i + 1 change places."""
    order = np.arange(p)
    order[[i, i + 1]] = i + 1, i
    return order


def agreed(found: Recovered, swapped: list[Recovered], error: Floats, s: Floats, n: Floats) -> Bools:
    """Edges (p, p), `SURE` by their errors, that stay in every order of `settled` that describes the covariances nearly as well,
    and in that with their ends the other way round, of whatever programs stand between them.
    """
    edges: Bools = np.abs(found.adjacency) > SURE * error
    for i, other in enumerate(swapped):
        if other.deviance - found.deviance < RIVAL:
            place = np.ix_(swap(i, len(edges)), swap(i, len(edges)))
            edges &= np.abs(other.adjacency[place]) > SURE * error
    kept, order = edges.copy(), list(range(len(edges)))
    for j, k in np.argwhere(edges).tolist():
        if k > j + 1:  # neighbours have changed places
            turned = before(edges, order, j, k)
            kept[j, k] = along(found.directions[turned], found.sets[:, turned], s, n).deviance - found.deviance >= RIVAL
    return kept


def refined(flag: Floats, sets: Bools, s: Floats, n: Floats) -> Recovered:
    """The solution of greatest likelihood of all programs together near ``flag`` (p, p), of given sets in causal order."""
    p = len(flag)
    lower = np.tril_indices(p, -1)
    first, matrices = torch.from_numpy(flag), torch.from_numpy(s)
    hit = np.vstack([np.zeros(p, dtype=bool), sets])
    weights = torch.from_numpy(np.stack([~hit, hit]) * n[:, None])  # (2, environments, programs)
    sizes = weights.sum(1)
    unrestricted = float(n @ np.linalg.slogdet(s)[1])

    def rotated(x: Tensor) -> Tensor:
        skew = torch.zeros(p, p, dtype=torch.float64)
        skew[lower] = x
        turned: Tensor = torch.linalg.matrix_exp(skew - skew.T) @ first
        return turned

    def roots(q: Tensor) -> Tensor:  # row k of the inverse of the k-th is the standardised equation of program k
        pooled = torch.einsum("gek,eij->gkij", weights, q @ matrices @ q.T) / sizes[..., None, None]
        found: Tensor = torch.linalg.cholesky(pooled)
        return found

    def deviance(x: Floats) -> tuple[float, Floats]:
        angles = torch.from_numpy(x).requires_grad_()
        deviations = torch.einsum("gkkk->gk", roots(rotated(angles)))
        value = 2 * (sizes * deviations.log()).sum()
        (gradient,) = torch.autograd.grad(value, angles)
        return float(value.detach()) - unrestricted, gradient.numpy()

    left, x = _minimum(deviance, np.zeros(len(lower[0])), float(n.sum()))
    q = rotated(torch.from_numpy(x))
    equations, changed = (torch.einsum("kkj->kj", torch.linalg.inv(root)) @ q for root in roots(q))
    mixed = equations @ torch.linalg.inv(changed)  # B
    forms = torch.einsum(
        "gki,eij,gkj->gek", torch.stack([equations, changed]), matrices, torch.stack([equations, changed])
    )
    density = torch.stack([(rows @ q.T).diagonal().abs().log() for rows in (equations, changed)])[:, None] - forms / 2
    adjacency = (torch.eye(p) - mixed / mixed.diagonal()[:, None]).T
    return Recovered(q.numpy(), sets, left, changed.numpy(), adjacency.numpy(), (density[1] - density[0])[1:].numpy())


def p_value(found: Recovered) -> float:
    """Of the deviance, if the model holds: covariances of K + 1 environments, less two rows a program and their flag."""
    k, p = found.sets.shape
    freedom = (k - 1) * p * (p + 1) // 2 - p * (p - 1) // 2
    return float(chi2.sf(found.deviance, freedom)) if freedom > 0 else 1.0


def curved(y: Floats, environment: NDArray[np.int64], found: Recovered) -> float:
    """The p-value of linear equations: by n R^2 of products of the programs before another one for its noise, chi-squared."""
    u, (k, p) = y @ found.directions.T, found.sets.shape
    for e in range(k + 1):
        u[environment == e] -= u[environment == e].mean(0)
    hit = np.vstack([np.zeros(p, dtype=bool), found.sets])[environment]
    statistic, freedom = 0.0, 0
    for program in range(1, p):
        i, j = np.triu_indices(program)
        products = u[:, i] * u[:, j]
        for e in range(k + 1):
            products[environment == e] -= products[environment == e].mean(0)
        for cells in (hit[:, program], ~hit[:, program]):
            before, own = u[cells, :program], u[cells, program]
            noise = own - before @ np.linalg.lstsq(before, own, rcond=None)[0]
            both = np.column_stack([before, products[cells]])
            left = noise - both @ np.linalg.lstsq(both, noise, rcond=None)[0]
            statistic += len(noise) * (1 - (left @ left) / (noise @ noise))
            freedom += len(i)
    return float(chi2.sf(statistic, freedom)) if freedom else 1.0


def jackknife(y: Floats, environment: NDArray[np.int64], noise: float | None, found: Recovered) -> Floats:
    """Standard errors (p, p) of the weights, with the sets that were found."""
    p, group = y.shape[1], groups_of(environment, GROUPS)
    without = []
    for g in range(GROUPS):
        kept = environment[group != g]
        s = covariances(y[group != g], kept, p, noise)
        without.append(along(found.directions, found.sets, s, np.bincount(kept).astype(float)).adjacency)
    error: Floats = np.sqrt((GROUPS - 1) * np.var(without, axis=0))
    return error
