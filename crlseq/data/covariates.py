"""Columns of cells beside the labels: batches, contexts and outcomes, by their names and by what the cells say.

- A *batch* is when and where cells were handled (lane, plate, replicate, donor): effects are differences within it.
- A *context* is what cells are or were given before (cell line, stimulation, time): effects may differ between them.
- An *outcome* is computed from expression (cluster, phase): a perturbation can change it, so it is no batch.

Of every column with few levels, and of every number, it is tested whether it goes along with the expression of control cells
(F tests of principal components), and whether it is tied to the labels (chi-square; Kruskal-Wallis of numbers). Columns that are
functions of the labels, or of which the labels are a function (guides), are the labels over again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import scipy.linalg
import scipy.sparse as sp
from scipy import stats

from crlseq.data.matrix import Screen
from crlseq.data.perturbations import Perturbations
from crlseq.data.values import Values
from crlseq.errors import few

BATCH, CONTEXT, OUTCOME, UNKNOWN = "batch", "context", "outcome", "unknown"
WORDS = {
    OUTCOME: (
        "cluster", "leiden", "louvain", "phase", "mixscape", "predicted", "prediction", "celltypist", "majority voting",
        "annotation", "doublet", "state", "pseudotime", "subtype", "snn", "cell cycle", "score", "mt", "mito", "mitochondrial",
        "ribo", "ribosomal",
    ),
    CONTEXT: (
        "cell line", "cellline", "cell type", "celltype", "line", "stimulation", "stimulus", "stim", "treatment", "time",
        "timepoint", "hour", "day", "dose", "tissue", "organism", "species", "sex", "medium", "media", "stage", "cytokine",
    ),
    BATCH: (
        "batch", "rep", "replicate", "biorep", "donor", "lane", "gem", "gemgroup", "plate", "sample", "library", "lib", "channel",
        "pool", "run", "well", "experiment", "dataset", "orig ident", "hto", "hashtag", "flowcell", "chip", "patient", "individual",
        "subject", "mouse", "animal", "embryo", "session", "site", "seq", "prep", "capture",
    ),
}  # fmt: skip
MAX_LEVELS, MAX_NUMBERS, MAX_NAMED = 100, 20, 1000  # of a column; of whole numbers; of one that is named like a batch
N_CONTROLS, N_GENES, N_COMPONENTS = 1000, 1000, 20  # that are looked at
N_RANKED = 20_000  # cells whose numbers are compared between labels
DEPTH = "log-depth"  # the logarithm of a cell's counts, a covariate that is no column
SMALLEST_LEVEL = 3  # control cells of a level that is compared
CERTAIN = 1e-3  # p-value below which a column differs in expression, or is tied to labels, beyond chance


@dataclass(frozen=True)
class Covariate:
    """A column of cells with few levels or with numbers (0 levels), and what was tested on it; shares and p-values are NaN where
    nothing could be.
    """

    column: str
    role: str  # by its name
    levels: int
    smallest: int  # cells of the smallest level
    explained: float  # share of the variance of control cells
    by_chance: float  # the share that as many levels explain on average if they differ in nothing
    p_expression: float
    p_labels: float  # of being tied to the labels

    @property
    def matters(self) -> bool:
        """Whether it goes along with the expression of control cells."""
        return self.p_expression < CERTAIN

    @property
    def looks_like_batch(self) -> bool:
        """By its name; or, where the name says nothing, by expression, unless labels go with it as with an outcome."""
        of_cells = self.role == UNKNOWN and self.matters and not self.p_labels < CERTAIN
        return self.levels > 0 and (self.role == BATCH or of_cells)

    @property
    def confounds(self) -> bool:
        """Whether cells of different labels differ in it, and by it in expression, though no perturbation made it."""
        return self.role not in (OUTCOME, CONTEXT) and self.matters and self.p_labels < CERTAIN

    def in_words(self) -> str:
        """``lane (2 levels; 3.1 % of the controls' variance, 0.4 % by chance)``."""
        levels = f"{self.levels} levels" if self.levels else "numbers"
        if np.isnan(self.explained):
            return f"{self.column} ({levels}; not testable on the control cells)"
        share = f"{100 * self.explained:.1f} % of the controls' variance, {100 * self.by_chance:.1f} % by chance"
        return f"{self.column} ({levels}; {share})"


def role_of(name: str) -> str:
    """What a column is by the words of its name."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(name))
    words = [re.sub(r"^\d+x?|\d+$", "", word.casefold()) for word in re.split(r"[^A-Za-z0-9]+", apart)]
    words += [word.removesuffix("s") for word in words] + [f"{a} {b}" for a, b in pairwise(words)]
    return next((role for role, known in WORDS.items() if any(word in known for word in words)), UNKNOWN)


def covariates(screen: Screen, labels: Perturbations, values: Values, totals: np.ndarray) -> list[Covariate]:
    """Columns with few levels or numbers that are not the labels over again, and `DEPTH`; `totals` (cells,) of all values."""
    used = np.flatnonzero(labels.condition >= 0)
    condition = labels.condition[used]
    found = [
        (str(key), codes)
        for key in screen.obs.columns
        if (codes := _levels(screen.obs[key], str(key), used)) is not None
    ]
    known = {labels.key, None if labels.contexts is None else labels.contexts.key}
    found = [(key, codes) for key, codes in found if key not in known and not same(codes, condition)]
    numbers = [
        (str(key), number)
        for key in screen.obs.columns
        if str(key) not in {*known, *dict(found)} and (number := _numbers(screen.obs[key], used)) is not None
    ]
    if values.kind == "counts" and DEPTH not in screen.obs and np.ptp(totals[used]) > 0:
        numbers.append((DEPTH, np.log(np.maximum(totals[used], 1.0))))
    if not found and not numbers:
        return []
    some, rows = screen.sample(used[condition == 0], N_CONTROLS)
    scores = _scores(rows, values, totals[some])
    place = np.searchsorted(used, some)
    return [
        Covariate(
            key, role_of(key), int(codes.max() + 1), int(np.bincount(codes[codes >= 0]).min()),
            *_explained(scores, codes[place]), _tied(codes, condition),
        )
        for key, codes in found
    ] + [
        Covariate(key, role_of(key), 0, 0, *_explained_by_number(scores, number[place]), _ranked(number, condition))
        for key, number in numbers
    ]  # fmt: skip


def _levels(column: pd.Series, key: str, used: np.ndarray) -> np.ndarray | None:
    """(used,) the level of each cell, -1 where it is missing; None if the column has one level, many, or no levels."""
    numbers = pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype)
    part = column.iloc[used]
    if numbers and not np.array_equal(part.dropna(), np.rint(part.dropna().astype(float))):
        return None
    codes, names = pd.factorize(part.astype(object), sort=False)
    most = MAX_NAMED if role_of(key) == BATCH else MAX_NUMBERS if numbers else MAX_LEVELS
    return np.asarray(codes) if 2 <= len(names) <= min(most, len(used) // 2) else None


def _numbers(column: pd.Series, used: np.ndarray) -> np.ndarray | None:
    """(used,) numbers; None if the column has others, some are missing or infinite, or all are the same."""
    if not pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_bool_dtype(column.dtype):
        return None
    part = column.iloc[used]
    if part.isna().any():
        return None
    values = part.to_numpy(float)
    return values if np.isfinite(values).all() and np.ptp(values) > 0 else None


def same(codes: np.ndarray, condition: np.ndarray) -> bool:
    """Whether the perturbed cells' levels are a function of the labels, or the labels of the levels."""
    known = codes >= 0
    pairs = np.unique(np.stack([codes[known], condition[known]]), axis=1)
    by_label = len(np.unique(pairs[1])) == pairs.shape[1]
    by_level = len(np.unique(pairs[0])) == pairs.shape[1]
    return bool(by_label or by_level)


def _scores(rows: sp.csr_matrix, values: Values, totals: np.ndarray) -> np.ndarray:
    """(cells, N_COMPONENTS) principal components of log-normalised cells, by their most variable genes."""
    if values.kind == "counts":
        rows = sp.csr_matrix(sp.diags_array(np.median(totals) / np.maximum(totals, 1e-300)) @ rows).log1p()
    square = np.asarray(rows.multiply(rows).mean(0)).ravel()
    variance = square - np.asarray(rows.mean(0)).ravel() ** 2
    x = rows[:, np.sort(np.argsort(-variance, kind="stable")[:N_GENES])].toarray()
    x = x - x.mean(0)
    squares, axes = scipy.linalg.eigh(x @ x.T, subset_by_index=[max(0, len(x) - N_COMPONENTS), len(x) - 1])
    return np.asarray(axes * np.sqrt(np.maximum(squares, 0)))


def _explained(scores: np.ndarray, codes: np.ndarray) -> tuple[float, float, float]:
    """Share of the variance of `scores` between levels, that by chance, and the smallest p-value times their number."""
    size = np.bincount(codes[codes >= 0], minlength=1)
    kept = (codes >= 0) & (size[np.maximum(codes, 0)] >= SMALLEST_LEVEL)
    levels, codes = np.unique(codes[kept], return_inverse=True)
    n, k = int(kept.sum()), len(levels)
    if k < 2 or n <= k:
        return (float("nan"),) * 3
    x = scores[kept] - scores[kept].mean(0)
    member = sp.csr_matrix((np.ones(n), (codes, np.arange(n))), (k, n))
    between = ((member @ x) ** 2 / np.bincount(codes)[:, None]).sum(0)
    total = (x**2).sum(0)
    within = np.maximum(total - between, 1e-12 * np.maximum(total, 1e-300))
    p = stats.f.sf(between / (k - 1) / (within / (n - k)), k - 1, n - k)
    return float(between.sum() / max(total.sum(), 1e-300)), (k - 1) / (n - 1), float(min(1.0, p.min() * x.shape[1]))


def _explained_by_number(scores: np.ndarray, number: np.ndarray) -> tuple[float, float, float]:
    """`_explained` of a straight line."""
    n = len(scores)
    x, z = scores - scores.mean(0), number - number.mean()
    square = float(z @ z)
    if n < 3 or square <= 1e-18 * float(number @ number):
        return (float("nan"),) * 3
    line, total = (z @ x) ** 2 / square, (x**2).sum(0)
    left = np.maximum(total - line, 1e-12 * np.maximum(total, 1e-300))
    p = stats.f.sf(line / (left / (n - 2)), 1, n - 2)
    return float(line.sum() / max(total.sum(), 1e-300)), 1 / (n - 1), float(min(1.0, p.min() * x.shape[1]))


def _ranked(number: np.ndarray, condition: np.ndarray) -> float:
    """p-value of a Kruskal-Wallis test of numbers between labels."""
    some = np.linspace(0, len(number) - 1, min(N_RANKED, len(number))).astype(int)
    number, condition = number[some], condition[some]
    groups = [number[condition == c] for c in np.unique(condition)]
    varied = len(groups) > 1 and np.ptp(number) > 0
    return float(stats.kruskal(*groups).pvalue) if varied else float("nan")


def _tied(codes: np.ndarray, condition: np.ndarray) -> float:
    """p-value of a chi-square test of levels and labels."""
    known = codes >= 0
    table = pd.crosstab(codes[known], condition[known]).to_numpy()
    return float(stats.chi2_contingency(table).pvalue) if min(table.shape) > 1 else float("nan")


def in_words(found: Sequence[Covariate], batch_key: str | None, asked: Collection[str] = ()) -> list[str]:
    """What a fit says of these columns: batches and covariates that are left alone, contexts that are pooled, an outcome for a
    batch; ``asked`` are the covariates that are taken off.
    """
    batches = [each for each in found if each.looks_like_batch and each.column not in asked]
    contexts = [each for each in found if each.role == CONTEXT and each.matters]
    left = sorted((each for each in found if each.confounds), key=lambda each: -each.explained)
    shown = batches if batch_key is None else []
    left = [each for each in left if each not in shown and each.column not in (batch_key, *asked)]
    notes = []
    if batches and batch_key is None:
        notes.append(
            f"No --batch-key was given. Columns that may be batches: {few([each.in_words() for each in batches], 4)}. "
            "Without it, differences between batches count as effects or as noise."
        )
    if left:
        notes.append(
            f"Cells of different perturbations differ in {few([each.in_words() for each in left], 4)}. Such a difference counts "
            f"as an effect, unless it is taken off: --covariates {left[0].column}."
        )
    if any(each.column == batch_key and each.role == OUTCOME for each in found):
        notes.append(
            f"The batch column {batch_key!r} is named like a result of expression, which perturbations change: differences "
            "within its levels hide their effects."
        )
    if contexts:
        notes.append(
            f"Cells of different contexts are fitted together: {few([each.in_words() for each in contexts], 4)}. "
            "Perturbations may act differently in each; --context-key COLUMN tells whether they do."
        )
    return notes
