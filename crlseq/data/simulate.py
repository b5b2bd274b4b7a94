"""Perturb-seq screens with a known truth: structural equations, interventions, mixing, counts.

`simulate` draws control and perturbed cells of the model that crlseq looks for and keeps what made them, so that a fit can
be scored. Everything follows from one `numpy.random.Generator`: equal arguments give equal cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from crlseq.config import InterventionKind
from crlseq.model.interventions import INTERVENTIONS

Equations = Literal["linear", "relu"]
Mixing = Literal["linear", "network"]
Noise = Literal["counts", "gaussian"]
Floats = NDArray[np.float64]

CONTROL = "control"
EDGE_WEIGHT = (0.6, 1.4)  # |G[j, k]|: far enough from 0 to be visible, small enough not to drown z
SHIFT = (1.0, 3.0)  # |a|, in standard deviations of the target's own noise
NOISE_SCALE = 0.7  # exp(s) of hard and soft interventions
RETENTION = (0.2, 0.6)  # gamma of soft interventions
GAUSSIAN_NOISE = 0.3  # measurement noise, in standard deviations of the signal
LOG_RATE_SCALE = 0.35  # standard deviation over cells and genes of the log rate that the latents explain
LOG_MEAN_SCALE = 1.2  # spread of the genes' mean log rates
DEPTH_SCALE = 0.3  # spread of the cells' log depths
DISPERSION = 0.2  # negative binomial: variance = mean + DISPERSION * mean^2
CHUNK = 4096  # cells whose rates are held at once


@dataclass(frozen=True)
class _Effects:
    """What each single perturbation does, all of shape (K,)."""

    target: NDArray[np.int64]
    shift: Floats
    log_scale: Floats
    retention: Floats


def simulate(
    *,
    n_latents: int = 10,
    perturbations_per_latent: int = 4,
    n_genes: int = 500,
    cells_per_perturbation: int = 150,
    n_control: int = 2000,
    expected_parents: float = 1.0,
    equations: Equations = "linear",
    intervention: InterventionKind = "hard",
    mixing: Mixing = "linear",
    noise: Noise = "counts",
    depth: float = 5000.0,
    n_doubles: int = 0,
    escapers: float = 0.0,
    n_batches: int = 1,
    batch_scale: float = 0.0,
    loading_density: float = 1.0,
    seed: int = 0,
) -> anndata.AnnData:
    """Simulate a Perturb-seq screen whose latent DAG and intervention targets are known.

    Structural equations of latent ``k``, for a cell under the perturbations ``c`` in its label::

        u_k = g_k * sum_j G[j, k] phi(u_j) + exp(s_k) z_k + a_k,      z_k ~ N(0, 1)

    with ``phi`` the identity or ReLU, ``g_k`` the product of the retentions, ``s_k`` and ``a_k`` the sums of
    the log noise scales and shifts of those perturbations that target ``k`` (1, 0 and 0 where none does).
    ``hard``: retention 0, scale 0.7; ``soft``: retention in [0.2, 0.6], scale 0.7; ``shift``: retention 1,
    scale 1. Shifts have size 1 to 3 and random sign, edges size 0.6 to 1.4 and random sign; the causal order
    is a random permutation of the latents, and each pair is joined with the same probability.

    The signal is ``e = u W`` (linear) or ``e = LeakyReLU0.2(u W1 + b1) W2`` (network, ``4 n_latents`` hidden units),
    scaled to unit standard deviation. With ``loading_density`` < 1 each latent moves that share of the genes, drawn at
    random, and with the network mixing each has hidden units of its own, so that it moves no other gene. Gaussian values
    are ``e + 0.3 N(0, 1)``; counts are negative binomial with mean ``d * softmax(b + 0.35 e)`` and variance
    ``mean + 0.2 mean^2``, ``b`` normal with standard deviation 1.2, ``d`` log-normal about ``depth``.

    Parameters
    ----------
    n_latents, n_genes
        Sizes ``p`` and ``G``.
    perturbations_per_latent
        Single perturbations ``g0 .. g{K-1}``, ``K = p * perturbations_per_latent``. The first ``p`` target each
        latent once; the targets of the others are drawn, so that this is an average.
    cells_per_perturbation, n_control
        Cells of every single or double perturbation, and control cells.
    expected_parents
        Edges per latent on average; at most ``(p - 1) / 2``, the complete DAG.
    equations, intervention, mixing, noise
        The kinds described above.
    depth
        Median of the expected counts per cell; unused for Gaussian values.
    n_doubles
        Combinations of two perturbations, drawn without repetition, named ``gA+gB``.
    escapers
        Share of perturbed cells that the perturbation does nothing to, such as those with an in-frame repair: their
        latents are drawn as control cells' are.
    n_batches, batch_scale
        Cells fall into batches at random; ``batch_scale`` is the standard deviation of the batches' effects on
        genes, in units of the signal's.
    loading_density
        Share of the genes that a latent moves, in (0, 1].
    seed
        Seed of ``numpy.random.default_rng``.

    Returns
    -------
    anndata.AnnData
        Cells x genes: ``X`` CSR float32 counts or dense float32 values; ``obs["perturbation"]`` (categorical,
        ``control`` among them), ``obs["batch"]`` if there are several, ``obs["escaped"]`` (bool) if any did;
        ``obsm["true_latents"]`` (cells, p);
        ``uns["truth"]`` with ``adjacency`` (p, p), ``target`` (single perturbation -> ``latent``),
        ``loaded`` (p, n_genes) bool where ``loading_density`` < 1, ``orientation`` and ``note``.

    Raises
    ------
    ValueError
        If a size is not positive, a kind is unknown, more edges than the complete DAG or more doubles than
        pairs are asked for, or a number is negative or not finite.

    Examples
    --------
    >>> import crlseq
    >>> adata = crlseq.simulate(n_latents=3, n_genes=50, cells_per_perturbation=20, n_control=60, seed=1)
    >>> adata.shape, adata.obs["perturbation"].nunique()
    ((300, 50), 13)
    >>> adata.uns["truth"]["adjacency"].shape, adata.obsm["true_latents"].shape
    ((3, 3), (300, 3))
    """
    _refuse_impossible(locals())
    rng, n_single = np.random.default_rng(seed), n_latents * perturbations_per_latent
    adjacency, order = _draw_graph(n_latents, expected_parents, rng)
    effects = _draw_effects(n_latents, n_single, intervention, rng)
    conditions: list[tuple[int, ...]] = [(), *((i,) for i in range(n_single)), *_draw_pairs(n_single, n_doubles, rng)]
    sizes = [n_control] + [cells_per_perturbation] * (len(conditions) - 1)

    def latents_under(members: tuple[int, ...], n: int) -> Floats:
        return _draw_latents(n, adjacency, order, effects, members, equations, rng)

    latents = np.concatenate([latents_under(members, n) for members, n in zip(conditions, sizes, strict=True)])
    labels = ["+".join(f"g{i}" for i in members) or CONTROL for members in conditions]
    obs: dict[str, Any] = {"perturbation": pd.Categorical(np.repeat(np.array(labels, dtype=object), sizes))}
    escaped = np.zeros(len(latents), dtype=bool)
    if escapers:  # without them nothing is drawn: one seed, one screen
        escaped[n_control:] = rng.random(len(latents) - n_control) < escapers
        latents[escaped] = latents_under((), int(escaped.sum()))
    loaded = rng.random((n_latents, n_genes)) < loading_density if loading_density < 1 else None
    signal = _mixed(latents, n_genes, mixing, loaded, rng)
    signal /= signal.std() or 1.0
    if n_batches > 1:
        batch = rng.integers(n_batches, size=len(latents))
        signal += (batch_scale * rng.standard_normal((n_batches, n_genes)))[batch]
        obs["batch"] = pd.Categorical([f"b{i}" for i in batch], categories=[f"b{i}" for i in range(n_batches)])
    if escapers:
        obs["escaped"] = escaped
    if noise == "counts":
        values: Any = _counts(signal, depth, rng)
    else:
        values = (signal + GAUSSIAN_NOISE * rng.standard_normal(signal.shape)).astype(np.float32)
    truth = {
        "adjacency": adjacency,
        "target": pd.DataFrame({"latent": effects.target}, index=_names("g", n_single)),
        "orientation": "adjacency[i, j] != 0 means latent i -> latent j",
        "note": f"{equations} structural equations, {intervention} interventions, {mixing} mixing of {n_latents} latents"
        f" into {n_genes} genes, {noise} noise, seed {seed}",
    } | ({} if loaded is None else {"loaded": loaded})
    cells, genes = pd.DataFrame(obs, index=_names("c", len(latents))), pd.DataFrame(index=_names("gene", n_genes))
    return anndata.AnnData(values, cells, genes, uns={"truth": truth}, obsm={"true_latents": latents})


def _names(kind: str, n: int) -> pd.Index:
    return pd.Index([f"{kind}{i}" for i in range(n)], dtype=object)


def _refuse_impossible(given: Mapping[str, Any]) -> None:
    """The arguments of `simulate`, by name."""
    sizes = ("n_latents", "perturbations_per_latent", "n_genes", "cells_per_perturbation", "n_control", "n_batches")
    for name in sizes:
        if given[name] < 1 or given[name] != int(given[name]):
            raise ValueError(f"{name} must be a whole number of at least 1, not {given[name]}.")
    for name in ("expected_parents", "n_doubles", "escapers", "batch_scale", "seed"):
        if not (np.isfinite(given[name]) and given[name] >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, not {given[name]}.")
        if name in ("n_doubles", "seed") and given[name] != int(given[name]):
            raise ValueError(f"{name} must be a whole number, not {given[name]}.")
    kinds = {"equations": Equations, "intervention": InterventionKind, "mixing": Mixing, "noise": Noise}
    for name, kind in kinds.items():
        if given[name] not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {given[name]!r}.")
    if not (np.isfinite(given["depth"]) and given["depth"] > 0):
        raise ValueError(f"depth must be a positive number, not {given['depth']}.")
    p, n_single = given["n_latents"], given["n_latents"] * given["perturbations_per_latent"]
    if given["expected_parents"] > (p - 1) / 2:
        raise ValueError(
            f"expected_parents = {given['expected_parents']:g} asks for more edges than a DAG of {p} latents can have"
            f" (at most {(p - 1) / 2:g} per latent)."
        )
    if not 0 < given["loading_density"] <= 1:
        raise ValueError(f"loading_density must be above 0 and at most 1, not {given['loading_density']}.")
    if given["escapers"] > 1:
        raise ValueError(f"escapers is a share of the cells, not {given['escapers']:g}.")
    if given["n_doubles"] > n_single * (n_single - 1) // 2:
        raise ValueError(f"n_doubles = {given['n_doubles']} exceeds the number of pairs of {n_single} perturbations.")


def _draw_graph(p: int, expected_parents: float, rng: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """Edge weights (p, p), row -> column, and a causal order of the latents."""
    order = rng.permutation(p)
    probability = 2 * expected_parents / (p - 1) if p > 1 else 0.0
    joined = np.triu(rng.random((p, p)) < probability, 1)
    weight = rng.uniform(*EDGE_WEIGHT, (p, p)) * rng.choice([-1.0, 1.0], (p, p))
    adjacency = np.zeros((p, p))
    adjacency[np.ix_(order, order)] = np.where(joined, weight, 0.0)
    return adjacency, order


def _draw_effects(p: int, n_single: int, intervention: InterventionKind, rng: np.random.Generator) -> _Effects:
    target = np.concatenate([np.arange(p), rng.integers(p, size=n_single - p)]).astype(np.int64)
    shift = rng.uniform(*SHIFT, n_single) * rng.choice([-1.0, 1.0], n_single)
    soft = rng.uniform(*RETENTION, n_single)  # drawn for every kind: one seed, one set of targets and shifts
    kind = INTERVENTIONS[intervention]
    retention = soft if kind.retention is None else np.full(n_single, kind.retention)
    log_scale = np.full(n_single, np.log(NOISE_SCALE) if kind.scales else 0.0)
    return _Effects(target, shift, log_scale, retention)


def _draw_pairs(n_single: int, n_doubles: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    first, second = np.triu_indices(n_single, 1)
    chosen = np.sort(rng.choice(len(first), n_doubles, replace=False)) if n_doubles else np.zeros(0, np.int64)
    return [(int(first[i]), int(second[i])) for i in chosen]


def _draw_latents(
    n: int,
    adjacency: Floats,
    order: NDArray[np.int64],
    effects: _Effects,
    members: tuple[int, ...],
    equations: Equations,
    rng: np.random.Generator,
) -> Floats:
    """Latents (n, p) of one condition: its structural equations, solved in causal order."""
    p = len(adjacency)
    shift, log_scale, retention = np.zeros(p), np.zeros(p), np.ones(p)
    for i in members:
        k = effects.target[i]
        shift[k] += effects.shift[i]
        log_scale[k] += effects.log_scale[i]
        retention[k] *= effects.retention[i]
    latents = rng.standard_normal((n, p)) * np.exp(log_scale) + shift
    for k in order:
        parents = np.maximum(latents, 0.0) if equations == "relu" else latents
        latents[:, k] += retention[k] * (parents @ adjacency[:, k])
    return latents


def _mixed(
    latents: Floats, n_genes: int, mixing: Mixing, loaded: NDArray[np.bool_] | None, rng: np.random.Generator
) -> Floats:
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


def _counts(signal: Floats, depth: float, rng: np.random.Generator) -> sparse.csr_matrix:
    """Negative-binomial counts (CSR float32): a gamma-distributed rate, then Poisson."""
    n, n_genes = signal.shape
    base = LOG_MEAN_SCALE * rng.standard_normal(n_genes)
    depths = depth * np.exp(DEPTH_SCALE * rng.standard_normal(n))
    blocks = []
    for start in range(0, n, CHUNK):
        rate = np.exp(base + LOG_RATE_SCALE * signal[start : start + CHUNK])
        rate *= (depths[start : start + CHUNK] / rate.sum(1))[:, None]
        counts = rng.poisson(rng.gamma(1 / DISPERSION, rate * DISPERSION))
        blocks.append(sparse.csr_matrix(counts.astype(np.float32)))
    return sparse.csr_matrix(sparse.vstack(blocks, format="csr"))
