"""Cells in the plane of two programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse

from crlseq.data.perturbations import read_perturbations
from crlseq.errors import InputError, UsageError, not_there
from crlseq.plotting.style import DISTINCT, FAINT, INK, MARKS, NOTHING, axes_of, bare, finish, note
from crlseq.run.run import Run
from crlseq.run.summary import short

CELLS = 20_000  # drawn at most, evenly spaced in the file
FEW = 5  # of a perturbation, below which there is no ellipse
SHOWN = 0.005  # of the cells beyond either end of the axes: outliers would press the rest together


def embedding(
    run: Run,
    *,
    programs: Sequence[str] | None = None,
    perturbations: Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool = False,
) -> Axes:
    """Means of some perturbations' and of the control cells in two programs, before all cells in grey.

    Around each mean is the ellipse of the cells' covariance that contains half of them. Two ``programs``, such as ``("P0", "P3")``; None takes the two that explain most of the perturbations' effects. At
    most eight ``perturbations``, by label; None takes the strongest that target these programs. ``ax, show``: see
    `crlseq.pl.dag`.

    Raises
    ------
    UsageError
        If programs or perturbations are not there, or too many.
    InputError
        If the run has no folder, a single program, or its ``crlseq.h5ad`` cannot be read.

    Examples
    --------
    >>> import crlseq
    >>> ax = crlseq.pl.embedding(crlseq.load("RUN"), programs=["P0", "P1"], perturbations=["g0"])
    >>> [text.get_text().strip() for text in ax.get_legend().get_texts()]
    ['control', 'g0']
    """
    if not run.program_names:
        return note(ax, NOTHING, show)
    pair = _pair(run, programs)
    chosen = chosen_perturbations(run, pair, perturbations)
    labels, latents, control = cells_of(run)
    x, y = latents[:, run.program_names.index(pair[0])], latents[:, run.program_names.index(pair[1])]
    ax = axes_of(ax, 6.2, 4.8)
    ax.scatter(x, y, s=3, color=FAINT, linewidths=0, rasterized=True)
    looks = {control: (INK, "o"), **dict(zip(chosen, zip(DISTINCT, MARKS, strict=True), strict=False))}
    for name, (colour, mark) in looks.items():
        own = np.stack([x, y], 1)[labels == name]
        if not len(own):
            continue
        if len(own) >= FEW:
            ax.add_patch(_half(own, colour))
        look: dict[str, Any] = {"s": 70, "marker": mark, "edgecolor": "white", "linewidth": 1.2, "zorder": 4}
        ax.scatter(*own.mean(0), color=colour, label=" " + short(name), **look)
    legend = ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    drawn = np.isin(labels, list(looks))
    for limit, values in ((ax.set_xlim, x[drawn]), (ax.set_ylim, y[drawn])):
        low, high = np.quantile(values, [SHOWN, 1 - SHOWN])
        edge = 0.05 * (high - low) or 1.0
        limit(low - edge, high + edge)
    bare(ax, *(f"{name}  {short(run.described[name].label, 40)}" for name in pair))
    return finish(ax, show, "Means of cells (SD of control cells); ellipses contain half of the cells")


def _half(cells: np.ndarray, colour: str) -> Ellipse:
    """The ellipse of the covariance of ``cells`` (n, 2), about their mean, that contains half of them."""
    mean = cells.mean(0)
    variance, axes = np.linalg.eigh(np.cov(cells.T))
    variance = np.maximum(variance, 1e-12)
    radius = np.sqrt(np.median((((cells - mean) @ axes) ** 2 / variance).sum(1)))
    width, height = 2 * radius * np.sqrt(variance)
    angle = float(np.degrees(np.arctan2(axes[1, 0], axes[0, 0])))
    return Ellipse(tuple(mean), width, height, angle=angle, facecolor="none", edgecolor=colour, linewidth=1.6, zorder=3)


def _pair(run: Run, programs: Sequence[str] | None) -> tuple[str, str]:
    names = run.program_names
    if programs is None:
        if len(names) < 2:
            raise InputError("This run has one program, but the plot needs two.", "Plot `effects` or `programs`.")
        explained = np.nan_to_num([run.described[name].effect_explained for name in names], nan=-np.inf)
        first, second = sorted(np.argsort(-explained, kind="stable")[:2])
        return names[first], names[second]
    if len(programs) != 2 or programs[0] == programs[1] or not set(programs) <= set(names):
        raise UsageError(
            f"The programs {', '.join(map(repr, programs))} are not two different programs of this run.",
            f"Programs are {names[0]} to {names[-1]}.",
        )
    return programs[0], programs[1]


def chosen_perturbations(run: Run, programs: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """Perturbations asked for, at most eight; None: the strongest that target the programs."""
    if asked is None:
        drivers, most = [run.described[name].drivers for name in programs], len(DISTINCT) // len(programs)
        return [str(name) for own in drivers for name in own.loc[own["n_cells"] > 0, "perturbation"][:most]]
    known = {row.name for row in run.facts.conditions}
    if unknown := [name for name in asked if name not in known]:
        raise not_there("perturbation", unknown[0], sorted(known))
    if len(asked) > len(DISTINCT):
        raise UsageError(f"{len(asked)} perturbations are too many to colour.", f"Give {len(DISTINCT)} at most.")
    return list(asked)


def cells_of(run: Run) -> tuple[np.ndarray, np.ndarray, str]:
    """Condition of cells of the run's h5ad, read without its matrix, their programs in standard deviations of the control
    cells' activities, and the control's name.
    """
    import anndata as ad

    from crlseq.data.files import open_store, readable

    path = run.folder / "crlseq.h5ad"
    if not path.exists():
        what = f"This picture shows cells, and {run.folder} has no crlseq.h5ad that holds them."
        raise InputError(what, "Draw another picture, or restore the file.")
    with open_store(path) as store, readable(str(path), "the table of cells"):
        obs, latents = ad.io.read_elem(store["obs"]), np.asarray(store["obsm/X_crlseq"])
    facts = run.facts
    found = read_perturbations(obs, facts.perturbation_key, facts.controls, facts.config.data.separator)
    used = np.flatnonzero(found.condition >= 0)
    some = used[np.linspace(0, len(used) - 1, min(CELLS, len(used))).astype(int)]
    names = np.asarray(found.condition_names, dtype=object)
    unit = latents[found.condition == 0].std(0)
    return names[found.condition[some]], latents[some] / np.where(unit > 0, unit, 1.0), str(names[0])
