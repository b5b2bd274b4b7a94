"""The pairs of programs as a matrix."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from crlseq.plotting.style import DOWN, INK, LINE, SOFT, UP, axes_of, finish, label_ticks, note
from crlseq.run.pairs import counts, legend, matrix, why_no_pairs
from crlseq.run.run import Run

LETTERS = 56  # of a line of the legend
PALE = 0.28  # share of its colour that a pair has which is only likely


def pairs(run: Run, *, ax: Axes | None = None, show: bool = False) -> Axes:
    """Every pair of programs, sources in rows and targets in columns, by its status in ``pairs.csv``.

    Orange with a plus: the source is upstream and raises the target; blue with a minus: it lowers it; pale with a question
    mark: likely; hatched: seen both ways; 0: excluded; grey with a dot: undecided. ``ax, show``: see `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> ax = crlseq.pl.pairs(crlseq.load("RUN"))
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['P0', 'P1', 'P2']
    """
    if run.pairs is None or run.pairs.empty:
        return note(ax, why_no_pairs(run.facts) if run.pairs is None else "One program makes no pair.", show)
    names = run.program_names
    marks = matrix(run.pairs, names)
    words = [f"{counts(run.pairs)}.", *(f"{mark} {status}: {means}" for mark, status, means in legend(run.pairs))]
    lines = [line for each in words for line in textwrap.wrap(each, LETTERS, subsequent_indent="    ")]
    ax = axes_of(ax, max(5.4, 3.2 + 0.3 * len(names)), 1.2 + 0.26 * len(names) + 0.15 * len(lines))
    for (i, k), mark in np.ndenumerate(marks.to_numpy()):
        if mark:
            face, ink, hatch = _look(mark)
            corner = (k - 0.45, i - 0.45)
            ax.add_patch(Rectangle(corner, 0.9, 0.9, facecolor=face, edgecolor=LINE, hatch=hatch, linewidth=0.6))
            ax.text(k, i, mark, color=ink, size=8, ha="center", va="center", parse_math=False)
    ax.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal", anchor="NW")
    label_ticks(ax, "y", [f"{name}  {run.described[name].label}" for name in names], fontsize=8)
    label_ticks(ax, "x", names, fontsize=8, rotation=90 if len(names) > 12 else 0)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("\n".join(lines), fontsize=7, loc="left", color=SOFT)
    return finish(ax, show, "Pairs of programs: source in the row, target in the column")


def _look(mark: str) -> tuple[str | tuple[float, ...], str, str | None]:
    """Colour of the cell and of the mark, and hatching."""
    if mark[0] in "+−":
        colour = UP if mark[0] == "+" else DOWN
        pale = tuple(1 - PALE * (1 - part) for part in to_rgb(colour))
        return (pale, INK, None) if mark.endswith("?") else (colour, "white", None)
    return {"⇄": ("white", INK, "////"), "·": (LINE, SOFT, None)}.get(mark, ("white", SOFT, None))
