"""Pairs that are called whatever is left out."""

from __future__ import annotations

import numpy as np
import pytest

from crlseq.discovery.ordering import Ordering, order_programs
from crlseq.discovery.robustness import robust_pairs
from tests.component_screens import Screen, component_screen


@pytest.fixture(scope="module")
def screen() -> Screen:
    return component_screen(2)


@pytest.fixture(scope="module")
def ordering(screen: Screen) -> Ordering:
    return order_programs(screen.y[:, :16], screen.environment, screen.targets, 8)


def test_true_pairs_survive(screen: Screen, ordering: Ordering) -> None:
    called = ordering.pairs.have("upstream", "likely")
    robust = robust_pairs(ordering, screen.y, screen.environment, screen.targets, None, 1)
    assert not (robust & ~called).any() and robust.sum() >= 3
    assert (screen.upstream[robust]).all()
    guide = np.arange(len(screen.y)) % 4
    halves = robust_pairs(ordering, screen.y, screen.environment, screen.targets, guide, 1)
    assert not (halves & ~robust).any()


def test_a_pair_that_hangs_on_one_guide_is_not_robust(screen: Screen, ordering: Ordering) -> None:
    """One of two guides of every perturbation only shifts: its half does not show the cut."""
    pairs = ordering.pairs.have("upstream", "likely")
    k, i = np.argwhere(pairs)[0]
    guide, y = np.arange(len(screen.y)) % 2, screen.y.copy()
    control = y[screen.environment == 0]
    rng = np.random.default_rng(0)
    for c in np.flatnonzero(screen.targets == i):
        own = np.flatnonzero((screen.environment == c + 1) & (guide == 1))
        mean = y[screen.environment == c + 1].mean(0) - control.mean(0)
        y[own] = control[rng.choice(len(control), len(own))] + mean
    again = order_programs(y, screen.environment, screen.targets, 8)
    assert again.pairs.have("upstream", "likely")[k, i]
    assert robust_pairs(again, y, screen.environment, screen.targets, None, 1)[k, i]
    assert not robust_pairs(again, y, screen.environment, screen.targets, guide, 1)[k, i]


def test_threads_change_nothing(screen: Screen, ordering: Ordering) -> None:
    one, two = (robust_pairs(ordering, screen.y, screen.environment, screen.targets, None, n) for n in (1, 2))
    assert np.array_equal(one, two)
