"""Shifts of every perturbation in two contexts of a run, with their errors: the figure of docs/contexts.md.

python scripts/contexts_figure.py RUN --output docs/figures/contexts.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

import crlseq


def main() -> None:
    """Draw the first two contexts that ``contexts.csv`` compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    table = crlseq.load(given.run).contexts
    if table is None or table.empty:
        raise SystemExit(f"{given.run} compares no contexts: fit with --context-key.")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    first = table.iloc[0]
    table = table[(table["context"] == first["context"]) & (table["other"] == first["other"])]
    differs = table["fdr"] <= 0.05
    figure, ax = plt.subplots(figsize=(4.2, 4.0), layout="constrained")
    ends = 1.1 * table[["shift", "shift_other"]].abs().to_numpy().max()
    ax.plot([-ends, ends], [-ends, ends], color="0.7", linewidth=1, zorder=0)
    for own, face, label in (
        (table[~differs], "white", "no difference seen"),
        (table[differs], "C3", "differs (FDR 5 %)"),
    ):
        ax.errorbar(
            own["shift"], own["shift_other"], xerr=own["se"], yerr=own["se_other"], fmt="o", markersize=5,
            markerfacecolor=face, markeredgecolor="C3" if face == "C3" else "0.3", ecolor="0.7", label=label,
        )  # fmt: skip
    ax.set_xlabel(f"shift in {first['context']} (SD of the program)")
    ax.set_ylabel(f"shift in {first['other']} (SD of the program)")
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(given.output, dpi=150)


if __name__ == "__main__":
    main()
