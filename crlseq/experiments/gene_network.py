"""A gene network without a latent DAG: regulators that act on each other in circles.

Levels are the steady state of

    x_g = c_g b_g sum_j w_jg h(x_j / k_jg),      h(x) = x^2 / (1 + x^2) or, of repressors, 1 / (1 + x^2),

Hill functions of the regulators j of gene g, as in SERGIO (Dibaeinia and Sinha 2020, Cell Systems 11:252), with log-normal
variation c of each cell and gene in place of its Langevin noise. Counts follow. A perturbation keeps a share of the production
of one regulator. Every regulator is upstream of every other, so that any DAG is false, and "not identified" is right.
"""

from __future__ import annotations

import anndata as ad
import numpy as np
from scipy import sparse

from crlseq.data.simulated_latents import Floats, Rng
from crlseq.experiments.peers import as_screen

KEPT = 0.2  # share of a regulator's production under its perturbation
VARIATION = 0.4  # deviation of log c
ROUNDS, HALF = 400, 0.5  # of the iteration to the steady state, and how far it goes each time
TOLERANCE = 1e-6  # relative change in the last round


def gene_network(
    seed: int, n_regulators: int = 8, n_genes: int = 200, cells: int = 300, n_control: int = 2000, depth: float = 5000.0
) -> ad.AnnData:
    """Counts (cells, n_genes) of control cells and of two perturbations for each regulator, the first `n_regulators` genes.

    True latents are log levels of the regulators; the true adjacency is empty, for no DAG is right.
    """
    rng = np.random.default_rng(seed)
    weights, half, represses = draw_network(n_regulators, n_genes, rng)
    base = np.exp(rng.normal(0.0, 1.0, n_genes))
    base[:n_regulators] = rng.uniform(1.5, 3.0, n_regulators)
    target = np.tile(np.arange(n_regulators), 2)
    environment = np.repeat(np.arange(len(target) + 1), [n_control] + [cells] * len(target))
    production = base * np.exp(VARIATION * rng.standard_normal((len(environment), n_genes)))
    for c, k in enumerate(target):
        production[environment == c + 1, k] *= KEPT
    levels = steady_state(production, weights, half, represses)
    rate = levels / levels.sum(1, keepdims=True) * depth * np.exp(0.3 * rng.standard_normal((len(levels), 1)))
    counts = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    empty = np.zeros((n_regulators, n_regulators))
    return as_screen(counts, environment, np.log(levels[:, :n_regulators]), empty, target)


def draw_network(n_regulators: int, n_genes: int, rng: Rng) -> tuple[Floats, Floats, np.ndarray]:
    """Weights, half-saturations (regulators, genes) and which links repress: a circle through all regulators, and for
    every gene two regulators more.
    """
    linked = np.zeros((n_regulators, n_genes), dtype=bool)
    circle = rng.permutation(n_regulators)
    linked[circle, np.roll(circle, -1)] = True
    for g in range(n_genes):
        others = np.setdiff1d(np.arange(n_regulators), [g])
        linked[rng.choice(others, 2, replace=False), g] = True
    weights = np.where(linked, rng.uniform(0.5, 1.5, linked.shape), 0.0)
    return weights, rng.uniform(0.5, 1.5, linked.shape), linked & (rng.random(linked.shape) < 0.4)


def steady_state(production: Floats, weights: Floats, half: Floats, represses: np.ndarray) -> Floats:
    """Levels (cells, genes) at which production (cells, genes) times regulation is what is there."""
    n_regulators, n_genes = weights.shape
    levels = np.ones((len(production), n_regulators))

    def made(genes: slice) -> Floats:
        found = np.full((len(production), len(range(*genes.indices(n_genes)))), 0.1)  # what is made without a regulator
        for j in range(n_regulators):
            power = (levels[:, [j]] / half[j, genes]) ** 2
            found += weights[j, genes] * np.where(represses[j, genes], 1.0, power) / (1 + power)
        return np.asarray(production[:, genes] * found)

    regulators = slice(0, n_regulators)
    for _ in range(ROUNDS):
        before = levels
        levels = (1 - HALF) * before + HALF * made(regulators)
        if np.abs(levels / before - 1).max() < TOLERANCE:
            break
    found = made(slice(0, n_genes))
    found[:, regulators] = levels
    return found
