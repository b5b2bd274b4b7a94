"""Scores in blocks, and what a perfect, an empty and a noisy prediction come to."""

import numpy as np
import pytest
from scipy.stats import ttest_ind

from crlseq.evaluation import truth as module
from crlseq.evaluation.baselines import GroupMoments, control_moments, group_moments
from crlseq.evaluation.compare import CEILING, INTERPOLATED, RANGE
from crlseq.evaluation.truth import Truth, ceilings

GENES, CONDITIONS, CELLS = 40, 9, 30


def cells(seed: int, change: np.ndarray) -> np.ndarray:
    """(conditions, cells, genes) with these changes."""
    rng = np.random.default_rng(seed)
    return 5 + change[:, None] + rng.normal(size=(len(change), CELLS, GENES))


def truth_of(measured: np.ndarray, mean_effect: np.ndarray) -> Truth:
    flat, group = measured.reshape(-1, GENES), np.repeat(np.arange(len(measured)), CELLS)
    control = np.random.default_rng(99).normal(size=(200, GENES)) + 5
    shares = np.tile([1.0, 0.0], (len(measured), 1))
    moments = control_moments(control, np.zeros(200, dtype=int), 1)
    targets = [np.zeros(0, dtype=int)] * len(measured)
    return Truth(group_moments(flat, group, len(measured)), shares, moments, mean_effect, targets)


def changes() -> np.ndarray:
    """What all perturbations do, and three genes of each."""
    common = np.where(np.arange(GENES) < 10, 0.5, 0.0)
    own = np.zeros((CONDITIONS, GENES))
    for i in range(CONDITIONS):
        own[i, 10 + 3 * i : 13 + 3 * i] = 2.0
    return common + own


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    change = changes()
    truth, predicted = truth_of(cells(0, change), change.mean(0)), 0.7 * change
    whole = truth.scores({"p": predicted.__getitem__})["p"]
    monkeypatch.setattr(module, "BLOCK_VALUES", 2 * GENES)
    assert len([*truth.blocks()]) == 5
    parts = truth.scores({"p": predicted.__getitem__})["p"]
    assert all(parts[metric] == pytest.approx(values, nan_ok=True) for metric, values in whole.items())


def test_few_rivals_estimate_the_ranks_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    change = rng.normal(size=(400, GENES))
    measured = GroupMoments(5 + change, np.ones_like(change), np.full(400, 9))
    controls = GroupMoments(np.full((2, GENES), 5.0), np.ones((2, GENES)), np.array([50, 50]))
    targets = [np.zeros(0, dtype=int)] * 400
    noisy = change + 3 * rng.normal(size=change.shape)
    found = []
    for most in (400, 100):
        monkeypatch.setattr(module, "MAX_RIVALS", most)
        truth = Truth(measured, np.tile([1.0, 0.0], (400, 1)), controls, np.zeros(GENES), targets)
        found.append(truth.scores({"p": noisy.__getitem__})["p"])
    for metric in ("discrimination", "centroid_accuracy"):
        exact, some = found[0][metric], found[1][metric]
        assert 0.6 < exact.mean() < 0.95
        assert some.mean() == pytest.approx(exact.mean(), abs=0.03)
        assert np.abs(some - exact).max() < 5 * np.sqrt(0.25 / 100)


def test_a_perfect_and_an_empty_prediction() -> None:
    change = changes()
    truth = truth_of(cells(2, change), change.mean(0))
    exact = truth.measured.mean - truth.shares @ truth.controls.mean
    perfect, nothing = (truth.scores({"p": p.__getitem__})["p"] for p in (exact, np.zeros_like(exact)))
    mean = truth.scores({"p": np.tile(change.mean(0), (CONDITIONS, 1)).__getitem__})["p"]
    for metric in ("wmse", "mae", "l2"):
        assert perfect[metric] == pytest.approx(0)
    for metric in ("r2_weighted_delta", "de_score", "discrimination", "pearson_delta"):
        assert perfect[metric] == pytest.approx(1), metric
    assert (nothing["de_score"] == 0).all()
    assert (mean["r2_weighted_delta"] < 0.1).all() and (mean["wmse"] > 10 * mean["l2"] ** 2 / GENES / 3).all()


def test_weights_are_of_the_genes_that_a_condition_changes_otherwise() -> None:
    change = changes()
    truth = truth_of(cells(3, change), change.mean(0))
    weights = truth.block(slice(0, CONDITIONS)).weights
    own = change - change.mean(0) > 1
    assert weights[own].min() > 0.2 and weights[~own].mean() < 0.05


def test_certainty_is_that_of_a_t_test() -> None:
    """Controls with the cells' own variance: as many cells on both sides, in SciPy's Welch test."""
    rng = np.random.default_rng(4)
    own, other = rng.normal(size=(CELLS, 1)) + 0.4, rng.normal(size=(CELLS, 1))
    controls = control_moments(other, np.zeros(CELLS, dtype=int), 1)
    truth = Truth(
        group_moments(own, np.zeros(CELLS, dtype=int), 1), np.array([[1.0, 0.0]]), controls, np.zeros(1), [[]]
    )
    expected = 1 - ttest_ind(own[:, 0], other[:, 0], equal_var=False).pvalue
    assert truth.block(slice(0, 1)).certainty[0, 0] == pytest.approx(expected)


def test_the_interpolated_duplicate_beats_both_of_its_parts() -> None:
    """Where a half says nothing sure, the mean of all perturbations is nearer than the half's noise."""
    change = changes()
    first, second = (truth_of(cells(seed, change), change.mean(0)) for seed in (5, 6))
    found = ceilings(first, second)
    mean = second.scores({"m": lambda rows: np.tile(change.mean(0), (rows.stop - rows.start, 1))})["m"]
    assert (found[INTERPOLATED]["l2"] < found[CEILING]["l2"]).all()
    assert (found[INTERPOLATED]["l2"] < mean["l2"]).all()
    assert (found[RANGE]["wmse"] > 0.8).all() and (found[RANGE]["r2_weighted_delta"] > 0.8).all()
    expected = 1 - found[INTERPOLATED]["l2"] / mean["l2"]
    assert found[RANGE]["l2"] == pytest.approx(expected)
    assert (found[RANGE]["l2"] < found[RANGE]["wmse"]).all()  # noise of genes that do nothing leaves L2 little room


def test_single_rows_are_judged_by_the_spread_of_conditions() -> None:
    change = changes()
    measured = GroupMoments(5 + change, np.zeros_like(change), np.ones(CONDITIONS, dtype=int))
    controls = GroupMoments(np.full((2, GENES), 5.0), np.zeros((2, GENES)), np.array([1, 1]))
    targets = [np.zeros(0, dtype=int)] * CONDITIONS
    spread = change.std(0, ddof=1)
    truth = Truth(measured, np.tile([1.0, 0.0], (CONDITIONS, 1)), controls, change.mean(0), targets, spread)
    block = truth.block(slice(0, 1))
    assert set(np.argsort(-block.weights[0])[:3]) == {10, 11, 12}
    found = truth.scores({"p": change.__getitem__})["p"]
    assert np.isnan(found["de_score"]).all() and np.isnan(found["sign_agreement"]).all()
    assert found["wmse"] == pytest.approx(0) and found["r2_weighted_delta"] == pytest.approx(1)
