"""How good is a fit? Its predictions and those of simple baselines against cells that took no part in it.

Three sets of cells are kept apart from the start (`read_cells`): *training* cells, all that the baselines are made of;
*controls*, which every prediction starts from and every change is taken against, and which are training controls or
those of a file given by the user; and *measured* cells, which no prediction sees.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch

from crlseq.data.batches import ControlPartners
from crlseq.errors import InputError
from crlseq.evaluation import baselines, metrics
from crlseq.evaluation.baselines import GroupMoments, Indices, batch_shares, control_moments, dense, group_moments
from crlseq.evaluation.cells import Cells, CellSets, read_cells
from crlseq.evaluation.compare import AXIOMS, CEILING, FLOOR, METRICS, MODEL, compare, in_words, summarise
from crlseq.evaluation.held_out import COMPARED_CELLS, SOURCE_CELLS, abducted
from crlseq.evaluation.recovery import known_recovery
from crlseq.evaluation.truth import Truth, ceilings
from crlseq.model.losses import median_bandwidth
from crlseq.prediction.counterfactual import counterfactual_quality
from crlseq.run.run import Run

COUNTERFACTUAL_CELLS = 200  # whose counterfactuals are judged
HALVES = 5  # random divisions of the measured cells of a condition
SHARED_NOISE = 0.1  # share of the measured changes that is the controls' sampling error, from which on it is told


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; `verdict` are sentences on the comparisons, `notes` on what was left out or has to be known.

    Attributes
    ----------
    conditions
        ``condition, group, predictor, n_cells``, the metrics of `compare.METRICS`, and for the model those of
        `compare.AXIOMS`; one row per condition and predictor: the model, each baseline, the split-half ceiling and the
        sampling floor.
    summary, comparisons
        See `compare.summarise` and `compare.compare`.
    predicted
        Mean expression (conditions, fitted genes) by predictor, conditions as in the table.
    recovery
        Scores against a known truth (`recovery.score_recovery`), where the file of the cells has one.
    """

    conditions: pd.DataFrame
    summary: pd.DataFrame
    comparisons: pd.DataFrame
    verdict: tuple[str, ...]
    notes: tuple[str, ...]
    predicted: dict[str, np.ndarray] = field(repr=False)
    recovery: dict[str, float] | None = None


def evaluate(
    run: Run, data: str | Path | ad.AnnData | None = None, legacy: bool = False, held_out_controls: bool = False
) -> Evaluation:
    """Judge a run by cells that it was not fitted on.

    Parameters
    ----------
    data
        Other cells with the same labels and genes, and controls of their own. None takes the run's test cells, or its
        validation cells where it has none.
    legacy
        Also the metrics of Zhang et al. 2023.
    held_out_controls
        Without `data`: start from the run's test control cells, and take every change against them. The sampling error of
        the training controls, which training effects and measured changes share otherwise, then helps no predictor.

    Raises
    ------
    InputError
        If there are no cells to judge by, or no controls, or the genes or values are others than the fit's.

    Examples
    --------
    >>> import crlseq
    >>> found = crlseq.evaluate(crlseq.load("RUN"))
    >>> found.conditions["predictor"].unique().tolist()[:4]
    ['model', 'no_change', 'mean', 'additive']
    """
    sets = read_cells(run, data, held_out_controls)
    seed = run.facts.seed
    rng = np.random.default_rng([seed, 9])
    train = sets.train
    effects = baselines.training_effects(train.x, train.condition, train.batch, sets.conditions, rng)
    chosen = np.flatnonzero(np.bincount(sets.measured.condition, minlength=len(sets.conditions)) >= 2)
    if not len(chosen):
        raise InputError("No condition has two cells to evaluate on.", "Give --data, or fit with --hold-out-cells.")
    queries = [sets.conditions[c] for c in chosen]
    place = np.full(len(sets.conditions), -1)
    place[chosen] = np.arange(len(chosen))
    measured = Cells(sets.measured.x, place[sets.measured.condition], sets.measured.batch)
    changes = baselines.predict(effects, queries)
    virtual = _VirtualControls(run, sets, rng, data is None and not held_out_controls)
    targets = [  # the genes that perturbations are named after
        np.array([g for part in parts for g in sets.gene_places.get(sets.names[part], ())], dtype=int)
        for parts in queries
    ]
    truth = _truth_of(measured, virtual.controls, effects.effect.mean(0), targets)
    control = truth.shares @ truth.controls.mean
    changes = {MODEL: np.stack([virtual.change(parts, truth.shares[i]) for i, parts in enumerate(queries)]), **changes}
    predicted = {name: control + change for name, change in changes.items()}
    scores = truth.scores({name: change.__getitem__ for name, change in changes.items()})
    cells = [_compare_cells(virtual, measured, i, parts, changes, legacy, rng) for i, parts in enumerate(queries)]
    for name in (*changes, CEILING):
        for i, found in enumerate(cells):
            for metric, value in found.get(name, {}).items():
                scores.setdefault(name, {}).setdefault(metric, np.full(len(chosen), np.nan))[i] = value
    scores[MODEL] |= virtual.axioms(queries)
    for name, best in _ceilings(measured, virtual.controls, effects.effect.mean(0), targets, rng).items():
        scores.setdefault(name, {}).update(best)
    scores[FLOOR] = truth.floor()
    names, groups = [sets.condition_names[c] for c in chosen], [sets.group(int(c)) for c in chosen]
    about = {"condition": names, "group": groups, "n_cells": truth.measured.n}
    rows = [pd.DataFrame({**about, "predictor": name, **values}) for name, values in scores.items()]
    table: pd.DataFrame = pd.concat(rows, ignore_index=True)
    table = table[["condition", "group", "predictor", "n_cells", *(m for m in (*METRICS, *AXIOMS) if m in table)]]
    comparisons = compare(table, seed)
    recovery, notes = known_recovery(run, data)
    if run.facts.without_effect:
        notes.append(
            "No perturbation has a detectable effect, so the model's predictions are control cells: no change."
        )
    whole = truth.block(slice(None))
    change = ((whole.measured.mean - whole.control) ** 2).sum(1)
    shared = (whole.error - truth.squared_error(slice(None))).clip(0.0).sum(1)  # the controls' part
    noisy = int((shared / np.maximum(change, 1e-30) > SHARED_NOISE).sum())
    if data is None and not held_out_controls and noisy > len(chosen) / 4:
        notes.append(
            f"In {noisy} of {len(chosen)} conditions, sampling error of the controls' mean makes up more than a tenth of the "
            "squared measured change. Baselines built from training effects share this error, which favours them. "
            "Avoid it with --held-out-controls, or with --data and other controls."
        )
    return Evaluation(
        table, summarise(table, seed), comparisons, in_words(comparisons), (*sets.notes, *notes), predicted, recovery
    )


class _VirtualControls:
    """Some control cells of each batch, and what the model makes of them under a condition.

    `fitted`: these are the controls that the model was fitted on, the error of whose mean it has an estimate of.
    """

    def __init__(self, run: Run, sets: CellSets, rng: np.random.Generator, fitted: bool) -> None:
        cells = sets.control
        self.known, self.model, self.compared = sets.known, sets.model, sets.compared
        self.controls = control_moments(cells.x[:, self.compared], cells.batch, int(cells.batch.max(initial=0)) + 1)
        some = [rng.permutation(np.flatnonzero(cells.batch == b))[:SOURCE_CELLS] for b in np.unique(cells.batch)]
        chosen = np.sort(np.concatenate(some))
        self.whole, self.batch = dense(cells.x[chosen]), cells.batch[chosen]
        self.cells = self.whole[:, self.compared]
        self.act = abducted(self.model, self.whole, run.facts.seed)
        self.unperturbed = self.act(np.array([-1]))[1][:, self.compared]
        self.control_error = fitted * self.model.control_error.double().numpy()[self.compared]
        self.made: tuple[Indices, np.ndarray, np.ndarray] = ((), self.cells, self.cells)
        self.scale = torch.tensor([program.scale for program in run.facts.programs], dtype=torch.float64)

    def rows(self, parts: Indices) -> tuple[int, ...]:
        """Rows of the model that a condition is the combination of."""
        return tuple(row for part in parts for row in self.known.get(part, ()))

    def virtual(self, parts: Indices) -> tuple[np.ndarray, np.ndarray]:
        """(controls, genes) virtual cells, and what they are on average over who escaped; parts never fitted do nothing."""
        known = self.rows(parts)
        if self.made[0] != known:
            made = self.act(np.array(known)) if known else (self.whole, self.whole)
            error = self.control_error if known else 0.0
            self.made = (known, made[0][:, self.compared] - error, made[1][:, self.compared] - error)
        return self.made[1:]

    def axioms(self, queries: list[Indices]) -> dict[str, np.ndarray]:
        """Quality of the counterfactuals of these controls, (conditions,) each; NaN where no part was fitted."""
        found: dict[str, np.ndarray] = {name: np.full(len(queries), np.nan) for name in AXIOMS}
        model = copy.deepcopy(self.model).double()  # as predictions are made: float32 would add its rounding
        some = np.unique(np.linspace(0, len(self.whole) - 1, COUNTERFACTUAL_CELLS).astype(int))
        control = torch.from_numpy(self.whole[some])[None]
        for i, parts in enumerate(queries):
            if rows := self.rows(parts):
                for name, value in counterfactual_quality(model, control, torch.tensor([rows]), self.scale).items():
                    found[name][i] = value
        return found

    def change(self, parts: Indices, shares: np.ndarray) -> np.ndarray:
        """(genes,) mean change against these controls, in batches by `shares`; 0 of parts that were never fitted.

        An effect is what the model makes of cells under the condition less what it makes of the same cells without one: of
        each batch's cells, so that a draw of few adds little noise. To decode cells afresh is no effect. Against the
        controls that were fitted the measured change has the sampling error of their mean, which the model knows in part:
        virtual cells made of these are moved by it.
        """
        if not self.rows(parts):
            return np.zeros(len(self.compared))
        mean = group_moments(self.virtual(parts)[1] - self.unperturbed, self.batch, len(shares) - 1).mean
        n = self.controls.n[:-1]
        return np.asarray(shares @ np.vstack([mean, (n / n.sum()) @ mean]))


def _ceilings(
    cells: Cells, controls: GroupMoments, mean_effect: np.ndarray, targets: list[np.ndarray], rng: np.random.Generator
) -> dict[str, dict[str, np.ndarray]]:
    """`truth.ceilings`, means over `HALVES` divisions.

    Both halves have half the cells that predictors are held against, so that one made of many training cells can pass these.
    """
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    for _ in range(HALVES):
        half = baselines.halves(cells.condition, rng)
        parts = (Cells(cells.x, np.where(half == h, cells.condition, -1), cells.batch) for h in (0, 1))
        for name, scores in ceilings(*(_truth_of(part, controls, mean_effect, targets) for part in parts)).items():
            found.setdefault(name, []).append(scores)
    return {name: {m: np.mean([row[m] for row in rows], axis=0) for m in rows[0]} for name, rows in found.items()}


def _truth_of(cells: Cells, controls: GroupMoments, mean_effect: np.ndarray, targets: list[np.ndarray]) -> Truth:
    measured = group_moments(cells.x, cells.condition, len(targets))
    return Truth(
        measured, batch_shares(controls, cells.condition, cells.batch, len(targets)), controls, mean_effect, targets
    )


def _compare_cells(
    virtual: _VirtualControls,
    cells: Cells,
    condition: int,
    parts: Indices,
    changes: dict[str, np.ndarray],
    legacy: bool,
    rng: np.random.Generator,
) -> dict[str, dict[str, float]]:
    """``mmd2`` and ``energy_distance`` of every predictor for one condition.

    Half of the measured cells are compared with as many predicted ones, and with the other half: the floor. The
    predicted cells of a baseline are the control cells that the virtual cells are made of, moved by its change.
    """
    own = np.flatnonzero(cells.condition == condition)
    size = min(len(own) // 2, COMPARED_CELLS)
    n = len(virtual.batch)
    partners = ControlPartners(np.arange(n), np.concatenate([virtual.batch, cells.batch[own]]))
    made, x = virtual.virtual(parts)[0], dense(cells.x[own])
    every = partners.draw_shared([np.arange(len(own)) + n], rng)[0]
    some = rng.permutation(len(own))[: 2 * COMPARED_CELLS]
    bandwidth = median_bandwidth(torch.from_numpy(np.concatenate([virtual.cells[every[some]], x[some]])))
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(HALVES if size >= 2 else 0):
        order = rng.permutation(len(own))
        first, second = order[:size], order[size : 2 * size]
        source = partners.draw_shared([first + n], rng)[0]
        half, base = metrics.Sample(x[first]), metrics.Sample(virtual.cells[source])
        predicted = {name: base.moved(change[condition]) for name, change in changes.items() if name != MODEL}
        predicted |= {MODEL: metrics.Sample(made[source]), CEILING: metrics.Sample(x[second])}
        for name, sample in predicted.items():
            found.setdefault(name, []).append(metrics.two_samples(sample, half, bandwidth))
    names = ("mmd2", "energy_distance")
    rows = {name: dict(zip(names, map(float, np.mean(pairs, axis=0)), strict=True)) for name, pairs in found.items()}
    if legacy:
        for name, change in changes.items():
            paired = made[every] if name == MODEL else virtual.cells[every] + change[condition]
            rows.setdefault(name, {}).update(metrics.legacy_scores(paired, x))
    return rows
