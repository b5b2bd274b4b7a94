"""Metrics against values worked out by hand, against SciPy and scikit-learn, and what they must not depend on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import pearsonr
from sklearn.metrics import mean_squared_error, pairwise_distances, r2_score
from sklearn.metrics.pairwise import rbf_kernel

from crlseq.evaluation.metrics import (
    Rivals,
    Sample,
    centroid_accuracy,
    de_score,
    dynamic_range,
    gene_weights,
    l2_distance,
    legacy_scores,
    mean_absolute_error,
    pearson_delta,
    perturbation_discrimination,
    r2_delta,
    rmse,
    sign_agreement,
    two_samples,
    weighted_mse,
    weighted_r2_delta,
)


def unbiased_mmd(a: np.ndarray, b: np.ndarray, bandwidth: float) -> float:
    return two_samples(Sample(a), Sample(b), bandwidth)[0]


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    return two_samples(Sample(a), Sample(b), 1.0)[1]


def test_pearson_delta_by_hand():
    control = np.array([1.0, 1.0, 1.0])
    # changes (1, 0, -1) and (2, 0, -2) agree fully; (1, 0, -1) and (0, 1, -1) at one half
    assert pearson_delta(np.array([2.0, 1, 0]), np.array([3.0, 1, -1]), control) == pytest.approx(1)
    assert pearson_delta(np.array([2.0, 1, 0]), np.array([1.0, 2, 0]), control) == pytest.approx(0.5)
    assert np.isnan(pearson_delta(control, np.array([3.0, 1, -1]), control))


def test_pearson_delta_of_a_change_that_is_a_rounding_error_is_undefined():
    control, measured = np.array([0.1, 0.7, 1.3]), np.array([1.0, 0.2, 3.0])
    nearly = (control + 0.3) - 0.3
    assert (nearly != control).any()
    assert np.isnan(pearson_delta(nearly, measured, control))


def test_pearson_delta_equals_scipy():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 50))
    assert pearson_delta(a, b, c) == pytest.approx(pearsonr(a - c, b - c).statistic)


def test_distances_by_hand():
    assert l2_distance(np.array([3.0, 0]), np.array([0.0, 4])) == 5
    assert rmse(np.array([3.0, 0]), np.array([0.0, 4])) == pytest.approx(5 / np.sqrt(2))


def test_r2_of_changes_is_not_clipped():
    control, measured = np.array([1.0, 1, 1]), np.array([2.0, 3, 4])  # changes 1, 2, 3: sum of squares about 2 is 2
    assert r2_delta(measured, measured, control) == 1
    assert r2_delta(control, measured, control) == 1 - 14 / 2
    assert r2_delta(np.array([2.0, 3, 3]), measured, control) == 0.5
    assert np.isnan(r2_delta(measured, control + 1, control))
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 30))
    assert r2_delta(a, b, c) == pytest.approx(r2_score(b - c, a - c))


def test_sign_agreement_by_hand():
    control = np.zeros(4)
    predicted, measured = np.array([1.0, -1, 0, 5]), np.array([2.0, 3, 1, -1])
    assert sign_agreement(predicted, measured, control, np.array([True, True, False, False])) == 0.5
    assert sign_agreement(predicted, measured, control, np.array([True, False, True, False])) == 0.5  # 0 has no sign
    assert np.isnan(sign_agreement(predicted, measured, control, np.zeros(4, dtype=bool)))


def test_centroid_accuracy_by_hand():
    measured = np.array([[0.0], [1.0], [5.0]])
    predicted = np.array([[0.1], [4.0], [2.5]])
    # 4 is 3 from its own 1; 0 is farther and 5 nearer. 2.5 is 2.5 from its own 5: 0 is as far, 1 nearer.
    assert centroid_accuracy(predicted, measured).tolist() == [1, 0.5, 0]
    assert np.isnan(centroid_accuracy(predicted[:1], measured[:1])).all()


def test_discrimination_by_hand():
    measured = np.array([[0.0, 9], [1.0, 0], [5.0, 0]])
    predicted = np.array([[0.9, 9], [4.0, 0], [5.0, 0]])
    nothing = np.zeros((3, 2), dtype=bool)
    # 4 is nearest to 5, then to its own 1: rank 1 of 3
    assert perturbation_discrimination(predicted, measured, nothing) == pytest.approx([1, 2 / 3, 1])
    target = np.array([[False, True], [False, False], [False, False]])
    # without its target gene, 0.9 is nearer to 1 than to its own 0
    assert perturbation_discrimination(predicted, measured, target) == pytest.approx([2 / 3, 2 / 3, 1])
    assert np.isnan(perturbation_discrimination(predicted[:1], measured[:1], nothing[:1])).all()


def test_weights_by_hand():
    # |t| of 1, 2 and 5: (0, 1/4, 1) squared
    assert gene_weights(np.array([-1.0, 2, 5])) == pytest.approx([0, 1 / 16, 1])
    assert gene_weights(np.array([[3.0, -3, 3], [0, 0, 1]])).tolist() == [[0, 0, 0], [0, 0, 1]]  # alike: no weights


def test_weighted_metrics_by_hand():
    predicted, measured, weights = np.array([1.0, 2, 9]), np.array([3.0, 2, 1]), np.array([1.0, 3, 0])
    assert weighted_mse(predicted, measured, weights) == 1  # (1 x 4 + 3 x 0) / 4
    # changes 2, 0, 5 against (1, 2, -4): weighted mean 1/2, spread 1 x 9/4 + 3 x 1/4 = 3, left 4
    assert weighted_r2_delta(predicted, measured, np.array([1.0, 2, -4]), weights) == pytest.approx(1 - 4 / 3)
    assert weighted_r2_delta(measured, measured, np.zeros(3), weights) == 1
    assert np.isnan(weighted_mse(predicted, measured, 0 * weights))
    assert np.isnan(weighted_r2_delta(predicted, measured, measured - 1, weights))  # one change for all genes


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_weighted_metrics_are_those_of_scikit_learn(seed: int, scale: float):
    rng = np.random.default_rng(seed)
    predicted, measured, reference = rng.normal(size=(3, 4, 12))
    weights = gene_weights(rng.normal(size=(4, 12)))
    rows = list(zip(predicted, measured, reference, weights, strict=True))
    mse = [mean_squared_error(m, p, sample_weight=w) for p, m, _, w in rows]
    r2 = [r2_score(m - r, p - r, sample_weight=w) for p, m, r, w in rows]
    assert weighted_mse(predicted, measured, scale * weights) == pytest.approx(mse)
    assert weighted_r2_delta(predicted, measured, reference, scale * weights) == pytest.approx(r2)
    alike = np.ones_like(weights)
    assert weighted_r2_delta(predicted, measured, reference, alike) == pytest.approx(
        r2_delta(predicted, measured, reference)
    )


def test_the_mean_of_all_perturbations_has_no_weighted_r2():
    """The paper's reason for it: what predicts the same for all conditions is at 0 or below, however near in all genes."""
    rng = np.random.default_rng(7)
    mean = rng.normal(size=50)
    measured = np.tile(mean, (8, 1))
    measured[np.arange(8), np.arange(8)] += 2  # one gene each
    weights = gene_weights(measured - mean + 0.01 * rng.normal(size=measured.shape))
    assert (weighted_r2_delta(np.tile(mean, (8, 1)), measured, mean, weights) <= 0).all()
    assert (pearson_delta(np.tile(mean, (8, 1)), measured, 0 * mean) > 0.9).all()


def test_mean_absolute_error_by_hand():
    assert mean_absolute_error(np.array([[3.0, 0], [1, 1]]), np.array([[0.0, 4], [1, 1]])).tolist() == [3.5, 0]


def test_de_score_by_hand():
    significant = np.array([[True, True, False, False]] * 3 + [[False] * 4])
    strength = np.array([[1, 9, 2, 0], [0.1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    # the two greatest of row 0 are genes 1 and 2, of which one is significant; a change of 0 is not called
    assert de_score(strength, significant) == pytest.approx([0.5, 0.5, 0, np.nan], nan_ok=True)


def test_de_score_is_the_overlap_of_cell_eval():
    """Its ``overlap_at_N`` (cell-eval 0.8.2): lists by falling |fold change|, cut at the number of significant genes."""
    rng = np.random.default_rng(5)
    measured, predicted = rng.normal(size=(2, 7, 30))
    significant = np.abs(measured) > 1
    expected = []
    for i in range(7):
        real = np.flatnonzero(significant[i])[np.argsort(-np.abs(measured[i, significant[i]]))]
        called = np.argsort(-np.abs(predicted[i]))
        k = len(real)
        expected.append(np.intersect1d(real[:k], called[:k]).size / k)
    assert de_score(np.abs(predicted), significant) == pytest.approx(expected)


def test_dynamic_range_by_hand():
    score, worst = np.array([0.8, 0.1, -3.0, 1.0]), np.array([0.5, 0.5, 0.5, 1.0])
    # 0.3 of the 0.5 up to 1; -0.8; far below: -1; no room
    assert dynamic_range(score, worst, 1.0) == pytest.approx([0.6, -0.8, -1, np.nan], nan_ok=True)
    assert dynamic_range(np.array([1.0, 6.0]), np.array([4.0, 4.0]), 0.0).tolist() == [0.75, -0.5]  # of an error


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_ranks_among_some_are_those_without_the_others(seed: int):
    rng = np.random.default_rng(seed)
    predicted, measured = rng.normal(size=(2, 6, 5))
    left_out = [np.array([i % 5]) for i in range(6)]
    kept = np.array([0, 2, 5])
    rivals = Rivals(measured[kept], kept == np.arange(6)[:, None])
    some = (
        centroid_accuracy(predicted, measured, rivals),
        perturbation_discrimination(predicted, measured, left_out, rivals),
    )
    for i in range(6):
        rows = np.unique([i, *kept])
        place = int(np.flatnonzero(rows == i)[0])
        part = predicted[rows], measured[rows]
        assert some[0][i] == centroid_accuracy(*part)[place]
        assert some[1][i] == perturbation_discrimination(*part, [left_out[j] for j in rows])[place]


def test_metrics_of_many_conditions_are_those_of_each():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 4, 9))
    for metric in (pearson_delta, r2_delta):
        assert metric(a, b, c) == pytest.approx([metric(*rows) for rows in zip(a, b, c, strict=True)])
    for metric in (l2_distance, rmse):
        assert metric(a, b) == pytest.approx([metric(*rows) for rows in zip(a, b, strict=True)])


def test_mmd_by_hand():
    a = np.array([[0.0], [1.0]])
    # each side has the pair at distance 1; between them two pairs at 0 and two at 1
    k = sum(np.exp(-1 / (2.0 * 2.0 ** (i - 2))) for i in range(5))
    assert unbiased_mmd(a, a, 2.0) == pytest.approx(2 * k - 2 * (2 * 5 + 2 * k) / 4)


def test_energy_distance_by_hand():
    a, b = np.array([[0.0], [2.0]]), np.array([[10.0], [12.0]])
    assert energy_distance(a, b) == pytest.approx(2 * 10 - 2 - 2)
    assert energy_distance(a, a) == pytest.approx(2 * 1 - 2 - 2)


def test_mmd_of_shifted_cells_grows_with_the_shift():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 100, 3))
    values = [unbiased_mmd(a, b + shift, 6.0) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert abs(values[0]) < 0.05 < values[3]


def test_both_distances_are_0_on_average_without_a_difference():
    rng = np.random.default_rng(1)
    found = [two_samples(*(Sample(rng.normal(size=(6, 2))) for _ in range(2)), 4.0) for _ in range(400)]
    error = np.std(found, axis=0) / np.sqrt(len(found))
    assert (np.abs(np.mean(found, axis=0)) < 4 * error).all()


def test_two_samples_by_shared_distances():
    rng = np.random.default_rng(2)
    a, b, change = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 1, rng.normal(size=3)
    moved = Sample(a).moved(change)
    assert two_samples(moved, Sample(b), 3.0) == pytest.approx(
        (unbiased_mmd(a + change, b, 3.0), energy_distance(a + change, b))
    )


def test_legacy_scores_by_hand():
    predicted, measured = np.array([[0.0, 2.0], [2.0, 6.0]]), np.array([[1.0, 2.0], [1.0, 4.0]])
    found = legacy_scores(predicted, measured)
    # means (1, 4) and (1, 3): 1 of the variance 4.5 of the prediction; squares 0.25 (1 + 0 + 1 + 4) over (1 + 4 + 1 + 16)
    assert found["legacy_r2"] == pytest.approx(1 - 1 / 4.5)
    assert found["legacy_rmse"] == pytest.approx(np.sqrt(6 / 22))
    widths = 1000 / 32 * 2.0 ** np.arange(10)

    def kernel(x, y):
        return sum(np.exp(-((x - y) ** 2).sum() / w) for w in widths)

    mean = {
        (i, j): np.mean([kernel(x, y) for x in (predicted, measured)[i] for y in (predicted, measured)[j]])
        for i in (0, 1)
        for j in (0, 1)
    }
    assert found["legacy_mmd2"] == pytest.approx(mean[0, 0] + mean[1, 1] - mean[0, 1] - mean[1, 0])
    assert legacy_scores(predicted + 100, measured)["legacy_r2"] == 0  # clipped


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(-5, 5))
def test_invariances(seed: int, scale: float, shift: float):
    rng = np.random.default_rng(seed)
    a, b, c = rng.normal(size=(3, 4, 6))
    order = rng.permutation(6)
    assert pearson_delta(c + scale * (a - c), b, c) == pytest.approx(pearson_delta(a, b, c))
    for metric in (pearson_delta, r2_delta):
        assert metric(a + shift, b + shift, c + shift) == pytest.approx(metric(a, b, c))
        assert metric(a[:, order], b[:, order], c[:, order]) == pytest.approx(metric(a, b, c))
    conditions = rng.permutation(4)
    nothing = np.zeros(a.shape, dtype=bool)
    assert (centroid_accuracy(a[conditions], b[conditions]) == centroid_accuracy(a, b)[conditions]).all()
    found = perturbation_discrimination(a, b, nothing)
    assert (perturbation_discrimination(a[conditions], b[conditions], nothing) == found[conditions]).all()
    x, y = rng.normal(size=(5, 6)), rng.normal(size=(4, 6))
    for distance in (lambda p, q: unbiased_mmd(p, q, 9.0), energy_distance):
        assert distance(x, y) == pytest.approx(distance(y, x))
        assert distance(x[::-1].copy(), y) == pytest.approx(distance(x, y))
        assert distance(x + shift, y + shift) == pytest.approx(distance(x, y))
    assert energy_distance(scale * x, scale * y) == pytest.approx(scale * energy_distance(x, y))


def test_distances_equal_scipy_and_scikit_learn():
    """Energy distance by SciPy in one dimension (with pairs of a cell with itself), MMD^2 by scikit-learn's kernels."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(30, 1)), rng.normal(size=(20, 1)) + 1
    itself = sum(np.abs(x - x.T).mean() / (len(x) - 1) for x in (a, b))
    assert energy_distance(a, b) == pytest.approx(scipy_energy(a[:, 0], b[:, 0]) ** 2 - itself)
    x, y = rng.normal(size=(12, 5)), rng.normal(size=(9, 5)) + 0.5
    widths = 4.0 * 2.0 ** (np.arange(5) - 2)

    def kernels(p, q):
        return sum(rbf_kernel(p, q, gamma=1 / w) for w in widths)

    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernels(x, x), kernels(y, y))]
    assert unbiased_mmd(x, y, 4.0) == pytest.approx(sum(within) - 2 * kernels(x, y).mean())


def test_ranks_equal_those_of_cell_eval():
    """Its `discrimination_score` (cell-eval 0.8.2), on scikit-learn's distances: normalised rank, target gene left out."""
    rng = np.random.default_rng(4)
    measured = rng.normal(size=(9, 12))
    predicted = measured + 2 * rng.normal(size=(9, 12))
    left_out = np.eye(9, 12, dtype=bool)
    expected = []
    for i in range(9):
        kept = ~left_out[i]
        distance = pairwise_distances(measured[:, kept], predicted[i : i + 1, kept], metric="l1").ravel()
        expected.append(1 - np.flatnonzero(np.argsort(distance) == i)[0] / 9)
    found = perturbation_discrimination(predicted, measured, left_out)
    assert found == pytest.approx(expected) and len(set(expected)) > 2
    far = pairwise_distances(predicted, measured, metric="l2")
    centroid = [(far[i] > far[i, i]).sum() / 8 for i in range(9)]
    assert centroid_accuracy(predicted, measured) == pytest.approx(centroid)
