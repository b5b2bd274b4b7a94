"""Screens of any size for benchmarks: counts with programs, perturbations that shift them, and a density that is kept."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

CHUNK = 4096
N_PROGRAMS = 15


def make_screen(
    n_perturbed: int,
    n_control: int,
    n_genes: int,
    n_perturbations: int,
    density: float,
    seed: int = 0,
    part: int | None = None,
) -> ad.AnnData:
    """UMI counts (cells, genes) as float32 CSR with a share `density` of non-zeros; every perturbation shifts a program.

    Rates are log-linear in the programs, genes' abundances log-normal, and sizes of cells vary by a fifth. Parts of one
    seed hold other cells of the same programs and perturbations.
    """  # fmt: skip
    rng = np.random.default_rng(seed)
    loadings = np.where(rng.random((N_PROGRAMS, n_genes)) < 0.1, rng.normal(0, 0.5, (N_PROGRAMS, n_genes)), 0.0)
    graph = np.triu(np.where(rng.random((N_PROGRAMS, N_PROGRAMS)) < 0.15, 0.7, 0.0), 1)
    total = np.linalg.inv(np.eye(N_PROGRAMS) - graph)
    total /= np.sqrt((total**2).sum(0))  # latents of unit variance over control cells
    target = np.arange(n_perturbations) % N_PROGRAMS
    shift = rng.choice([-1.0, 1.0], n_perturbations) * rng.uniform(1.5, 3.0, n_perturbations)
    perturbation = np.concatenate([np.full(n_control, -1), np.arange(n_perturbed) % n_perturbations])
    perturbation = perturbation[rng.permutation(len(perturbation))]
    abundance = rng.normal(0, 1.0, n_genes)
    level = _level_of(density, abundance)
    if part is not None:
        rng = np.random.default_rng([seed, part])
    parts = []
    for start in range(0, len(perturbation), CHUNK):
        own = perturbation[start : start + CHUNK]
        z = rng.normal(size=(len(own), N_PROGRAMS))
        there = np.flatnonzero(own >= 0)
        z[there, target[own[there]]] += shift[own[there]]
        rate = np.exp(abundance + level + z @ total @ loadings + rng.normal(0, 0.2, (len(own), 1)))
        parts.append(sp.csr_matrix(_thinned(rate, density, rng)))
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(np.where(perturbation < 0, "control", [f"g{k}" for k in perturbation]))},
        index=[f"c{i}" for i in range(len(perturbation))],
    )
    return ad.AnnData(
        sp.csr_matrix(sp.vstack(parts, format="csr")), obs, pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])
    )


def _level_of(density: float, abundance: np.ndarray) -> float:
    """The log factor at which that share of the counts of an average cell is not 0."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        expected = float(-np.expm1(-np.exp(abundance + middle)).mean())
        low, high = (middle, high) if expected < density else (low, middle)
    return low


def _thinned(rate: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
    """Poisson counts; the rates are scaled so that programs do not move the density."""
    for _ in range(3):
        rate *= density / -np.expm1(-rate).mean()
    return rng.poisson(rate).astype(np.float32)
