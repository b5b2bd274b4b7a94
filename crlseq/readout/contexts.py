"""``contexts.csv``: does a perturbation shift its program otherwise in another context?"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import norm

from crlseq.data import splits
from crlseq.data.contexts import gene_and_context
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.mean_effects import MIN_CELLS, by_batch, cells_alone, shares_of_controls
from crlseq.discovery.effects import benjamini_hochberg
from crlseq.run.columns import CONTEXT_COLUMNS
from crlseq.run.tables import program_names

# Share of a shift by which units of a program may differ between contexts: where genes are expressed otherwise, the same
# change of counts is another one of components. In a simulated screen slopes of equal shifts were 0.90 and 0.90 ± 0.03.
UNIT = 0.1


def context_table(data: PerturbSeqData, latents: np.ndarray, target: np.ndarray) -> pd.DataFrame:
    """`crlseq.run.columns.CONTEXT_COLUMNS` of perturbations that act on a program in some context, a row per two contexts, the
    surest difference first.

    A shift is the mean of ``latents`` (cells, p) over all cells of training and validation, hit or not, less that of
    controls of the same batches and context, in standard deviations of the program; ``target`` (K,) programs, -1 without
    a claim. The test is normal; the error of a difference joins those of the two shifts and `UNIT`. FDR: Benjamini-Hochberg over
    the rows.
    """
    cells = data.cells_by_condition(splits.TRAIN, splits.VALIDATION)
    controls = by_batch(data, cells[0], lambda own: (latents[own].mean(0), latents[own].var(0, ddof=1) / len(own)))
    number = {name: k for k, name in enumerate(data.perturbation_names)}
    own_cells = cells_alone(data, cells)
    rows, names = list[dict[str, object]](), program_names(latents.shape[1])
    for gene in dict.fromkeys(gene_and_context(name)[0] for name in data.perturbation_names):
        own = {context: number.get(f"{gene}@{context}", -1) for context in data.context_names}
        there = [context for context, k in own.items() if k in own_cells]
        programs = {int(target[own[context]]) for context in there} - {-1}
        for program in sorted(programs):  # one, where targets are tied
            shifts = {
                context: _shift(data, latents[:, program], own_cells[own[context]], program, controls)
                for context in there
            }
            for a, b in combinations(there, 2):
                (first, se), (second, other_se) = shifts[a], shifts[b]
                error = float(np.sqrt(se**2 + other_se**2 + (UNIT * min(abs(first), abs(second))) ** 2))
                rows.append({
                    "perturbation": gene, "program": names[program], "context": a, "other": b, "shift": first, "se": se,
                    "shift_other": second, "se_other": other_se, "difference": first - second, "difference_se": error,
                    "p_value": float(2 * norm.sf(abs(first - second) / error)) if error > 0 else np.nan,
                    "n_cells": len(own_cells[own[a]]), "n_cells_other": len(own_cells[own[b]]),
                })  # fmt: skip
    table = pd.DataFrame(rows, columns=[name for name in CONTEXT_COLUMNS if name != "fdr"])
    table.insert(list(CONTEXT_COLUMNS).index("fdr"), "fdr", benjamini_hochberg(table["p_value"].to_numpy(float)))
    return table.astype(CONTEXT_COLUMNS).sort_values(["p_value", "perturbation"], kind="stable", ignore_index=True)


def _shift(
    data: PerturbSeqData,
    latent: np.ndarray,
    own: np.ndarray,
    program: int,
    controls: dict[int, tuple[np.ndarray, np.ndarray]],
) -> tuple[float, float]:
    """Mean shift of cells and its standard error, of cells in batches with controls."""
    own = own[np.isin(data.batch[own], list(controls))]
    if len(own) < MIN_CELLS:
        return float("nan"), float("nan")
    mean, square = float(latent[own].mean()), float(latent[own].var(ddof=1)) / len(own)
    for batch, share in shares_of_controls(data.batch[own], controls).items():
        mean -= share * float(controls[batch][0][program])
        square += share**2 * float(controls[batch][1][program])
    return mean, float(np.sqrt(square))
