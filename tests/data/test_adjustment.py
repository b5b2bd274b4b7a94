"""What is taken off for covariates: by hand, against exact tests, and where nothing may be taken."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from crlseq.data import splits
from crlseq.data.adjustment import Adjustment
from crlseq.data.covariate_columns import Column


def adjustment(
    *columns: Column, condition: np.ndarray, batch: np.ndarray | None = None, wholly: bool = False
) -> Adjustment:
    split = np.full(len(condition), splits.TRAIN)
    batch = np.zeros(len(condition), dtype=int) if batch is None else batch
    return Adjustment.of(columns, wholly, condition, int(condition.max()) + 1, split, batch)


def test_slopes_by_hand() -> None:
    """Controls z = 0, 2, 4 and y = 1, 2, 6: slope 5 / 4 per unit of z, and z - 2 is taken off every cell."""
    z, y = np.array([0.0, 2, 4, 10, 12]), np.array([[1.0], [2], [6], [0], [0]], dtype=np.float32)
    found = adjustment(Column("age", (), z, False), condition=np.array([0, 0, 0, 1, 1]))
    assert np.allclose(found.for_tests(y)[:, 0], y[:, 0] - 1.25 * (z - 2))
    assert found.mean(np.array([3, 4])) == pytest.approx(9 / np.sqrt(8 / 3))
    assert found.variance(np.array([3, 4])) == pytest.approx(9**2 / 8)  # (mean z - mean of controls)^2 / sum of squares


def test_slopes_are_within_batches() -> None:
    """Batches differ in z and in y the other way; within them y rises by 2 z."""
    batch = np.repeat([0, 1], 4)
    z = np.array([0.0, 1, 2, 1, 10, 11, 12, 11])
    y = (2.0 * z - 30 * batch)[:, None].astype(np.float32)
    found = adjustment(Column("age", (), z, False), condition=np.tile([0, 0, 0, 1], 2), batch=batch)
    own = found.for_tests(y)[:, 0]
    assert np.allclose(own[:4], own[0]) and np.allclose(own[4:], own[4])


def test_levels_that_are_not_of_full_rank() -> None:
    """Two categories that are the same take off what one does."""
    rng = np.random.default_rng(0)
    code = rng.integers(0, 3, 200)
    y = rng.normal(size=(200, 4)).astype(np.float32)
    condition = np.repeat([0, 1], 100)
    one, same = Column("donor", ("a", "b", "c"), code, False), Column("again", ("x", "y", "z"), code, False)
    expected = y - np.stack([y[:100][code[:100] == c].mean(0) for c in range(3)])[code]
    for columns in ((one,), (one, same)):
        assert np.allclose(
            adjustment(*columns, condition=condition).for_tests(y) - y[:100].mean(0), expected, atol=1e-5
        )


def test_changes_are_tested_as_by_exact_tests() -> None:
    """A level in one batch: twice Fisher's one-sided test nearly; a number: Wilcoxon's test."""
    rng = np.random.default_rng(1)
    condition = np.repeat([0, 1, 2], [300, 40, 60])
    level = np.concatenate([np.arange(300) < 45, np.arange(40) < 14, np.arange(60) < 9]).astype(int)
    number = rng.lognormal(0, 1, 400) + 0.7 * (condition == 1)
    changes = adjustment(
        Column("phase", ("n", "m"), level, True), Column("score", (), number, True), condition=condition
    ).changes
    rows = changes[(changes["column"] == 1)].set_index("condition")
    exact = 2 * stats.fisher_exact([[14, 26], [45, 255]], alternative="greater").pvalue
    assert rows.loc[1, "mean"] == pytest.approx(0.35) and rows.loc[1, "control"] == pytest.approx(0.15)
    assert rows.loc[1, "difference"] == pytest.approx(0.2)
    assert rows.loc[1, "se"] == pytest.approx(np.sqrt(0.35 * 0.65 / 39 + 0.15 * 0.85 / 299), rel=1e-6)
    assert 0.7 < rows.loc[1, "p_value"] / exact < 1.4 and rows.loc[2, "p_value"] > 0.9
    p = changes[changes["column"] == 2].set_index("condition")["p_value"]
    for c in (1, 2):
        wilcoxon = stats.mannwhitneyu(number[condition == c], number[condition == 0], use_continuity=False)
        assert p[c] == pytest.approx(wilcoxon.pvalue, rel=0.4)


def test_p_values_of_nothing_are_uniform() -> None:
    """Skewed numbers and rare levels, in batches of different shares: 600 conditions of which none differs."""
    rng = np.random.default_rng(2)
    condition, batch = np.repeat(np.arange(601), [2000, *[20] * 600]), rng.integers(0, 3, 14_000)
    number, level = rng.lognormal(batch, 1.0), (rng.random(14_000) < 0.05 + 0.1 * batch).astype(int)
    changes = adjustment(
        Column("a", (), number, True), Column("b", ("no", "yes"), level, True), condition=condition, batch=batch
    ).changes
    for column in (0, 2):
        p = changes.loc[changes["column"] == column, "p_value"]
        assert (p <= 0.05).mean() <= 0.07 and (p <= 0.002).mean() <= 0.009
    assert (changes["fdr"] > 0.05).all()


def test_what_a_perturbation_changes_stays() -> None:
    """A score that condition 1 raises: its mean stays and its variation goes; all goes where effects are to be removed."""
    rng = np.random.default_rng(3)
    condition = np.repeat([0, 1, 2], 200)
    score = rng.normal(size=600) + 2.0 * (condition == 1)
    y = np.stack([3 * score + rng.normal(size=600), rng.normal(size=600)], 1).astype(np.float32)
    column = Column("S_score", (), score, True)
    kept, removed = (adjustment(column, condition=condition, wholly=wholly) for wholly in (False, True))
    assert kept.for_tests(y)[condition == 1, 0].mean() == pytest.approx(y[condition == 1, 0].mean(), abs=0.3)
    assert kept.for_tests(y)[condition == 1, 0].std() == pytest.approx(1, abs=0.15)
    assert removed.for_tests(y)[condition == 1, 0].mean() == pytest.approx(0, abs=0.4)
    assert abs(kept.for_tests(y)[condition == 2, 0].mean()) < 0.25  # of which nothing is known
    # Cells themselves keep it, unless it is to be removed.
    own, without = y.copy(), y.copy()
    kept.take_off(own, np.arange(600))
    removed.take_off(without, np.arange(600))
    assert np.array_equal(own, y) and abs(without[condition == 1, 0].mean()) < 0.4
    assert kept.mean(np.flatnonzero(condition == 1)).tolist() == [0.0]
    assert (kept.strata(np.arange(400), np.arange(400) < 200) == 0).all()


def test_measurement_noise_stays() -> None:
    """A score that is a component itself would leave none of it: what stays varies as the least component does."""
    rng = np.random.default_rng(4)
    condition = np.repeat([0, 1], [4000, 500])
    y = rng.normal(size=(4500, 4)) * [3.0, 2.0, 1.5, 1.0]
    score = y @ [0.6, 0.8, 0.0, 0.0] + 1.0 * (condition == 1)
    y = y.astype(np.float32)
    found = adjustment(Column("S_score", (), score, True), condition=condition, wholly=True)
    found.take_off(y, np.arange(4500))
    variance = np.linalg.eigvalsh(np.cov(y[condition == 0].T))
    assert variance[0] > 0.9 and variance[-1] == pytest.approx(13 - (5.4**2 + 3.2**2) / 5.8, rel=0.1)
    assert y[condition == 1].mean(0) @ [0.6, 0.8, 0, 0] == pytest.approx(-1.0, abs=0.15)


def test_strata_hold_what_was_there_before() -> None:
    """Donors are strata; of a number, each stratum has as many perturbed cells, and few differences within it."""
    rng = np.random.default_rng(5)
    condition = np.repeat([0, 1], [500, 100])
    donor = rng.integers(0, 2, 600)
    age = rng.normal(size=600) + 1.0 * (condition == 1)
    cells, perturbed = np.arange(600), condition == 1
    by_donor = adjustment(Column("donor", ("a", "b"), donor, False), condition=condition).strata(cells, perturbed)
    assert len(np.unique(by_donor)) == 2 and all(len(np.unique(donor[by_donor == s])) == 1 for s in np.unique(by_donor))
    found = adjustment(Column("age", (), age, False), condition=condition)
    strata = found.strata(cells, perturbed)
    assert np.bincount(strata[perturbed]).tolist() == [10] * 10
    within = [age[(strata == s) & perturbed].mean() - age[(strata == s) & ~perturbed].mean() for s in range(10)]
    assert abs(np.mean(within)) < 0.15 < age[perturbed].mean() - age[~perturbed].mean()
    slopes = np.array([[1.0, -2.0, 0.0]])
    groups = found.groups(slopes)
    assert np.bincount(groups[:500]).tolist() == [50] * 10 and len(np.unique(groups)) == 10


def test_small_perturbations_have_few_strata() -> None:
    condition = np.repeat([0, 1], [100, 12])
    found = adjustment(Column("age", (), np.random.default_rng(6).normal(size=112), False), condition=condition)
    assert np.bincount(found.strata(np.arange(112), condition == 1)[100:]).tolist() == [6, 6]
