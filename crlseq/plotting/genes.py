"""What perturbations do to genes: all of them as a map, and one of them as a volcano."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import BboxBase
from scipy.cluster.hierarchy import leaves_list, linkage

from crlseq.plotting.charts import ROWS, heat
from crlseq.plotting.style import DOWN, FAINT, INK, SOFT, TEXT, UP, axes_of, bare, finish, note
from crlseq.run.perturbation import genes_of
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR
from crlseq.run.summary import short
from crlseq.run.tables import by_program, shown

LABELS = 12  # genes that a volcano names
LEAST_P = 1e-300
STRONG = 0.99  # share of a map's values within its colours: an own transcript would make all else pale


def effects_map(run: Run, *, top: int = ROWS, ax: Axes | None = None, show: bool = False) -> Axes:
    """Genes by perturbations: the change of log expression, of the `top` genes that change most surely.

    Perturbations with a gene that surely changes (FDR <= 0.05) stand by their programs, genes by likeness; a square marks
    a perturbation's own transcript. ``ax, show``: see `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> ax = crlseq.pl.effects_map(crlseq.load("RUN"), top=10)
    >>> len(ax.get_yticklabels())
    10
    """
    table = run.effects
    sure = table[table["fdr"] <= DETECTABLE_FDR]
    ordered = by_program(run.interventions, run.interventions["shift"])["perturbation"]
    names = ordered[ordered.isin(sure["perturbation"])].astype(str).tolist()
    if not names:
        return note(ax, "No gene surely changes under any perturbation.", show)
    first = sure.sort_values("p_value", kind="stable").drop_duplicates("gene")
    genes = first["gene"].head(top)
    wide = table.pivot(index="gene", columns="perturbation", values="change").reindex(index=genes, columns=names)
    values = wide.fillna(0.0).to_numpy()
    if len(values) > 2:
        order = leaves_list(linkage(values, "average", optimal_ordering=True))
        genes, values = genes.iloc[order], values[order]
    called = dict(zip(first["gene"], shown(first), strict=True))
    ax = axes_of(ax, 2.6 + 0.2 * len(names), 1.6 + 0.16 * len(genes))
    heat(
        ax,
        values,
        [called[gene] for gene in genes],
        names,
        "change of log expression",
        turned=True,
        end=float(np.quantile(np.abs(values), STRONG)),
    )
    own = [(i, k) for i, gene in enumerate(genes) for k, name in enumerate(names) if name in (gene, called[gene])]
    if own:
        y, x = zip(*own, strict=True)
        ax.scatter(x, y, s=26, marker="s", facecolor="none", edgecolor=INK, linewidth=0.8)
    rest = f", the {len(genes)} surest of {len(first)}" if len(first) > len(genes) else ""
    whole = len(run.preprocessing.genes) * table["perturbation"].nunique() == len(table)
    blank = "" if whole else "\nwhite also where no change was surely seen"
    return finish(ax, show, f"Effects on genes{rest}; squares: own transcripts{blank}")


def volcano(run: Run, perturbation: str, *, ax: Axes | None = None, show: bool = False) -> Axes:
    """Log2 fold change of every gene under one perturbation against its p-value; the surest genes are named.

    Of values that are no logarithms, the change of the mean. InputError if there is no such perturbation. ``ax, show``:
    see `crlseq.pl.dag`.

    Examples
    --------
    >>> import crlseq
    >>> crlseq.pl.volcano(crlseq.load("RUN"), "g0").get_ylabel()
    '−log10 p'
    """
    genes = genes_of(run, perturbation)
    if genes.empty:
        return note(ax, f"{short(perturbation)} has too few cells of its own.", show)
    folds = bool(genes["log2_fold_change"].notna().any())
    genes = genes[genes["p_value"].notna()]
    x = genes["log2_fold_change" if folds else "change"].to_numpy()
    y = -np.log10(genes["p_value"].clip(lower=LEAST_P).to_numpy())
    sure = (genes["fdr"] <= DETECTABLE_FDR).to_numpy()
    ax = axes_of(ax, 5.2, 4.2)
    for chosen, colour in ((~sure, FAINT), (sure & (x > 0), UP), (sure & (x <= 0), DOWN)):
        ax.scatter(x[chosen], y[chosen], s=14, color=colour, linewidths=0)
    if sure.any() and not sure.all():
        ax.axhline(y[sure].min(), color=SOFT, linewidth=0.6, linestyle=":")
    ax.axvline(0, color=SOFT, linewidth=0.6)
    ax.margins(0.08)
    bare(ax, "log2 fold change" if folds else "change of the mean", "−log10 p")
    n = f"{int(sure.sum())} of {len(run.preprocessing.genes)} genes change (FDR ≤ {DETECTABLE_FDR})"
    finish(ax, False, f"{short(perturbation)}: {n}")
    _name(ax, x[sure][:LABELS], y[sure][:LABELS], [short(gene) for gene in shown(genes)[sure][:LABELS]])
    return finish(ax, show, f"{short(perturbation)}: {n}")


def _name(ax: Axes, x: np.ndarray, y: np.ndarray, names: list[str]) -> None:
    """Names beside points, away from the middle; a name that would lie upon another one is left out."""
    taken: list[BboxBase] = []
    for a, b, name in zip(x, y, names, strict=True):
        side = "left" if a > 0 else "right"
        label = ax.annotate(
            name, (a, b), (4 if a > 0 else -4, 0), textcoords="offset points", size=7, ha=side, va="center", color=INK, **TEXT
        )  # fmt: skip
        box = label.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            label.remove()
        else:
            taken.append(box)
