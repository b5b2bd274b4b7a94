"""The power of a screen by its cells a perturbation."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from crlseq.plotting.style import DISTINCT, FAINT, MARKS, TEXT, bare

PANELS = {"detected": "effects detected", "targets": "on the right program", "edges": "edges found"}
WIDTH, HEIGHT = 2.9, 3.0  # inches of a panel
APART = 0.03  # of a number of cells: between marks of several effects, so that their errors are all seen


def by_effect(table: pd.DataFrame) -> list[tuple[float, pd.DataFrame]]:
    """The rows of each effect; 0 stands for those of a run or scenario, whose ``effect`` is NaN."""
    effect = table["effect"].fillna(0.0)
    return [(size, table[effect == size]) for size in dict.fromkeys(effect.tolist())]


def draw_power(table: pd.DataFrame, title: str) -> Figure:
    """Shares with their standard errors by cells a perturbation, a panel a share and a line an effect; a dotted line at 90 %.

    ``table`` is that of `crlseq.experiments.power.power`; a share that is nowhere known has no panel.
    """
    shown = [name for name in PANELS if table[name].notna().any()]
    figure, panels = plt.subplots(
        1, len(shown), figsize=(1.3 + WIDTH * len(shown), HEIGHT), layout="constrained", sharey=True, squeeze=False
    )
    groups = by_effect(table)
    for ax, name in zip(panels[0], shown, strict=True):
        ax.axhline(0.9, color=FAINT, linewidth=0.8, linestyle=":")
        for i, (effect, rows) in enumerate(groups):
            label = f"{effect:g} SD" if effect else "its own"
            aside = (1 + APART) ** (i - (len(groups) - 1) / 2)
            ax.errorbar(
                rows["cells"] * aside, rows[name], yerr=rows[f"{name}_se"], color=DISTINCT[i % len(DISTINCT)],
                marker=MARKS[i % len(MARKS)], markersize=4, linewidth=1.3, elinewidth=0.8, capsize=2, label=label,
            )  # fmt: skip
        ax.set_title(PANELS[name], fontsize=9, loc="left")
        ax.set_xscale("log")
        ax.set_xticks(cells := sorted(set(table["cells"])), [f"{n:g}" for n in cells])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(-0.04, 1.06)
        ax.set_yticks(np.linspace(0, 1, 6), [f"{share:.0%}" for share in np.linspace(0, 1, 6)])
        bare(ax, "cells per perturbation")
    lines = panels[0][0].get_legend_handles_labels()
    figure.legend(*lines, fontsize=7, frameon=False, loc="outside right center", title="effect", title_fontsize=7)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left", **TEXT)
    return figure
