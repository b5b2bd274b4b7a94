"""Does the DAG predict what adding single effects cannot? Doubles of upstream and downstream genes under hard interventions.

A hard intervention cuts its target off from its parents. If A lies upstream of B, what A does to B's program is gone in
A+B, and the sum of the two single effects is wrong by just that. Screens are simulated with all doubles of their
perturbations, the fit sees single perturbations alone, and every double is predicted by the model and by the sum.

Written to the folder: ``pairs.csv`` (one row per screen and double), ``summary.csv`` (means by relation) and ``nonadditive.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import crlseq
from crlseq.evaluation.cells import read_cells
from crlseq.evaluation.held_out import abducted
from crlseq.evaluation.metrics import l2_distance, pearson_delta
from crlseq.evaluation.recovery import closure
from crlseq.run.run import Run

SCREEN = {
    "n_latents": 5, "perturbations_per_latent": 3, "n_genes": 200, "cells_per_perturbation": 100, "n_control": 1000,
    "n_doubles": 105, "expected_parents": 1.0,
}  # fmt: skip
KINDS = {"upstream and downstream": ("#D55E00", "o"), "unrelated": ("#0072B2", "s"), "same program": ("#777777", "^")}
SOURCE_CELLS = 500


def pairs_of(run: Run, truth: dict[str, object]) -> pd.DataFrame:
    """One row per double: relation, size of the interaction, errors, and whether the interaction was predicted."""
    judged = read_cells(run, None)
    ancestor = closure(np.asarray(truth["adjacency"]) != 0)
    target = truth["target"]["latent"]  # type: ignore[index]
    control_cells = np.asarray(_dense(judged.control.x)[:SOURCE_CELLS], dtype=float)
    control = _dense(judged.control.x).mean(0)
    act = abducted(run.model, control_cells, run.facts.seed)

    def predicted(parts: Sequence[int]) -> np.ndarray:
        rows = np.array([judged.known[part][0] for part in parts])
        return np.asarray(act(rows)[1].mean(0) - control_cells.mean(0))

    single = {c[0]: _dense(judged.train.x[judged.train.condition == i]).mean(0) - control for i, c in enumerate(judged.conditions) if len(c) == 1}  # fmt: skip
    of_model = {part: predicted([part]) for part in single}
    rows = []
    for c in np.unique(judged.measured.condition):
        parts = judged.conditions[c]
        if len(parts) != 2:
            continue
        a, b = (int(target[judged.names[part]]) for part in parts)
        kind = (
            "same program" if a == b else "upstream and downstream" if ancestor[a, b] or ancestor[b, a] else "unrelated"
        )
        measured = _dense(judged.measured.x[judged.measured.condition == c]).mean(0)
        additive, by_model = single[parts[0]] + single[parts[1]], predicted(parts)
        interaction = measured - control - additive
        rows.append({
            "double": judged.condition_names[c], "relation": kind,
            "interaction": float(np.linalg.norm(interaction)),
            "interaction_pearson": float(pearson_delta(by_model - of_model[parts[0]] - of_model[parts[1]], interaction, np.zeros_like(control))),
            "model_l2": float(l2_distance(control + by_model, measured)), "additive_l2": float(l2_distance(control + additive, measured)),
            "model_pearson": float(pearson_delta(control + by_model, measured, control)),
            "additive_pearson": float(pearson_delta(control + additive, measured, control)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Means by mixing and relation, and the share of doubles on which the model's L2 is the lower one."""
    grouped = table.assign(model_better=table["model_l2"] < table["additive_l2"]).groupby(["mixing", "relation"])
    means = grouped[
        ["interaction", "model_l2", "additive_l2", "model_pearson", "additive_pearson", "interaction_pearson"]
    ]
    return pd.concat(
        [grouped.size().rename("doubles"), grouped["model_better"].mean(), means.mean()], axis=1
    ).reset_index()


def draw(table: pd.DataFrame) -> Figure:
    """Error of the sum against that of the model, and the interactions predicted; a row a mixing, a mark a double."""
    mixings = list(dict.fromkeys(table["mixing"]))
    figure = Figure(figsize=(10, 0.5 + 4.2 * len(mixings)), layout="constrained")
    panels = figure.subplots(len(mixings), 2, squeeze=False)
    top = float(table[["model_l2", "additive_l2"]].max().max()) * 1.05
    for (left, right), mixing in zip(panels, mixings, strict=True):
        own = table[table["mixing"] == mixing]
        verdicts = own.drop_duplicates("seed")["verdict"].value_counts()
        told = ", ".join(f"graph {verdict} in {n}" for verdict, n in verdicts.items())
        left.plot([0, top], [0, top], color="#999999", linewidth=0.8)
        for kind, (colour, shape) in KINDS.items():
            rows = own[own["relation"] == kind]
            look = {"s": 14, "c": colour, "marker": shape, "alpha": 0.55, "linewidths": 0}
            left.scatter(rows["additive_l2"], rows["model_l2"], label=f"{kind} ({len(rows)})", **look)
            right.scatter(rows["interaction"], rows["interaction_pearson"], **look)
        left.set(xlim=(0, top), ylim=(0, top), xlabel="L2 error of the sum of single effects", ylabel="L2 error of the model")  # fmt: skip
        left.set_title(f"{mixing} mixing: {told} of {verdicts.sum()} screens", fontsize=9, loc="left")
        left.text(0.97, 0.05, "below the line: the model is nearer", transform=left.transAxes, ha="right", fontsize=8)
        left.legend(fontsize=8, frameon=False, loc="upper left")
        right.axhline(0, color="#999999", linewidth=0.8)
        right.set(xlim=(1, None), ylim=(-1, 1.02), xlabel="measured interaction: |double - sum of singles|", ylabel="correlation of predicted\nwith measured interaction")  # fmt: skip
        for axes in (left, right):
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Hard interventions, fitted on single perturbations alone", fontsize=11)
    return figure


def _dense(x: object) -> np.ndarray:
    return np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=float)


def main(words: Sequence[str] | None = None) -> None:
    """Simulate, fit, predict, write."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark_nonadditive", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="screens of each mixing [3]")
    parser.add_argument("--mixing", nargs="+", default=["linear", "network"], choices=["linear", "network"])
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the cells, at most [100]")
    given = parser.parse_args(words)
    given.output.mkdir(parents=True, exist_ok=True)
    tables = []
    for mixing in given.mixing:
        for seed in range(given.seeds):
            screen = crlseq.simulate(**SCREEN, mixing=mixing, seed=seed)
            options = {
                "n_latents": SCREEN["n_latents"],
                "bootstrap": 0,
                "epochs": given.epochs,
                "threads": given.threads,
            }
            run = crlseq.fit(
                screen, given.output / f"{mixing}-{seed}", combinations=False, force=True, seed=seed, **options
            )
            verdict = run.facts.identification.verdict
            tables.append(pairs_of(run, screen.uns["truth"]).assign(mixing=mixing, seed=seed, verdict=verdict))
            print(f"{mixing} {seed}: the graph is {verdict}", flush=True)
    table: pd.DataFrame = pd.concat(tables, ignore_index=True)
    table.to_csv(given.output / "pairs.csv", index=False)
    summary = summarise(table)
    summary.to_csv(given.output / "summary.csv", index=False)
    draw(table).savefig(given.output / "nonadditive.png", dpi=150)
    print(summary.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
