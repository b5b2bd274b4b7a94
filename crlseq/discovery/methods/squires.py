"""Precision matrices that differ by one row: hard interventions, one for each program, and no mean shift needed.

With y = M u, the equations B u = e (e of variance 1) and H = M^-1, the precision of y is Theta = H' B' B H. A hard
intervention on program k replaces row b_k of B by a multiple of the k-th unit vector:

    Theta_k - Theta_0 = (lambda_k h_k)(lambda_k h_k)' - c_k c_k',    c_k = row k of B H,    h_k = row k of H,

of rank one if k has no parents, and else once its ancestors' rows are projected out: so programs are found from the
sources on. In that order C = B H is the triangular factor of Theta_0, and Theta_k - Theta_0 + c_k c_k' is rank one, along h_k.

Source: Squires, Seigal, Bhate and Uhler 2023, "Linear causal disentanglement via interventions", ICML. Errors of weights are
those of a jackknife over groups of cells, which is ours.
Assumes: components and equations are linear; each program has exactly one perturbation, which is hard.
Identified: the graph and the programs, from covariances alone. Soft interventions leave a matrix of rank one too, along
another h_k: hard ones have to be asked for, and otherwise ancestry alone is claimed. Where more than rank one is left, a
perturbation acts on several programs, and nothing is claimed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from crlseq.discovery.factor_result import REASON, factor_result, start_with
from crlseq.discovery.methods import Programs
from crlseq.discovery.score_differences import groups_of, precisions
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer, judge_squires

AT_MOST: Answer = "identified"
GROUPS = 10  # of cells, of which the jackknife leaves one out
SURE = 3.0  # standard errors of a weight that is an edge

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Recovered:
    """Programs u = H (y - mean) with noise of variance 1; numbered as the interventions."""

    directions: Floats  # (p, p) H
    adjacency: Floats  # (p, p) weights, row -> column
    order: NDArray[np.int64]  # (p,) sources first
    left: float  # largest share of a second eigenvalue where there should be one: 0 if each changes one row of B


def find(task: Task) -> Programs:
    """Programs and graph of as many programs as there are perturbations with an effect."""
    start = start_with(task, "squires")
    k = start.n_latents
    used = start.cells.train.numpy()
    y, environment = start.cells.values[used, :k].double().numpy(), start.cells.environment[used].numpy()
    found = recover(precisions(y, environment, k, start.cells.noise))
    error = jackknife(y, environment, start.cells.noise, found)
    edges = np.abs(found.adjacency) > SURE * error
    target = np.full(len(task.effect), -1)
    target[start.environments] = np.arange(k)
    verdict = judge_squires(found.left, int(edges.sum()), task.kind == "hard")
    graph = found.adjacency * edges * verdict.grants_graph
    directions = torch.from_numpy(found.directions.T)
    return Programs(k, REASON, factor_result(task, start, directions, verdict, torch.from_numpy(graph), target))


def recover(theta: Floats, order: NDArray[np.int64] | None = None) -> Recovered:
    """The programs of precisions ``theta`` (p + 1, p, p): control cells first, then the interventions; in a given order, or
    one of which each program leaves least beyond rank one.
    """
    p = theta.shape[1]
    difference = theta[1:] - theta[0]
    half = np.linalg.cholesky(np.linalg.inv(theta[0]))  # in whose coordinates control cells are white
    white = half.T @ difference @ half
    rows, places = np.zeros((0, p)), list[int]()
    for step in range(p):
        outside = np.eye(p) - rows.T @ rows
        left = [k for k in range(p) if k not in places]
        values, vectors = np.linalg.eigh(outside @ white[left] @ outside)
        sizes = np.sort(np.abs(values), 1)
        ratio = sizes[:, -2] / np.maximum(sizes[:, -1], 1e-300) if p > 1 else np.zeros(len(left))
        best = int(ratio.argmin()) if order is None else left.index(int(order[step]))
        row = outside @ vectors[best][:, np.abs(values[best]).argmax()]
        rows = np.vstack([rows, row / np.linalg.norm(row)])
        places.append(left[best])
    # In white coordinates Theta_0 is 1, and its triangular factor in the basis of `rows` is `rows` itself.
    found = np.array(places)
    directions, shares = np.empty((p, p)), np.empty(p)
    for step, k in enumerate(places):
        one = white[k] + np.outer(rows[step], rows[step])
        known = rows[: step + 1]  # h_k lies in what its ancestors and itself span
        directions[k] = np.linalg.eigh(known @ one @ known.T)[1][:, -1] @ known
        values = np.linalg.eigvalsh(one)
        shares[k] = np.abs(values[:-1]).max(initial=0.0) / max(values[-1], 1e-300)
    mixing = rows[np.argsort(found)] @ np.linalg.inv(directions)  # B, up to the scale of its columns
    scale = np.diag(mixing).copy()
    equations = mixing / scale
    return Recovered(
        directions=(directions * scale[:, None]) @ np.linalg.inv(half),
        adjacency=(np.eye(p) - equations).T,
        order=found,
        left=float(shares.max()),
    )


def jackknife(y: Floats, environment: NDArray[np.int64], noise: float | None, found: Recovered) -> Floats:
    """Standard errors (p, p) of the weights, in the order that was found."""
    p, group = y.shape[1], groups_of(environment, GROUPS)
    without = np.array([
        recover(precisions(y[group != g], environment[group != g], p, noise), found.order).adjacency for g in range(GROUPS)
    ])  # fmt: skip
    error: Floats = np.sqrt((GROUPS - 1) * without.var(0))
    return error
