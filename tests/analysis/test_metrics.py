"""Metrics against values worked out by hand and against SciPy."""

import numpy as np
import pytest
from scipy.stats import pearsonr

from crlseq.analysis.metrics import l2_distance, pearson_delta, unbiased_mmd


def test_pearson_delta_by_hand():
    control = np.array([1.0, 1.0, 1.0])
    # changes (1, 0, -1) and (2, 0, -2) agree fully; (1, 0, -1) and (0, 1, -1) at one half
    assert pearson_delta(np.array([2.0, 1, 0]), np.array([3.0, 1, -1]), control) == pytest.approx(1)
    assert pearson_delta(np.array([2.0, 1, 0]), np.array([1.0, 2, 0]), control) == pytest.approx(0.5)
    assert np.isnan(pearson_delta(control, np.array([3.0, 1, -1]), control))


def test_pearson_delta_equals_scipy():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 50))
    assert pearson_delta(a, b, c) == pytest.approx(pearsonr(a - c, b - c).statistic)


def test_l2_by_hand():
    assert l2_distance(np.array([3.0, 0]), np.array([0.0, 4])) == 5


def test_mmd_of_shifted_cells_grows_with_the_shift():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 100, 3))
    values = [unbiased_mmd(a, b + shift, 6.0) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert abs(values[0]) < 0.05 < values[3]
