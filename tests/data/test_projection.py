"""Rank of the mean shifts: the number of latents on simulations with a known truth."""

import numpy as np
import pytest

from crlseq.config import make_config
from crlseq.data.dataset import read_data
from crlseq.data.projection import effect_rank, principal_components
from crlseq.data.simulate import simulate


def rank(screen):
    data = read_data(screen, make_config().data, 0)
    return effect_rank(principal_components(data, 50, 0), data)


@pytest.mark.parametrize("n_latents", [3, 6])
@pytest.mark.parametrize("seed", [11, 12])
def test_linear_mixing_gives_the_number_of_latents(n_latents, seed):
    screen = simulate(
        n_latents=n_latents, perturbations_per_latent=3, n_genes=60, cells_per_perturbation=150, n_control=600,
        noise="gaussian", seed=seed,
    )  # fmt: skip
    assert rank(screen) == n_latents


def test_labels_without_any_effect_give_one():
    screen = simulate(
        n_latents=3, perturbations_per_latent=4, n_genes=40, cells_per_perturbation=60, n_control=300, seed=2
    )
    controls = screen[screen.obs["perturbation"] == "control"].copy()
    labels = np.random.default_rng(0).choice(["control", "a", "b", "c", "d", "e"], controls.n_obs)
    controls.obs["perturbation"] = labels
    assert rank(controls) == 1


def test_components_of_training_cells_alone():
    screen = simulate(
        n_latents=3, perturbations_per_latent=2, n_genes=25, cells_per_perturbation=40, n_control=100, seed=4
    )
    data = read_data(screen, make_config(hold_out_cells=0.3).data, 0)
    scores = principal_components(data, 5, 0)
    assert scores.shape == (screen.n_obs, 5)
    train = scores[data.split == 1]
    covariance = np.cov(train.T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-6 * covariance.max()
    assert train.mean(0) == pytest.approx(np.zeros(5), abs=1e-5)
