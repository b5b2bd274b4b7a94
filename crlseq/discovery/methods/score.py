"""Differences of score functions under any mixing: two hard interventions for each program, of which nobody says which two.

    grad_y log p_a(y) / p_b(y) = J' grad_u log q_a(u_k) / q_b(u_k),    J = du/dy

for two hard interventions a, b on program k, since u_k depends on nothing upstream under either: in the latents' coordinates the
difference is 0 but for k.

1. Two environments are a pair if their difference has one direction; the pairs of all are a matching of greatest weight.
2. Latents u = f(y) start along these directions; a network is trained as a classifier of a_k against b_k by u_k alone.
3. Program j is a parent of k if the score difference between both interventions on k and control cells depends on u_j.

Source: Varici, Acarturk, Shanmugam, Kumar and Tajer 2025, "Score-based causal representation learning: linear and general
transformations", JMLR 26(112), algorithm GSCALE-I. There an autoencoder is penalised for differences off the diagonal D; here
log-odds of one latent each make D diagonal (`crlseq.discovery.contrastive`), and step 1 takes the place of a search.
Assumes: components are an invertible function of the programs, nearly enough linear to tell pairs; each program has exactly two
perturbations, both hard, whose log-odds are quadratic in some function of it.
Identified: programs, each up to a function of its own, and the graph, if hard interventions are asked for; else ancestry.
"""

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray

from crlseq.discovery.contrastive import train_encoder
from crlseq.discovery.factor_result import REASON_OF_PAIRS, latents_result, start_with
from crlseq.discovery.methods import Programs
from crlseq.discovery.methods.contrastive import MOST_CONTROLS, components_of
from crlseq.discovery.methods.score_linear import judged, leading, weights, with_errors
from crlseq.discovery.score_differences import Products, fit_log_odds, products
from crlseq.discovery.task import Task
from crlseq.discovery.verdict import Answer

AT_MOST: Answer = "identified"

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def find(task: Task) -> Programs:
    """Programs and graph of half as many programs as there are perturbations with an effect."""
    start = start_with(task, "score", 2)
    p, noise = start.n_latents, start.cells.noise or 0.0
    y, environment = components_of(start)
    task.stage("pairing the perturbations")
    pairs, first = paired(y, environment, p, task.seed, noise)
    task.stage("training the classifier")
    encoder = train_encoder(y, environment, pairs, False, task.seed, noise, first)
    u = encoder.latents(y)
    of_pairs = by_pairs(products(u, environment, task.seed), pairs)
    found, error = with_errors(u, environment, of_pairs, True, mixed=False)
    edges, verdict = judged(found, error, of_pairs, u[environment == 0], task.kind == "hard")
    graph = torch.from_numpy(weights(u[environment == 0], edges) * verdict.grants_graph)
    target = np.full(len(task.effect), -1)
    target[start.environments[pairs - 1]] = np.arange(p)[:, None]
    latents = torch.from_numpy(encoder.latents(start.cells.values[task.fitted_cells(), : y.shape[1]].double().numpy()))
    known = torch.from_numpy(noise * encoder.squared_slopes(y[environment == 0][:MOST_CONTROLS]))
    return Programs(p, REASON_OF_PAIRS, latents_result(task, start, latents, known, verdict, graph, target))


def paired(y: Floats, environment: Ints, p: int, seed: int, noise: float = 0.0) -> tuple[Ints, Floats]:
    """Pairs (p, 2) of environments on one program, and the direction (p, q) of each in components ``y`` (n, q)."""
    own, controls = y[:, :p], y[environment == 0, :p]
    scores, covariance = (
        fit_log_odds(own, environment, seed, noise).gradients(controls),
        np.cov(controls.T).reshape(p, p),
    )
    root, moments = np.linalg.cholesky(covariance), dict[tuple[int, int], Floats]()
    graph: nx.Graph[int] = nx.Graph()
    for a in range(2 * p):
        for b in range(a + 1, 2 * p):
            apart = scores[a] - scores[b]
            moments[a, b] = apart.T @ apart / len(apart)
            sizes = np.linalg.eigvalsh(root.T @ moments[a, b] @ root)
            graph.add_edge(a, b, weight=float(np.log(sizes[-1] / sizes.sum())))
    found = sorted((min(pair), max(pair)) for pair in nx.max_weight_matching(graph, maxcardinality=True))
    first = np.zeros((p, y.shape[1]))
    first[:, :p] = leading(np.array([moments[pair] for pair in found]), covariance)
    return np.array(found) + 1, first


def by_pairs(of_groups: Products, pairs: Ints) -> Products:
    """The mean of both interventions on each program: of ``pairs`` (p, 2) of environments."""
    return Products(of_groups.pairs[:, :, pairs - 1].mean(3), of_groups.described)
