"""Effects with their noise: shrinkage by hand, against known truths, and apart from the error of the controls."""

from __future__ import annotations

import numpy as np
import pytest

from crlseq.training.effects import MOST, Effects, estimate_effects, shrink


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_effects_of_a_normal_prior_are_shrunk_by_its_share(rng: np.random.Generator) -> None:
    """Prior N(0, 2^2), errors of 1: posterior mean 4/5 d, variance 4/5."""
    effect = 2 * rng.normal(size=5000) + rng.normal(size=5000)
    mean, variance = shrink(effect, np.ones(5000))
    some = np.abs(effect) < 4
    assert np.abs(mean - 0.8 * effect)[some].mean() < 0.1
    assert variance[some].mean() == pytest.approx(0.8, abs=0.06)


def test_noise_is_shrunk_away_and_what_stands_out_is_kept(rng: np.random.Generator) -> None:
    effect = rng.normal(size=2000)
    effect[7] = 30.0
    mean, _ = shrink(effect, np.ones(2000))
    assert mean[7] == pytest.approx(30, abs=2)
    assert (np.delete(mean, 7) ** 2).mean() < 0.01  # of 1
    mean, variance = shrink(np.array([1.0, 2.0]), np.array([0.0, 0.0]))
    assert not mean.any() and not variance.any()


def drawn(
    true: np.ndarray, rng: np.random.Generator, noise: float = 0.1, control_noise: float = 0.02, row: float = 2.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Measured effects, squared errors that differ by gene and by perturbation, shares, and the controls' squared errors."""
    n, g = true.shape
    of_gene = rng.gamma(4, 0.25, size=g)
    squares = noise * of_gene * rng.uniform(1 / row, row, (n, 1))
    of_controls = control_noise * of_gene
    seen = true - np.sqrt(of_controls) * rng.normal(size=g) + np.sqrt(squares) * rng.normal(size=true.shape)
    return seen, squares, np.ones((n, 1)), of_controls[None]


def programs(rng: np.random.Generator, n: int, g: int) -> np.ndarray:
    """Three programs, each of half of the genes and of four in ten perturbations; and each perturbation's own gene."""
    loads = rng.normal(size=(n, 3)) * (rng.random((n, 3)) < 0.4)
    genes = rng.normal(size=(3, g)) * (rng.random((3, g)) < 0.5)
    true = 0.5 * loads @ genes
    true[np.arange(n), np.arange(n)] -= 3.0
    return true


@pytest.mark.parametrize("n", [20, MOST + 30])
def test_programs_are_better_known_together_and_intervals_cover(rng: np.random.Generator, n: int) -> None:
    true = programs(rng, n, 400)
    seen, noise, shares, control_noise = drawn(true, rng)
    found = estimate_effects(seen, noise, shares, control_noise)
    alone = np.stack([shrink(d, np.sqrt(s + control_noise[0]))[0] for d, s in zip(seen, noise, strict=True)])
    squares = [float(((x - true) ** 2).mean()) for x in (found.effect, alone, seen)]
    assert squares[0] < 0.7 * squares[1] < 0.5 * squares[2]
    covered = np.abs(found.effect - true) <= 1.959964 * found.error
    assert 0.9 < covered.mean() < 0.98
    assert 0.9 < covered[true != 0].mean() < 0.98


def test_what_two_programs_share_is_known_where_one_perturbation_alone_says_nothing(rng: np.random.Generator) -> None:
    """Fifteen perturbations of one program, effects of 0.8 errors: together they say which genes are of it."""
    true = np.tile(0.8 * rng.choice([-1.0, 0.0, 1.0], 600), (15, 1))
    seen = true + rng.normal(size=true.shape)
    found = estimate_effects(seen, np.ones_like(seen), np.ones((15, 1)), np.full((1, 600), 1e-4))
    alone = shrink(seen[0], np.ones(600))[0]
    assert ((found.effect - true) ** 2).mean() < 0.35 * (true**2).mean() < 0.5 * ((alone - true[0]) ** 2).mean()


@pytest.mark.parametrize("n", [1, 2, 20])
def test_own_transcripts_stay(rng: np.random.Generator, n: int) -> None:
    true = np.zeros((n, 500))
    true[np.arange(n), np.arange(n)] = -4.0
    seen, noise, shares, control_noise = drawn(true, rng, 0.05, 0.02, row=1.0)
    noise[np.arange(n), np.arange(n)] = 0.0  # nothing is left of them, in no cell
    found = estimate_effects(seen, noise, shares, control_noise)
    np.testing.assert_allclose(found.effect[np.arange(n), np.arange(n)], -4, atol=0.8)
    assert (found.effect[true == 0] ** 2).mean() < 0.15 * (seen[true == 0] ** 2).mean()


def test_the_controls_error_is_no_common_effect(rng: np.random.Generator) -> None:
    """Few controls and no effect: all that perturbations have in common is the controls' error, which is told."""
    true = np.zeros((20, 1000))
    true[:10, :3] = 4.0
    seen, noise, shares, control_noise = drawn(true, rng, 0.1, 0.2, row=1.0)
    error = (true - seen).mean(0)
    found = estimate_effects(seen, noise, shares, control_noise)
    assert ((found.effect - true) ** 2).mean() < 0.1 * (error**2).mean()
    assert np.corrcoef(found.control_error[0, 3:], error[3:])[0, 1] > 0.95
    np.testing.assert_allclose(found.effect[:10, :3], 4, atol=1.2)


def test_controls_of_two_batches_have_errors_of_their_own(rng: np.random.Generator) -> None:
    errors = np.sqrt(0.2) * rng.normal(size=(2, 1000))
    shares = np.repeat(np.eye(2), 10, axis=0)
    seen = -shares @ errors + np.sqrt(0.1) * rng.normal(size=(20, 1000))
    found = estimate_effects(seen, np.full(seen.shape, 0.1), shares, np.full((2, 1000), 0.2))
    for batch in (0, 1):
        assert np.corrcoef(found.control_error[batch], errors[batch])[0, 1] > 0.95
    assert (found.effect**2).mean() < 0.05 * (seen**2).mean()


def test_in_doubt_there_is_no_effect(rng: np.random.Generator) -> None:
    """Beside perturbations of a program, one without any effect keeps next to nothing; and so does a screen of such."""
    true = np.concatenate([programs(rng, 20, 800), np.zeros((5, 800))])
    found = estimate_effects(*(made := drawn(true, rng, 0.1, 0.01, row=1.0)))
    assert (found.effect[20:] ** 2).sum() < 0.12 * (made[0][20:] ** 2).sum()
    for n in (1, 2, 30):
        found = estimate_effects(*(made := drawn(np.zeros((n, 1000)), rng)))
        assert (found.effect**2).sum() < 0.08 * (made[0] ** 2).sum()


def test_no_effect_is_smaller_than_its_squares_say(rng: np.random.Generator) -> None:
    """Effects of half an error in every gene: gene by gene nothing is kept. The whole is made as large as it is, and no more."""
    true = 0.5 * rng.choice([-1.0, 1.0], (1, 4000))
    seen = true + rng.normal(size=true.shape)
    found = estimate_effects(seen, np.ones_like(seen), np.ones((1, 1)), np.full((1, 4000), 1e-6))
    assert (found.effect**2).sum() == pytest.approx((seen**2).sum() - 4000, rel=0.02)
    assert np.corrcoef(found.effect[0], seen[0])[0, 1] > 0.99
    assert ((found.effect - true) ** 2).sum() < 0.3 * ((seen - true) ** 2).sum()
    assert (np.abs(found.effect - true) <= 1.96 * found.error).mean() > 0.9


def test_the_order_of_perturbations_and_genes_does_not_matter(rng: np.random.Generator) -> None:
    true = programs(rng, 12, 300)
    seen, noise, shares, control_noise = drawn(true, rng)
    found = estimate_effects(seen, noise, shares, control_noise)
    rows, genes = rng.permutation(12), rng.permutation(300)
    other = estimate_effects(
        seen[rows][:, genes], noise[rows][:, genes], shares[rows], np.ascontiguousarray(control_noise[:, genes])
    )
    np.testing.assert_allclose(other.effect, found.effect[rows][:, genes], atol=1e-6)
    np.testing.assert_allclose(other.error, found.error[rows][:, genes], atol=1e-6)
    np.testing.assert_allclose(other.control_error, found.control_error[:, genes], atol=1e-6)


def test_the_unit_of_expression_does_not_matter(rng: np.random.Generator) -> None:
    seen, noise, shares, control_noise = drawn(programs(rng, 8, 200), rng)
    found, other = (estimate_effects(c * seen, c**2 * noise, shares, c**2 * control_noise) for c in (1.0, 50.0))
    np.testing.assert_allclose(other.effect, 50 * found.effect, atol=1e-6)
    np.testing.assert_allclose(other.error, 50 * found.error, atol=1e-6)


def test_genes_and_cells_that_do_not_vary() -> None:
    """Nothing varies; a gene that varies nowhere; a perturbation whose cells are all alike."""
    found = estimate_effects(np.ones((2, 3)), np.zeros((2, 3)), np.ones((2, 1)), np.zeros((1, 3)))
    assert isinstance(found, Effects) and not found.effect.any() and not found.error.any()
    many = MOST + 1
    found = estimate_effects(np.ones((many, 3)), np.zeros((many, 3)), np.ones((many, 1)), np.zeros((1, 3)))
    assert not found.effect.any()
    noise = np.array([[0.1, 0.1, 0.0], [0.0, 0.0, 0.0]])
    found = estimate_effects(np.full((2, 3), 5.0), noise, np.ones((2, 1)), np.array([[0.1, 0.1, 0.0]]))
    assert np.isfinite(found.effect).all() and np.isfinite(found.error).all()
    assert not found.effect[:, 2].any() and (found.effect[:, :2] > 3).all()
