"""Tests by energy distance and by moments: against plain loops, error rates, power, and the FDR by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.discovery import effects
from crlseq.discovery.effects import benjamini_hochberg, energy_test, moment_test


def energy(x, y):
    def mean(pairs):
        return np.mean([np.linalg.norm(a - b) for a, b in pairs])

    between = mean(itertools.product(x, y))
    return 2 * between - mean(itertools.permutations(x, 2)) - mean(itertools.permutations(y, 2))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 7), m=st.integers(2, 7))
def test_energy_distance_equals_plain_loops(seed, n, m):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n + m, 3))
    found, p = energy_test(scores, np.arange(n + m) < n, np.zeros(n + m), (19,), rng)
    assert found == pytest.approx(energy(scores[:n], scores[n:]), abs=1e-10)
    assert 1 / 20 <= p <= 1


def test_p_value_is_the_exact_share_when_all_labellings_are_few():
    # Two far pairs: of the 6 labellings of 4 cells, 2 reach the observed distance, so p tends to 1/3.
    scores = np.array([[0.0], [0.1], [10.0], [10.1]])
    _, p = energy_test(scores, np.array([True, True, False, False]), np.zeros(4), (3000,), np.random.default_rng(0))
    assert p == pytest.approx(1 / 3, abs=0.03)


def test_no_effect_gives_uniform_p_values():
    rng = np.random.default_rng(0)
    p = [energy_test(rng.normal(size=(40, 2)), np.arange(40) < 15, np.zeros(40), (99,), rng)[1] for _ in range(300)]
    assert abs(np.mean(p) - 0.5) < 0.06
    assert np.mean(np.array(p) <= 0.05) < 0.09


def test_only_a_likely_effect_gets_the_second_stage():
    rng = np.random.default_rng(0)
    labels, strata = np.arange(40) < 15, np.zeros(40)
    cells = rng.normal(size=(40, 2))
    p = [energy_test(rng.normal(size=(40, 2)), labels, strata, (99, 900), rng)[1] for _ in range(50)]
    first = [value for value in p if value >= 0.11 and round(value * 100) == pytest.approx(value * 100)]
    assert len(first) > 40  # done after 99
    assert energy_test(cells + 3 * labels[:, None], labels, strata, (99, 900), rng)[1] == pytest.approx(1 / 1000)


def test_two_stages_keep_the_error_rate():
    rng = np.random.default_rng(1)
    p = [energy_test(rng.normal(size=(30, 1)), np.arange(30) < 10, np.zeros(30), (19, 180), rng)[1] for _ in range(400)]
    for level in (0.01, 0.05, 0.1):
        assert np.mean(np.array(p) <= level) <= level + 3 * np.sqrt(level * (1 - level) / 400)


def test_permutation_within_batches_is_not_fooled_by_a_batch_effect():
    rng = np.random.default_rng(0)
    batch = np.repeat([0, 1], 60)
    perturbed = np.r_[rng.permutation(60) < 50, rng.permutation(60) < 10]  # mostly in batch 0
    scores = rng.normal(size=(120, 2)) + 3 * batch[:, None]
    _, naive = energy_test(scores, perturbed, np.zeros(120), (199,), rng)
    _, stratified = energy_test(scores, perturbed, batch, (199,), rng)
    assert naive == pytest.approx(1 / 200)
    assert stratified > 0.05


def two_sets(seed: int, scale: float, n: int = 300, q: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Controls and as many cells whose first component varies ``scale`` times as much; units differ by component."""
    rng = np.random.default_rng(seed)
    cells = rng.normal(size=(2 * n, q))
    cells[:n, 0] *= scale
    return cells * np.geomspace(1, 100, q), np.arange(2 * n) < n


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_change_of_variance_alone_is_seen_by_moments(scale: float) -> None:
    for seed in range(3):
        scores, perturbed = two_sets(seed, scale)
        rng = np.random.default_rng(seed)
        assert moment_test(scores, perturbed, np.zeros(600), (99, 900), rng) <= 0.005
        assert energy_test(scores, perturbed, np.zeros(600), (99,), rng)[1] > 0.01  # hidden by the larger components


def test_moments_keep_the_error_rate_with_heavy_tails_and_batches() -> None:
    rng = np.random.default_rng(0)
    batch = np.repeat([0, 1], 60)
    perturbed = np.r_[rng.permutation(60) < 40, rng.permutation(60) < 10]  # mostly in batch 0
    p = []
    for _ in range(200):
        scores = rng.standard_t(3, size=(120, 4)) * (1 + batch[:, None]) + 2 * batch[:, None]
        p.append(moment_test(scores, perturbed, batch, (99,), rng))
    assert abs(np.mean(p) - 0.5) < 0.08
    assert np.mean(np.array(p) <= 0.05) < 0.1


def test_moments_do_not_depend_on_the_units_and_leave_out_rounding_errors() -> None:
    scores, perturbed = two_sets(0, 1.3, n=60, q=4)

    def p(cells: np.ndarray) -> float:
        return moment_test(cells, perturbed, np.zeros(120), (199,), np.random.default_rng(0))

    mixed = scores @ np.random.default_rng(1).normal(size=(4, 4))
    assert p(mixed) == pytest.approx(p(scores), abs=0.011)
    rounding = 1e-9 * np.random.default_rng(2).normal(size=(120, 3))
    rounding[perturbed] *= 5
    assert p(np.concatenate([scores, rounding], 1)) == pytest.approx(p(scores), abs=0.011)
    assert p(np.ones((120, 3))) == 1.0


def test_benjamini_hochberg_by_hand():
    # sorted: .01*4/1=.04, .02*4/2=.04, .03*4/3=.04, .5; NaN does not count
    adjusted = benjamini_hochberg(np.array([0.5, 0.01, np.nan, 0.03, 0.02]))
    assert adjusted[[0, 1, 3, 4]].tolist() == pytest.approx([0.5, 0.04, 0.04, 0.04])
    assert np.isnan(adjusted[2])


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=30))
def test_benjamini_hochberg_equals_scipy(values):
    from scipy.stats import false_discovery_control

    assert np.allclose(benjamini_hochberg(np.array(values)), false_discovery_control(values))


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6, 1.0, 2.0, 8.0])
def test_permutations_that_nothing_can_reach_are_not_drawn(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same p-value as if they had been."""
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(120, 6))
    scores[:60, 0] += shift
    perturbed, strata = np.arange(120) < 60, np.repeat([0, 1], 60)[rng.permutation(120)]

    def tested() -> tuple[tuple[float, float], int]:
        drawn = np.random.default_rng(2)
        found = effects.energy_test(scores, perturbed, strata, effects.STAGES, drawn)
        return found, int(drawn.integers(2**62))

    short, state = tested()
    monkeypatch.setattr(effects, "BEYOND", np.inf)
    whole, other = tested()
    assert short == whole
    assert (state != other) == (shift >= 2.0)  # fewer were drawn
