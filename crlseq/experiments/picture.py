"""A benchmark as a picture."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from crlseq.experiments.scenarios import BASELINES, EXTERNAL, METHODS

SHOWN = {"ancestor_f1": "Ancestor F1", "target_accuracy": "Target accuracy", "shd": "SHD", "mcc": "MCC"}
# Okabe and Ito's colours, which colour-blind readers tell apart, and with each colour another shape every time.
COLOURS = ("#0072B2", "#CC79A7", "#009E73", "#D55E00", "#E69F00", "#56B4E9")
SHAPES = "oPDsX<>pH*8"
MARKS = {name: (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, name in enumerate((*METHODS, *EXTERNAL))}
MARKS |= {"random": ("#777777", "^"), "empty": ("#333333", "v")}


def draw(table: pd.DataFrame) -> Figure:
    """Small multiples: one row per scenario, column per score and mark per seed, a black bar at each method's median."""
    scenarios = list(dict.fromkeys(table["scenario"]))
    figure = Figure(figsize=(11, 0.9 + 1.6 * len(scenarios)), layout="constrained")
    panels = figure.subplots(len(scenarios), len(SHOWN), squeeze=False, sharey="row")
    for axes, (score, title) in zip(panels[0], SHOWN.items(), strict=True):
        axes.set_title(title + ("\nlower is better" if score == "shd" else "\nhigher is better"), fontsize=9)
    for line, scenario in zip(panels, scenarios, strict=True):
        rows = table[table["scenario"] == scenario]
        methods = [name for name in MARKS if name in set(rows["method"])]
        for axes, score in zip(line, SHOWN, strict=True):
            for at, method in enumerate(methods):
                values = rows.loc[rows["method"] == method].sort_values("seed")[score].dropna().astype(float)
                colour, shape = MARKS[method]
                # Spread over the height, so that seeds with equal scores are all seen.
                height = at + np.linspace(-0.3, 0.3, len(values)) if len(values) > 1 else np.full(len(values), at)
                if len(values):
                    axes.vlines(values.median(), at - 0.42, at + 0.42, colors="black", linewidth=1.8, zorder=4)
                else:
                    why = "not applicable" if method in BASELINES else "all fits failed"
                    across = axes.get_yaxis_transform()
                    axes.text(0.03, at, why, va="center", fontsize=7, color="#666666", transform=across)
                axes.scatter(
                    values, height, s=18, c=colour, marker=shape, alpha=0.7, linewidths=0, clip_on=False, zorder=3,
                )  # fmt: skip
            if score == "shd":
                top = max(1.0, rows[score].astype(float).max())
                axes.set_xlim(-0.03 * top, 1.03 * top)
                axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            else:
                axes.set_xlim(-0.02, 1.02)
                axes.set_xticks([0, 0.5, 1])
            axes.set_yticks(range(len(methods)), methods)
            axes.set_ylim(len(methods) - 0.4, -0.6)
            axes.tick_params(labelsize=8, length=2)
            axes.grid(axis="x", color="#e2e2e2", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        name = scenario.replace("-", "\n")
        line[0].set_ylabel(name, fontsize=9, fontweight="bold", rotation=0, ha="right", va="center")
    return figure
