"""Axes: the consensus of slopes by hand, axes that one perturbation's second target does not turn, batches."""

from __future__ import annotations

import numpy as np

from crlseq.discovery.axes import alike, consensus, environment_means, exogenous_axes, shifts_outside
from tests.component_screens import component_screen


def slopes(*values: float, error: float = 0.01) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes towards program 1 of perturbations that all target program 0, with their variances and targets."""
    slope = np.stack([np.ones(len(values)), values], 1)
    return slope, np.full(slope.shape, error**2), np.zeros(len(values), dtype=int)


def test_means_of_environments_by_hand() -> None:
    y = np.array([[1.0, 0.0], [3.0, 2.0], [5.0, 7.0]])
    means = environment_means(y, np.array([0, 0, 2]), 3)
    np.testing.assert_allclose(means, [[2, 1], [0, 0], [5, 7]])


def test_one_second_target_among_four_does_not_move_the_consensus() -> None:
    found = consensus(*slopes(0.0, 0.01, 0.6, -0.01), p=2)
    assert abs(found.mean[0, 1]) < 0.01
    assert found.variance[0, 1] < 0.02**2


def test_two_perturbations_that_disagree_leave_both_in_doubt() -> None:
    found = consensus(*slopes(0.0, 0.6), p=2)
    assert 0.2 < found.mean[0, 1] < 0.4
    assert found.variance[0, 1] > 0.2**2


def test_a_single_perturbation_may_have_a_second_target() -> None:
    found = consensus(*slopes(0.3), p=2)
    np.testing.assert_allclose(found.mean[0, 1], 0.3, atol=1e-9)
    assert found.variance[0, 1] > 4 * 0.01**2
    np.testing.assert_allclose(found.variance[1], 1.0)  # no perturbation targets program 1


def test_perturbations_that_agree_have_the_error_of_their_mean() -> None:
    values = 0.2 + 0.01 * np.random.default_rng(0).standard_normal(400)
    found = consensus(*slopes(*values), p=2)
    assert abs(found.mean[0, 1] - 0.2) < 0.002
    assert 0.9 < found.variance[0, 1] / (0.01**2 / 400) < 2
    assert found.outliers < 0.02


def test_axes_of_a_screen_with_second_targets_lie_where_programs_do() -> None:
    plain, second = (component_screen(3, own=own, k=48) for own in (0.0, 0.3))
    for screen in (plain, second):
        center, axes = exogenous_axes(screen.y, screen.environment, screen.targets, 8)
        x = (screen.y - center) @ axes
        np.testing.assert_allclose(x[screen.environment == 0].mean(0), 0, atol=1e-9)
        np.testing.assert_allclose(x[screen.environment == 0].std(0), 1, atol=1e-9)
        correlation = np.corrcoef(x[screen.environment == 0].T) - np.eye(8)
        assert np.median(np.abs(correlation)) < 0.08  # exogenous programs are independent but for background


def test_shifts_outside_the_axes_tell_batches() -> None:
    found = []
    for batches in (0.0, 0.1):
        screen = component_screen(5, batches=batches)
        center, axes = exogenous_axes(screen.y, screen.environment, screen.targets, 8)
        found.append(shifts_outside(screen.y, (screen.y - center) @ axes, screen.environment))
    assert 0.6 < found[0] < 1.3
    assert found[1] > 4


def test_lines_that_are_nearly_one() -> None:
    lines = np.array([[1.0, 0.0, 0.0], [0.96, 0.28, 0.0], [0.0, 0.8, 0.6]])  # cosines .96, 0 and .224
    expected = np.zeros((3, 3), dtype=bool)
    expected[0, 1] = expected[1, 0] = True
    np.testing.assert_array_equal(alike(np.linalg.pinv(lines) * [1.0, -7.0, 0.2], 0.95), expected)
