"""Cells that escaped their perturbation: told from those that respond, and left out of a fit that asks for it.

The idea is mixscape's (Papalexi et al. 2021, Nature Genetics 53:322). With scores x of cells (principal components,
each experimental batch centred on its control cells) and d the mean score of a perturbation's responding cells, every
cell has the coordinate

    s_i = x_i . d / |d|^2,

0 on average for control cells and 1 for responders. A responder's own score is taken out of the mean that it is
projected on, since it would find itself there. The coordinates of a perturbation's cells are a mixture of control's
normal distribution, known from control cells, and a second one, fitted by EM; responders are the cells with a posterior
of `THRESHOLD` or more, d is their mean again, and so on until they do not change. Only training cells determine d and
the mixture.

All cells stay where there is no ground to tell them apart: without a detectable effect, in combinations, where one
shifted normal describes the coordinates as well (BIC), or where the two means are closer than `SEPARATION` standard
deviations of control.

Choosing cells by how they look makes effects look larger, those that vary among cells most of all. p-values are therefore
of all cells, and test cells are never left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.errors import few

THRESHOLD = 0.5
DETECTABLE = 0.05
SEPARATION = 1.5  # at 1.5 a fifth of the cells are on the wrong side of the middle
MIN_CELLS = 10  # training cells that respond; with fewer, all stay
ROUNDS, STEPS, TOLERANCE = 10, 500, 1e-8
MIN_WIDTH = 0.2  # of the responders, as a share of control's standard deviation


@dataclass(frozen=True)
class Responders:
    """Who responds.

    ``table`` has ``perturbation, n_cells`` (training and validation), ``n_left_out, share`` (of training cells that
    respond, by the mixture), ``separation`` (of the means, in standard deviations of control), ``why`` (all stay).
    """

    posterior: np.ndarray  # (cells,) float32 probability that a cell responds to its perturbation; NaN where not told
    escaped: np.ndarray  # ascending indices (int64) of the training and validation cells below `THRESHOLD`
    table: pd.DataFrame

    def in_words(self) -> str:
        """How many cells of which perturbations."""
        told = self.table[self.table["n_left_out"] > 0].sort_values("n_left_out", ascending=False, kind="stable")
        if told.empty:
            return "Responders: no perturbation has cells that look like control cells; none are excluded."
        return (
            f"Responders: {len(self.escaped)} cells of {len(told)} perturbations look like control cells and are "
            f"excluded ({few([f'{r.n_left_out} of {r.n_cells} {r.perturbation}' for r in told.itertuples()])}); "
            "this choice makes the effects of the remaining cells larger."
        )

    def record(self) -> dict[str, Any]:
        """For ``run.json``."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return {"threshold": THRESHOLD, "n_left_out": len(self.escaped), "perturbations": rows}


def find_responders(data: PerturbSeqData, scores: np.ndarray, fdr: np.ndarray) -> Responders:
    """Tell responders from escaped cells in every single perturbation with a detectable effect.

    `scores` (cells, q) are principal components; `fdr` (perturbations,) is of the effect tests, NaN: no effect.
    """
    train, validation, test = (data.cells_by_condition(code) for code in (splits.TRAIN, splits.VALIDATION, splits.TEST))
    x = _centred(scores.astype(np.float64), data.batch, train[0])
    control = x[train[0]]
    posterior = np.full(len(x), np.nan, dtype=np.float32)
    rows, escaped = [], [np.zeros(0, dtype=np.int64)]
    for c, parts in enumerate(data.conditions):
        if c == 0 or not len(train[c]):
            continue
        fitted = np.concatenate([train[c], validation[c]])
        row: dict[str, Any] = {
            "perturbation": data.condition_names[c], "n_cells": len(fitted), "n_left_out": 0, "share": np.nan,
            "separation": np.nan, "why": "",
        }  # fmt: skip
        rows.append(row)
        if len(parts) != 1:
            row["why"] = "a combination"
        elif not fdr[parts[0]] <= DETECTABLE:
            row["why"] = "no detectable effect"
        else:
            cells = np.concatenate([fitted, test[c]])
            told, share, separation, why = _tell_apart(x[cells], np.arange(len(cells)) < len(train[c]), control)
            row |= {"share": share, "separation": separation, "why": why}
            if not why:
                posterior[cells] = told
                out = fitted[told[: len(fitted)] < THRESHOLD]
                row["n_left_out"] = len(out)
                escaped.append(out)
    columns = ["perturbation", "n_cells", "n_left_out", "share", "separation", "why"]
    return Responders(posterior, np.sort(np.concatenate(escaped)), pd.DataFrame(rows, columns=columns))


def left_out(data: PerturbSeqData, cells: np.ndarray, note: str = "") -> PerturbSeqData:
    """The screen with these cells unused."""
    split = data.split.copy()
    split[cells] = splits.UNUSED
    return replace(data, split=split, notes=(*data.notes, note) if note else data.notes)


def _centred(x: np.ndarray, batch: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """Scores less the mean of their batch's training controls, or of all where a batch has none."""
    centre = np.repeat(x[controls].mean(0)[None], batch.max(initial=0) + 1, axis=0)
    for b in np.unique(batch[controls]):
        centre[b] = x[controls[batch[controls] == b]].mean(0)
    centred: np.ndarray = x - centre[batch]
    return centred


def _tell_apart(x: np.ndarray, is_train: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, float, float, str]:
    """Posterior (cells,) of the centred scores x (cells, q) of one perturbation, share, separation, and why all stay."""
    responds = is_train.copy()
    for _ in range(ROUNDS):
        total, n = x[responds].sum(0), int(responds.sum())
        mean = total / n
        unit = mean @ mean
        s = x @ mean / unit
        # Those among the mean: (n mean - x_i) / (n - 1) in its place.
        own = x[responds]
        s[responds] = (own @ total - (own**2).sum(1)) / ((n - 1) * unit)
        s0 = control @ mean / unit
        m0, sd0 = float(s0.mean()), max(float(s0.std()), 1e-12)
        share, m, sd = _mixture(s[is_train], m0, sd0)
        separation = (m - m0) / sd0
        # Beyond either mean the ratio of two normals of different width would turn round.
        inside = np.clip(s, m0, max(m, m0))
        log_odds = np.log(share / (1 - share)) + _log_normal(inside, m, sd) - _log_normal(inside, m0, sd0)
        posterior = 1 / (1 + np.exp(-np.clip(log_odds, -50, 50)))
        now = is_train & (posterior >= THRESHOLD)
        if now.sum() < MIN_CELLS:
            return posterior, share, separation, f"fewer than {MIN_CELLS} training cells would remain"
        if np.array_equal(now, responds):
            break
        responds = now
    if separation < SEPARATION:
        why = "responders would be too close to control cells"
    else:
        two = _needs_two(s[is_train], (share, m, sd), (m0, sd0))
        why = "" if two else "one normal distribution describes the cells as well"
    return posterior, share, separation, why


def _log_normal(s: np.ndarray, m: float, sd: float) -> np.ndarray:
    value: np.ndarray = -0.5 * ((s - m) / sd) ** 2 - np.log(sd)
    return value


def _mixture(s: np.ndarray, m0: float, sd0: float) -> tuple[float, float, float]:
    """Share, mean and standard deviation of the second of two normals by EM; the first, (m0, sd0), is known."""
    upper = s[s >= np.median(s)]
    share, m, sd = 0.5, float(upper.mean()), max(float(upper.std()), MIN_WIDTH * sd0)
    before = -np.inf
    for _ in range(STEPS):
        second, first = np.log(share) + _log_normal(s, m, sd), np.log(1 - share) + _log_normal(s, m0, sd0)
        both = np.logaddexp(second, first)
        weight = np.exp(second - both)
        total = weight.sum()
        if both.sum() - before < TOLERANCE * len(s) or total < 2:
            break
        before = both.sum()
        share = float(np.clip(total / len(s), 1e-6, 1 - 1e-6))
        m = float(weight @ s / total)
        sd = max(float(np.sqrt(weight @ (s - m) ** 2 / total)), MIN_WIDTH * sd0)
    return share, m, sd


def _needs_two(s: np.ndarray, second: tuple[float, float, float], first: tuple[float, float]) -> bool:
    """Whether the mixture beats one free normal by BIC; it has one parameter more."""
    share, m, sd = second
    mixed = np.logaddexp(np.log(share) + _log_normal(s, m, sd), np.log(1 - share) + _log_normal(s, *first)).sum()
    single = _log_normal(s, float(s.mean()), max(float(s.std()), 1e-12)).sum()
    return bool(2 * (mixed - single) > np.log(len(s)))
