"""What interventions change: the closed form from exact moments, calibrated errors, nothing under mere shifts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from crlseq.discovery.changes import MIN_CELLS, bend_of, measure_changes, retained
from crlseq.discovery.hits import Floats
from tests.component_screens import component_screen

CHAIN = np.zeros((3, 3))
CHAIN[0, 1], CHAIN[1, 2] = 0.8, -0.5
CONFOUNDED = np.array([[1.0, 0.0, 0.3], [0.0, 1.0, 0.0], [0.3, 0.0, 1.0]])
SHIFT = 1.5  # hit and escaped cells are not told apart, so that every cell counts the same


def exactly(rng: np.random.Generator, mean: Floats, covariance: Floats, n: int) -> Floats:
    """Cells (n, p) whose sample has this mean and covariance to the last digit."""
    z = rng.standard_normal((n, len(mean)))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / n).T)
    return mean + z @ np.linalg.cholesky(covariance).T


def exogenous(graph: Floats, omega: Floats, target: int | None, kept: float) -> Floats:
    """Covariance of x = u (I - G) where ``target`` receives a share ``kept`` of what its parents give, and, if that is
    nothing, has noise of its own.
    """
    p = len(graph)
    own, noise = graph.copy(), omega.copy()
    if target is not None:
        own[:, target] *= kept
        if kept == 0:
            noise[target] = noise[:, target] = 0
            noise[target, target] = 0.5
    to_x = np.linalg.inv(np.eye(p) - own) @ (np.eye(p) - graph)
    covariance: Floats = to_x.T @ noise @ to_x
    return covariance


@pytest.mark.parametrize("omega", [np.eye(3), CONFOUNDED])
@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
def test_changes_of_exact_moments_are_those_of_the_closed_form(omega: Floats, kept: float) -> None:
    rng = np.random.default_rng(0)
    cells = [exactly(rng, np.zeros(3), exogenous(CHAIN, omega, None, 1.0), 500)]
    cells += [exactly(rng, SHIFT * np.eye(3)[i], exogenous(CHAIN, omega, i, kept), 400) for i in range(3)]
    environment = np.repeat(np.arange(4), [len(part) for part in cells])
    found = measure_changes(np.concatenate(cells), environment, np.arange(3))
    total = np.linalg.inv(np.eye(3) - CHAIN)
    expected = -omega @ (total if kept == 0 else (1 - kept) * (total - np.eye(3)))
    for i in range(3):
        others = [k for k in range(3) if k != i]
        np.testing.assert_allclose(found.by_target[i][0].value[others], expected[others, i], atol=1e-9)
    np.testing.assert_allclose(found.correlation, omega - np.eye(3), atol=1e-9)


def test_a_chain_by_hand() -> None:
    rng = np.random.default_rng(1)
    cells = [exactly(rng, np.zeros(3), np.eye(3), 500)]
    cells += [exactly(rng, SHIFT * np.eye(3)[i], exogenous(CHAIN, np.eye(3), i, 0.0), 400) for i in range(3)]
    found = measure_changes(np.concatenate(cells), np.repeat(np.arange(4), [500, 400, 400, 400]), np.arange(3))
    shown = np.stack([found.by_target[i][0].value for i in range(3)], 1)
    np.testing.assert_allclose(shown[~np.eye(3, dtype=bool)], [-0.8, 0.4, 0, 0.5, 0, 0], atol=1e-9)


def test_what_a_perturbation_retains_of_what_the_others_take() -> None:
    rng = np.random.default_rng(0)
    shares = {1: [0.0, 0.0, 0.5, 1.0], 2: [0.0], 0: [0.0, 0.0]}  # of their parents' effect, by target
    cells = [exactly(rng, np.zeros(3), np.linalg.inv(np.eye(3) - CHAIN).T @ np.linalg.inv(np.eye(3) - CHAIN), 20_000)]
    targets = [i for i, kept in shares.items() for _ in kept]
    for i, kept in shares.items():
        for share in kept:
            graph = CHAIN.copy()
            graph[:, i] *= share
            total = np.linalg.inv(np.eye(3) - graph)
            cells.append(exactly(rng, SHIFT * total[i], total.T @ total, 2_000))
    environment = np.repeat(np.arange(len(cells)), [len(own) for own in cells])
    x = np.vstack(cells) @ (np.eye(3) - CHAIN)
    found = retained(measure_changes(x, environment, np.array(targets)))
    assert set(found) == {0, 1, 2, 3}  # one has no other beside it, and a root loses nothing
    for c, expected in enumerate([0.0, 0.0, 0.5, 1.0]):
        share, error = found[c]
        assert share == pytest.approx(expected, abs=3 * error)
        assert error < 0.15


@pytest.mark.parametrize("options", [{}, {"kept": 0.5}, {"kept": 1.0}, {"own": 0.3}])
def test_errors_are_calibrated(options: dict[str, float]) -> None:
    z = []
    for seed in range(20, 26):
        screen = component_screen(seed, n=150, n_control=1500, **options)  # type: ignore[arg-type]
        found = screen.changes()
        none = ~screen.upstream & ~np.eye(8, dtype=bool) & np.isfinite(found.e_error)
        z.append((found.e / found.e_error)[none])
    assert 0.82 < np.std(np.concatenate(z)) < 1.15


def test_hit_cells_alone_show_the_whole_change_whatever_share_is_hit() -> None:
    screen = component_screen(31)
    found = screen.changes()
    total = np.linalg.inv(np.eye(8) - screen.graph)
    strong = screen.upstream & (np.abs(total) > 0.5) & (found.e_error < 0.1)
    assert strong.sum() > 3
    ratio = -found.e[strong] / total[strong]  # less than 1 by the background that the coordinates hold
    assert 0.6 < np.median(ratio) < 1.05


def test_weak_and_small_perturbations_say_nothing() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((400 + MIN_CELLS - 1 + 50, 2))
    x[400 : 400 + MIN_CELLS - 1, 0] += 4  # strong, of too few cells
    x[-50:] -= x[-50:].mean(0)  # no shift at all
    environment = np.repeat([0, 1, 2], [400, MIN_CELLS - 1, 50])
    found = measure_changes(x, environment, np.array([0, 1]))
    assert found.by_target == [[], []]
    assert np.isinf(found.e_error[0, 1])
    assert np.isinf(found.e_error[1, 0])
    assert not found.e.any()


def test_order_and_sign_of_programs_do_not_matter() -> None:
    screen = component_screen(7, n=150, n_control=1000, p=4, k=12)
    found = screen.changes()
    order = np.array([2, 0, 3, 1])
    moved = type(screen)(screen.y, screen.environment, np.argsort(order)[screen.targets], screen.graph).changes()
    np.testing.assert_allclose(np.abs(moved.e), np.abs(found.e[np.ix_(order, order)]), atol=1e-6)
    np.testing.assert_allclose(moved.e_error, found.e_error[np.ix_(order, order)], rtol=1e-5)


def test_a_program_without_perturbations_is_unknown() -> None:
    screen = component_screen(8, n=150, n_control=1000, p=4, k=12)
    kept = screen.targets[screen.environment[screen.environment > 0] - 1] != 2
    rows = np.concatenate([np.flatnonzero(screen.environment == 0), np.flatnonzero(screen.environment > 0)[kept]])
    own = np.flatnonzero(screen.targets != 2)
    number = np.zeros(len(screen.targets) + 1, dtype=int)
    number[own + 1] = np.arange(1, len(own) + 1)
    left = type(screen)(screen.y[rows], number[screen.environment[rows]], screen.targets[own], screen.graph)
    found = left.changes()
    assert np.isinf(found.e_error[2]).all()
    assert np.isinf(found.e_error[[0, 1, 3], 2]).all()
    assert np.isfinite(found.e_error[0, 1])
    assert np.isfinite(found.e).all()


@pytest.mark.parametrize(
    ("z", "bend"),
    [
        (1.0, 1.0),
        (1.3, 1.0),  # (3 * 1.69 + 20) / 23 = 1.0900 = 1.044^2: by chance
        (3.0, np.sqrt((3 * 9 + 20) / 23)),  # 1.4295
        (9.0, 1.5),  # one z counts as 4 at most, sqrt(68 / 23) = 1.72, and that is the most
    ],
)
def test_the_bend_is_what_covariances_that_nothing_changes_differ_by(z: float, bend: float) -> None:
    """Three programs: under do(i) there is one covariance beside x_i, that of the two others."""
    found = component_screen(0, p=3, k=6).changes()
    beside = np.zeros((3, 3, 3))
    for i, (j, k) in enumerate([(1, 2), (0, 2), (0, 1)]):
        beside[i, j, k] = beside[i, k, j] = -z
        beside[i, j, j] = beside[i, k, k] = 50.0  # variances have no part
    assert bend_of(replace(found, beside=beside)) == pytest.approx(bend)


def test_straight_coordinates_have_no_bend_and_bent_ones_have() -> None:
    screen = component_screen(3)
    assert bend_of(screen.changes()) == 1.0
    bent = replace(screen, y=screen.y + 0.1 * (screen.y**2) @ np.roll(np.eye(screen.y.shape[1]), 1, 0))
    assert bend_of(bent.changes()) > 1.15
