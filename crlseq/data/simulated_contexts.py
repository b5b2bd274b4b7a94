"""Contexts of simulated cells: what further ones have of their own, beside what all share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from crlseq.data.simulated_latents import Effects, Equations, Floats, Rng, System, draw_latents

OWN_SHIFTS = (0.0, 0.5, -1.0)  # times the shift in the first context
World = tuple[System, Effects]


def draw_worlds(system: System, effects: Effects, given: Mapping[str, Any], rng: Rng) -> list[World]:
    """Equations and effects of each context, by the arguments of `crlseq.simulate`; the first has those that are passed."""
    worlds, (p, k) = [(system, effects)], (len(system.order), len(effects.shift))
    for _ in range(given["contexts"] - 1):
        adjacency, shift = system.adjacency.copy(), effects.shift.copy()
        place = np.argsort(system.order)
        free = np.argwhere((adjacency == 0) & (place[:, None] < place))
        if len(free) < given["own_edges"]:
            raise ValueError(f"own_edges = {given['own_edges']} exceeds the {len(free)} pairs without an edge.")
        for j, i in rng.permutation(free)[: given["own_edges"]]:
            adjacency[j, i] = rng.uniform(*given["edge_size"]) * rng.choice([-1.0, 1.0])
        own = rng.permutation(k)[: round(given["own_shifts"] * k)]
        shift[own] *= rng.choice(OWN_SHIFTS, len(own))
        low, high = given["context_noise"]
        noise = rng.uniform(low, high, p)
        worlds.append((replace(system, adjacency=adjacency, noise=noise), replace(effects, shift=shift)))
    return worlds


def latents_in_contexts(
    worlds: Sequence[World],
    conditions: Sequence[tuple[int, ...]],
    hits: Sequence[tuple[Any, NDArray[np.bool_]]],
    context: NDArray[np.int64],
    equations: Equations,
    rngs: tuple[Rng, Rng],
) -> Floats:
    """Latents (n, p) of all cells, condition after condition, each cell by the world of its ``context`` (n,)."""
    parts, start = [], 0
    for members, (_, hit) in zip(conditions, hits, strict=True):
        own = context[start : start + len(hit)]
        part = np.empty((len(hit), len(worlds[0][0].order)))
        for c, world in enumerate(worlds):
            part[own == c] = draw_latents(*world, members, hit[own == c], equations, *rngs)
        parts.append(part)
        start += len(hit)
    return np.concatenate(parts)


def set_apart(signal: Floats, context: NDArray[np.int64], given: Mapping[str, Any], rng: Rng) -> dict[str, Any]:
    """Adds what contexts themselves do to the signal (n, genes); the column of obs that tells them, if there are several."""
    n = given["contexts"]
    if n == 1:
        return {}
    signal += (given["context_scale"] * rng.standard_normal((n, signal.shape[1])))[context]
    return {"context": pd.Categorical([f"context{c}" for c in context])}


def truth_of(worlds: Sequence[World]) -> dict[str, Any]:
    """``adjacency_by_context`` (contexts, p, p) and ``shift_by_context``, a table of perturbations by context, if there are
    several.
    """
    if len(worlds) == 1:
        return {}
    names = pd.Index([f"g{i}" for i in range(len(worlds[0][1].shift))], dtype=object)
    shifts = {f"context{c}": effects.shift for c, (_, effects) in enumerate(worlds)}
    own = np.stack([system.adjacency for system, _ in worlds])
    return {"adjacency_by_context": own, "shift_by_context": pd.DataFrame(shifts, index=names)}
