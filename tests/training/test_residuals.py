"""Effects past the programs: what the latents leave over of an effect, and what all perturbations share of that."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch

import crlseq
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.mean_effects import controls_by_batch, mean_effect
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.training.effects import estimate_effects
from crlseq.training.residuals import measure_missed, shared_effect
from tests.support import dense


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def effects(common: float, n: int = 20, g: int = 3000) -> np.ndarray:
    """Common effects in the first tenth of genes, and an effect on a gene of each perturbation's own."""
    true = np.zeros((n, g))
    true[:, : g // 10] = common
    true[np.arange(n), g // 2 + np.arange(n)] = -3.0
    return true


def test_own_effects_are_no_common_effect() -> None:
    """Twenty genes, each changed by 3 in one of 20: their means of 0.15 are what their spread makes, and no more."""
    common, squared = shared_effect(effects(0.0))
    np.testing.assert_allclose(common, 0, atol=1e-12)
    np.testing.assert_allclose(squared, 0, atol=1e-12)


def test_what_all_perturbations_share_is_kept_apart(rng: np.random.Generator) -> None:
    """The mean's squares are 300 * 4 + 20 * .15^2, of which the spread of own effects makes 20 * 9 / 400."""
    common, squared = shared_effect(effects(2.0))
    agreed = 1 - 0.45 / (1200 + 0.45)
    np.testing.assert_allclose(common[:300], 2 * agreed)
    np.testing.assert_allclose(common[1500:1520], -0.15 * agreed)
    np.testing.assert_allclose(squared[1500:1520], agreed * 9 / 400)
    assert not common[300:1500].any()
    common, _ = shared_effect(effects(2.0) + 0.3 * rng.normal(size=(20, 3000)))
    np.testing.assert_allclose(common[:300], 2, atol=0.3)


def test_few_perturbations_have_nothing_in_common_by_chance(rng: np.random.Generator) -> None:
    """Two perturbations with own effects: their mean is no common effect; and one shares nothing."""
    measured = rng.normal(size=(2, 1000))
    common, squared = shared_effect(measured)
    assert (common**2).sum() < 0.05 * (measured.mean(0) ** 2).sum()
    common, squared = shared_effect(measured[:1])
    assert not common.any() and not squared.any()


@torch.no_grad()
def test_single_effects_of_the_model_are_the_estimates(screen: ad.AnnData) -> None:
    """Through the latents and past them, of hit cells; of penetrances below 1, the estimate from effects over these."""
    data: PerturbSeqData = read_data(screen, crlseq.config.make_config().data, 0)
    model = crlseq.fit(screen.copy(), method="linear", n_latents=3, bootstrap=0).model.double()
    model.penetrance[1] = 0.5
    measure_missed(model, data, 0)
    cells = data.cells_by_condition(splits.TRAIN)
    control = torch.from_numpy(data.dense(cells[0])).double()[None]
    assert control.shape[1] <= 500
    z = model.encoder(control)[0]
    controls = controls_by_batch(data, cells[0])
    places = [(c, p[0]) for c, p in enumerate(data.conditions) if len(p) == 1]
    share = np.array([[float(model.penetrance[k])] for _, k in places])
    measured, noise = map(
        np.stack, list(zip(*(mean_effect(data, cells[c], controls) for c, _ in places), strict=True))[:2]
    )
    _, spread, n = controls[-1]
    estimate = estimate_effects(measured / share, noise / share**2, 1 / share, (spread / n)[None])
    before = model.decoder(model.scm(z)).mean((0, 1))
    for i, (_, k) in enumerate(places):
        one = torch.tensor([[k]])
        effect = model.decoder(model.intervene(z, one)).mean((0, 1)) - before + model.missed(one)[0, 0]
        np.testing.assert_allclose(effect.numpy(), estimate.effect[i], atol=1e-6)
        error = (model.residual_error[k] ** 2 + model.common_error**2).sqrt().numpy()
        assert (error >= estimate.error[i] - 1e-9).all()
    np.testing.assert_allclose(model.control_error.numpy(), estimate.control_error[0], atol=1e-6)
    assert model.control_error.any()


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
