"""The law of combination: limits worked out by hand, and factors, terms and spread from made combinations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crlseq.model.combination_law import PRIOR_FACTORS, CombinationLaw
from crlseq.training import combinations
from crlseq.training.combinations import Measured, _left_out, _spread, _with_factors, _with_own, _with_terms

N_GENES, N_SINGLES = 200, 12


def law_of(common: np.ndarray, beta: float = 0.5, gamma: float = 0.5) -> CombinationLaw:
    from dataclasses import replace

    law = CombinationLaw.prior(
        torch.from_numpy(common), torch.zeros(len(common)), torch.zeros((0, 2), dtype=torch.int64)
    )
    return replace(law, factors=torch.tensor([beta, gamma], dtype=torch.float64))


def test_effects_of_one_size_give_half_the_sum_and_half_the_common_effect() -> None:
    single = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    law = law_of(np.array([0.0, 0.0, 4.0]))
    assert law.effect([(0,), (1,)], single).tolist() == [1.0, 1.0, 2.0]
    assert law_of(np.array([0.0, 0.0, 4.0]), 0.75, 0.25).effect([(0,), (1,)], single).tolist() == [1.5, 1.5, 1.0]


def test_an_effect_three_times_as_large_weighs_as_its_share_says() -> None:
    single = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    # Shares 3/4 and 1/4: coefficients 1 - 1/4 and 1 - 3/4, and 1 - (9 + 1) / 16 of the common effect.
    assert law_of(np.array([0.0, 0.0, 8.0])).effect([(0,), (1,)], single).tolist() == [2.25, 0.25, 3.0]


def test_beside_a_part_that_does_nothing_the_other_stays_as_it_is() -> None:
    single = torch.tensor([[3.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    assert law_of(np.array([5.0, 5.0]), 0.3, 0.9).effect([(0,), (1,)], single).tolist() == [3.0, -1.0]


def test_factors_of_a_sum_give_the_sum() -> None:
    single = torch.tensor([[3.0, -1.0], [0.5, 2.0], [1.0, 1.0]], dtype=torch.float64)
    found = law_of(np.array([5.0, 5.0]), 1.0, 0.0).effect([(0,), (1,), (2,)], single)
    assert found.tolist() == [4.5, 2.0]


@given(st.permutations([0, 1, 2]), st.floats(0.1, 1.5), st.floats(0.0, 1.0))
def test_the_order_of_the_parts_does_not_matter(order: list[int], beta: float, gamma: float) -> None:
    rng = np.random.default_rng(3)
    single, law = torch.from_numpy(rng.normal(size=(3, 7))), law_of(rng.normal(size=7), beta, gamma)
    groups = [(0,), (1,), (2,)]
    shuffled = law.effect([groups[i] for i in order], single[order])
    assert torch.allclose(shuffled, law.effect(groups, single), atol=1e-12)


def test_pairs_of_the_equations_are_not_governed() -> None:
    law = CombinationLaw.prior(torch.zeros(3, dtype=torch.float64), torch.zeros(3), torch.tensor([[1, 4]]))
    assert not law.governs([(4,), (1,)])
    assert law.governs([(1,), (2,)])
    assert not law.governs([(1,)])


def made(
    beta: float, gamma: float, n: int, noise: float = 0.02, term: float = 0.0, seed: int = 0
) -> tuple[CombinationLaw, Measured, np.ndarray]:
    """A law with the prior's factors, n doubles that obey others, and the terms (singles, genes) in them."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(size=(N_SINGLES, N_GENES)) * rng.uniform(0.5, 2.0, (N_SINGLES, 1))
    common, terms = effects.mean(0) + 0.3 * rng.normal(size=N_GENES), term * rng.normal(size=effects.shape)
    pairs = [*itertools.combinations(range(N_SINGLES), 2)]
    parts = [pairs[i] for i in rng.permutation(len(pairs))[:n]]
    true = law_of(common, beta, gamma)
    single = [effects[list(pair)] for pair in parts]
    effect = np.stack([
        true.effect([(a,), (b,)], torch.from_numpy(own)).numpy() + terms[a] + terms[b]
        for (a, b), own in zip(parts, single, strict=True)
    ])  # fmt: skip
    effect += noise * rng.normal(size=effect.shape)
    return law_of(common), Measured(parts, single, [np.zeros(2)] * n, effect, np.full(effect.shape, noise**2)), terms


@pytest.mark.parametrize("truth", [(0.5, 0.5), (1.0, 0.0), (0.6, 0.43), (0.42, 0.6)])
def test_factors_are_found(truth: tuple[float, float]) -> None:
    law, measured, _ = made(*truth, n=20)
    found = _with_factors(law, measured)
    assert found.factors.numpy() == pytest.approx(truth, abs=0.02)
    assert (np.abs(found.factors.numpy() - truth) <= 4 * found.factor_error.numpy()).all()


def test_few_scattered_combinations_leave_the_factors_near_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    law, measured, _ = made(1.0, 0.0, n=5)
    scattered = measured._replace(effect=measured.effect * rng.uniform(-2.0, 4.0, (5, 1)))
    sure, unsure = _with_factors(law, measured), _with_factors(law, scattered)
    assert (unsure.factor_error > 5 * sure.factor_error).all()
    assert (unsure.factor_error < combinations.FACTOR_SPREAD).all()
    monkeypatch.setattr(combinations, "FACTOR_SPREAD", 1e6)
    free = _with_factors(law, scattered)
    assert np.linalg.norm(unsure.factors.numpy() - PRIOR_FACTORS) < np.linalg.norm(free.factors.numpy() - PRIOR_FACTORS)


def test_terms_of_genes_that_act_otherwise_together_are_found() -> None:
    law, measured, terms = made(0.5, 0.5, n=50, term=0.5)
    left = measured.effect - np.stack([
        law.effect([(k,) for k in parts], torch.from_numpy(single)).numpy()
        for parts, single in zip(measured.parts, measured.single, strict=True)
    ])  # fmt: skip
    found, missed, (gain, error) = _with_terms(law, measured, left)
    assert gain > 0.8 > 4 * error
    assert (missed**2).sum() < 0.2 * (left**2).sum()
    learned = found.terms.numpy() + found.mean.numpy() / 2
    errors = ((learned - terms) ** 2).sum(1) / (terms**2).sum(1)
    assert np.median(errors) < 0.15


def test_without_terms_none_are_kept() -> None:
    kept = 0
    for seed in range(20):
        law, measured, _ = made(0.5, 0.5, n=20, noise=0.3, seed=seed)
        left = measured.effect - np.stack([
            law.effect([(k,) for k in parts], torch.from_numpy(single)).numpy()
            for parts, single in zip(measured.parts, measured.single, strict=True)
        ])  # fmt: skip
        found, missed, _ = _with_terms(law, measured, left)
        kept += len(found.terms) > 0
        assert len(found.terms) or (missed is left)
    assert kept <= 4


def test_left_out_residuals_are_those_of_a_refit_without_the_row() -> None:
    rng = np.random.default_rng(1)
    root, left = rng.normal(size=(6, 6)), rng.normal(size=(6, 3))
    covariance = root @ root.T + np.eye(6)
    found = _left_out(covariance, left)
    for i in range(6):
        rest = np.delete(np.arange(6), i)
        predicted = covariance[i, rest] @ np.linalg.solve(covariance[np.ix_(rest, rest)], left[rest])
        assert found[i] == pytest.approx(left[i] - predicted)


def test_the_spread_is_that_of_what_is_missed() -> None:
    rng = np.random.default_rng(2)
    law, measured, _ = made(0.5, 0.5, n=60, noise=0.1)
    squares = np.stack([(single**2).sum(0) for single in measured.single])
    missed = rng.normal(size=squares.shape) * np.sqrt(0.2 * squares + 0.05 * squares.mean(1, keepdims=True) + 0.1**2)
    near, far = _spread(law, measured, missed).tolist()
    assert near == pytest.approx(0.2, abs=0.02)
    assert far == pytest.approx(0.05, abs=0.02)


def test_a_measured_combination_keeps_what_its_cells_show() -> None:
    law, measured, _ = made(1.0, 0.0, n=10, noise=0.01)
    found = _with_own(law, measured)
    a, b = measured.parts[3]
    predicted = found.effect([(b,), (a,)], torch.from_numpy(measured.single[3][::-1].copy())).numpy()
    assert np.abs(predicted - measured.effect[3]).max() < 0.05
    assert (found.error([(a,), (b,)], torch.from_numpy(measured.single[3])).numpy() < 0.02).all()
