"""Principal components: of training cells alone."""

import numpy as np
import pytest

from crlseq.config import make_config
from crlseq.data.dataset import read_data
from crlseq.data.projection import principal_components
from crlseq.data.simulate import simulate


def test_components_of_training_cells_alone():
    screen = simulate(
        n_latents=3, perturbations_per_latent=2, n_genes=25, cells_per_perturbation=40, n_control=100, seed=4
    )
    data = read_data(screen, make_config(hold_out_cells=0.3).data, 0)
    scores = principal_components(data, 5, 0).scores
    assert scores.shape == (screen.n_obs, 5)
    train = scores[data.split == 1]
    covariance = np.cov(train.T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-6 * covariance.max()
    assert train.mean(0) == pytest.approx(np.zeros(5), abs=1e-5)
