"""Another tool's predictions against measured cells: tables of means or of cells, with no model of ours.

Conditions that are measured and predicted are judged. Conditions that are measured and not predicted are what the tool
may have known: baselines are made of these alone. Where there are none, a condition's baseline is the mean of the others.
Both files are read in blocks of cells, and scored in blocks of conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from crlseq.data.label_rules import Perturbations
from crlseq.data.matrix import Screen, open_screen
from crlseq.data.names import GeneNames
from crlseq.data.perturbations import read_perturbations
from crlseq.data.preprocess import MIN_COMMON
from crlseq.errors import InputError, few
from crlseq.evaluation import baselines
from crlseq.evaluation.baselines import GroupMoments, Indices, TrainingEffects
from crlseq.evaluation.compare import AXIOMS, FLOOR, METRICS, MODEL, compare, in_words, summarise
from crlseq.evaluation.evaluate import Evaluation
from crlseq.evaluation.truth import Rows, Truth, ceilings

CEILING_CONDITIONS = 500  # whose halves are compared: more sharpen a mean less than they cost
MIN_HALF = 2  # cells
SEED = 0
SAMPLED = 200  # cells that tell counts from other values
Source: TypeAlias = str | Path | ad.AnnData


@dataclass(frozen=True)
class _Plan:
    """What is judged by what: conditions of `labels`, those judged first, then those known, then the control."""

    labels: Perturbations
    measured: np.ndarray  # (measured rows,) place in the order of groups, or -1
    predicted: np.ndarray  # (predicted rows,) place among the judged, or -1
    judged: np.ndarray  # conditions
    known: np.ndarray
    single_rows: bool  # the measured file has one row a condition: no sampling errors
    notes: tuple[str, ...]


def evaluate_predictions(
    predictions: Source,
    data: Source,
    perturbation_key: str | None = None,
    control_label: str | Sequence[str] | None = None,
    separator: str | None = None,
    layer: str | None = None,
) -> Evaluation:
    """Judge another tool's predictions by measured cells.

    Parameters
    ----------
    predictions
        Predicted cells, or one row of predicted means a condition, of the kind and scale of the measured values. Conditions
        are in the column that has the labels of `data`, or else are the names of the rows. Control rows are not used.
    data
        Measured cells, or one row a condition, with controls.
    perturbation_key, control_label, separator, layer
        How the labels and the values of `data` are read; detected where not given.

    Returns
    -------
    As from `evaluate`; the predictions are called ``model``. Metrics are those of means: no distances between cells.

    Raises
    ------
    InputError
        If a file cannot be read, the two have few genes or no condition in common, there are no controls, or only one of
        them holds counts.

    Examples
    --------
    >>> import anndata, crlseq
    >>> cells = anndata.read_h5ad("screen.h5ad")
    >>> predicted = cells[cells.obs["perturbation"] == "g2+g4"].copy()  # a perfect prediction
    >>> found = crlseq.evaluate_predictions(predicted, "screen.h5ad")
    >>> found.conditions["predictor"].tolist()[:4]
    ['model', 'no_change', 'mean', 'additive']
    """
    with open_screen(predictions) as own, open_screen(data, layer) as other:
        places = _common_genes(own, other)
        plan = _plan(own, other, perturbation_key, control_label, separator)
        values = _same_values(own, other)
        columns = np.flatnonzero(places >= 0), places[places >= 0]
        predicted = _Sums.of(plan.predicted, len(plan.judged), len(columns[0]), squares=False)
        _add(own, columns[0], values, [predicted])
        n_groups = len(plan.judged) + len(plan.known) + 1
        measured = _Sums.of(plan.measured, n_groups, len(columns[0]), squares=not plan.single_rows)
        chosen, halves = _halves(plan, len(columns[0]))
        _add(other, columns[1], values, [measured, *halves])
        names = GeneNames.of(other.var)
    column = {int(gene): i for i, gene in enumerate(columns[1])}
    targets = {name: [column[g] for g in names.find(name) if g in column] for name in plan.labels.names}
    note = [] if len(column) == own.n_genes else [f"{len(column)} of {own.n_genes} predicted genes are compared."]
    return _judged(plan, predicted.mean(), measured, chosen, [half.moments() for half in halves], targets, note)


def _judged(
    plan: _Plan,
    predicted: np.ndarray,
    sums: _Sums,
    chosen: np.ndarray,
    halves: list[GroupMoments],
    targets: dict[str, list[int]],
    notes: list[str],
) -> Evaluation:
    labels, n = plan.labels, len(plan.judged)
    moments = sums.moments()
    control = moments.mean[-1].astype(float)
    controls = GroupMoments(*(np.repeat(np.asarray(part[-1:], dtype=float), 2, axis=0) for part in moments))
    queries = [labels.conditions[c] for c in plan.judged]
    genes = [np.array([g for p in parts for g in targets[labels.names[p]]], dtype=int) for parts in queries]
    effects = TrainingEffects(
        tuple(labels.conditions[c] for c in plan.known), moments.mean[n:-1] - control, np.zeros((2, 0, len(control)))
    )
    common = (effects.effect if len(plan.known) else moments.mean[:n] - control).mean(0, dtype=float)
    spread = moments.mean[:-1].std(0, ddof=1, dtype=float) if plan.single_rows else None

    def truth_of(measured: GroupMoments, which: np.ndarray) -> Truth:
        shares = np.tile([1.0, 0.0], (len(which), 1))
        return Truth(measured, shares, controls, common, [genes[i] for i in which], spread)

    truth = truth_of(GroupMoments(*(part[:n] for part in moments)), np.arange(n))
    rows = {MODEL: lambda rows: predicted[rows] - control, **_baselines(effects, queries, truth, common)}
    seen = {part for c in plan.known for part in labels.conditions[c]}
    about = pd.DataFrame({
        "condition": [labels.condition_names[c] for c in plan.judged],
        "group": [_group(parts, seen, bool(len(plan.known))) for parts in queries],
        "n_cells": moments.n[:n],
    })  # fmt: skip
    parts = [about.assign(predictor=name, **values) for name, values in truth.scores(rows).items()]
    if len(chosen):
        best = ceilings(*(truth_of(half, chosen) for half in halves))
        parts += [about.iloc[chosen].assign(predictor=name, **values) for name, values in best.items()]
    if not plan.single_rows:
        parts.append(about.assign(predictor=FLOOR, **truth.floor()))
    table: pd.DataFrame = pd.concat(parts, ignore_index=True)
    table = table[["condition", "group", "predictor", "n_cells", *(m for m in (*METRICS, *AXIOMS) if m in table)]]
    comparisons = compare(table, SEED)
    words = in_words(comparisons, "the prediction")
    return Evaluation(table, summarise(table, SEED), comparisons, words, (*plan.notes, *notes), {})


def _baselines(effects: TrainingEffects, queries: list[Indices], truth: Truth, common: np.ndarray) -> dict[str, Rows]:
    """Changes that simple predictors say, made as they are asked for; see `crlseq.evaluation.baselines`."""

    def same(change: np.ndarray) -> Rows:
        return lambda rows: np.broadcast_to(change, (len(queries[rows]), len(change)))

    def by(predict: Callable[[TrainingEffects, Sequence[Indices]], np.ndarray]) -> Rows:
        return lambda rows: predict(effects, queries[rows])

    def others(rows: slice) -> np.ndarray:
        """The mean effect of all judged conditions but the own one."""
        block = truth.block(rows)
        return np.asarray((truth.n * common - (block.measured.mean - block.control)) / max(truth.n - 1, 1))

    found = {"no_change": same(np.zeros(len(common)))}
    if not effects.parts:
        return found | ({"mean": others} if truth.n > 1 else {})
    found["mean"] = same(common)
    singles = {parts[0] for parts in effects.parts if len(parts) == 1}
    if any(part in singles for parts in queries for part in parts):
        found |= {"additive": by(baselines.additive), "shrunk_additive": by(baselines.shrunk_additive)}
        found["matching_mean"] = by(baselines.matching_mean)
    return found


def _group(parts: Indices, seen: set[int], any_known: bool) -> str:
    """Kind of a condition, as in `evaluate`; without any known condition nobody can say what was seen."""
    if not any_known:
        return "combinations" if len(parts) > 1 else "single perturbations"
    n = sum(part in seen for part in parts)
    return "unseen perturbations" if len(parts) == 1 else f"combinations, {n} of {len(parts)} parts seen"


def _common_genes(own: Screen, other: Screen) -> np.ndarray:
    """(predicted genes,) place of each in the measured file; -1 where it has none."""
    places = other.places_of(GeneNames([*own.genes], {}))
    n, least = int((places >= 0).sum()), min(own.n_genes, other.n_genes)
    if n < max(MIN_COMMON * least, 2):
        raise InputError(
            f"{own.source} and {other.source} have {n} genes in common, of {own.n_genes} and {other.n_genes}.",
            f"Name genes alike; they are named like {own.genes[0]!r} and {other.genes[0]!r}.",
        )
    return places


def _plan(
    own: Screen, other: Screen, key: str | None, control: str | Sequence[str] | None, separator: str | None
) -> _Plan:
    """Read the labels of both files in one vocabulary, and decide what is judged."""
    first = read_perturbations(other.obs, key, control, separator)
    named = own.obs[first.key] if first.key in own.obs else own.obs.index.to_series()
    both = [np.asarray(column.astype(object)) for column in (other.obs[first.key], named)]
    cut = separator if separator is not None else first.separator or ""
    labels = read_perturbations(pd.DataFrame({first.key: np.concatenate(both)}), first.key, first.control_labels, cut)
    measured, predicted = labels.condition[: other.n_cells], labels.condition[other.n_cells :]
    n, n_predicted = (np.bincount(c[c >= 0], minlength=len(labels.conditions)) for c in (measured, predicted))
    single_rows = int(n[1:].max(initial=0)) <= 1
    enough = n >= (1 if single_rows else 2)
    if not enough[0]:
        raise InputError(
            f"{other.source} has {n[0]} cells labelled {labels.control_label!r}; at least two are needed.",
            "Give measured cells with controls: all changes are relative to them.",
        )
    enough[0] = False
    judged, known = np.flatnonzero(enough & (n_predicted > 0)), np.flatnonzero(enough & (n_predicted == 0))
    if not len(judged):
        examples = [labels.condition_names[c] for c in np.unique(predicted[predicted > 0])]
        raise InputError(
            f"No condition of {own.source} is measured in {other.source}.",
            f"Predicted are {few(examples) or 'none'}: name them as in column {first.key!r}, which has "
            f"{few([labels.condition_names[c] for c in np.flatnonzero(n[1:]) + 1])}.",
        )
    notes = []
    if absent := [labels.condition_names[c] for c in np.flatnonzero((n_predicted > 0) & ~enough) if c]:
        notes.append(f"{len(absent)} predicted conditions are not measured and not judged: {few(absent)}.")
    if not len(known):
        notes.append("Every measured condition is predicted, so the only baselines are no change and the others' mean.")
    if single_rows:
        notes.append(
            "The measured file has one row per condition, so there are no tests of single genes; the spread of the "
            "conditions weights genes instead."
        )
    place = np.full(len(labels.conditions) + 1, -1)
    place[np.concatenate([judged, known, [0]])] = np.arange(len(judged) + len(known) + 1)
    wanted = place[predicted]
    return _Plan(
        labels, place[measured], np.where(wanted < len(judged), wanted, -1), judged, known, single_rows, tuple(notes)
    )


def _halves(plan: _Plan, n_genes: int) -> tuple[np.ndarray, list[_Sums]]:
    """Judged conditions whose halves are compared (places), and sums of both halves."""
    n = np.bincount(plan.measured[plan.measured >= 0], minlength=len(plan.judged))[: len(plan.judged)]
    rng = np.random.default_rng(SEED)
    chosen = np.sort(rng.permutation(np.flatnonzero(n >= 2 * MIN_HALF))[:CEILING_CONDITIONS])
    if not len(chosen):
        return chosen, []
    half = baselines.halves(plan.measured, rng)
    place = np.full(int(plan.measured.max()) + 2, -1)
    place[chosen] = np.arange(len(chosen))
    own = place[plan.measured]
    return chosen, [_Sums.of(np.where(half == h, own, -1), len(chosen), n_genes) for h in (0, 1)]


def _same_values(own: Screen, other: Screen) -> Callable[[sp.csr_matrix, str], sp.csr_matrix]:
    """What makes blocks of both files comparable: nothing, or log-normalisation of counts. InputError if one has counts."""
    sampled = [screen.sample(np.arange(screen.n_cells), SAMPLED)[1] for screen in (own, other)]
    counts = [bool((x.data >= 0).all() and (x.data == np.rint(x.data)).all()) for x in sampled]
    if counts[0] != counts[1]:
        which, rest = (own, other) if counts[0] else (other, own)
        raise InputError(
            f"{which.source} holds counts, and {rest.source} does not.", "Give both log-normalised in the same way."
        )
    target = float(np.median(np.asarray(sampled[1].sum(1))))

    def values(block: sp.csr_matrix, source: str) -> sp.csr_matrix:
        if not np.isfinite(block.data).all():
            raise InputError(f"{source} has NaN or infinite values.", "Remove or replace them first.")
        if all(counts):
            totals = np.maximum(np.asarray(block.sum(1)).ravel(), 1e-300)
            block.data = np.log1p(block.data * np.repeat(target / totals, np.diff(block.indptr)))
        return block

    return values


@dataclass(frozen=True)
class _Sums:
    """Sums of rows and of their squares by group (rows,), -1 for none; float32 (groups, genes)."""

    group: np.ndarray
    n: np.ndarray
    total: np.ndarray
    square: np.ndarray | None

    @classmethod
    def of(cls, group: np.ndarray, n_groups: int, n_genes: int, squares: bool = True) -> _Sums:
        """Of nothing yet."""
        total, square = (np.zeros((n_groups, n_genes), dtype=np.float32) if wanted else None for wanted in (1, squares))
        assert total is not None
        return cls(group, np.bincount(group[group >= 0], minlength=n_groups), total, square)

    def add(self, rows: slice, block: sp.csr_matrix) -> None:
        """Take in the cells `rows`."""
        group = self.group[rows]
        there = np.flatnonzero(group >= 0)
        if not len(there):
            return
        present, code = np.unique(group[there], return_inverse=True)
        which = sp.csr_matrix((np.ones(len(there)), (code, there)), shape=(len(present), block.shape[0]))
        for sums, values in ((self.total, block), (self.square, block.power(2) if self.square is not None else None)):
            if sums is not None and values is not None:
                found = sp.csr_matrix(which @ values)
                sums[np.repeat(present, np.diff(found.indptr)), found.indices] += found.data.astype(np.float32)

    def mean(self) -> np.ndarray:
        """(groups, genes), in the place of the sums."""
        np.divide(self.total, np.maximum(self.n, 1)[:, None], out=self.total, casting="unsafe")
        return self.total

    def moments(self) -> GroupMoments:
        """Means and unbiased variances (0 without squares), in the place of the sums."""
        mean = self.mean()
        if self.square is None:
            return GroupMoments(mean, np.broadcast_to(np.float32(0), mean.shape), self.n)
        for row, average, n in zip(self.square, mean, self.n, strict=True):
            row[:] = np.maximum(row - n * average.astype(float) ** 2, 0) / max(n - 1, 1)
        return GroupMoments(mean, self.square, self.n)


def _add(
    screen: Screen, columns: np.ndarray, values: Callable[[sp.csr_matrix, str], sp.csr_matrix], sums: list[_Sums]
) -> None:
    """Pass over a file once; genes are its `columns`."""
    every = np.array_equal(columns, np.arange(screen.n_genes))
    for rows, block in screen.blocks():
        own = values(block, screen.source)
        own = own if every else sp.csr_matrix(own[:, columns])
        for each in sums:
            each.add(rows, own)
