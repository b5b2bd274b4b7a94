"""Latents of simulated cells: graph, interventions, the cells that they hit, structural equations.

Every number comes from a generator that is passed; `crlseq.data.simulate` says what the numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crlseq.config import InterventionKind
from crlseq.model.interventions import INTERVENTIONS

Equations = Literal["linear", "relu"]
Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Rng = np.random.Generator

NOISE_SCALE = 0.7  # exp(s) of hard and soft interventions
GUIDE_SD = 0.15  # of the penetrance of one perturbation's guides
SECOND_SHIFT = (0.3, 0.8)  # size of a second shift, as a share of the first
CAUSED = 3  # latents that a hidden cause drives
HIDDEN_WEIGHT = (0.7, 1.2)  # size of its weights
LOOP_RADIUS = 0.8  # largest spectral radius of |G| with a feedback edge: fixed points are then reached quickly
TOLERANCE = 1e-12  # change of a latent in the last round of a fixed point, in standard deviations of the noise


@dataclass(frozen=True)
class System:
    """Structural equations: ``adjacency`` (p, p), row -> column; ``order`` (p,), causal but for a feedback edge; ``hidden``
    (H, p), weights of hidden common causes; ``noise`` (p,) standard deviations of the latents' own.
    """

    adjacency: Floats
    order: Whole
    hidden: Floats
    noise: Floats | float = 1.0


@dataclass(frozen=True)
class Effects:
    """What each single perturbation does to a cell that it hits, all of shape (K,); ``second_latent`` is -1 for none."""

    target: Whole
    shift: Floats
    log_scale: Floats
    retention: Floats
    second_latent: Whole
    second_shift: Floats


def draw_graph(p: int, expected_parents: float, edge_size: tuple[float, float], rng: Rng) -> tuple[Floats, Whole]:
    """Edge weights (p, p), row -> column, of a DAG, and a causal order of the latents."""
    order = rng.permutation(p)
    probability = 2 * expected_parents / (p - 1) if p > 1 else 0.0
    joined = np.triu(rng.random((p, p)) < probability, 1)
    weight = rng.uniform(*edge_size, (p, p)) * rng.choice([-1.0, 1.0], (p, p))
    adjacency = np.zeros((p, p))
    adjacency[np.ix_(order, order)] = np.where(joined, weight, 0.0)
    return adjacency, order


def with_loop(adjacency: Floats, order: Whole, edge_size: tuple[float, float], rng: Rng) -> Floats:
    """The DAG with one feedback edge, from a latent to one of its ancestors.

    The weight is made smaller until the spectral radius of |G| is at most `LOOP_RADIUS`: there is one fixed point then,
    also where interventions take a part of an edge away. In a graph without edges the first two latents are joined.
    """
    looped = adjacency.copy()
    if not looped.any():
        looped[order[0], order[1]] = rng.uniform(*edge_size) * rng.choice([-1.0, 1.0])
    itself = np.eye(len(looped))
    paths = np.linalg.matrix_power(itself + (looped != 0), len(looped)) - itself
    ancestor, descendant = rng.choice(np.argwhere(paths > 0))
    looped[descendant, ancestor] = rng.uniform(*edge_size) * rng.choice([-1.0, 1.0])
    while np.abs(np.linalg.eigvals(np.abs(looped))).max() > LOOP_RADIUS:
        looped[descendant, ancestor] *= 0.95
    return looped


def draw_hidden(n: int, p: int, rng: Rng) -> Floats:
    """Weights (n, p) of hidden common causes, each on `CAUSED` latents."""
    weight = np.zeros((n, p))
    for row in weight:
        row[rng.choice(p, CAUSED, replace=False)] = rng.uniform(*HIDDEN_WEIGHT, CAUSED) * rng.choice(
            [-1.0, 1.0], CAUSED
        )
    return weight


def draw_effects(
    p: int,
    n_single: int,
    intervention: InterventionKind,
    shift_size: tuple[float, float],
    kept: tuple[float, float],
    rng: Rng,
) -> Effects:
    """Targets, shifts of size in `shift_size` and, where the kind leaves it free, retentions in `kept`; no second target."""
    target = np.concatenate([np.arange(p), rng.integers(p, size=n_single - p)]).astype(np.int64)
    shift = rng.uniform(*shift_size, n_single) * rng.choice([-1.0, 1.0], n_single)
    soft = rng.uniform(*kept, n_single)  # drawn for every kind: one seed, one set of targets and shifts
    kind = INTERVENTIONS[intervention]
    retention = soft if kind.retention is None else np.full(n_single, kind.retention)
    log_scale = np.full(n_single, np.log(NOISE_SCALE) if kind.scales else 0.0)
    return Effects(target, shift, log_scale, retention, np.full(n_single, -1), np.zeros(n_single))


def with_second_targets(effects: Effects, p: int, share: float, rng: Rng) -> Effects:
    """That share of the perturbations, rounded to a whole number of them, also shifts another of ``p`` >= 2 latents."""
    n_single = len(effects.target)
    chosen = rng.permutation(n_single)[: round(share * n_single)]
    size = rng.uniform(*SECOND_SHIFT, len(chosen)) * rng.choice([-1.0, 1.0], len(chosen))
    latent, shift = effects.second_latent.copy(), effects.second_shift.copy()
    latent[chosen] = (effects.target[chosen] + rng.integers(1, p, len(chosen))) % p
    shift[chosen] = size * np.abs(effects.shift[chosen])
    return replace(effects, second_latent=latent, second_shift=shift)


def draw_pairs(n_single: int, n_doubles: int, rng: Rng) -> list[tuple[int, int]]:
    """Pairs of perturbations, without repetition."""
    first, second = np.triu_indices(n_single, 1)
    chosen = np.sort(rng.choice(len(first), n_doubles, replace=False)) if n_doubles else np.zeros(0, np.int64)
    return [(int(first[i]), int(second[i])) for i in chosen]


def draw_penetrance(n_single: int, guides: int, bounds: tuple[float, float], rng: Rng) -> Floats:
    """Probability (K, guides) that a cell with a guide is hit: uniform in `bounds`, guides of one perturbation about it."""
    centre = rng.uniform(*bounds, (n_single, 1))
    spread = GUIDE_SD * rng.standard_normal((n_single, guides)) if guides > 1 else 0.0
    return np.asarray(np.clip(centre + spread, *bounds))


def draw_latents(
    system: System,
    effects: Effects,
    members: Sequence[int],
    hit: NDArray[np.bool_],
    equations: Equations,
    rng: Rng,
    hidden_rng: Rng,
) -> Floats:
    """Latents (n, p) of one condition, whose perturbations ``members`` act in the cells of their columns in ``hit`` (n, m).

    Noise comes from the first generator, hidden causes from the second; an intervention that cuts its target off from its
    parents does so from the hidden ones too.
    """
    shape = len(hit), len(system.adjacency)
    shift, log_scale, retention = np.zeros(shape), np.zeros(shape), np.ones(shape)
    for i, struck in zip(members, hit.T, strict=True):
        k, second = effects.target[i], effects.second_latent[i]
        shift[struck, k] += effects.shift[i]
        log_scale[struck, k] += effects.log_scale[i]
        retention[struck, k] *= effects.retention[i]
        if second >= 0:
            shift[struck, second] += effects.second_shift[i]
    own = rng.standard_normal(shape) * system.noise * np.exp(log_scale) + shift
    own += retention * (hidden_rng.standard_normal((shape[0], len(system.hidden))) @ system.hidden)
    return solve(system, own, retention, equations)


def solve(system: System, own: Floats, retention: Floats, equations: Equations) -> Floats:
    """The u (n, p) with ``u = own + retention * (phi(u) G)``.

    One round in causal order solves a DAG. With a cycle rounds are repeated until no latent changes: they contract, since
    phi does not expand and the spectral radius of |G| is below 1.
    """
    latents, before = own.copy(), np.full_like(own, np.inf)
    while np.abs(latents - before).max(initial=0.0) > TOLERANCE:
        before = latents.copy()
        for k in system.order:
            parents = np.maximum(latents, 0.0) if equations == "relu" else latents
            latents[:, k] = own[:, k] + retention[:, k] * (parents @ system.adjacency[:, k])
    return latents
