"""Representation scores against values worked out by hand, and what they must and must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.linear_model import LinearRegression

from crlseq.evaluation.representation import dci, interventional_robustness, representation_scores


def test_dci_of_a_permutation_and_of_nothing() -> None:
    assert dci(np.eye(3)[[2, 0, 1]] * [[1.0], [2], [3]]) == (1, 1)
    assert dci(np.ones((4, 3))) == pytest.approx((0, 0))
    assert dci(np.zeros((2, 2))) == (0, 0)
    assert dci(np.ones((1, 1))) == (1, 1)


def test_dci_by_hand() -> None:
    # Latent 0 is true latent 0 alone, latent 1 mixes both evenly: 1 and 0, weights 1 and 2.
    disentanglement, completeness = dci(np.array([[1.0, 0], [1, 1]]))
    assert disentanglement == pytest.approx((1 * 1 + 2 * 0) / 3)
    # True latent 0 is spread over both evenly, true latent 1 is in one.
    assert completeness == pytest.approx((0 + 1) / 2)
    # With a third true latent that nothing stands for: entropy to base 3, and its completeness is 0.
    disentanglement, completeness = dci(np.array([[1.0, 0, 0], [1, 1, 0]]))
    assert disentanglement == pytest.approx((1 + 2 * (1 - np.log(2) / np.log(3))) / 3)
    assert completeness == pytest.approx(1 / 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_dci_is_the_published_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    r = rng.gamma(0.5, size=(5, 4))
    rows = [1 - entropy(row / row.sum(), base=4) for row in r]
    columns = [1 - entropy(column / column.sum(), base=5) for column in r.T]
    expected = np.average(rows, weights=r.sum(1)), np.mean(columns)
    assert dci(r) == pytest.approx(expected)
    assert dci(r[rng.permutation(5)][:, rng.permutation(4)] * 7) == pytest.approx(expected)


def test_robustness_by_hand() -> None:
    a, b = (grid.ravel().astype(float) for grid in np.meshgrid([0, 1], [0, 1]))
    factors = np.repeat(np.stack([a, b], 1), 50, axis=0)
    assert interventional_robustness(factors, factors) == 1
    # a + b is 0, 1, 1, 2: at most 1 from its mean, and with a given at most 1/2.
    mixed = factors.sum(1, keepdims=True)
    assert interventional_robustness(mixed, factors) == pytest.approx(0.5)
    # a alone is robust; weights are the largest deviations 1/2 and 1.
    both = np.concatenate([factors[:, :1], mixed], 1)
    assert interventional_robustness(both, factors) == pytest.approx((0.5 * 1 + 1 * 0.5) / 1.5)
    assert interventional_robustness(np.ones((200, 1)), factors) == 0


def test_scores_order_representations() -> None:
    rng = np.random.default_rng(0)
    u = rng.standard_normal((3000, 5))
    u[:, 1] += 0.8 * u[:, 0]  # latents are no independent factors here
    rotation = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    same = representation_scores(u[:, ::-1] * [1, -2, 3, 4, 5] + 7, u)
    noisy = representation_scores(u + 0.5 * rng.standard_normal(u.shape), u)
    rotated = representation_scores(u @ rotation, u)
    nothing = representation_scores(rng.standard_normal(u.shape), u)
    assert all(value > 0.99 for name, value in same.items() if name != "irs") and same["irs"] > 0.88
    assert rotated["dci_informativeness"] > 0.99 and rotated["dci_disentanglement"] < 0.5
    for name in same:
        assert same[name] > noisy[name] > nothing[name], name
    assert same["dci_disentanglement"] > rotated["dci_disentanglement"] and same["irs"] > rotated["irs"]
    assert nothing["dci_informativeness"] < 0.01


def test_informativeness_is_that_of_a_linear_model() -> None:
    rng = np.random.default_rng(1)
    u = rng.standard_normal((4000, 2))
    z = u @ [[1.0, 0.3], [0.2, 1]] + rng.standard_normal((4000, 2))
    expected = np.mean([LinearRegression().fit(z, u[:, j]).score(z, u[:, j]) for j in range(2)])
    assert representation_scores(z, u)["dci_informativeness"] == pytest.approx(expected, abs=0.03)


def test_fewer_latents_and_dead_ones() -> None:
    u = np.random.default_rng(2).standard_normal((1000, 3))
    found = representation_scores(np.column_stack([u[:, 0], np.full(1000, 3.0)]), u)
    assert found["dci_disentanglement"] > 0.9 and found["dci_informativeness"] == pytest.approx(1 / 3, abs=0.02)
    assert found["irs"] > 0.85
