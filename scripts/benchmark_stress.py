"""What is recovered from screens that went wrong: batches, wrong labels, few cells, no effects, low depth, doublets.

Every stress has levels; every fit is scored against the simulation's truth: targets, ancestry, edges, and how many of
the declared edges with a support of 0.9 or more are false. A fit should get worse by degrees and say so, not be wrong
and sure of it.

Written to the folder: ``stress.csv`` (one row per fit, written as it ends: the same command continues where it stopped) and
``summary.csv`` (one row per level).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

import crlseq
from crlseq.data.simulate import CONTROL
from crlseq.errors import CrlseqError
from crlseq.evaluation.recovery import closure, edge_supports, score_recovery
from crlseq.run.run import Run

SURE = 0.9
SCREEN: dict[str, Any] = {
    "n_latents": 10,
    "perturbations_per_latent": 4,
    "cells_per_perturbation": 100,
    "n_control": 1000,
}


# --- what goes wrong: a screen of counts in, another one out


def mislabelled(screen: ad.AnnData, share: float, rng: np.random.Generator) -> ad.AnnData:
    """`share` of the perturbed cells carry the label of another perturbation, each equally likely."""
    names, labels = _labels(screen)
    wrong = _some(np.flatnonzero(labels != CONTROL), share, rng)
    place = np.searchsorted(names, labels[wrong])
    labels[wrong] = names[(place + rng.integers(1, len(names), len(wrong))) % len(names)]
    return _labelled(screen.copy(), labels)


def uneven(screen: ad.AnnData, ratio: float, rng: np.random.Generator) -> ad.AnnData:
    """Perturbations keep from ``1 / ratio`` of their cells to all of them, evenly spread in the logarithm."""
    names, labels = _labels(screen)
    kept = labels == CONTROL
    for name, power in zip(rng.permutation(names), np.linspace(-1, 0, len(names)), strict=True):
        kept[_some(np.flatnonzero(labels == name), ratio**power, rng)] = True
    return screen[kept].copy()


def without_effect(screen: ad.AnnData, share: float, rng: np.random.Generator, n_cells: int = 100) -> ad.AnnData:
    """Perturbations ``none0, none1, ...`` whose `n_cells` are controls, until they are `share` of all perturbations."""
    names, labels = _labels(screen)
    n_null = round(len(names) * share / (1 - share))
    taken = rng.permutation(np.flatnonzero(labels == CONTROL))[: n_null * n_cells]
    labels[taken] = [f"none{i}" for i in np.repeat(np.arange(n_null), n_cells)]
    return _labelled(screen.copy(), labels)


def doublets(screen: ad.AnnData, share: float, rng: np.random.Generator) -> ad.AnnData:
    """`share` of the cells get the counts of another cell on top, and keep their label."""
    double = _some(np.arange(screen.n_obs), share, rng)
    other = (double + rng.integers(1, screen.n_obs, len(double))) % screen.n_obs
    place = sp.csr_matrix((np.ones(len(double), np.float32), (double, other)), shape=(screen.n_obs, screen.n_obs))
    changed = screen.copy()
    changed.X = sp.csr_matrix(screen.X + place @ screen.X)
    return changed


def confounded(screen: ad.AnnData, controls: bool, rng: np.random.Generator) -> ad.AnnData:
    """Of a screen in batches ``b0`` and ``b1``: half of the perturbations keep cells of ``b1`` alone, the others of ``b0``.

    Controls keep both batches, or ``b0`` alone without `controls`.
    """
    names, labels = _labels(screen)
    second = np.isin(labels, rng.permutation(names)[: len(names) // 2])
    in_second = (screen.obs["batch"] == "b1").to_numpy()
    kept = np.where(labels == CONTROL, controls | ~in_second, second == in_second)
    return screen[kept].copy()


def _labels(screen: ad.AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Names of the perturbations, sorted, and the cells' labels."""
    labels = screen.obs["perturbation"].astype(str).to_numpy().astype(object)
    return np.array(sorted(set(labels) - {CONTROL}), dtype=object), labels


def _labelled(screen: ad.AnnData, labels: np.ndarray) -> ad.AnnData:
    screen.obs["perturbation"] = pd.Categorical(labels)
    return screen


def _some(cells: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(cells)[: round(share * len(cells))])


# --- stresses: levels, the screen of a level and seed, and what the fit is told beside


def _batched(scale: float, controls: bool, seed: int) -> ad.AnnData:
    changes = {"cells_per_perturbation": 200, "n_batches": 2, "batch_scale": scale}  # half of the cells are kept
    screen = crlseq.simulate(**{**SCREEN, **changes}, seed=seed)
    return confounded(screen, controls, np.random.default_rng(seed))


def _changed(change: Callable[..., ad.AnnData], **options: Any) -> Callable[[float, int], ad.AnnData]:
    def make(level: float, seed: int) -> ad.AnnData:
        return change(crlseq.simulate(**{**SCREEN, **options}, seed=seed), level, np.random.default_rng(seed))

    return make


BATCH = {"batch_key": "batch"}
Make = Callable[[float, int], ad.AnnData]
STRESSES: dict[str, tuple[Sequence[float], Make, dict[str, Any]]] = {
    "none": ([0], lambda level, seed: crlseq.simulate(**SCREEN, seed=seed), {}),
    "batches, named": ([0.5, 1], lambda level, seed: _batched(level, True, seed), BATCH),
    "batches, not named": ([0.25, 0.5, 1], lambda level, seed: _batched(level, True, seed), {}),
    # The perturbations of one batch are left out, so that some latents have none: nobody knows how many are left.
    "batches without controls": (
        [0.5, 1],
        lambda level, seed: _batched(level, False, seed),
        {**BATCH, "n_latents": "auto"},
    ),
    "wrong labels": ([0.1, 0.2, 0.3], _changed(mislabelled), {}),
    "uneven cell numbers": ([3, 10, 30], _changed(uneven, cells_per_perturbation=200), {}),
    "no effect": ([0.5, 0.8], _changed(without_effect, perturbations_per_latent=2, n_control=9000), {}),
    "depth": ([2000, 1000, 500], lambda level, seed: crlseq.simulate(**SCREEN, depth=level, seed=seed), {}),
    "doublets": ([0.05, 0.1, 0.2], _changed(doublets), {}),
}


def row_of(run: Run, truth: dict[str, Any]) -> dict[str, Any]:
    """Scores of a run, and its declared edges with a support of `SURE` or more: all, false ones, and those between unrelated latents."""
    scores = score_recovery(run.interventions, run.edges, truth)
    found = run.facts.discovery
    row = {name: scores[name] for name in ("target_accuracy", "ancestor_f1", "shd")}
    claimed = run.interventions["program"].fillna("") != ""
    row |= {
        "verdict": run.facts.identification.verdict, "n_edges": len(run.edges), "sure": 0, "sure_false": 0, "sure_unrelated": 0,
        "misfit": found and found.dispersion, "straightened": found and found.straightened,
        "claims_of_none": int((claimed & run.interventions["perturbation"].str.startswith("none")).sum()),
    }  # fmt: skip
    if found and found.bootstrap and len(run.edges):
        related = {**truth, "adjacency": closure(np.asarray(truth["adjacency"]) != 0)}
        for name, graph in (("sure_false", truth), ("sure_unrelated", related)):
            pairs = edge_supports(found.bootstrap.edge, run.interventions, graph)
            sure = run.edges[["source", "target"]].merge(pairs[pairs["support"] >= SURE - 1e-9])
            row |= {"sure": len(sure), name: int((~sure["true"]).sum())}
    return row


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per stress and level: means of scores, sums of edges, and how often each verdict was given."""
    rows = []
    for (stress, level), group in table.groupby(["stress", "level"], sort=False):
        fitted = group[group["error"].isna()]
        verdicts = fitted["verdict"].value_counts()
        rows.append({
            "stress": stress, "level": level, "fits": len(group), "refused": len(group) - len(fitted),
            **fitted[["target_accuracy", "ancestor_f1", "shd", "misfit"]].mean().to_dict(),
            "verdict": ", ".join(f"{verdict} {n}" for verdict, n in verdicts.items()),
            **fitted[["n_edges", "sure", "sure_false", "sure_unrelated", "claims_of_none"]].sum().astype(int).to_dict(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def main(words: Sequence[str] | None = None) -> None:
    """Simulate, spoil, fit, score, write."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark_stress", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--stress", nargs="+", default=list(STRESSES), choices=list(STRESSES), metavar="NAME", help=f"which [all]: {', '.join(STRESSES)}")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="screens of each level [3]")
    parser.add_argument("--method", default="straighten", choices=["straighten", "linear"], help="[straighten]")
    parser.add_argument("--bootstrap", type=int, metavar="N", help="replicates of each fit [20]")
    parser.add_argument("--epochs", type=int, metavar="N", help="targets and graph do not depend on it [100]")
    parser.add_argument("--threads", type=int, metavar="N")
    given = parser.parse_args(words)
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / "stress.csv"
    rows: list[dict[str, Any]] = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {(row["stress"], row["level"], row["seed"]) for row in rows}
    # Seeds outermost: what there is time for then is a whole table of fewer seeds.
    wanted = [(s, level, seed) for seed in range(given.seeds) for s in given.stress for level in STRESSES[s][0]]
    for stress, level, seed in wanted:
        if (stress, level, seed) in done:
            continue
        _, make, told = STRESSES[stress]
        screen = make(level, seed)
        options = {
            "perturbation_key": "perturbation", "n_latents": SCREEN["n_latents"], "method": given.method,
            "bootstrap": given.bootstrap, "epochs": given.epochs, "threads": given.threads, "seed": seed, **told,
        }  # fmt: skip
        started = time.perf_counter()
        row: dict[str, Any] = {"stress": stress, "level": level, "seed": seed, "error": None}
        try:
            row |= row_of(crlseq.fit(screen, **options), screen.uns["truth"])
        except CrlseqError as error:
            row["error"] = str(error)
        row["seconds"] = round(time.perf_counter() - started, 1)
        rows.append(row)
        order = {name: i for i, name in enumerate(STRESSES)}
        table = pd.DataFrame(rows).sort_values("stress", key=lambda names: names.map(order), kind="stable")
        table.to_csv(path, index=False)
        summarise(table).to_csv(given.output / "summary.csv", index=False)
        print({name: round(v, 2) if isinstance(v, float) else v for name, v in row.items()}, flush=True)
    if rows:
        print(pd.read_csv(given.output / "summary.csv").round(2).to_string(index=False))


if __name__ == "__main__":
    main()
