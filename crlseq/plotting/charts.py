"""Heat maps of programs and interventions, and charts of tested effects and of losses by epoch."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from crlseq.plotting.style import DOWN, INK, LINE, NOTHING, SIGNED, SOFT, UP, axes_of, bare, finish, label_ticks, note
from crlseq.readout.drawing import limit_of
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR
from crlseq.run.summary import assignment, strongest
from crlseq.run.tables import shown

ROWS = 60  # of a map or chart, if no number is asked for
LOW = 2.6  # inches that the title of a colour scale needs


def effects(run: Run, *, top: int = ROWS, ax: Axes | None = None, show: bool = False) -> Axes:
    """Energy distance of each perturbation's cells from control cells: filled where it is detectable (FDR <= 0.05).

    At most the `top` with the largest distances; the title says how many were left out. ``ax, show``: see `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> crlseq.pl.effects(crlseq.load("RUN")).get_xlabel()
    'energy distance from control cells'
    """
    tested = run.interventions[run.interventions["energy_distance"].notna()]
    table = tested.sort_values("energy_distance", ascending=False, kind="stable")[:top]
    if table.empty:
        return note(ax, "No single perturbation was tested.", show)
    ax = axes_of(ax, 5.2, 1.1 + 0.17 * len(table))
    y, x = np.arange(len(table)), table["energy_distance"].to_numpy()
    found = (table["fdr"] <= DETECTABLE_FDR).to_numpy()
    ax.hlines(y, 0, x, color=LINE, linewidth=1)
    ax.axvline(0, color=SOFT, linewidth=0.8)
    for chosen, face, name in ((found, UP, f"FDR ≤ {DETECTABLE_FDR}"), (~found, "white", "not detectable")):
        ax.scatter(x[chosen], y[chosen], s=24, facecolor=face, edgecolor=UP, label=name, zorder=3)
    # Distances span decades; below the smallest detectable one the scale is linear.
    small = float(x[found].min()) if found.any() else 1.0
    if x.max() > 20 * small:
        ax.set_xscale("symlog", linthresh=small)
    bare(ax, "energy distance from control cells")
    label_ticks(ax, "y", list(table["perturbation"]), fontsize=8 if len(table) <= ROWS else 6)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    detected = int((tested["fdr"] <= DETECTABLE_FDR).sum())
    shown = f"; the {len(table)} strongest" if len(table) < len(tested) else ""
    ax.legend(fontsize=7, frameon=False, loc="lower right")
    return finish(ax, show, f"{detected} of {len(tested)} perturbations have a detectable effect{shown}")


def history(run: Run, *, ax: Axes | None = None, show: bool = False) -> Axes:
    """Training and validation loss by epoch, and the epoch whose weights were kept; see `crlseq.pl.dag` for arguments.

    Examples
    --------
    >>> import crlseq
    >>> crlseq.pl.history(crlseq.load("RUN")).get_xlabel()
    'epoch'
    """
    if run.history.empty:
        return note(ax, "No network was trained: there is no loss by epoch.", show)
    ax = axes_of(ax, 5.2, 3.2)
    epochs = run.history["epoch"].to_numpy() + 1
    looks = {"total": (DOWN, "training", "-"), "validation_total": (UP, "validation", "--")}
    for name, (colour, title, line) in looks.items():
        if name in run.history:
            ax.plot(epochs, run.history[name], line, color=colour, label=title, marker=".", markersize=4, linewidth=1.4)
    kept = run.facts.training.best_epoch + 1
    ax.axvline(kept, color=INK, linewidth=0.8, linestyle=":", label=f"kept: epoch {kept}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=7, frameon=False)
    bare(ax, "epoch", "loss")
    return finish(ax, show, "Loss (validation: with the final weights of the terms)")


def programs(run: Run, *, n_genes: int | None = None, ax: Axes | None = None, show: bool = False) -> Axes:
    """Loadings of the top genes of every program, a heat map of genes by programs, each in units of its largest loading.

    ``n_genes`` per program, by \\|loading\\|; None takes as many as make 60 rows, between 2 and 10. ``ax, show``: see
    `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> ax = crlseq.pl.programs(crlseq.load("RUN"), n_genes=3)
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['P0', 'P1', 'P2']
    """
    names = run.program_names
    if not names:
        return note(ax, NOTHING, show)
    n = n_genes or int(np.clip(ROWS // len(names), 2, 10))
    wide = run.programs.pivot(index="gene", columns="program", values="loading")[names]
    chosen = run.programs[run.programs["rank"] <= n]
    rows = list(dict.fromkeys(chosen["gene"]))
    called = dict(zip(chosen["gene"], shown(chosen), strict=True))
    values = wide.loc[rows].to_numpy() / np.maximum(wide.abs().max().to_numpy(), 1e-300)
    ax = axes_of(ax, 2.4 + 0.34 * len(names), max(LOW, 1.2 + 0.16 * len(rows)))
    heat(ax, values, [called[gene] for gene in rows], names, "loading / largest of the program")
    # A line between the programs whose top genes these are: each gene stands with the first that it is one of.
    first = chosen.drop_duplicates("gene")["program"].tolist()
    for i in range(1, len(rows)):
        if first[i] != first[i - 1]:
            ax.axhline(i - 0.5, color=INK, linewidth=0.4)
    return finish(ax, show, f"Top {n} genes of each program")


def interventions(run: Run, *, top: int = ROWS, ax: Axes | None = None, show: bool = False) -> Axes:
    """The intervention map: what each perturbation does to the program that it targets.

    Colour and number are the shift in standard deviations of the program. The area of a ring is the share of bootstrap
    replicates that gave the perturbation to that program instead. At most the `top` with the largest \\|shift\\|; the
    title says how many were left out. ``ax, show``: see `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> crlseq.pl.interventions(crlseq.load("RUN"), top=5).figure.savefig("interventions.png")
    """
    rows, left_out = strongest(run.interventions, top)
    names = run.program_names
    if rows.empty:
        return note(ax, "No perturbation has a detectable effect: there is nothing to map.", show)
    values = np.full((len(rows), len(names)), np.nan)
    values[np.arange(len(rows)), [names.index(name) for name in rows["program"]]] = rows["shift"]
    ax = axes_of(ax, 2.6 + 0.34 * len(names), max(LOW, 1.4 + 0.17 * len(rows)))
    heat(ax, values, list(rows["perturbation"]), names, "shift (SD of the program)")
    target = np.nonzero(~np.isnan(values))
    end = limit_of(values)
    decimals = 1 if end >= 2 else 2
    if len(rows) <= ROWS:
        for i, k in zip(*target, strict=True):
            colour = "white" if abs(values[i, k]) > 0.6 * end else INK
            ax.text(k, i, f"{values[i, k]:+.{decimals}f}", size=6, ha="center", va="center", color=colour)
    title = "Interventions" + (f", the {len(rows)} strongest of {len(rows) + left_out}" if left_out else "")
    shares = assignment(run.facts.bootstrap, rows)
    if shares is not None:
        shares[target] = 0
        i, k = np.nonzero(shares > 0)
        ax.scatter(k, i, s=60 * shares[i, k], facecolor="none", edgecolor=INK, linewidth=0.7)
        title += "\nrings: share of bootstrap replicates for another program"
    return finish(ax, show, title)


def heat(
    ax: Axes, values: np.ndarray, rows: list[str], columns: list[str], title: str, turned: bool = False, end: float = 0
) -> None:
    """A heat map of signed ``values`` (rows, columns); ``turned``: names of columns from below upwards. Colours end at
    ``end``, or the largest value.
    """
    beyond = 0 < end < limit_of(values)
    end = end or limit_of(values)
    image = ax.imshow(values, cmap=SIGNED, vmin=-end, vmax=end, aspect="auto", interpolation="nearest")
    size = 8 if len(rows) <= ROWS else 6
    label_ticks(ax, "y", rows, fontsize=size)
    label_ticks(ax, "x", columns, fontsize=8, rotation=90 if turned or len(columns) > 12 else 0)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    ax.grid(which="minor", axis="x", color=LINE, linewidth=0.5)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_color(LINE)
    bar = ax.figure.colorbar(
        image,
        ax=ax,
        shrink=min(1.0, 12 / max(len(rows), 1)),
        pad=0.02,
        anchor=(0.0, 1.0),
        extend="both" if beyond else "neither",
    )
    bar.set_label(title, fontsize=8)
    bar.ax.tick_params(labelsize=7)
