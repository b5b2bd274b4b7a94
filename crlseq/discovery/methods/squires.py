"""Precision matrices that differ by one row: hard interventions, one for each program, and no mean shift needed.

With y = M u, the equations B u = e (e of variance 1) and H = M^-1, the precision of y is Theta = H' B' B H. A hard
intervention on program k replaces row b_k of B by a multiple of the k-th unit vector:

    Theta_k - Theta_0 = (lambda_k h_k)(lambda_k h_k)' - c_k c_k',    c_k = row k of B H,    h_k = row k of H,

of rank one if k has no parents, and else once its ancestors' rows are projected out: so programs are found from the
sources on. In that order C = B H is the triangular factor of Theta_0, and Theta_k - Theta_0 + c_k c_k' is rank one, along h_k.

Source: Squires, Seigal, Bhate and Uhler 2023, "Linear causal disentanglement via interventions", ICML. That with cells the rows are
of greatest likelihood, in this order or one near it, and that the deviance is tested (`crlseq.discovery.methods.multi_node`), is ours.
Assumes: components and equations are linear and normal; each program has exactly one perturbation, which is hard.
Identified: the graph and the programs, from covariances alone. Soft interventions leave a matrix of rank one too, along
another h_k: hard ones have to be asked for, and otherwise ancestry alone is claimed. Where covariances are not described, a
perturbation acts on several programs or the order is wrong, and nothing is claimed.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from crlseq.discovery.factor_result import REASON, factor_result, start_with
from crlseq.discovery.methods import Programs
from crlseq.discovery.methods.multi_node import (
    Recovered,
    agreed,
    along,
    covariances,
    curved,
    jackknife,
    p_value,
    settled,
)
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer, judge_squires

AT_MOST: Answer = "identified"

Floats = NDArray[np.float64]


def find(task: Task) -> Programs:
    """Programs and graph of as many programs as there are perturbations with an effect."""
    start = start_with(task, "squires")
    k = start.n_latents
    used = start.cells.train.numpy()
    y, environment = start.cells.values[used, :k].double().numpy(), start.cells.environment[used].numpy()
    s, n = covariances(y, environment, k, start.cells.noise), np.bincount(environment).astype(float)
    found, swapped = by_likelihood(s, n)
    edges = agreed(found, swapped, jackknife(y, environment, start.cells.noise, found), s, n)
    tests = p_value(found), curved(y, environment, found)
    verdict = judge_squires(*tests, int(edges.sum()), task.kind == "hard")
    target = np.full(len(task.effect), -1)
    target[start.environments] = found.sets.argmax(1)
    graph = torch.from_numpy(found.adjacency * edges * verdict.grants_graph)
    directions = torch.from_numpy(found.directions.T)
    return Programs(k, REASON, factor_result(task, start, directions, verdict, graph, target))


def by_likelihood(s: Floats, n: Floats) -> tuple[Recovered, list[Recovered]]:
    """What `crlseq.discovery.methods.multi_node.settled` makes of the order that `ordered_rows` finds, of covariances ``s``
    (p + 1, p, p) of ``n`` (p + 1,) cells.
    """
    rows, order = ordered_rows(np.linalg.inv(s).astype(np.float64))
    sets = np.arange(len(order))[:, None] == order
    return settled(along(rows, sets, s, n), s, n)


def ordered_rows(theta: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """C (p, p), sources first, and the interventions (p,) of its rows, of precisions ``theta`` (p + 1, p, p), control cells
    first: in the order of which each program leaves least beyond rank one.
    """
    p = theta.shape[1]
    difference = theta[1:] - theta[0]
    half = np.linalg.cholesky(
        np.linalg.inv(theta[0])
    )  # in whose coordinates control cells are white, and C orthonormal
    white = half.T @ difference @ half
    rows, order = np.zeros((0, p)), list[int]()
    for _ in range(p):
        outside = np.eye(p) - rows.T @ rows
        left = [k for k in range(p) if k not in order]
        values, vectors = np.linalg.eigh(outside @ white[left] @ outside)
        sizes = np.sort(np.abs(values), 1)
        ratio = sizes[:, -2] / np.maximum(sizes[:, -1], 1e-300) if p > 1 else np.zeros(len(left))
        best = int(ratio.argmin())
        row = outside @ vectors[best][:, np.abs(values[best]).argmax()]
        rows = np.vstack([rows, row / np.linalg.norm(row)])
        order.append(left[best])
    return rows @ np.linalg.inv(half), np.array(order)
