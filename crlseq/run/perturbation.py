"""One perturbation in words and numbers, from the tables of a run."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import norm

from crlseq.errors import not_there
from crlseq.run.arms import losses_in_words
from crlseq.run.covariates import changes_in_words
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR

POWER = 0.8


def row_of(run: Run, name: str) -> pd.Series:
    """The row of ``interventions.csv`` of a perturbation; InputError, with the nearest names, if there is none."""
    rows = run.interventions[run.interventions["perturbation"] == name]
    if rows.empty:
        raise not_there("perturbation", name, list(run.interventions["perturbation"]))
    return rows.iloc[0]


def genes_of(run: Run, name: str) -> pd.DataFrame:
    """Rows of ``effects.csv`` of a perturbation, the surest first; InputError if there is no such perturbation."""
    row_of(run, name)  # refuses what is not there
    return run.effects[run.effects["perturbation"] == name].drop(columns="perturbation").reset_index(drop=True)


def perturbation_in_words(run: Run, name: str) -> list[str]:
    """What is known of a perturbation, a sentence each; InputError if there is none of that name."""
    row, genes = row_of(run, name), genes_of(run, name)
    if np.isnan(row["fdr"]):
        tested = "it was not tested: too few cells, or no control cells in their batches"
    else:
        seen = "an effect is detectable" if row["fdr"] <= DETECTABLE_FDR else "no effect is detectable"
        tested = f"{seen} (FDR {row['fdr']:.2g})"
    lines = [f"{name} has {row['n_cells']} cells; {tested}."]
    if not np.isnan(row.get("knock_down", np.nan)):
        share, change, error = 2.0 ** row["knock_down"], row["knock_down"], row["knock_down_se"]
        lines.append(
            f"Its own transcript is {share:.0%} of that in controls (log2 fold change {change:+.2f} ± {error:.2f})."
        )
    if row["program"]:
        lines += _of_its_program(run, row)
    if run.second_targets is not None:
        second = run.second_targets[run.second_targets["perturbation"] == name]
        lines += [
            f"It also shifts {other['program']} by {other['shift']:+.2f} ± {other['se']:.2f} SD (FDR {other['fdr']:.2g})."
            for other in second.to_dict("records")
        ]
    arms = None if run.arms is None else run.arms[run.arms["perturbation"] == name]
    return [*lines, *changes_in_words(run.covariates, name), *losses_in_words(arms), *_of_genes(run, genes)]


def _of_its_program(run: Run, row: pd.Series) -> list[str]:
    error = "" if np.isnan(row.get("shift_se", np.nan)) else f" ± {row['shift_se']:.2f}"
    words = f"It moves {row['program']} ({run.described[row['program']].title}) by {row['shift']:+.2f}{error} SD"
    share = row.get("penetrance", np.nan)
    if not np.isnan(share) and share < 1:
        words += f" in the {share:.0%} of its cells that it hits"
    lines = [f"{words}."]
    if not np.isnan(row["support"]):
        guess = ", so that this program is a guess" if row["support"] < 0.5 else ""
        lines.append(f"{row['support']:.0%} of the resamplings give it this program{guess}.")
    if not np.isnan(row.get("explained", np.nan)):
        lines.append(f"The program tells {max(row['explained'], 0.0):.0%} of its measured effect.")
    if row.get("disagrees", 0.0) == 1:
        lines.append(f"Its cells contradict the other perturbations of {row['program']}.")
    return lines


def _of_genes(run: Run, genes: pd.DataFrame) -> list[str]:
    """How many genes change, and which change would have been seen."""
    if genes.empty:
        return ["No effect on single genes was measured: it has fewer than two cells of its own."]
    changed, n = genes["fdr"] <= DETECTABLE_FDR, len(run.preprocessing.genes)
    lines = [f"{int(changed.sum())} of {n} genes change (FDR ≤ {DETECTABLE_FDR})."]
    if len(genes) == n:
        threshold = max(float(genes.loc[changed, "p_value"].max()) if changed.any() else 0.0, DETECTABLE_FDR / n)
        seen = (norm.isf(threshold / 2) + norm.ppf(POWER)) * float(genes["se"].median())
        lines.append(
            f"In half of the genes, a change of log expression by {seen:.2g} would have been seen with a probability of {POWER}."
        )
    return lines
