"""Expression of simulated cells: programs mixed into genes, background factors, counts.

Every number comes from a generator that is passed; `crlseq.data.simulate` says what the numbers are.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Mixing = Literal["linear", "network"]
Noise = Literal["counts", "gaussian"]
Floats = NDArray[np.float64]
Rng = np.random.Generator

BACKGROUND_DENSITY = 0.4  # share of the genes that a background factor moves
LOG_RATE_SCALE = 0.35  # standard deviation of a log rate for one of the signal
LOG_MEAN_SCALE = 1.2  # spread of the genes' mean log rates
DEPTH_SCALE = 0.3  # spread of the cells' log depths
DISPERSION = 0.2  # negative binomial: variance = mean + DISPERSION * mean^2
DISPERSIONS = (0.02, 1.0)  # of single genes, about the same mean
CHUNK = 4096  # cells whose rates are held at once


def mixed(latents: Floats, n_genes: int, mixing: Mixing, loaded: NDArray[np.bool_] | None, rng: Rng) -> Floats:
    """Signal (n, n_genes) of latents (n, p); each latent moves the genes that are ``loaded`` (p, n_genes)."""
    p = latents.shape[1]
    if mixing == "linear":
        loadings = rng.standard_normal((p, n_genes)) / np.sqrt(p)
        if loaded is not None:
            loadings *= loaded
        return np.asarray(latents @ loadings)
    hidden = 4 * p
    first = rng.standard_normal((p, hidden)) / np.sqrt(p)
    last = rng.standard_normal((hidden, n_genes)) / np.sqrt(hidden)
    if loaded is not None:  # unit h reads latent h % p alone, as strongly as another does all
        first = np.tile(np.eye(p), 4) * (first * np.sqrt(p))
        last *= np.tile(loaded, (4, 1))
    value = latents @ first + 0.5 * rng.standard_normal(hidden)
    signal: Floats = np.where(value > 0, value, 0.2 * value) @ last
    return signal


def draw_background(n: int, factors: int, cell_cycle: bool, rng: Rng) -> Floats:
    """Factors (n, F) that nobody perturbs, each of variance 1: normal ones, then the two coordinates of a cell cycle."""
    normal = rng.standard_normal((n, factors))
    angle = rng.uniform(0.0, 2 * np.pi, n)
    return np.column_stack([normal, *(np.sqrt(2) * f(angle) for f in (np.cos, np.sin) if cell_cycle)])


def background_loadings(n: int, n_genes: int, strength: float, rng: Rng) -> Floats:
    """Loadings (n, n_genes): normal with standard deviation `strength` on `BACKGROUND_DENSITY` of the genes, 0 on others."""
    return strength * rng.standard_normal((n, n_genes)) * (rng.random((n, n_genes)) < BACKGROUND_DENSITY)


def draw_dispersions(n_genes: int, rng: Rng) -> Floats:
    """Dispersions (n_genes,): gamma with shape 2 and mean `DISPERSION`, within `DISPERSIONS`."""
    return np.clip(rng.gamma(2.0, DISPERSION / 2, n_genes), *DISPERSIONS)


def counts(log_rate: Floats, depth: Floats, dispersion: Floats, rng: Rng) -> sparse.csr_matrix:
    """Negative-binomial counts (CSR float32): a gamma-distributed rate, then Poisson.

    ``log_rate`` (n, n_genes), to which the genes' means are added; ``depth`` (n,) the median of the expected counts of each
    cell; ``dispersion`` (n_genes,).
    """
    n, n_genes = log_rate.shape
    base = LOG_MEAN_SCALE * rng.standard_normal(n_genes)
    depths = depth * np.exp(DEPTH_SCALE * rng.standard_normal(n))
    blocks = []
    for start in range(0, n, CHUNK):
        rate = np.exp(base + log_rate[start : start + CHUNK])
        rate *= (depths[start : start + CHUNK] / rate.sum(1))[:, None]
        drawn = rng.poisson(rng.gamma(1 / dispersion, rate * dispersion))
        blocks.append(sparse.csr_matrix(drawn.astype(np.float32)))
    return sparse.csr_matrix(sparse.vstack(blocks, format="csr"))
