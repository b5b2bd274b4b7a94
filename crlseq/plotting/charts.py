"""Charts of numbers: tests of effects, and losses by epoch."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from crlseq.plotting.style import DOWN, INK, SOFT, UP, axes_of, bare, finish, label_ticks, note
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR

ROWS = 60


def effects(run: Run, *, top: int = ROWS, ax: Axes | None = None, show: bool = False) -> Axes:
    """Energy distance of each perturbation's cells from control cells: filled where it is detectable (FDR <= 0.05).

    Parameters
    ----------
    top
        Perturbations at most, those with the largest distances; the title says how many were left out.
    ax, show
        See `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> crlseq.pl.effects(crlseq.load("RUN")).get_xlabel()
    'energy distance from control cells'
    """
    tested = run.interventions[run.interventions["energy_distance"].notna()]
    table = tested.sort_values("energy_distance", ascending=False, kind="stable")[:top]
    if table.empty:
        return finish(note(axes_of(ax, 4, 2), "No single perturbation was tested."), show)
    ax = axes_of(ax, 5.2, 1.1 + 0.17 * len(table))
    y, x = np.arange(len(table)), table["energy_distance"].to_numpy()
    found = (table["fdr"] <= DETECTABLE_FDR).to_numpy()
    ax.hlines(y, 0, x, color="#c8c8c8", linewidth=1)
    ax.axvline(0, color=SOFT, linewidth=0.8)
    for chosen, face, name in ((found, UP, f"FDR ≤ {DETECTABLE_FDR}"), (~found, "white", "not detectable")):
        ax.scatter(x[chosen], y[chosen], s=24, facecolor=face, edgecolor=UP, label=name, zorder=3)
    # Distances span decades; below the smallest detectable one the scale is linear.
    small = float(x[found].min()) if found.any() else 1.0
    if x.max() > 20 * small:
        ax.set_xscale("symlog", linthresh=small)
    label_ticks(ax, "y", list(table["perturbation"]), fontsize=8 if len(table) <= ROWS else 6)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("energy distance from control cells", fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    detected = int((tested["fdr"] <= DETECTABLE_FDR).sum())
    shown = f"; the {len(table)} strongest" if len(table) < len(tested) else ""
    ax.set_title(f"{detected} of {len(tested)} perturbations have a detectable effect{shown}", fontsize=9, loc="left")
    ax.legend(fontsize=7, frameon=False, loc="lower right")
    bare(ax)
    return finish(ax, show)


def history(run: Run, *, ax: Axes | None = None, show: bool = False) -> Axes:
    """Training and validation loss by epoch, and the epoch whose weights were kept; see `crlseq.pl.dag` for arguments.

    Examples
    --------
    >>> import crlseq
    >>> crlseq.pl.history(crlseq.load("RUN")).get_xlabel()
    'epoch'
    """
    if run.history.empty:
        return finish(note(axes_of(ax, 4, 2), "No network was trained: there is no loss by epoch."), show)
    ax = axes_of(ax, 5.2, 3.2)
    epochs = run.history["epoch"].to_numpy() + 1
    looks = {"total": (DOWN, "training", "-"), "validation_total": (UP, "validation", "--")}
    for name, (colour, title, line) in looks.items():
        if name in run.history:
            ax.plot(epochs, run.history[name], line, color=colour, label=title, marker=".", markersize=4, linewidth=1.4)
    kept = run.facts.training.best_epoch + 1
    ax.axvline(kept, color=INK, linewidth=0.8, linestyle=":", label=f"kept: epoch {kept}")
    ax.set_xlabel("epoch", fontsize=8)
    ax.set_ylabel("loss", fontsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(labelsize=7)
    ax.set_title("Loss (validation: with the final weights of the terms)", fontsize=9, loc="left")
    ax.legend(fontsize=7, frameon=False)
    bare(ax)
    return finish(ax, show)
