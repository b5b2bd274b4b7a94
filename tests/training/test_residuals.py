"""Effects past the programs: shrinkage by hand and against known priors, what is shared, and how sure it is."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch

import crlseq
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.training.residuals import missed_effects, shrink
from tests.support import dense


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


def test_a_single_perturbation_keeps_one_share_of_what_is_spread_thin(rng: np.random.Generator) -> None:
    """Effects of 0.3 errors in every gene, of which the prior, gene by gene, keeps next to nothing."""
    measured = 0.3 * rng.choice([-1.0, 1.0], (1, 4000)) + rng.normal(size=(1, 4000))
    noise = np.full((1, 4000), 0.6)
    found = missed_effects(measured, noise, np.full((1, 4000), 0.4))
    assert not found.common.any()  # one perturbation shares nothing
    sparse, _ = shrink(measured[0], np.ones(4000))
    rest = measured[0] - sparse
    share = max(0, 1 - 4000 / (rest**2).sum())
    np.testing.assert_allclose(found.own[0], sparse + share * rest)


def shared(
    rng: np.random.Generator, common: float, n: int = 20, g: int = 3000
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Common effects in the first tenth of genes, an own effect of each perturbation's gene; noise of cells and controls."""
    noise, control_noise = np.full((n, g), 0.1), np.full((n, g), 0.05)
    true = np.zeros((n, g))
    true[:, : g // 10] = common
    true[np.arange(n), g // 2 + np.arange(n)] = -3.0
    seen = true + np.sqrt(0.1) * rng.normal(size=(n, g)) + np.sqrt(0.05) * rng.normal(size=g)
    return true, seen, noise, control_noise


def test_the_controls_error_is_no_common_effect(rng: np.random.Generator) -> None:
    true, seen, noise, control_noise = shared(rng, 0.0)
    found = missed_effects(seen, noise, control_noise)
    assert np.abs(found.common).max() < 0.1
    error = found.own - true
    alone = np.stack([shrink(row, np.sqrt(0.15) * np.ones(len(row)))[0] for row in seen]) - true
    assert (error**2).mean() < 1.2 * (alone**2).mean() < 0.05 * ((seen - true) ** 2).mean()
    np.testing.assert_allclose(found.own[np.arange(20), 1500 + np.arange(20)], -3, atol=1.2)


def test_what_all_perturbations_share_is_kept_apart(rng: np.random.Generator) -> None:
    _, seen, noise, control_noise = shared(rng, 2.0)
    found = missed_effects(seen, noise, control_noise)
    np.testing.assert_allclose(found.common[:300], 2, atol=0.9)
    assert np.abs(found.common[300:1500]).mean() < 0.1 and np.abs(found.own[:, :300]).mean() < 0.1
    _, seen, noise, control_noise = shared(rng, 0.8)  # two errors: no perturbation alone says so, twenty do
    found = missed_effects(seen, noise, control_noise)
    assert found.common[:300].mean() > 4 * np.abs(found.common[300:1500]).mean()
    assert found.common[:300].mean() > 0.4


def test_few_perturbations_have_nothing_in_common_by_chance(rng: np.random.Generator) -> None:
    """Two perturbations with own effects: their mean is no common effect."""
    measured = rng.normal(size=(2, 1000))
    found = missed_effects(measured, np.full((2, 1000), 0.01), np.full((2, 1000), 0.001))
    assert (found.common**2).sum() < 0.05 * (measured.mean(0) ** 2).sum()
    np.testing.assert_allclose(found.own, measured, atol=0.3)


def test_posterior_deviations_cover(rng: np.random.Generator) -> None:
    n, g = 30, 2000
    true = rng.normal(size=(n, g)) * np.where(rng.random((n, g)) < 0.2, 1.0, 0.0)
    seen = true + 0.3 * rng.normal(size=(n, g))
    found = missed_effects(seen, np.full((n, g), 0.08), np.full((n, g), 0.01))
    covered = np.abs(found.common + found.own - true) <= 1.96 * np.sqrt(found.own_error**2 + found.common_error**2)
    assert 0.9 < covered.mean() < 0.99
    assert covered[true != 0].mean() > 0.75


def test_a_combination_has_the_common_effect_once() -> None:
    model = DiscrepancyVAE(2, 1, 3)
    model.common.copy_(torch.tensor([1.0, 0]))
    model.common_error.copy_(torch.tensor([0.3, 0]))
    model.residual.copy_(torch.tensor([[0.0, 10], [0, 20], [0, 40]]))
    model.residual_error.copy_(torch.tensor([[0.4, 3.0], [0, 4], [0, 0]]))
    conditions = torch.tensor([[0, -1], [0, 1], [-1, -1]])
    torch.testing.assert_close(model.missed(conditions)[:, 0], torch.tensor([[1.0, 10], [1, 30], [0, 0]]))
    torch.testing.assert_close(model.missed_error(conditions), torch.tensor([[0.5, 3.0], [0.5, 5], [0, 0]]))


def test_a_fit_measures_what_its_latents_miss(screen: ad.AnnData) -> None:
    """A gene that one perturbation alone silences, and one that every perturbation raises."""
    adata = screen.copy()
    x = dense(adata)
    perturbed = adata.obs["perturbation"] != "control"
    x[:, 30] = np.random.default_rng(1).poisson(8, len(x))
    x[(adata.obs["perturbation"] == "g6").to_numpy(), 30] = 0
    x[:, 31] = np.random.default_rng(2).poisson(np.where(perturbed, 12, 6))
    adata.X = x
    run = crlseq.fit(adata, method="linear", n_latents=3, bootstrap=0)
    model, names = run.model, list(run.interventions["perturbation"])
    moved = model.missed(torch.tensor([[names.index(name)] for name in names]))[:, 0]
    others = np.delete(np.arange(len(names)), names.index("g6"))
    assert moved[names.index("g6"), 30] < -1 and moved[others, 30].abs().max() < 0.5
    together = float(model.missed(torch.tensor([[0, 1]]))[0, 0, 31])
    assert 0.3 < together < 1.2  # log(12 / 6), once
