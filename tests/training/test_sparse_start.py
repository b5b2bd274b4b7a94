"""Sparse loadings of a discovery: the latents' prior by hand, and the gene lists of simulated programs."""

from __future__ import annotations

from dataclasses import dataclass

import anndata as ad
import numpy as np
import pytest
import torch

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.projection import principal_components
from crlseq.data.simulate import simulate
from crlseq.discovery.result import Discovery
from crlseq.discovery.verdict import Verdict
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.scm import LatentSCM
from crlseq.model.sparse_decoder import SparseDecoder
from crlseq.training.distributed import ALONE
from crlseq.training.learner import Learner
from crlseq.training.objective import Objective
from crlseq.training.sparse_start import condition_prior, control_deviation
from crlseq.training.trainer import architecture_of, fit_model
from crlseq.training.warm_start import WarmStart, warm_start

P, K, G = 3, 6, 60
CONFIG = make_config(n_latents=P, bootstrap=0, decoder="sparse", epochs=3)


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return simulate(
        n_latents=P, perturbations_per_latent=2, n_genes=G, cells_per_perturbation=150, n_control=600,
        noise="gaussian", loading_density=0.2, seed=4,
    )  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """A screen, what made it as a discovery whose latents are measured with noise, and the genes of each program."""

    data: PerturbSeqData
    start: WarmStart
    loaded: np.ndarray
    latents: np.ndarray


@pytest.fixture(scope="module")
def truth(screen: ad.AnnData) -> Truth:
    """Latents in a topological order; measurement errors of the latents are correlated, as those of a projection are."""
    data, true = read_data(screen, CONFIG.data, 0), screen.uns["truth"]
    adjacency = np.asarray(true["adjacency"])
    order = np.argsort(np.linalg.inv(np.eye(P) - (adjacency != 0)).astype(bool).sum(0))
    rng = np.random.default_rng(0)
    mixed = np.array([[0.2, 0.1, 0.0], [0.0, 0.2, 0.1], [0.1, 0.0, 0.2]])
    latents = screen.obsm["true_latents"][:, order] + rng.standard_normal((screen.n_obs, P)) @ mixed
    target = np.argsort(order)[true["target"]["latent"].loc[list(data.perturbation_names)]]
    controls = screen.obs["perturbation"] == "control"
    shift = [
        latents[screen.obs["perturbation"] == name, k].mean()
        for name, k in zip(data.perturbation_names, target, strict=True)
    ]
    assert abs(latents[controls].mean()) < 0.2
    discovery = Discovery(
        index=np.arange(screen.n_obs), latents=latents, noise=(mixed**2).sum(0), adjacency=adjacency[np.ix_(order, order)],
        intercept=np.zeros(P), target=target, shift=np.array(shift), log_scale=np.full(K, np.log(0.7)),
        retention=np.zeros(K), kind="hard", equations="linear", verdict=Verdict("identified", ""), held_out={}, gain=1.0,
        gain_error=0.1, misfit=1.0, environments=np.arange(K),
    )  # fmt: skip
    start = WarmStart(discovery, np.ones(K, bool), principal_components(data, 20, 0))
    return Truth(data, start, np.asarray(true["loaded"])[order], screen.obsm["true_latents"][:, order])


def begun(truth: Truth) -> tuple[DiscrepancyVAE, SparseDecoder]:
    torch.manual_seed(0)
    model = DiscrepancyVAE(**architecture_of(CONFIG.model, G, P, K, truth.start))
    assert isinstance(model.decoder, SparseDecoder)
    return model, model.decoder


@torch.no_grad()
def test_moments_of_conditions_by_hand() -> None:
    """P0 -2-> P1: control, perturbation 0 shifts P0 by 3, perturbation 1 cuts P1 off and halves its noise."""
    scm = LatentSCM(2, 2, "soft")
    scm.graph.copy_(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    scm.shift.copy_(torch.tensor([3.0, 1.0]))
    scm.retention_logit.copy_(torch.tensor([50.0, -50.0]))
    scm.log_scale.copy_(torch.tensor([0.0, 3 * np.arctanh(np.log(0.5) / 3)]))
    weights = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    mean, covariance = condition_prior(scm, torch.tensor([[-1], [0], [1]]), weights)
    assert mean.flatten().tolist() == pytest.approx([0, 0, 3, 6, 0, 1])
    assert covariance[0].flatten().tolist() == pytest.approx([1, 2, 2, 5])
    assert covariance[2].flatten().tolist() == pytest.approx([1, 0, 0, 0.25], abs=1e-6)
    assert control_deviation(scm).tolist() == pytest.approx([1, 5**0.5])


@torch.no_grad()
def test_gene_lists_are_those_that_made_the_cells(truth: Truth) -> None:
    model, decoder = begun(truth)
    anchor = warm_start(model, truth.data, truth.start)
    found = (decoder.output.mask != 0).T.numpy()
    assert (found & truth.loaded).sum() / found.sum() > 0.9
    assert (found & truth.loaded).sum() / truth.loaded.sum() > 0.9
    # Regression on the latents as measured leaves their errors to the genes.
    u, x = truth.start.discovery.latents, truth.data.dense(np.arange(len(truth.data.split)))
    design = np.column_stack([u, np.ones(len(u))])
    slope, left, _, _ = np.linalg.lstsq(design, x, rcond=None)
    error = np.sqrt(np.outer(np.linalg.inv(np.cov(u.T)).diagonal(), left)) / len(u)
    regressed = np.abs(slope[:P]) > 4 * error
    assert (regressed & ~truth.loaded).sum() > 2 + (found & ~truth.loaded).sum()
    # What the encoder is held to comes from all genes: closer to the truth than the latents as measured.
    assert (anchor.variance < truth.start.discovery.noise).all()
    z, measured = (model.scm.double().abduct(torch.from_numpy(part)).numpy() for part in (truth.latents, u))
    assert (((anchor.z - z) ** 2).mean(0) < 0.7 * ((measured - z) ** 2).mean(0)).all()


@torch.no_grad()
def test_it_starts_linear_and_standardised(truth: Truth) -> None:
    model, decoder = begun(truth)
    warm_start(model, truth.data, truth.start)
    u = torch.randn(50, P)
    middle = (decoder(u) + decoder(-u)) / 2
    torch.testing.assert_close(middle, decoder(torch.zeros(1, P)).expand_as(middle), atol=1e-4, rtol=0)
    before = decoder.output.mask.clone()
    decoder.standardise(model.scm(torch.randn(20_000, P, generator=torch.Generator().manual_seed(0))))
    torch.testing.assert_close(decoder.output.mask, before, atol=0.02, rtol=0.05)


def test_zeros_stay_zero_between_the_fits_of_masks(truth: Truth) -> None:
    model, decoder = begun(truth)
    anchor = warm_start(model, truth.data, truth.start)
    learner = Learner(Objective(model, truth.data, CONFIG.model, 1.0, anchor), CONFIG, ALONE)
    assert learner.sparsity is not None
    learner.sparsity.begin(0, 1, 1.0)
    learner.sparsity.mark()
    zero, before = decoder.output.mask == 0, decoder.output.mask.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        decoder(torch.randn(8, P)).square().sum().backward()
        optimizer.step()
        learner.sparsity.hold()
    assert 0 < zero.float().mean() < 1
    assert (decoder.output.mask[zero] == 0).all()
    assert (decoder.output.mask[~zero] != before[~zero]).all()


def test_training_keeps_the_lists(truth: Truth) -> None:
    fitted = fit_model(truth.data, CONFIG, P, start=truth.start)
    assert isinstance(fitted.model.decoder, SparseDecoder)
    found = (fitted.model.decoder.output.mask != 0).T.numpy()
    assert (truth.data.split == splits.TRAIN).any()
    assert (found & truth.loaded).sum() / found.sum() > 0.85
    assert (found & truth.loaded).sum() / truth.loaded.sum() > 0.85
    assert fitted.history[-1]["total"] < fitted.history[0]["total"] + 0.5
