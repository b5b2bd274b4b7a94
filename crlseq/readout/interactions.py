"""What measured combinations do that their parts do not: ``interactions.csv``.

Of a combination the *term* is c - 1, c the coefficient of its effect D on the sum s of its parts' effects: 0 where effects
add up. Both halves of the parts' cells take turns as instrument and regressor, c = (s_1 . D) / (s_1 . s_2), so that the
sampling noise of single effects does not draw c to 0; its error is that of the means of cells along s. The classes are those
of Norman et al. 2019 (Science 365, "Exploring genetic interaction manifolds constructed from rich single-cell phenotypes"), who
tell interactions by the coefficients of both parts and by how alike their effects are:

additive     c does not differ from 1 (FDR 5 %), or could not be told from it;
synergistic  c is above 1;
redundant    c is below 1 and the effects are alike (cosine of at least `ALIKE`);
epistatic    c is below 1 and one part masks the other: the smaller coefficient is less than `MASKED` of the larger one;
buffering    c is below 1 otherwise.

Of a perturbation the term is the share of what its combinations do beyond the law that recurs from one of them to the next,
less what the error of its single effect makes; 0 where that has nothing to do with the perturbation. It is tested by exchanging
combinations at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.discovery.effects import benjamini_hochberg
from crlseq.run.columns import INTERACTION_COLUMNS
from crlseq.threads import counted
from crlseq.training.combinations import FittedLaw, Measured

MASKED, ALIKE, FDR = 1 / 3, 0.5, 0.05
MIN_CONTAINING = 3  # combinations of a perturbation that tell what recurs
N_EXCHANGES = 2000


def interaction_table(data: PerturbSeqData, fitted: FittedLaw, seed: int) -> pd.DataFrame:
    """`crlseq.run.columns.INTERACTION_COLUMNS`, a row a measured combination, then one a perturbation of enough of them."""
    rng = np.random.default_rng([seed, 14])
    rows = [*_combinations(data, fitted.measured, rng), *_perturbations(data, fitted, rng)]
    table = pd.DataFrame(rows, columns=[name for name in INTERACTION_COLUMNS if name not in ("fdr", "class")] + ["p"])
    for scope in ("combination", "perturbation"):
        own = table["scope"] == scope
        table.loc[own, "fdr"] = benjamini_hochberg(table.loc[own, "p"].to_numpy(dtype=float))
    table["class"] = [_class(row) for row in table.to_dict("records")]
    return table[list(INTERACTION_COLUMNS)]


def _class(row: Mapping[Any, Any]) -> str:
    if row["scope"] == "perturbation":
        return ""
    if not row["fdr"] <= FDR:
        return "additive"
    if row["term"] > 0:
        return "synergistic"
    if row["similarity"] >= ALIKE:  # of which either stands for the other
        return "redundant"
    return "epistatic" if row["masking"] < MASKED else "buffering"


def _combinations(data: PerturbSeqData, measured: Measured, rng: np.random.Generator) -> list[tuple[object, ...]]:
    cells = data.cells_by_condition(splits.TRAIN)
    place = {parts: c for c, parts in enumerate(data.conditions)}
    halves: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def half_means(c: int) -> tuple[np.ndarray, np.ndarray]:
        if c not in halves:
            order = rng.permutation(cells[c])
            first, second = np.array_split(order, 2)
            halves[c] = data.moments(np.sort(first))[0], data.moments(np.sort(second))[0]
        return halves[c]

    rows: list[tuple[object, ...]] = []
    for parts, single in counted(zip(measured.parts, measured.single, strict=True), len(measured.parts)):
        own = place[parts]
        of_parts = [place[k,] for k in parts]
        base = half_means(0)
        sums = [sum(half_means(c)[h] - base[h] for c in of_parts) for h in (0, 1)]
        overlap = float(sums[0] @ sums[1])
        direction = (sums[0] + sums[1]) / 2
        effect = data.moments(cells[own])[0] - data.moments(cells[0])[0]
        term = float(direction @ effect) / overlap - 1 if overlap > 0 else np.nan
        squared = _variance(data, cells[own], direction)
        squared += sum(_variance(data, cells[c], direction) for c in of_parts)
        squared += (len(parts) - 1) ** 2 * _variance(data, cells[0], direction)
        error = np.sqrt(squared) / overlap if overlap > 0 else np.nan
        size = np.linalg.norm(single, axis=1)
        coefficients = np.abs(np.linalg.lstsq(single.T, effect, rcond=None)[0])
        alike = (single @ single.T / np.maximum(np.outer(size, size), 1e-30))[np.triu_indices(len(size), 1)].min()
        p = float(torch.special.erfc(torch.tensor(abs(term) / error / 2**0.5))) if overlap > 0 else np.nan
        masking = float(coefficients.min() / max(coefficients.max(), 1e-30))
        name = data.condition_names[own]
        rows.append((name, "combination", len(cells[own]), term, error, float(alike), masking, p))
    return rows


def _variance(data: PerturbSeqData, cells: np.ndarray, direction: np.ndarray) -> float:
    """Squared standard error of the mean of cells along a direction: genes of one cell are not independent."""
    along = data.dense(cells) @ direction
    return float(along.var(ddof=1) / len(along))


def _perturbations(data: PerturbSeqData, fitted: FittedLaw, rng: np.random.Generator) -> list[tuple[object, ...]]:
    measured = fitted.measured
    rest = fitted.left - fitted.left.mean(0)
    gram = rest @ rest.T
    np.fill_diagonal(gram, np.maximum(np.diag(gram) - measured.noise.sum(1), 0.0))
    n = len(gram)
    exchanged = np.stack([rng.permutation(n) for _ in range(N_EXCHANGES)]) if n else np.zeros((0, 0), dtype=int)
    rows: list[tuple[object, ...]] = []
    for k in sorted({k for parts in measured.parts for k in parts}):
        own = np.flatnonzero([k in parts for parts in measured.parts])
        if len(own) < MIN_CONTAINING:
            continue
        # The error of the single effect recurs as well, and is no interaction.
        by_error = _error_that_recurs(fitted, k, own) / max(float(np.diag(gram)[own].mean()), 1e-30)
        term = _recurs(gram, own) - by_error
        without = np.array([_recurs(gram, np.delete(own, i)) for i in range(len(own))])
        error = float(np.sqrt((len(own) - 1) / len(own) * ((without - without.mean()) ** 2).sum()))
        chance = np.array([_recurs(gram, order[own]) for order in exchanged])
        p = (1 + (chance >= term).sum()) / (1 + len(chance))
        rows.append((data.perturbation_names[k], "perturbation", len(own), term, error, np.nan, np.nan, float(p)))
    return rows


def _error_that_recurs(fitted: FittedLaw, k: int, own: np.ndarray) -> float:
    """Mean summed square that the error of perturbation k's effect, times its coefficient, has in these combinations."""
    squares = []
    for i in own:
        place = fitted.measured.parts[i].index(k)
        c = float(fitted.law.coefficients(torch.from_numpy(fitted.measured.single[i]))[0][place])
        squares.append(c**2 * float(fitted.measured.unsure[i][place]))
    return float(np.mean(squares))


def _recurs(gram: np.ndarray, own: np.ndarray) -> float:
    """Mean product of two of these rows over their mean square."""
    block = gram[np.ix_(own, own)]
    squares = float(np.trace(block))
    m = len(own)
    return float((block.sum() - squares) / (m - 1) / squares) if squares > 0 and m > 1 else 0.0
