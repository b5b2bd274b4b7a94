"""Whether the errors of what interventions change are honest, and what each guard of pairs is worth.

Screens of Gaussian values with a background, a cell cycle and escaped cells are simulated with a known graph. Targets are
given, so that nothing but `crlseq.discovery.ordering` is judged.

Written to the folder: ``calibration.csv`` (one row per screen and ordered pair: E, its error, the true E) with
``calibration.png``; ``ablation.csv`` (pairs and edges, right and wrong, with parts of the method taken away).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import norm

from crlseq.data.simulate import CONTROL, simulate
from crlseq.discovery import changes, direct_edges, pairs
from crlseq.discovery.axes import exogenous_axes
from crlseq.discovery.changes import measure_changes
from crlseq.discovery.ordering import order_programs
from crlseq.evaluation.recovery import closure

SCREEN: dict[str, Any] = {
    "n_latents": 8, "n_genes": 40, "noise": "gaussian", "cells_per_perturbation": 300, "n_control": 2500,
    "expected_parents": 0.75, "edge_size": (0.5, 1.2), "shift_size": (1.5, 5.0), "penetrance": (0.3, 0.95), "guides": 3,
    "background": 2, "cell_cycle": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "hard": {}, "soft": {"intervention": "soft", "retention": (0.5, 0.5)}, "shift": {"intervention": "shift"},
    "second": {"second_targets": 0.4}, "hidden": {"hidden": 2}, "cycle": {"cycle": True},
    "batches": {"n_batches": 4, "batch_scale": 0.3}, "relu": {"equations": "relu"},
}  # fmt: skip
HARD_NOISE = 0.7  # of a hard intervention's target, see `crlseq.data.simulate`


def cells_of(screen: ad.AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (n, q), environments (n,), 0 for control, and true targets (K,)."""
    target = screen.uns["truth"]["target"]["latent"]
    codes = pd.Categorical(screen.obs["perturbation"], [CONTROL, *target.index]).codes
    return np.asarray(screen.X, dtype=float), codes.astype(np.int64), target.to_numpy()


def calibrate(n: int) -> pd.DataFrame:
    """E of every ordered pair of hard screens beside what it would be with all cells and the true axes."""
    rows = []
    for seed in range(n):
        screen = simulate(seed=seed, **SCREEN)
        y, environment, targets = cells_of(screen)
        graph, u = screen.uns["truth"]["adjacency"], screen.obsm["true_latents"]
        center, axes = exogenous_axes(y, environment, targets, len(graph))
        x = (y - center) @ axes
        found = measure_changes(x, environment, targets)
        total = np.linalg.inv(np.eye(len(graph)) - graph)
        # Each exogenous program's own share of its axis: x = z diag(scale) + background + noise.
        z = u[environment == 0] @ (np.eye(len(graph)) - graph)
        scale = np.linalg.lstsq(z, x[environment == 0], rcond=None)[0].diagonal()
        true = -np.outer(scale, scale) * total
        for k, i in np.argwhere(~np.eye(len(graph), dtype=bool) & np.isfinite(found.e_error)):
            rows.append({"seed": seed, "e": found.e[k, i], "error": found.e_error[k, i], "true": true[k, i]})
    return pd.DataFrame(rows)


def without_hits() -> Iterator[Any]:
    """All cells in the place of those that were hit."""
    real = changes.hit_cells

    def none(s: Any, variance: float) -> Any:
        hit = real(s, variance)
        return type(hit)(hit.share, hit.error, 1e-6 * np.sign(hit.mean), hit.width, variance)

    yield patch.object(changes, "hit_cells", none)


def without_guards() -> Iterator[Any]:
    """A change that is seen, and no reverse: the first two guards alone."""
    yield patch.object(pairs, "left_by_controls", lambda found: np.full_like(found.e, np.inf))
    yield patch.object(pairs, "_beside_unchanged", lambda found, z: np.ones_like(z, dtype=bool))
    yield patch.object(pairs, "_not_chosen", lambda found: np.ones_like(found.e, dtype=bool))
    yield patch.object(pairs, "modulated", lambda ratio, seen: (np.zeros_like(ratio), 0.0))


def without_control_variates() -> Iterator[Any]:
    """Noise that E shares with covariances beside the target stays in it."""
    yield patch.object(changes, "LOST", np.inf)


def without_axis_errors() -> Iterator[Any]:
    """Axes are taken for exact."""
    yield patch.object(changes, "_turned", lambda parts, targets, p: (np.zeros((p, p)), 0.0))


def without_mediators() -> Iterator[Any]:
    """Edges that are worth their price once; what was dropped may have left its effect to them."""
    yield patch.object(direct_edges, "PRICE_BESIDE", 0.0)


VARIANTS: dict[str, Callable[[], Iterator[Any]]] = {
    "all of it": lambda: iter(()), "all cells": without_hits, "first two guards": without_guards,
    "no control variates": without_control_variates, "exact axes": without_axis_errors, "no mediators": without_mediators,
}  # fmt: skip


def ablate(n: int) -> pd.DataFrame:
    """Right and wrong pairs and edges by kind of screen and variant, of n screens each."""
    rows = []
    for kind, options in KINDS.items():
        screens = [simulate(seed=1000 + seed, **SCREEN, **options) for seed in range(n)]
        for variant, patches in VARIANTS.items():
            row: dict[str, Any] = {"screens": kind, "variant": variant}
            for screen in screens:
                y, environment, targets = cells_of(screen)
                edges = screen.uns["truth"]["adjacency"] != 0
                ancestors = closure(edges) & ~np.eye(len(edges), dtype=bool)
                with ExitStack() as stack:
                    for one in patches():
                        stack.enter_context(one)
                    found = order_programs(y, environment, targets, len(edges))
                for name, called, true in (
                    ("upstream", found.pairs.have("upstream"), ancestors), ("likely", found.pairs.have("likely"), ancestors),
                    ("edges", found.declared, edges),
                ):  # fmt: skip
                    for what, count in (("right", called & true), ("wrong", called & ~true), ("true", true)):
                        row[f"{name}_{what}"] = row.get(f"{name}_{what}", 0) + int(count.sum())
                row["both_ways"] = row.get("both_ways", 0) + int(found.pairs.have("both ways").sum()) // 2
            rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """z of true zeros against the normal distribution, and E with 95 % intervals against its true value."""
    zero = table["true"].abs() < 1e-9
    z = np.sort((table["e"] / table["error"])[zero])
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    expected = norm.ppf((np.arange(len(z)) + 0.5) / len(z))
    left.plot(expected, expected, color="#777777", linewidth=1)
    left.plot(expected, z, ".", color="#0072B2", markersize=3)
    left.set(
        xlabel="normal quantile", ylabel="z = E / se", title=f"{len(z)} pairs without a change: SD of z {z.std():.2f}"
    )
    changed = table[~zero]
    inside = ((changed["e"] - changed["true"]).abs() < 1.96 * changed["error"]).mean()
    some = changed.iloc[:: max(1, len(changed) // 150)]
    right.errorbar(
        some["true"], some["e"], 1.96 * some["error"], fmt=".", color="#D55E00", markersize=4, elinewidth=0.6
    )
    ends = [float(changed["true"].min()), float(changed["true"].max())]
    right.plot(ends, ends, color="#777777", linewidth=1)
    right.set(
        xlabel="true E", ylabel="E ± 1.96 se", title=f"{len(changed)} changes: {inside:.0%} of 95 % intervals hold it"
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Calibrate and ablate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--screens", type=int, default=100, help="for the calibration")
    parser.add_argument("--ablation", type=int, default=20, help="screens of each kind")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    table = calibrate(args.screens)
    table.to_csv(args.output / "calibration.csv", index=False)
    draw(table).savefig(args.output / "calibration.png", dpi=150)
    found = ablate(args.ablation)
    found.to_csv(args.output / "ablation.csv", index=False)
    print(found.to_string(index=False))


if __name__ == "__main__":
    main()
