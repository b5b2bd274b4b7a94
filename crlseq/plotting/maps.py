"""Heat maps: genes by programs, and perturbations by programs."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from crlseq.plotting.style import INK, SIGNED, axes_of, finish, label_ticks, limit_of, note
from crlseq.run.run import Run
from crlseq.run.summary import assignment, strongest

ROWS = 60  # of a map, if no number is asked for


def programs(run: Run, *, n_genes: int | None = None, ax: Axes | None = None, show: bool = False) -> Axes:
    """Loadings of the top genes of every program, a heat map of genes by programs, each in units of its largest loading.

    Parameters
    ----------
    n_genes
        Genes per program, by \\|loading\\|; None takes as many as make 60 rows, between 2 and 10.
    ax, show
        See `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> ax = crlseq.pl.programs(crlseq.load("RUN"), n_genes=3)
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['P0', 'P1', 'P2']
    """
    names = run.program_names
    n = n_genes or int(np.clip(ROWS // len(names), 2, 10))
    wide = run.programs.pivot(index="gene", columns="program", values="loading")[names]
    chosen = run.programs[run.programs["rank"] <= n]
    rows = list(dict.fromkeys(chosen["gene"]))
    values = wide.loc[rows].to_numpy() / np.maximum(wide.abs().max().to_numpy(), 1e-300)
    ax = axes_of(ax, 2.4 + 0.34 * len(names), 1.2 + 0.16 * len(rows))
    _heat(ax, values, rows, names, "loading / largest of the program")
    # A line between the programs whose top genes these are: each gene stands with the first that it is one of.
    first = chosen.drop_duplicates("gene")["program"].tolist()
    for i in range(1, len(rows)):
        if first[i] != first[i - 1]:
            ax.axhline(i - 0.5, color=INK, linewidth=0.4)
    ax.set_title(f"Top {n} genes of each program", fontsize=9, loc="left")
    return finish(ax, show)


def interventions(run: Run, *, top: int = ROWS, ax: Axes | None = None, show: bool = False) -> Axes:
    """The intervention map: what each perturbation does to the program that it targets.

    Colour and number are the shift in standard deviations of the program. The area of a ring is the share of bootstrap
    replicates that gave the perturbation to that program instead.

    Parameters
    ----------
    top
        Perturbations at most, those with the largest \\|shift\\|; the title says how many were left out.
    ax, show
        See `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> crlseq.pl.interventions(crlseq.load("RUN"), top=5).figure.savefig("interventions.png")
    """
    rows, left_out = strongest(run.interventions, top)
    names = run.program_names
    if rows.empty:
        return finish(
            note(axes_of(ax, 4, 2), "No perturbation has a detectable effect: there is nothing to map."), show
        )
    values = np.full((len(rows), len(names)), np.nan)
    values[np.arange(len(rows)), [names.index(name) for name in rows["program"]]] = rows["shift"]
    ax = axes_of(ax, 2.6 + 0.34 * len(names), 1.4 + 0.17 * len(rows))
    _heat(ax, values, list(rows["perturbation"]), names, "shift (SD of the program)")
    target = np.nonzero(~np.isnan(values))
    end = limit_of(values)
    decimals = 1 if end >= 2 else 2
    if len(rows) <= ROWS:
        for i, k in zip(*target, strict=True):
            dark = abs(values[i, k]) > 0.6 * end
            ax.text(
                k, i, f"{values[i, k]:+.{decimals}f}", size=6, ha="center", va="center", color="white" if dark else INK
            )
    shares = assignment(run.facts.bootstrap, rows)
    if shares is not None:
        shares[target] = 0
        i, k = np.nonzero(shares > 0)
        ax.scatter(k, i, s=60 * shares[i, k], facecolor="none", edgecolor=INK, linewidth=0.7)
    title = "Interventions" + (f", the {len(rows)} strongest of {len(rows) + left_out}" if left_out else "")
    ax.set_title(
        title + ("\nrings: share of bootstrap replicates for another program" if shares is not None else ""),
        fontsize=9,
        loc="left",
    )
    return finish(ax, show)


def _heat(ax: Axes, values: np.ndarray, rows: list[str], columns: list[str], title: str) -> None:
    end = limit_of(values)
    image = ax.imshow(values, cmap=SIGNED, vmin=-end, vmax=end, aspect="auto", interpolation="nearest")
    size = 8 if len(rows) <= ROWS else 6
    label_ticks(ax, "y", rows, fontsize=size)
    label_ticks(ax, "x", columns, fontsize=8, rotation=90 if len(columns) > 12 else 0)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    ax.grid(which="minor", axis="x", color="#e6e6e6", linewidth=0.5)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_color("#c8c8c8")
    bar = ax.figure.colorbar(image, ax=ax, shrink=min(1.0, 12 / max(len(rows), 1)), pad=0.02, anchor=(0.0, 1.0))
    bar.set_label(title, fontsize=8)
    bar.ax.tick_params(labelsize=7)
