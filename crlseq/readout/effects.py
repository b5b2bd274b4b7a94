"""What each perturbation does to every gene: measured, with its error, and how much of it the tables of programs tell.

A change is the mean log expression of the perturbation's cells minus that of control cells of the same batches, over all
its cells, hit or not. Its program's part is ``penetrance * shift * total_effect``, which is in the same unit.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import t

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, sums_by_gene
from crlseq.data.mean_effects import by_batch, cells_alone, shares_of_controls
from crlseq.discovery.effects import benjamini_hochberg
from crlseq.readout.arms import Genome, arm_rows, arm_table
from crlseq.readout.programs import Interventions, Programs
from crlseq.run.schema import DETECTABLE_FDR
from crlseq.run.tables import significant
from crlseq.threads import in_parallel

JOINED = 200  # perturbations: rows of single ones, among much that is freed, keep several times their room
MOST_ROWS = 1_000_000  # of the table: of a larger screen it has those that are significant, and own transcripts
# Cells that the control cells' variance counts as beside the perturbation's own: a few cells that all lack a transcript
# do not vary, and are not certain. With 20, 0.05 and 0.001 are kept by groups of 2 to 100 control cells of four screens.
PRIOR_CELLS = 20
HALF_COUNT = 0.5  # added to sums of expression, so that no transcript is gone altogether


class Sums(NamedTuple):
    """Cells, and means and unbiased variances (2, G) of log expression and of expression."""

    n: int
    mean: np.ndarray
    variance: np.ndarray


class Effect(NamedTuple):
    """Of one perturbation, (G,) each: change of log expression, log2 fold change of mean expression, their errors, p-value."""

    change: np.ndarray
    se: np.ndarray
    log2_fold_change: np.ndarray
    log2_fold_change_se: np.ndarray
    p_value: np.ndarray


def effect_table(
    data: PerturbSeqData, programs: Programs, interventions: Interventions, penetrance: np.ndarray
) -> tuple[pd.DataFrame, dict[str, np.ndarray], pd.DataFrame | None]:
    """`crlseq.run.columns.EFFECT_COLUMNS` of single perturbations with at least two cells, the surest gene of each first;
    by perturbation (K,) what the table says of its own transcript: ``knock_down, knock_down_se``; and `ARM_COLUMNS` where
    positions of genes are known. ``penetrance`` (K,).

    Of training and validation cells. FDR: Benjamini-Hochberg over the genes of a perturbation. Fold changes of values that
    are no logarithms, and of own transcripts that are not fitted, are NaN.
    """
    cells = data.cells_by_condition(splits.TRAIN, splits.VALIDATION)
    controls = control_sums(data, cells[0])
    alone = cells_alone(data, cells)
    whole = len(alone) * data.n_genes <= MOST_ROWS
    n = len(data.perturbation_names)
    knock_down = {name: np.full(n, np.nan) for name in ("knock_down", "knock_down_se")}
    parts, few, genome, losses = [], [], Genome.of(data), list[dict[str, Any]]()

    def read(k: int) -> tuple[int, Effect, np.ndarray, pd.DataFrame]:
        found, target = measured_effect(data, alone[k], controls), interventions.target[k]
        told = np.full(data.n_genes, np.nan)
        if target >= 0:
            told = penetrance[k] * interventions.shift[k] * programs.total_effect[target]
        return k, found, told, _rows(data, k, found, told, whole)

    for k, found, told, rows in in_parallel(read, alone, torch.get_num_threads()):
        transcript = own_transcript(data, k, controls)
        if transcript is not None:
            knock_down["knock_down"][k] = found.log2_fold_change[transcript]
            knock_down["knock_down_se"][k] = found.log2_fold_change_se[transcript]
        few.append(rows)
        if len(few) == JOINED:
            parts.append(pd.concat(few, ignore_index=True))
            few.clear()
        if genome is not None:
            losses += arm_rows(data, genome, k, found.change, found.se, told)
    empty = _rows(data, 0, Effect(*np.full((5, 0), np.nan)), np.zeros(0), whole)
    parts = [*parts, *few] or [empty]
    return pd.concat(parts, ignore_index=True), knock_down, None if genome is None else arm_table(losses)


def _rows(data: PerturbSeqData, k: int, found: Effect, told: np.ndarray, whole: bool) -> pd.DataFrame:
    fdr = benjamini_hochberg(found.p_value)
    kept = np.full(len(fdr), whole) | (fdr <= DETECTABLE_FDR)
    if len(kept):
        kept[list(data.own_genes[k])] = True
    order = np.lexsort((-np.abs(found.change), found.p_value))
    order = order[kept[order]]
    genes = data.preprocessing.gene_names
    numbers = found._asdict() | {"fdr": fdr, "program_part": told, "residual": found.change - told}
    return pd.DataFrame({
        "perturbation": np.full(len(order), data.perturbation_names[k], dtype=object),
        "gene": np.asarray(genes.index, dtype=object)[order],
        **({} if genes.symbol_column is None else {"symbol": genes.symbols[order]}),
        **{name: significant(values[order]) for name, values in numbers.items()},
    })  # fmt: skip


def control_sums(data: PerturbSeqData, controls: np.ndarray) -> dict[int, Sums]:
    """Of the controls of each batch, and of all of them under -1."""
    return by_batch(data, controls, partial(_sums, data))


def measured_effect(data: PerturbSeqData, cells: np.ndarray, controls: dict[int, Sums]) -> Effect:
    """What cells do that controls of the same batches do not: Welch's t with a variance that `PRIOR_CELLS` moderate."""
    own = _sums(data, cells)
    mean, error, squares = np.zeros((3, 2, data.n_genes))  # of controls, of their mean, and its square by their numbers
    variance = np.zeros((2, data.n_genes))
    n_controls = 0.0
    for batch, share in shares_of_controls(data.batch[cells], controls).items():
        them = controls[batch]
        mean += share * them.mean
        variance += share * them.variance
        error += share**2 * them.variance / them.n
        squares += (share**2 * them.variance / them.n) ** 2 / max(them.n - 1, 1)
        n_controls += share * them.n
    freedom = PRIOR_CELLS + own.n - 1
    of_cells = (PRIOR_CELLS * variance + (own.n - 1) * own.variance) / freedom / own.n
    total = of_cells + error
    if data.adjustment is not None:
        total[0] += data.adjustment.variance(cells) * controls[-1].variance[0]
    se = np.sqrt(total[0])
    change = own.mean[0] - mean[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic, degrees = change / se, total[0] ** 2 / (of_cells[0] ** 2 / freedom + squares[0])
        p_value = np.where(se > 0, 2 * t.sf(np.abs(statistic), degrees), np.nan)
    own_level, level = own.mean[1] + HALF_COUNT / own.n, mean[1] + HALF_COUNT / max(n_controls, 1.0)
    relative = of_cells[1] / own_level**2 + error[1] / level**2
    fold = np.log2(own_level / level) if data.preprocessing.values != "continuous" else np.full(data.n_genes, np.nan)
    return Effect(change, se, fold, np.where(np.isnan(fold), np.nan, np.sqrt(relative) / np.log(2)), p_value)


def own_transcript(data: PerturbSeqData, perturbation: int, controls: dict[int, Sums]) -> int | None:
    """Place of the perturbed gene, of several the most expressed one; None if it is not fitted."""
    genes = data.own_genes[perturbation]
    return max(genes, key=lambda gene: controls[-1].mean[1][gene]) if genes else None


def _sums(data: PerturbSeqData, cells: np.ndarray) -> Sums:
    """In float64, block by block; where values are no logarithms, they stand for expression as well."""
    sums = np.zeros((4, data.n_genes))  # of logarithms, their squares, expression, its squares
    for _, x in data.blocks(cells):
        for place, transform in enumerate(
            (np.asarray, np.asarray if data.preprocessing.values == "continuous" else np.expm1)
        ):
            if isinstance(x, np.ndarray):
                values = transform(x.astype(np.float64))
                sums[2 * place : 2 * place + 2] += values.sum(0), (values**2).sum(0)
            else:  # zeros stay zeros
                values = transform(x.data.astype(np.float64))
                sums[2 * place] += sums_by_gene(x, values)
                sums[2 * place + 1] += sums_by_gene(x, values**2)
    mean, square = sums[::2] / len(cells), sums[1::2] / len(cells)
    variance = np.maximum(square - mean**2, 0.0) * len(cells) / max(len(cells) - 1, 1)
    if data.adjustment is not None:
        mean[0] -= data.adjustment.mean(cells) @ data.covariate_slopes
    return Sums(len(cells), mean, variance)
