"""What simple predictors say of a condition: the answers that a model has to beat.

Every baseline is a change against control, made of training cells alone: `training_effects` is given no others, and
`predict` is given what it returns. With E_c the mean of the training cells of condition c minus that of training
controls of the same batches:

    no_change       0
    mean            the mean of E over the fitted conditions: with one batch, P - control for the mean P of their means
    additive        the sum of the single effects of the parts
    shrunk_additive half of that sum and half the mean of all single effects; see `shrunk_additive`
    matching_mean   the mean of E over the fitted conditions with a part in common; see `matching_mean`
    ridge           linear in the parts on principal components of E; see `ridge`

A part that is in no fitted condition has no effect, with the model as with the baselines. All E share the sampling noise
of the controls with every measured change, so that with few controls the correlation of an additive change is above 0
even where nothing has an effect; distances between means do not share it. Since 2025 the field's
finding is that few models beat these (Ahlmann-Eltze et al. 2025, Nature Methods; Csendes et al. 2025, BMC Genomics;
matching mean: Vinas Torne et al. 2025, Nature Biotechnology).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from crlseq.errors import UsageError

N_COMPONENTS = 10  # as in Ahlmann-Eltze et al. 2025
PENALTIES = np.logspace(-3, 3, 25)
# Of the sum, and weight of the common effect: least squares on 288 measured doubles has .4 to .6 for both.
SHRINKAGE = 0.5

Indices = tuple[int, ...]
Expression = sp.csr_matrix | np.ndarray  # (cells, genes)


class GroupMoments(NamedTuple):
    """Mean (0 without cells), unbiased variance (0 of one cell), (groups, genes), and number of cells (groups,)."""

    mean: np.ndarray
    variance: np.ndarray
    n: np.ndarray


def group_moments(x: Expression, group: np.ndarray, n_groups: int) -> GroupMoments:
    """GroupMoments of cells (cells, genes) by group (cells,); cells of group -1 take no part."""
    there = np.flatnonzero(group >= 0)
    indicator = sp.csr_matrix((np.ones(len(there)), (group[there], there)), shape=(n_groups, x.shape[0]))
    n = np.bincount(group[there], minlength=n_groups)
    values: Any = x.astype(float)
    squares = values**2 if isinstance(values, np.ndarray) else values.multiply(values)
    total, square = dense(indicator @ values), dense(indicator @ squares)
    mean = total / np.maximum(n, 1)[:, None]
    spread = np.maximum(square - total * mean, 0.0)
    return GroupMoments(mean, spread / np.maximum(n - 1, 1)[:, None], n)


def dense(values: Any) -> np.ndarray:
    """The same numbers, of a sparse matrix too, in float64."""
    return np.asarray(values if isinstance(values, np.ndarray) else values.toarray(), dtype=float)


def control_moments(x: Expression, batch: np.ndarray, n_batches: int) -> GroupMoments:
    """Of control cells (cells, genes) by batch (cells,); the last group is of all, for batches without two controls."""
    own, every = group_moments(x, batch, n_batches), group_moments(x, np.zeros_like(batch), 1)
    return GroupMoments(*map(np.concatenate, zip(own, every, strict=True)))


def batch_shares(controls: GroupMoments, group: np.ndarray, batch: np.ndarray, n_groups: int) -> np.ndarray:
    """(groups, batches + 1) share of each group's cells in each batch of `control_moments`, or under its last group."""
    n_batches, there = len(controls.n) - 1, group >= 0
    usable = np.append(controls.n[:-1] >= 2, False)
    place = np.where((batch >= 0) & (batch < n_batches), batch, n_batches)
    counts = np.zeros((n_groups, n_batches + 1))
    np.add.at(counts, (group[there], np.where(usable[place], place, n_batches)[there]), 1.0)
    shares: np.ndarray = counts / np.maximum(counts.sum(1, keepdims=True), 1.0)
    return shares


@dataclass(frozen=True)
class TrainingEffects:
    """All that baselines know."""

    parts: tuple[Indices, ...]  # of each fitted condition
    effect: np.ndarray  # (conditions, genes) of its training cells against controls
    halves: np.ndarray  # (2, conditions, genes): the same from either half of its cells


def training_effects(
    x: Expression, condition: np.ndarray, batch: np.ndarray, conditions: Sequence[Indices], rng: np.random.Generator
) -> TrainingEffects:
    """Effects of every condition with two training cells; condition 0, with the parts (), is the control.

    ``x`` (cells, genes), ``condition`` and ``batch`` are of training cells and no others; ``rng`` halves each condition.
    """
    n, control = len(conditions), condition == 0
    controls = control_moments(x[control], batch[control], int(batch.max(initial=0)) + 1)
    half = halves(condition, rng)

    def effects(group: np.ndarray) -> np.ndarray:
        return np.asarray(group_moments(x, group, n).mean - batch_shares(controls, group, batch, n) @ controls.mean)

    fitted = [c for c in range(1, n) if (condition == c).sum() >= 2]
    either = np.stack([effects(np.where(half == h, condition, -1))[fitted] for h in (0, 1)])
    return TrainingEffects(tuple(tuple(conditions[c]) for c in fitted), effects(condition)[fitted], either)


def halves(condition: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(cells,) 0 or 1: a random half of the cells of each condition."""
    order = rng.permutation(len(condition))
    order = order[np.argsort(condition[order], kind="stable")]
    half = np.empty(len(condition), dtype=np.int64)
    half[order] = (np.arange(len(order)) - np.searchsorted(condition[order], condition[order])) % 2
    return half


def predict(train: TrainingEffects, queries: Sequence[Indices]) -> dict[str, np.ndarray]:
    """Changes (queries, genes) of every baseline of `BASELINES`."""
    shape = (len(queries), train.effect.shape[1])
    found = {name: np.asarray(baseline.function(train, queries), dtype=float) for name, baseline in BASELINES.items()}
    for name, changes in found.items():
        if changes.shape != shape or not np.isfinite(changes).all():
            raise UsageError(f"The baseline {name} gave no {shape[0]} x {shape[1]} finite changes.", "Correct it.")
    return found


def no_change(train: TrainingEffects, queries: Sequence[Indices]) -> np.ndarray:
    """Controls, whatever the perturbation."""
    return np.zeros((len(queries), train.effect.shape[1]))


def mean_effect(train: TrainingEffects, queries: Sequence[Indices]) -> np.ndarray:
    """The mean effect of the fitted conditions, whatever the perturbation."""
    return np.tile(train.effect.mean(0), (len(queries), 1))


def additive(train: TrainingEffects, queries: Sequence[Indices]) -> np.ndarray:
    """Sum of the effects of the single perturbations; for a single one its own training effect."""
    single = {parts[0]: row for parts, row in zip(train.parts, train.effect, strict=True) if len(parts) == 1}
    changes = np.zeros((len(queries), train.effect.shape[1]))
    for change, parts in zip(changes, queries, strict=True):
        for part in parts:
            if part in single:
                change += single[part]
    return changes


def shrunk_additive(train: TrainingEffects, queries: Sequence[Indices]) -> np.ndarray:
    """``SHRINKAGE`` of the sum of the single effects, and as much of the mean of all single effects.

    What combinations of two technologies have in common: their effects fall short of the sum, and what all perturbations
    do counts once. The factors are fixed; nothing is fitted to the screen. Without single effects the mean is of all.
    """
    single = train.effect[[len(parts) == 1 for parts in train.parts]]
    common = (single if len(single) else train.effect).mean(0)
    return np.asarray(SHRINKAGE * additive(train, queries) + SHRINKAGE * common)


def matching_mean(train: TrainingEffects, queries: Sequence[Indices]) -> np.ndarray:
    """Mean effect of the fitted conditions that have a part in common with the query.

    For a double of which singles alone were fitted it is (E_a + E_b) / 2. A query that was itself fitted takes its
    own training effect; one that shares no part with any condition the mean of all.
    """
    changes = np.empty((len(queries), train.effect.shape[1]))
    own = {parts: i for i, parts in enumerate(train.parts)}
    for change, parts in zip(changes, queries, strict=True):
        sharing = [i for i, other in enumerate(train.parts) if set(other) & set(parts)]
        rows = [own[tuple(parts)]] if tuple(parts) in own else sharing
        change[:] = train.effect[rows].mean(0) if rows else train.effect.mean(0)
    return changes


def ridge(train: TrainingEffects, queries: Sequence[Indices]) -> np.ndarray:
    """Ridge regression of effects on their parts, in the space of principal components of the training effects.

    Rows are the two halves of each fitted condition's cells; the design D (rows, parts) has a 1 for each part. The
    scores S = effects V, V the leading `N_COMPONENTS` right singular vectors of the effects (through the origin: no
    change), are fitted by (D'D + penalty)^-1 D'S. The penalty of `PENALTIES` has the least squared leave-one-out error
    (y - y_hat) / (1 - h) over rows. Rows are halves since a single perturbation with one row would say nothing of
    itself once that is left out, and no penalty would be better than any other.
    """
    parts = sorted({part for condition in train.parts for part in condition})
    axes = np.linalg.svd(train.effect, full_matrices=False)[2][:N_COMPONENTS]
    design = np.tile(_design(train.parts, parts), (2, 1))
    scores = np.concatenate(list(train.halves)) @ axes.T
    gram = design.T @ design
    best, errors = np.zeros((len(parts), len(axes))), np.inf
    for penalty in PENALTIES:
        inverse = np.linalg.inv(gram + penalty * np.eye(len(parts)))
        coefficients = inverse @ design.T @ scores
        leverage = np.einsum("rp,pq,rq->r", design, inverse, design)
        error = float((((scores - design @ coefficients) / (1 - leverage)[:, None]) ** 2).sum())
        if error < errors:
            best, errors = coefficients, error
    found: np.ndarray = _design(queries, parts) @ best @ axes
    return found


def _design(conditions: Sequence[Indices], parts: Sequence[int]) -> np.ndarray:
    return np.array([[float(part in condition) for part in parts] for condition in conditions])


class Baseline(NamedTuple):
    """A function of training effects and queries that returns changes (queries, genes), and what sentences call it."""

    function: Callable[[TrainingEffects, Sequence[Indices]], np.ndarray]
    words: str


BASELINES = {
    "no_change": Baseline(no_change, "no change"),
    "mean": Baseline(mean_effect, "the mean of perturbed cells"),
    "additive": Baseline(additive, "the sum of single effects"),
    "shrunk_additive": Baseline(shrunk_additive, "the shrunk sum"),
    "matching_mean": Baseline(matching_mean, "the matching mean"),
    "ridge": Baseline(ridge, "ridge"),
}


def register_baseline(
    name: str, function: Callable[[TrainingEffects, Sequence[Indices]], np.ndarray], words: str = ""
) -> None:
    """Hold models against another simple prediction, in every later `crlseq.evaluate` of this process.

    ``function(train, queries)`` gets `TrainingEffects` and tuples of indices of perturbations as in ``train.parts``, and
    returns finite changes (queries, genes) of mean expression. Sentences call it `words`. UsageError if the name is taken
    by one of crlseq's own.

    Examples
    --------
    >>> import crlseq
    >>> from crlseq.evaluation.baselines import BASELINES
    >>> crlseq.register_baseline("half", lambda train, queries: BASELINES["additive"].function(train, queries) / 2)
    >>> found = crlseq.evaluate(crlseq.load("RUN"))
    >>> bool((found.conditions["predictor"] == "half").any()), BASELINES.pop("half").words
    (True, 'half')
    """
    if name in OWN:
        raise UsageError(f"{name!r} is one of crlseq's own predictors.", "Choose another name.")
    BASELINES[name] = Baseline(function, words or name)


OWN = frozenset({*BASELINES, "model", "split_half", "interpolated_duplicate", "dynamic_range", "sampling_floor"})
