"""Pairs of programs that differ between two contexts: how many of those called do, and how many that do are called.

    python scripts/benchmark_contexts.py --screens 30
    python scripts/benchmark_contexts.py --fits 10     # verdicts and edges where noise of programs differs

Gaussian components of simulated screens: six programs in 12 components, four hard interventions a program on average, all
cells hit, targets known; so many cells a perturbation and context, and 7.5 times as many controls. What differs is the total effect.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

import crlseq
from crlseq.data.simulated_contexts import draw_worlds, latents_in_contexts
from crlseq.data.simulated_latents import System, draw_effects, draw_graph
from crlseq.discovery.ordering import DIFFER_FDR, order_programs

P, Q, NOISE = 6, 12, 0.35
KINDS: dict[str, dict[str, Any]] = {
    "nothing differs": {},
    "noise of programs differs (0.5 to 2 SD)": {"context_noise": (0.5, 2.0)},
    "30 % of shifts differ": {"own_shifts": 0.3},
    "30 % of shifts and one edge": {"own_shifts": 0.3, "own_edges": 1},
    "30 % of shifts, one edge, noise": {"own_shifts": 0.3, "own_edges": 1, "context_noise": (0.5, 2.0)},
}
GIVEN = {"contexts": 2, "own_shifts": 0.0, "own_edges": 0, "context_noise": (1.0, 1.0), "edge_size": (0.6, 1.4)}


def judged(given: Mapping[str, Any], cells: int, seed: int) -> np.ndarray:
    """Pairs called rightly, wrongly, and that differ; own edges called, and of them; upstream pairs rightly and wrongly."""
    rng = np.random.default_rng(seed)
    adjacency, order = draw_graph(P, 1.0, given["edge_size"], rng)
    effects = draw_effects(P, 4 * P, "hard", (1.0, 3.0), (0.0, 0.0), rng)
    worlds = draw_worlds(System(adjacency, order, np.zeros((0, P))), effects, given, rng)
    mixing, parts = rng.normal(size=(P, Q)), list[tuple[np.ndarray, int, int]]()
    targets = list[int]()
    for c, world in enumerate(worlds):
        for k in [-1, *np.flatnonzero(world[1].shift)]:  # without a shift nothing is detected, and it takes no part
            n = int(7.5 * cells) if k < 0 else cells
            hit = [(None, np.ones((n, int(k >= 0)), dtype=bool))]
            members = [() if k < 0 else (int(k),)]
            u = latents_in_contexts([world], members, hit, np.zeros(n, dtype=np.int64), "linear", (rng, rng))
            if k >= 0:
                targets.append(int(effects.target[k]))
            parts.append((u @ mixing + NOISE * P**0.5 * rng.normal(size=(n, Q)), 0 if k < 0 else len(targets), c))
    y, environment, context = (
        np.concatenate([part[j] if j == 0 else np.full(len(part[0]), part[j]) for part in parts]) for j in range(3)
    )
    for c in range(len(worlds)):
        y[context == c] -= y[(context == c) & (environment == 0)].mean(0)
    found = order_programs(y, environment, np.array(targets), P, context=context)
    total = [np.linalg.inv(np.eye(P) - system.adjacency) for system, _ in worlds]
    truly, called = np.abs(total[0] - total[1]) > 1e-9, found.differ <= DIFFER_FDR  # type: ignore[operator]
    own = worlds[0][0].adjacency != worlds[1][0].adjacency
    upstream, acts = found.pairs.have("upstream"), (np.abs(total[0]) > 1e-9) | (np.abs(total[1]) > 1e-9)
    counts = [called & truly, called & ~truly, truly, called & own, own, upstream & acts, upstream & ~acts]
    return np.array([int(each.sum()) for each in counts])


FITTED = {  # Gaussian values of five programs in 200 genes, 200 cells a perturbation and context
    "equal noise": {},
    "noise of 0.5 to 2 SD": {"context_noise": (0.5, 2.0)},
    "noise of 0.5 to 2 SD, 30 % of shifts": {"context_noise": (0.5, 2.0), "own_shifts": 0.3},
    "noise of 0.5 to 2 SD, three contexts": {"context_noise": (0.5, 2.0), "contexts": 3},
}


def fitted(options: Mapping[str, Any], seed: int) -> tuple[np.ndarray, float, float]:
    """Whether the graph is identified, edges right, wrong and of, perturbations with the right target and with one; misfit;
    processor time in s.
    """
    contexts = options.get("contexts", 2)
    screen = crlseq.simulate(
        n_latents=5, n_genes=200, noise="gaussian", cells_per_perturbation=200 * contexts, n_control=1500 * contexts,
        context_scale=0.3, seed=seed, **{"contexts": 2, **options},
    )  # fmt: skip
    start = time.process_time()
    run = crlseq.fit(screen, context_key="context", method="linear", bootstrap=0, threads=1)
    spent = time.process_time() - start
    truth, acting = screen.uns["truth"], run.interventions[run.interventions["program"] != ""]
    latent = truth["target"]["latent"][acting["perturbation"].str.split("@").str[0]].to_numpy()
    shared = pd.crosstab(acting["program"].to_numpy(), latent)
    rows, columns = linear_sum_assignment(-shared.to_numpy())
    name = {shared.index[i]: int(shared.columns[j]) for i, j in zip(rows, columns, strict=True)}
    right = sum(name.get(program) == own for program, own in zip(acting["program"], latent, strict=True))
    edges = run.edges[run.edges["context"] == ""]
    pairs = [(name.get(a), name.get(b)) for a, b in zip(edges["source"], edges["target"], strict=True)]
    good = sum(None not in pair and truth["adjacency"][pair] != 0 for pair in pairs)
    identified = run.info["identification"]["verdict"] in ("identified", "ancestry only")
    counts = [identified, good, len(pairs) - good, (truth["adjacency"] != 0).sum(), right, len(acting)]
    return np.array(counts, dtype=int), float(run.info["discovery"]["dispersion"]), spent


def print_fits(n: int) -> None:
    """A row for each kind of noise."""
    print("| screens | graph identified | misfit | edges right / wrong / of | targets right | processor time |")
    print("|---|---|---|---|---|---|")
    for name, options in FITTED.items():
        found = [fitted(options, 700 + seed) for seed in range(n)]
        identified, good, bad, of, right, acting = np.sum([each[0] for each in found], axis=0)
        misfit, spent = (np.array([each[j] for each in found]) for j in (1, 2))
        about = f"{np.median(misfit):.2f} ({misfit.min():.2f} to {misfit.max():.2f})"
        row = f"{identified} of {n} | {about} | {good} / {bad} / {of} | {right} of {acting} | {spent.mean():.1f} s"
        print(f"| {name} | {row} |", flush=True)


def main() -> None:
    """A row of a table for each kind of screen and number of cells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", type=int, default=30)
    parser.add_argument("--seed", type=int, default=900, help="of the first screen")
    parser.add_argument("--cells", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--fits", type=int, default=0, help="screens of each kind that are fitted, in place of pairs")
    given = parser.parse_args()
    if given.fits:
        print_fits(given.fits)
        return
    print(
        "| screens | cells | called rightly / wrongly / of | own edges | false share (error) | shared order right / wrong |"
    )
    print("|---|---|---|---|---|---|")
    for cells in given.cells:
        for name, options in KINDS.items():
            rows = np.array([judged({**GIVEN, **options}, cells, given.seed + seed) for seed in range(given.screens)])
            right, wrong, of, edges, own, good, bad = rows.sum(0)
            share = rows[:, 1] / np.maximum(rows[:, 0] + rows[:, 1], 1)
            told = f"{share.mean():.3f} ({share.std() / len(share) ** 0.5:.3f})"
            edge = f"{edges} of {own}" if own else "–"
            print(f"| {name} | {cells} | {right} / {wrong} / {of} | {edge} | {told} | {good} / {bad} |", flush=True)


if __name__ == "__main__":
    main()
