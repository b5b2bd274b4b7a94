"""Baselines worked out by hand on few cells, and what they recover of noisy ones."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import ttest_ind

from crlseq.evaluation.baselines import (
    BASELINES,
    TrainingEffects,
    additive,
    batch_shares,
    control_moments,
    group_moments,
    halves,
    matching_mean,
    predict,
    ridge,
    shrunk_additive,
    training_effects,
)
from crlseq.evaluation.truth import welch

CONDITIONS = ((), (0,), (1,), (2,), (0, 1), (3,))


def effects(rows: dict[tuple[int, ...], list[float]]) -> TrainingEffects:
    effect = np.array(list(rows.values()))
    return TrainingEffects(tuple(rows), effect, np.stack([effect, effect]))


SINGLES = effects({(0,): [1.0, 0, 0], (1,): [0.0, 2, 0], (2,): [0.0, 0, 6]})


def test_moments_of_groups() -> None:
    x = np.array([[1.0, 0], [3.0, 0], [5.0, 4], [9.0, 9]])
    for cells in (x, sp.csr_matrix(x)):
        found = group_moments(cells, np.array([0, 0, 2, -1]), 3)
        assert found.mean.tolist() == [[2, 0], [0, 0], [5, 4]]
        assert found.variance.tolist() == [[2, 0], [0, 0], [0, 0]]
        assert found.n.tolist() == [2, 0, 1]


def test_effects_are_against_controls_of_the_same_batches() -> None:
    # Controls: 0 in batch 0, 10 in batch 1. Condition 1 lies in batch 1 alone, condition 2 in both as 1 to 1,
    # condition 3 in batch 2, which has no controls: it takes all, whose mean is 5.
    x = np.array([[0.0], [0], [10], [10], [12], [14], [1], [11], [7], [9]])
    condition = np.array([0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    batch = np.array([0, 0, 1, 1, 1, 1, 0, 1, 2, 2])
    found = training_effects(x, condition, batch, CONDITIONS[:4], np.random.default_rng(0))
    assert found.parts == ((0,), (1,), (2,))
    assert found.effect.tolist() == [[3], [1], [3]]
    assert found.halves.mean(0).tolist() == [[3], [1], [3]]


def test_conditions_without_two_training_cells_are_no_part_of_any_baseline() -> None:
    x, condition = np.array([[0.0], [0], [2], [2], [9]]), np.array([0, 0, 1, 1, 2])
    found = training_effects(x, condition, np.zeros(5, dtype=int), CONDITIONS, np.random.default_rng(0))
    assert found.parts == ((0,),)
    assert predict(found, [(1,)])["mean"].tolist() == [[2]]
    assert predict(found, [(1,)])["additive"].tolist() == [[0]]


def test_halves_divide_every_condition() -> None:
    condition = np.array([0, 1, 1, 1, 1, 2, 2, 2])
    half = halves(condition, np.random.default_rng(0))
    assert np.bincount(condition, half).tolist() in ([0, 2, 1], [1, 2, 1])
    draws = {tuple(halves(condition, np.random.default_rng(seed))[1:5]) for seed in range(30)}
    assert len(draws) == 6  # every way to divide four


def test_additive_by_hand() -> None:
    found = additive(SINGLES, [(0, 1), (0, 1, 2), (1,), (1, 7), (7, 8)])
    assert found.tolist() == [[1, 2, 0], [1, 2, 6], [0, 2, 0], [0, 2, 0], [0, 0, 0]]


def test_additive_does_not_look_at_fitted_combinations() -> None:
    with_double = effects({(0,): [1.0, 0], (1,): [0.0, 1], (0, 1): [9.0, 9]})
    assert additive(with_double, [(0, 1)]).tolist() == [[1, 1]]


def test_shrunk_additive_by_hand() -> None:
    # Half the sum and half the mean (1, 2, 6) / 3 of all singles; the fitted double has no say.
    with_double = effects({(0,): [1.0, 0, 0], (1,): [0.0, 2, 0], (2,): [0.0, 0, 6], (0, 1): [99.0, 99, 99]})
    expected = [[1 / 2 + 1 / 6, 1 + 1 / 3, 1], [1 / 6, 1 / 3, 3 + 1], [1 / 6, 1 / 3, 1]]
    assert shrunk_additive(with_double, [(0, 1), (2,), (7,)]) == pytest.approx(np.array(expected))
    assert shrunk_additive(effects({(0, 1): [4.0]}), [(0, 1)]).tolist() == [[2]]


def test_matching_mean_by_hand() -> None:
    assert matching_mean(SINGLES, [(0, 1), (1,), (1, 7), (7, 8)]).tolist() == [
        [0.5, 1, 0], [0, 2, 0], [0, 2, 0], pytest.approx([1 / 3, 2 / 3, 2])
    ]  # fmt: skip
    with_double = effects({(0,): [1.0], (1,): [4.0], (0, 2): [7.0]})
    assert matching_mean(with_double, [(0, 1), (0, 2), (2,)]).tolist() == [[4], [7], [7]]


def test_mean_and_no_change_by_hand() -> None:
    found = predict(SINGLES, [(0, 1), (2,)])
    assert tuple(found) == tuple(BASELINES)
    assert found["no_change"].tolist() == [[0, 0, 0]] * 2
    assert found["mean"] == pytest.approx(np.array([[1 / 3, 2 / 3, 2]] * 2))


def test_ridge_without_noise_is_additive() -> None:
    # Equal halves say that nothing is noise, so that the smallest penalty is best: 2 of 2 + 0.001.
    assert ridge(SINGLES, [(0, 1), (2, 7)]) == pytest.approx(np.array([[1, 2, 0], [0, 0, 6]]), rel=1e-3)


def test_ridge_shrinks_what_halves_do_not_share() -> None:
    rng = np.random.default_rng(0)
    n, genes = 300, 8
    truth = rng.normal(size=(n, genes))
    rows = truth + 2 * rng.normal(size=(2, n, genes))  # variance 1 of effects, 2 of the noise of their mean
    train = TrainingEffects(tuple((i,) for i in range(n)), rows.mean(0), rows)
    found = ridge(train, train.parts)
    slope = (found * rows.mean(0)).sum() / (rows.mean(0) ** 2).sum()
    assert slope == pytest.approx(1 / 3, abs=0.06)  # the posterior mean's
    assert np.linalg.norm(found - truth) < 0.7 * np.linalg.norm(rows.mean(0) - truth)


def test_ridge_uses_fitted_combinations() -> None:
    # Two single effects that are nowhere measured alone, from three doubles.
    train = effects({(0, 1): [3.0], (0, 2): [4.0], (1, 2): [5.0]})
    assert ridge(train, [(0,), (1,), (2,)]) == pytest.approx(np.array([[1], [2], [3]]), rel=0.01)


def test_standard_errors_are_welchs() -> None:
    rng = np.random.default_rng(3)
    cells, controls = rng.normal(size=(7, 5)) + 1, 3 * rng.normal(size=(12, 5))
    measured = group_moments(cells, np.zeros(7, dtype=int), 1)
    own = control_moments(controls, np.zeros(12, dtype=int), 1)
    shares = batch_shares(own, np.zeros(7, dtype=int), np.zeros(7, dtype=int), 1)
    _, p_value = welch(measured, shares, own, measured.mean - own.mean[:1])
    assert p_value[0] == pytest.approx(ttest_ind(cells, controls, equal_var=False).pvalue)
