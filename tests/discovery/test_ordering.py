"""The order of programs over bootstrap replicates."""

from __future__ import annotations

import numpy as np
import pytest

from crlseq.discovery import ordering as ordering_module
from crlseq.discovery.ordering import Ints, Ordering, order_programs, with_support

Screen = tuple[np.ndarray, Ints, Ints]


@pytest.fixture(scope="module")
def screen() -> Screen:
    """Programs 0 -> 1 and 2 alone, six hard interventions on each, all cells hit."""
    rng = np.random.default_rng(5)
    targets = np.repeat(np.arange(3), 6)
    environment = np.repeat(np.arange(19), [1500, *[250] * 18])
    z = rng.normal(size=(len(environment), 3))
    u = z.copy()
    u[:, 1] += 0.8 * z[:, 0]
    shift = np.tile([1.5, -1.5, 2.5, -2.5, 4.0, -4.0], 3)
    for c, (i, a) in enumerate(zip(targets, shift, strict=True)):
        own = environment == c + 1
        u[own, i] = 0.7 * z[own, i] + a
        if i == 0:
            u[own, 1] = z[own, 1] + 0.8 * u[own, 0]
    mixing = rng.normal(size=(3, 5))
    return u @ mixing + 0.1 * rng.normal(size=(len(u), 5)), environment, targets


@pytest.fixture(scope="module")
def ordering(screen: Screen) -> Ordering:
    return order_programs(*screen, 3)


def test_support_counts_replicates_that_find_the_pair_and_the_edge_again(screen: Screen, ordering: Ordering) -> None:
    found = with_support(ordering, ordering.exogenous(screen[0]), *screen[1:], n=6, seed=0, threads=1)
    assert found.ancestor[0, 1] >= 5 / 6 and found.support[0, 1] >= 5 / 6
    assert (found.support <= found.ancestor).all()  # an edge is declared between programs whose order is shown
    others = ~np.eye(3, dtype=bool)
    others[0, 1] = False
    assert found.ancestor[others].max() <= 1 / 6
    assert np.allclose(found.ancestor * 6, np.round(found.ancestor * 6))
    again = with_support(ordering, ordering.exogenous(screen[0]), *screen[1:], n=6, seed=0, threads=2)
    np.testing.assert_array_equal(again.ancestor, found.ancestor)


def test_support_follows_the_programs_into_another_order(screen: Screen, ordering: Ordering) -> None:
    found = with_support(ordering, ordering.exogenous(screen[0]), *screen[1:], n=2, seed=1, threads=1)
    moved = found.reordered(np.array([2, 0, 1]))
    assert moved.ancestor[1, 2] == found.ancestor[0, 1] and moved.support[1, 2] == found.support[0, 1]


def test_without_replicates_support_is_unknown(screen: Screen, ordering: Ordering) -> None:
    found = with_support(ordering, ordering.exogenous(screen[0]), *screen[1:], n=0, seed=0, threads=1)
    assert np.isnan(found.ancestor).all() and np.isnan(found.support).all()


def test_errors_are_widened_where_straightened_cells_are_bent(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering_module, "bend_of", lambda found: 1.4)
    straight, bent = order_programs(*screen, 3), order_programs(*screen, 3, straightened=True)
    assert (straight.bend, bent.bend) == (None, 1.4)
    reverse = 0.1 * np.abs(straight.pairs.change.T)  # what bends feign
    np.testing.assert_allclose(bent.pairs.error, np.hypot(1.4 * straight.pairs.error, reverse))
    np.testing.assert_array_equal(bent.pairs.change, straight.pairs.change)


def test_changes_have_the_signs_of_a_read_out(screen: Screen) -> None:
    y = screen[0]
    truth = np.linalg.lstsq(y - y.mean(0), _programs(screen), rcond=None)[0]
    for flip in ([1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]):
        found = order_programs(*screen, 3, readout=truth * flip)
        assert np.sign(found.pairs.change[0, 1]) == np.sign(0.8 * flip[0] * flip[1])
        assert (np.diag(found.axes.T @ np.cov(y.T) @ truth) * flip > 0).all()


def _programs(screen: Screen) -> np.ndarray:
    """Shifts of all cells' programs, up to what no mean shows: projections on the mean shift of each program's strongest."""
    y, environment, _ = screen
    control = y[environment == 0].mean(0)
    lines = np.stack([y[environment == c + 1].mean(0) - control for c in np.flatnonzero(np.arange(18) % 6 == 4)])
    u: np.ndarray = (y - control) @ np.linalg.pinv(lines)
    return u
