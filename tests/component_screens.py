"""Screens in whitened components with a known graph, and what can be wrong with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crlseq.discovery.axes import exogenous_axes
from crlseq.discovery.changes import Changes, measure_changes
from crlseq.discovery.hits import Floats
from crlseq.discovery.pairs import Bools


@dataclass(frozen=True)
class Screen:
    """Cells (n, q), their environments and the targets, with the truth."""

    y: Floats
    environment: np.ndarray
    targets: np.ndarray
    graph: Floats

    @property
    def upstream(self) -> Bools:
        """(p, p): j is an ancestor of k."""
        p = len(self.graph)
        ancestors: Bools = (np.abs(np.linalg.inv(np.eye(p) - self.graph)) > 1e-9) & ~np.eye(p, dtype=bool)
        return ancestors

    def changes(self) -> Changes:
        """What the interventions change, in the exogenous coordinates found."""
        center, axes = exogenous_axes(self.y, self.environment, self.targets, len(self.graph))
        return measure_changes((self.y - center) @ axes, self.environment, self.targets)


def component_screen(
    seed: int,
    *,
    kept: float = 0.0,  # share of its parents' effect that a target keeps: 0 hard, 1 a mere shift
    density: float = 0.3,
    shared: float = 0.0,  # second targets of all perturbations of a target, as a share of the shift
    own: float = 0.0,  # second targets of each perturbation
    modulated: float = 0.0,  # by which a standard deviation of another program changes a shift
    hidden: int = 0,  # causes of three programs each
    feedback: bool = False,
    bent: bool = False,  # programs add to others only where they are above 0
    chosen: bool = False,  # only cells high in a root are hit
    batches: float = 0.0,  # noise of conditions in every component
    p: int = 8,
    k: int = 32,
    n: int = 300,
    n_control: int = 2500,
) -> Screen:
    """Linear programs, four background factors, 20 components, shifts of 1.5 to 5 that hit 40 to 95 % of the cells."""
    rng = np.random.default_rng(seed)
    rank = np.argsort(rng.permutation(p))
    graph = (rng.random((p, p)) < density) * (rank[:, None] < rank) * rng.uniform(0.5, 1.2, (p, p))
    graph *= rng.choice([-1, 1], (p, p))
    if feedback:
        j, i = np.argwhere(graph)[0]
        graph[i, j] = 0.6 / max(1.0, abs(graph[j, i]))
    targets = np.concatenate([np.arange(p), rng.integers(0, p, k - p)])
    shift, share = rng.uniform(1.5, 5, k) * rng.choice([-1, 1], k), rng.uniform(0.4, 0.95, k)
    environment = np.repeat(np.arange(k + 1), [n_control] + [n] * k)
    count, at = len(environment), np.append(-1, targets)[environment]
    common = np.zeros((hidden, p))
    for row in common:
        row[rng.choice(p, 3, replace=False)] = rng.uniform(0.7, 1.2, 3) * rng.choice([-1, 1], 3)
    private = rng.standard_normal((count, p))
    noise = private + rng.standard_normal((count, hidden)) @ common
    total = np.linalg.inv(np.eye(p) - graph)
    free = noise @ total
    chance = np.append(0, share)[environment]
    if chosen:
        root = int(np.argmin(rank))
        chance = np.where(at == root, chance, np.minimum(1, 2 * chance * (free[:, root] > 0)))
    on = (rng.random(count) < chance)[:, None] & (at[:, None] == np.arange(p))
    seconds = shared * rng.standard_normal((p, p)) * (rng.random((p, p)) < 0.4)
    others = seconds[targets] + own * rng.standard_normal((k, p)) * (rng.random((k, p)) < 0.4)
    others[np.arange(k), targets] = 0
    added = np.vstack([np.zeros(p), others * shift[:, None]])[environment] * on.any(1, keepdims=True)
    by = np.append(0, shift)[environment]
    if modulated:
        whom = (np.arange(p) + rng.integers(1, p, p)) % p
        by = by * (1 + modulated * free[np.arange(count), whom[at]] / free.std(0)[whom[at]])
    own_noise = noise if kept else 0.7 * private
    u = np.zeros((count, p))
    for _ in range(60 if feedback else p + 1):
        parents = (np.maximum(u, 0) if bent else u) @ graph
        u = np.where(on, kept * parents + own_noise + by[:, None], parents + noise) + added
    y = u @ rng.standard_normal((p, 20)) + 0.7 * rng.standard_normal((count, 4)) @ rng.standard_normal((4, 20))
    y += 0.35 * rng.standard_normal((count, 20)) + batches * rng.standard_normal((k + 1, 20))[environment]
    return Screen(y, environment, targets, graph)
