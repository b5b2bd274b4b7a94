"""Train, validation and held-out cells, drawn within every condition."""

from __future__ import annotations

import numpy as np

SPLITS = ("unused", "train", "validation", "test")
UNUSED, TRAIN, VALIDATION, TEST = range(4)

MIN_CELLS = 2  # an unbiased MMD needs two cells a side, so a split never leaves or takes fewer


def split_cells(
    condition: np.ndarray,
    fitted: np.ndarray,
    held_out: np.ndarray,
    validation: float,
    test: float,
    rng: np.random.Generator,
    shuffled: bool = False,
) -> np.ndarray:
    """One code of `SPLITS` for every cell, given its condition (below 0: dropped).

    Cells of `fitted` conditions (conditions,) are divided; those of `held_out` ones are all test cells; others are
    unused. `validation` and `test` are shares of a fitted condition's cells; one that comes to fewer than two cells, or
    leaves fewer than two to train on, is not taken. Conditions are visited in order, so one seed gives one split. Where
    cells of a condition lie `shuffled`, a stretch of them is as good as a draw, and is read at once.
    """
    split = np.zeros(len(condition), dtype=np.int8)
    order = np.argsort(condition, kind="stable")
    bounds = np.searchsorted(condition[order], np.arange(len(fitted) + 1))
    for c in range(len(fitted)):
        cells = order[bounds[c] : bounds[c + 1]]
        if held_out[c]:
            split[cells] = TEST
        elif fitted[c]:
            split[cells] = TRAIN
            drawn, taken = in_random_order(cells, rng, shuffled), 0
            for share, code in ((test, TEST), (validation, VALIDATION)):
                n = round(share * len(cells))
                if min(n, len(cells) - taken - n) >= MIN_CELLS:
                    split[drawn[taken : taken + n]] = code
                    taken += n
    return split


def in_random_order(cells: np.ndarray, rng: np.random.Generator, shuffled: bool) -> np.ndarray:
    """Cells permuted; or, where they lie in random order already, begun at a random one, so that runs stay runs."""
    return np.roll(cells, -int(rng.integers(len(cells)))) if shuffled and len(cells) else rng.permutation(cells)
