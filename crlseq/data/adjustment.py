"""What covariates do to cells, taken off: one owner for tests, components, means of genes and partners in training.

With z (cells, d) the covariates as deviations from the controls of a cell's batch, in standard deviations of controls, a level of
a category being a 0/1 number, and y (cells, q) scores or genes,

    y' = y - (z - k_c) B,      B = (Z' Z)^- Z' Y  over training controls, within batches (least squares of smallest norm).

Controls alone tell B: in perturbed cells a covariate goes along with having been hit. There is no ridge: columns are few beside
controls (`crlseq.data.covariate_columns`). What was there before a perturbation (donor, lane, depth) is taken off wholly, k = 0,
everywhere. What a perturbation can change, such as a phase of the cell cycle, stays in the cells, so that an arrest is an effect
like any other; from the scores that effects are tested on its variation is taken off as noise, k_c being the mean z of cells of a
perturbation c that changes it (FDR 5 %), else 0.

Tests compare within strata of the combination of covariates taken off wholly that tells the perturbed cells from controls best
(Cochran 1968, Biometrics 24): the error of B, what is not linear, and variances that differ are then alike on both sides of a
permutation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from crlseq.data import splits
from crlseq.data.covariate_columns import Column

FDR = 0.05
N_STRATA, CELLS_PER_STRATUM = 10, 5  # at most, and perturbed cells of each
MIN_CONTROLS = 2  # of a batch, to centre it on its own
ROWS = 65_536  # cells at a time

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Adjustment:
    """The covariates of a screen, in d columns: one of a number, one a level of a category."""

    columns: tuple[Column, ...]
    owner: np.ndarray  # (d,) the place of each column's covariate
    levels: tuple[str, ...]  # (d,) empty of numbers
    wholly: np.ndarray  # (d,) bool: taken off wholly
    z: NDArray[np.float32]  # (cells, d)
    condition: np.ndarray  # (cells,) -1 of cells that take no part
    kept: Floats  # (conditions, d): k
    precision: Floats  # (d, d): (Z' Z)^- over training controls
    changes: pd.DataFrame  # what conditions do to covariates: `condition`, `column` of the d, and `_changes`
    batch: np.ndarray  # (cells,)
    controls: np.ndarray  # training controls

    @classmethod
    def of(
        cls,
        columns: tuple[Column, ...],
        wholly: bool,
        condition: np.ndarray,
        n_conditions: int,
        split: np.ndarray,
        batch: np.ndarray,
    ) -> Adjustment:
        """From what was read; ``wholly``: what perturbations do to covariates is taken off as well."""
        owner, levels, raw = _raw(columns)
        controls = np.flatnonzero((condition == 0) & (split == splits.TRAIN))
        z, scale = _deviations(raw, controls, batch)
        used = np.flatnonzero((condition >= 0) & np.isin(split, (splits.TRAIN, splits.VALIDATION)))
        is_level = np.array([level != "" for level in levels])
        changes = _changes(raw[used], condition[used], batch[used], is_level)
        changes["covariate"] = owner[changes["column"]]
        changes["fdr"] = _fdr(changes)
        all_of = np.array([wholly or not columns[place].outcome for place in owner])
        kept = np.zeros((n_conditions, len(owner)))
        surely = changes[(changes["fdr"] <= FDR) & ~all_of[changes["column"]]]
        for c, place in surely[["condition", "covariate"]].drop_duplicates().itertuples(index=False):
            own = used[condition[used] == c]
            kept[c] = np.where(owner == place, z[own].mean(0, dtype=np.float64), kept[c])
        changes["difference"] /= np.where(is_level, 1.0, scale)[changes["column"]]
        changes["se"] /= np.where(is_level, 1.0, scale)[changes["column"]]
        centred = _within(z[controls] * all_of, batch[controls])
        precision = np.asarray(np.linalg.pinv(centred.T @ centred, rcond=1e-9, hermitian=True), dtype=np.float64)
        return cls(columns, owner, levels, all_of, z, condition, kept, precision, changes, batch, controls)

    def slopes(self, cells: np.ndarray, blocks: Iterable[tuple[slice, Any]], every: bool = False) -> Floats:
        """B (d, q) from these training controls and blocks of their values, with places among them; 0 of columns that are not
        taken off wholly, unless ``every`` counts.
        """
        z = _within(self.z[cells] * (self.wholly | every), self.batch[cells])
        cross = sum((values.T @ z[rows] for rows, values in blocks), 0.0)
        return np.asarray(np.linalg.pinv(z.T @ z, rcond=1e-9, hermitian=True) @ np.asarray(cross).T)

    def for_tests(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores (cells of the screen, q) without what covariates do, but for what perturbations change."""
        slopes = self.slopes(self.controls, [(slice(None), scores[self.controls].astype(np.float64))], every=True)
        kept = np.concatenate([self.kept, np.zeros((1, self.kept.shape[1]))])  # the last row serves condition -1
        adjusted = np.empty_like(scores)
        for start in range(0, len(scores), ROWS):
            own = slice(start, start + ROWS)
            adjusted[own] = scores[own] - (self.z[own] - kept[self.condition[own]]) @ slopes
        return adjusted

    def mean(self, cells: np.ndarray) -> Floats:
        """(d,) mean of what is taken off wholly, over cells."""
        return np.asarray(self.z[cells].mean(0, dtype=np.float64) * self.wholly)

    def take_off(self, scores: NDArray[np.float32], cells: np.ndarray) -> None:
        """Take what goes wholly off the scores (cells of the screen, q) of these cells in place, and leave measurement noise.

        A covariate that is computed from expression, such as a score of the cell cycle, takes the noise of its genes along. Where
        z explains a share rho of the canonical variate w'y of controls (of variance 1; Hotelling 1936), more than leaves
        n = |w|^2 times the least variance of y, a share g of it stays, g^2 rho = n - (1 - rho), in the cells' deviations from the
        mean of their condition; means are adjusted wholly.
        """
        y = _within(scores[self.controls].astype(np.float64), self.batch[self.controls])
        slopes = self.slopes(self.controls, [(slice(None), y)])
        gone = _within(self.z[self.controls] * self.wholly, self.batch[self.controls]) @ slopes
        value, axes = np.linalg.eigh(y.T @ y / len(y))
        value = np.maximum(value, 1e-12 * max(float(value[-1]), 1e-300))
        white = (gone @ axes) / np.sqrt(value)
        rho, turn = np.linalg.eigh(white.T @ white / len(y))
        noise = value[0] * (turn**2 / value[:, None]).sum(0)
        share = np.sqrt(np.clip((noise - (1 - rho)) / np.maximum(rho, 1e-9), 0.0, 1.0)) * (rho > 1e-9)
        left = slopes @ (axes / np.sqrt(value) @ turn * share) @ turn.T @ (axes * np.sqrt(value)).T
        mean = self._means()
        for start in range(0, len(cells), ROWS):
            own = cells[start : start + ROWS]
            scores[own] -= self.z[own] @ slopes - (self.z[own] - mean[self.condition[own]]) @ left

    def _means(self) -> Floats:
        """(conditions + 1, d) mean z of each; the last row, 0, serves condition -1."""
        number = np.where(self.condition < 0, len(self.kept), self.condition)
        counts = np.maximum(np.bincount(number, minlength=len(self.kept) + 1), 1)
        means = np.stack([np.bincount(number, column, len(counts)) / counts for column in self.z.T], axis=1)
        means[-1] = 0.0
        return np.asarray(means)

    def variance(self, cells: np.ndarray) -> float:
        """Squared error of what is taken off the mean of cells, over the variance of controls: v' (Z' Z)^- v."""
        mean = self.mean(cells)
        return float(mean @ self.precision @ mean)

    def strata(self, cells: np.ndarray, is_perturbed: np.ndarray) -> np.ndarray:
        """(n,) strata of cells of both sets: batches, divided by the discriminant of what is taken off wholly (Fisher 1936)."""
        batch, z = self.batch[cells], self.z[cells][:, self.wholly].astype(np.float64)
        if not z.shape[1]:
            return np.asarray(batch)
        one, other = z[is_perturbed], z[~is_perturbed]
        spread = (len(one) * np.cov(one.T, bias=True) + len(other) * np.cov(other.T, bias=True)).reshape(
            2 * z.shape[1:]
        )
        direction = np.linalg.pinv(spread, rcond=1e-9, hermitian=True) @ (one.mean(0) - other.mean(0))
        score = z @ direction
        return np.asarray(batch * N_STRATA + _bins(score, score[is_perturbed], len(one) // CELLS_PER_STRATUM))

    def groups(self, slopes: Floats) -> np.ndarray:
        """(cells,) batches, divided by what covariates do to expression, along its leading direction in controls.

        ``slopes`` (d, G). Each group has controls, if its batch has: the score is that of Hansen 2008, Biometrika 95.
        """
        root = np.linalg.cholesky(
            np.cov(self.z[self.controls].T.astype(np.float64)).reshape(2 * (len(self.owner),))
            + 1e-9 * np.eye(len(self.owner))
        )
        leading = np.linalg.svd(root.T @ slopes, full_matrices=False)[2][0]
        score, group = self.z @ (slopes @ leading), np.zeros(len(self.z), dtype=np.int64)
        for b in np.unique(self.batch[self.controls]):
            own = np.flatnonzero(self.batch == b)
            group[own] = _bins(score[own], score[self.controls[self.batch[self.controls] == b]])
        return np.asarray(self.batch * N_STRATA + group)


def _raw(columns: tuple[Column, ...]) -> tuple[np.ndarray, tuple[str, ...], Floats]:
    """The covariate and the level of each of d columns, and their values (cells, d)."""
    owner, levels, values = list[int](), list[str](), list[np.ndarray]()
    for place, column in enumerate(columns):
        for code, level in enumerate(column.levels or ("",)):
            owner.append(place)
            levels.append(level)
            values.append(column.values == code if column.levels else np.nan_to_num(column.values))
    return np.array(owner), tuple(levels), np.stack(values, axis=1).astype(np.float64)


def _deviations(raw: Floats, controls: np.ndarray, batch: np.ndarray) -> tuple[NDArray[np.float32], Floats]:
    """z (cells, d), and the standard deviations (d,) of controls within batches, 1 where they do not vary."""
    scale = np.sqrt((_within(raw[controls], batch[controls]) ** 2).mean(0))
    scale = np.where(scale > 1e-12 * np.maximum(np.abs(raw[controls]).max(0), 1e-300), scale, np.inf)
    z = np.empty(raw.shape, dtype=np.float32)
    overall = raw[controls].mean(0)
    for b in np.unique(batch):
        own = controls[batch[controls] == b]
        center = raw[own].mean(0) if len(own) >= MIN_CONTROLS else overall
        cells = batch == b
        z[cells] = (raw[cells] - center) / scale
    return z, np.where(np.isfinite(scale), scale, 1.0)


def _within(values: Floats, batch: np.ndarray) -> Floats:
    """Values (n, d) less the means of their batches."""
    number = np.unique(batch, return_inverse=True)[1]
    counts = np.bincount(number)
    means = np.stack([np.bincount(number, column) / counts for column in values.T], axis=1)
    return values - means[number]


def _bins(score: Floats, reference: Floats, most: int = N_STRATA) -> np.ndarray:
    """The value of each score where there are few, else which of equal parts of ``reference`` it falls into, at most so many."""
    most = min(max(most, 2), N_STRATA)
    values = np.unique(np.round(reference, 9))
    if len(values) <= N_STRATA:
        edges = (values[1:] + values[:-1]) / 2
    else:
        edges = np.unique(np.quantile(reference, np.arange(1, most) / most))
    return np.searchsorted(edges, score, side="right")


def _changes(raw: Floats, condition: np.ndarray, batch: np.ndarray, is_level: np.ndarray) -> pd.DataFrame:
    """``condition, column, n_cells, mean, control, difference, se, p_value``: each condition against controls of its batches."""
    batch = np.unique(batch, return_inverse=True)[1]
    shape = int(condition.max()) + 1, int(batch.max()) + 1
    n = _sums(np.ones(len(raw)), condition, batch, shape)
    own, m = np.where(n[0] > 0, n[1:], 0.0), n[0]  # of batches without controls nothing is told
    total, there = own.sum(1), own > 0
    share = own / np.maximum(total, 1.0)[:, None]
    rows = []
    for j, column in enumerate(raw.T):
        center = column.mean()
        s, squares = (_sums((column - center) ** k, condition, batch, shape) for k in (1, 2))
        at_controls, of_own = s[0] / np.maximum(m, 1.0), np.where(there, s[1:], 0.0)
        mean, control = of_own.sum(1) / np.maximum(total, 1.0), (share * at_controls).sum(1)
        spread = (np.where(there, squares[1:], 0.0) - of_own**2 / np.maximum(own, 1.0)).clip(0).sum(1)
        of_controls = (squares[0] - m * at_controls**2).clip(0) / np.maximum((m - 1) * m, 1.0)
        variance = spread / np.maximum((total - there.sum(1)) * total, 1.0) + (share**2 * of_controls).sum(1)
        tested = column if is_level[j] else pd.Series(column).groupby(batch).rank(pct=True).to_numpy(np.float64)
        told = {"mean": mean + center, "control": control + center}
        rows.append(pd.DataFrame({
            "condition": np.arange(1, shape[0]), "column": j, "n_cells": total.astype(np.int64),
            **{name: np.clip(value, 0.0, 1.0) if is_level[j] else value for name, value in told.items()},
            "difference": mean - control, "se": np.sqrt(variance),
            "p_value": _permutation_p(tested, condition, batch, own, m, 0.5 * is_level[j]),
        })[total > 0])  # fmt: skip
    found: pd.DataFrame = pd.concat(rows, ignore_index=True)
    return found


def _sums(values: Floats, condition: np.ndarray, batch: np.ndarray, shape: tuple[int, int]) -> Floats:
    """(conditions, batches) sums of values of cells."""
    sums = np.bincount(condition * shape[1] + batch, values, shape[0] * shape[1])
    return np.asarray(sums.reshape(shape), dtype=np.float64)


def _permutation_p(
    values: Floats, condition: np.ndarray, batch: np.ndarray, own: Floats, m: Floats, correction: float
) -> Floats:
    """(conditions - 1,) two-sided p-values of a permutation, within batches, of the sum of values over a condition's cells.

    By its first three moments (Pearson type III: Mielke and Berry 2007): of ranks that is a stratified Wilcoxon test (van Elteren
    1960), of levels with a correction of a half that of Cochran, Mantel and Haenszel. ``own`` cells of each condition and ``m``
    controls by batch.
    """
    x, there, both = values - values.mean(), own > 0, np.maximum(own + m, 3.0)
    s, ss, sss = (_sums(x**k, condition, batch, (len(own) + 1, len(m))) for k in (1, 2, 3))
    mean = (s[1:] + s[0]) / both
    second = np.maximum(ss[1:] + ss[0] - both * mean**2, 0.0)
    third = sss[1:] + sss[0] - 3 * mean * (ss[1:] + ss[0]) + 2 * both * mean**3
    excess = np.where(there, s[1:] - own * mean, 0.0).sum(1)
    variance = np.where(there, own * m / (both * (both - 1)) * second, 0.0).sum(1)
    skew = np.where(there, own * m * (m - own) / (both * (both - 1) * np.maximum(both - 2, 1.0)) * third, 0.0).sum(1)
    told = variance > 1e-18 * max(float((x**2).max()), 1e-300)
    deviation = np.sqrt(np.where(told, variance, 1.0))
    size = np.maximum(np.abs(excess) - correction, 0.0) / deviation
    tail = stats.pearson3.sf(size, np.sign(excess) * skew / deviation**3)
    return np.where(told, np.clip(2 * tail, 1e-300, 1.0), np.nan)


def _fdr(changes: pd.DataFrame) -> Floats:
    """Benjamini and Hochberg's, over conditions and levels of each covariate."""
    fdr = np.full(len(changes), np.nan)
    for place in changes["covariate"].unique():
        rows = np.flatnonzero((changes["covariate"] == place) & changes["p_value"].notna())
        if len(rows):
            fdr[rows] = stats.false_discovery_control(changes["p_value"].to_numpy()[rows])
    return fdr
