"""What a screen finds where there is nothing: control cells in the place of perturbed ones.

Control cells are split at random into pseudo-perturbations, as large as the real ones and as many as leave half of the
controls, and go through the test of effects. Half of them, moved by the mean shifts of real perturbations and in the
share of cells that these hit, go through the order of programs: mere shifts order nothing. What is found is chance.

Where no perturbation has an effect, pseudo-perturbations that were shifted tell which effect would have been found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.discovery.effects import MOMENT_COMPONENTS, effect_tests
from crlseq.discovery.hits import Floats
from crlseq.discovery.ordering import Ints, Ordering, order_programs
from crlseq.storage.stage_cache import cached_on_disk
from crlseq.threads import counted

ENOUGH = 40  # pseudo-perturbations, over repeats
MAX_REPEATS, PAIR_REPEATS = 20, 5
MIN_CELLS = 20  # of a pseudo-perturbation
FDR = 0.05
SIZES = tuple(0.25 * 2 ** (i / 2) for i in range(9))  # of shifts: 0.25 to 4 standard deviations
TRIALS, POWER = 20, 0.8


@cached_on_disk()
@dataclass(frozen=True)
class Found:
    """So many of so many."""

    found: int
    of: int


@cached_on_disk()
@dataclass(frozen=True)
class Sensitivity:
    """Cells of a perturbation (median), control cells, and the smallest of `SIZES` that is detected in `POWER` of
    perturbations of so many cells; None where none of them is, or cells are too few to try.
    """

    n_cells: int
    n_control: int
    shift: float | None


def sensitivity(data: PerturbSeqData, scores: np.ndarray, seed: int) -> Sensitivity:
    """What `crlseq.discovery.effects.effect_tests` would have found, by control cells that are shifted.

    A shift by d has the length d in the standard deviations of control cells along the leading components, and a random
    direction there. It counts as detected if p is at most `FDR`, as where all perturbations have such an effect.
    """
    cells = data.cells_by_condition(splits.TRAIN, splits.VALIDATION)
    controls, n = cells[0], int(np.median([len(own) for own in cells[1:] if len(own)]))
    size = min(n, len(controls) // 2)
    spread = scores[controls].std(0)[:MOMENT_COMPONENTS]
    q, moved, (low, high) = len(spread), scores.copy(), (0, len(SIZES))
    while size >= MIN_CELLS and low < high:  # the least that is detected, by bisection
        middle = (low + high) // 2
        detected = 0
        for i in counted(range(TRIALS), TRIALS):
            rng = np.random.default_rng([seed, 19, i])
            drawn, direction = rng.permutation(controls)[:size], rng.standard_normal(q)
            moved[drawn, :q] += SIZES[middle] * spread * direction / np.linalg.norm(direction)
            detected += int(effect_tests(_pseudo(data, [drawn]), moved, seed + i)["p_value"][0] <= FDR)
            moved[drawn] = scores[drawn]
        low, high = (low, middle) if detected >= POWER * TRIALS else (middle + 1, high)
    return Sensitivity(n, len(controls), SIZES[low] if size >= MIN_CELLS and low < len(SIZES) else None)


def _pseudo(data: PerturbSeqData, drawn: list[np.ndarray]) -> PerturbSeqData:
    """The control cells alone, of which each array of `drawn` ones carries a perturbation."""
    condition = np.where(np.isin(data.condition, (-1, 0)), data.condition, -1)
    for k, own in enumerate(drawn):
        condition[own] = k + 1
    names = tuple(f"pseudo{k}" for k in range(len(drawn)))
    return replace(
        data, condition=condition, conditions=((), *((k,) for k in range(len(drawn)))),
        condition_names=(data.condition_names[0], *names), perturbation_names=names,
    )  # fmt: skip


def undone_effects(data: PerturbSeqData, scores: np.ndarray, seed: int) -> Found:
    """Pseudo-perturbations with a detected effect; ``scores`` as in `crlseq.discovery.effects.effect_tests`."""
    cells = data.cells_by_condition(splits.TRAIN, splits.VALIDATION)
    controls, sizes = cells[0], [len(own) for own in cells[1:] if len(own)]
    size = min(int(np.median(sizes)) if sizes else 0, len(controls) // 2)
    if size < MIN_CELLS:
        return Found(0, 0)
    m = min(len(sizes), max(1, len(controls) // 2 // size))
    repeats, found = min(MAX_REPEATS, -(-ENOUGH // m)), 0
    for i in counted(range(repeats), repeats):
        drawn = np.random.default_rng([seed, 13, i]).permutation(controls)
        pseudo = _pseudo(data, [drawn[k * size : (k + 1) * size] for k in range(m)])
        found += int((effect_tests(pseudo, scores, seed + i)["fdr"] <= FDR).sum())
    return Found(found, repeats * m)


def ordered_shifts(y: Floats, environment: Ints, targets: Ints, p: int, ordering: Ordering, seed: int) -> Found:
    """Pairs that mere shifts of control cells order: the strongest shift of each program, on cells of their own.

    Arguments as in `crlseq.discovery.ordering.order_programs`, and what it found.
    """
    controls = np.flatnonzero(environment == 0)
    n = np.bincount(environment, minlength=len(targets) + 1)[1:]
    size = min(int(np.median(n)), len(controls) // 2 // p)
    if size < MIN_CELLS:
        return Found(0, 0)
    shift = np.stack([y[environment == c + 1].mean(0) for c in range(len(targets))]) - ordering.center
    along = np.abs((shift @ ordering.axes)[np.arange(len(targets)), targets])
    strongest = [int(np.flatnonzero(targets == i)[along[targets == i].argmax()]) for i in range(p)]
    found = 0
    for repeat in counted(range(PAIR_REPEATS), PAIR_REPEATS):
        rng = np.random.default_rng([seed, 17, repeat])
        drawn = rng.permutation(controls)
        moved, own = [y[drawn[p * size :]]], [np.zeros(len(drawn) - p * size, dtype=np.int64)]
        for i, c in enumerate(strongest):
            share = ordering.hits[c].share if c in ordering.hits else 1.0
            hit = rng.random(size) < share
            moved.append(y[drawn[i * size : (i + 1) * size]] + hit[:, None] * shift[c] / share)
            own.append(np.full(size, i + 1))
        pairs = order_programs(np.concatenate(moved), np.concatenate(own), np.arange(p), p).pairs
        found += int(pairs.have("upstream", "likely").sum())
    return Found(found, PAIR_REPEATS * p * (p - 1))
