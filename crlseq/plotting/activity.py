"""Activity of programs in the cells of each perturbation: a dot plot of all programs, and violins of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from crlseq.errors import not_there
from crlseq.plotting.cells import cells_of, chosen_perturbations
from crlseq.plotting.charts import ROWS
from crlseq.plotting.style import DISTINCT, FAINT, INK, NOTHING, SIGNED, SOFT, axes_of, bare, finish, label_ticks, note
from crlseq.readout.drawing import limit_of
from crlseq.run.run import Run
from crlseq.run.summary import short, strongest

OUTSIDE = 0.05  # of the control cells, both tails together
FULL, LARGEST = (0.05, 0.25, 0.5, 1.0), 110.0  # shares in the legend; area of a dot of share 1
FEW = 5  # cells, below which there is no violin


def activity(run: Run, *, top: int = ROWS, ax: Axes | None = None, show: bool = False) -> Axes:
    """Programs by perturbations: colour is the mean activity of the perturbation's cells in standard deviations, area the
    share of its cells outside the middle 95 % of control cells.

    The `top` perturbations with the largest \\|shift\\|. ``ax, show``: see `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> ax = crlseq.pl.activity(crlseq.load("RUN"), top=4)
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['P0', 'P1', 'P2']
    """
    rows, left_out = strongest(run.interventions, top)
    labels, latents, control = cells_of(run) if len(rows) else (np.empty(0), np.empty((0, 0)), "")
    names = [name for name in rows["perturbation"] if (labels == name).any()]
    if not names:
        return note(ax, NOTHING, show)
    low, high = np.quantile(latents[labels == control], [OUTSIDE / 2, 1 - OUTSIDE / 2], axis=0)
    means = np.stack([latents[labels == name].mean(0) for name in names])
    outside = np.stack([((own < low) | (own > high)).mean(0) for own in (latents[labels == name] for name in names)])
    ax = axes_of(ax, 3.4 + 0.34 * len(run.program_names), 1.4 + 0.19 * len(names))
    k, i = np.meshgrid(np.arange(means.shape[1]), np.arange(len(names)))
    end = limit_of(means)
    look: dict[str, Any] = {"cmap": SIGNED, "vmin": -end, "vmax": end, "edgecolor": SOFT, "linewidth": 0.4}
    dots = ax.scatter(k.ravel(), i.ravel(), s=LARGEST * outside.ravel(), c=means.ravel(), **look)
    label_ticks(ax, "y", names, fontsize=8 if len(names) <= ROWS else 6)
    label_ticks(ax, "x", run.program_names, fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(-0.6, means.shape[1] - 0.4)
    marks = [ax.scatter([], [], s=LARGEST * share, color=FAINT, label=f"{share:.0%}") for share in FULL]
    ax.legend(
        handles=marks, title="cells outside 95 %\nof control cells", fontsize=7, title_fontsize=7, frameon=False,
        loc="upper left", bbox_to_anchor=(1.02, 1.0), labelspacing=0.9,
    )  # fmt: skip
    bar = ax.figure.colorbar(dots, ax=ax, location="bottom", shrink=0.9, pad=0.02, aspect=30)
    bar.set_label("mean activity (SD of control cells)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    rest = f", the {len(names)} strongest of {len(names) + left_out}" if left_out else ""
    return finish(ax, show, f"Activity of programs by perturbation{rest}")


def violin(
    run: Run, program: str, *, perturbations: Sequence[str] | None = None, ax: Axes | None = None, show: bool = False
) -> Axes:
    """Distributions of one program's activity in control cells and in the cells of up to eight perturbations.

    ``perturbations`` by label; None takes the strongest that target the program. Lines mark medians. InputError if there
    is no such program. ``ax, show``: see `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> ax = crlseq.pl.violin(crlseq.load("RUN"), "P0", perturbations=["g0"])
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['control', 'g0']
    """
    if not run.program_names:
        return note(ax, NOTHING, show)
    if program not in run.program_names:
        raise not_there("program", program, run.program_names)
    chosen = chosen_perturbations(run, [program], perturbations)
    labels, latents, control = cells_of(run)
    values = latents[:, run.program_names.index(program)]
    groups = {name: values[labels == name] for name in (control, *chosen)}
    groups = {name: own for name, own in groups.items() if len(own)}
    ax = axes_of(ax, 1.8 + 0.55 * len(groups), 3.4)
    for place, (colour, own) in enumerate(zip((SOFT, *DISTINCT), groups.values(), strict=False)):
        if len(own) >= FEW and own.std() > 0:
            parts = ax.violinplot(own, [place], widths=0.85, showextrema=False, showmedians=True)
            parts["bodies"][0].set(facecolor=colour, alpha=0.65)  # type: ignore[index]
            parts["cmedians"].set(color=INK, linewidth=1.2)
        else:
            ax.scatter(np.full(len(own), place), own, s=10, color=colour)
    ax.axhline(0, color=SOFT, linewidth=0.6, zorder=0)
    bare(ax, y="activity (SD of control cells)")
    label_ticks(ax, "x", list(groups), fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
    ax.tick_params(axis="x", length=0)
    return finish(ax, show, f"{program}  {short(run.described[program].label, 40)}")
