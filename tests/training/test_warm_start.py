"""The warm start: before any training step the network is the linear model that was discovered."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from crlseq.config import Config, make_config
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.projection import principal_components
from crlseq.data.simulate import simulate
from crlseq.discovery.discover import discover
from crlseq.discovery.result import Discovery
from crlseq.discovery.task import Task
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.training.trainer import architecture_of, fit_model
from crlseq.training.warm_start import MIN_VARIANCE, Anchor, WarmStart, warm_start

P, K, IDLE, UNTESTED = 3, 9, 8, 7


@dataclass(frozen=True)
class Started:
    """A model that starts from a discovery; perturbation 8 has no effect, 7 was not tested."""

    data: PerturbSeqData
    discovery: Discovery
    start: WarmStart
    config: Config
    model: DiscrepancyVAE
    anchor: Anchor


@pytest.fixture(scope="module")
def started() -> Started:
    adata = simulate(
        n_latents=P, perturbations_per_latent=3, n_genes=40, cells_per_perturbation=60, n_control=300,
        noise="gaussian", n_doubles=2, seed=3,
    )  # fmt: skip
    data = read_data(adata, make_config().data, 0)
    effect = np.ones(K)
    effect[[IDLE, UNTESTED]] = 0
    config = make_config(n_latents=P, bootstrap=0, epochs=2, seed=1)
    discovery = discover(Task(data, effect, config.model, 0))
    tested = np.arange(K) != UNTESTED
    start = WarmStart(discovery, tested, principal_components(data, 30, 0))
    model, anchor = begin(data, start, config)
    return Started(data, discovery, start, config, model, anchor)


def begin(data: PerturbSeqData, start: WarmStart, config: Config, seed: int = 0) -> tuple[DiscrepancyVAE, Anchor]:
    torch.manual_seed(seed)
    model = DiscrepancyVAE(**architecture_of(config.model, data.n_genes, P, K, start)).double()
    return model, warm_start(model, data, start)


def rows(data: PerturbSeqData, cells: np.ndarray) -> Tensor:
    return torch.from_numpy(data.dense(cells)).double()


def test_the_screen_has_something_to_start_from(started: Started) -> None:
    assert started.discovery.adjacency.any()
    assert started.discovery.verdict.answer == "identified"


@torch.no_grad()
def test_encoder_and_decoder_are_exactly_linear(started: Started) -> None:
    generator = torch.Generator().manual_seed(0)

    def is_affine(f: object, n: int) -> bool:
        assert callable(f)
        a, b = 10 * torch.randn(2, 20, n, generator=generator, dtype=torch.float64)
        return torch.allclose(f(a + b) + f(torch.zeros_like(a)), f(a) + f(b), atol=1e-9)

    assert is_affine(lambda x: started.model.encoder(x)[0], 40)
    assert is_affine(started.model.decoder, P)
    assert is_affine(started.model.latents, 40)
    assert not is_affine(lambda x: x.relu(), 40)


@torch.no_grad()
def test_latents_are_those_discovered(started: Started) -> None:
    train = started.data.split[started.discovery.index] == splits.TRAIN
    u = started.model.latents(rows(started.data, started.discovery.index[train])).numpy()
    for k in range(P):
        found = started.discovery.latents[train, k]
        assert np.corrcoef(u[:, k], found)[0, 1] > 0.95
        assert np.polyfit(u[:, k], found, 1)[0] == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_the_decoder_is_the_regression_of_expression_on_the_latents(started: Started) -> None:
    train = started.data.split[started.discovery.index] == splits.TRAIN
    x = rows(started.data, started.discovery.index[train]).numpy()
    u = np.column_stack([started.discovery.latents[train], np.ones(train.sum())])
    expected = u @ np.linalg.lstsq(u, x, rcond=None)[0]
    decoded = started.model.decoder(torch.from_numpy(started.discovery.latents[train])).numpy()
    assert np.abs(decoded - expected).max() < 1e-4
    assert started.model.log_noise is not None
    assert started.model.log_noise.exp().numpy() == pytest.approx((x - expected).var(0), rel=1e-3)


@torch.no_grad()
def test_the_posterior_variance_is_how_well_latents_are_known(started: Started) -> None:
    variance = started.model.encoder(rows(started.data, np.arange(5)))[1].numpy()
    expected = np.clip(started.discovery.noise, MIN_VARIANCE, 1)
    assert variance == pytest.approx(np.tile(expected, (5, 1)), rel=1e-6)
    assert started.anchor.variance == pytest.approx(np.maximum(started.discovery.noise, MIN_VARIANCE))


@torch.no_grad()
def test_graph_and_interventions_are_those_discovered(started: Started) -> None:
    scm, found = started.model.scm, started.discovery
    assert scm.intervention == found.kind
    assert scm.adjacency.numpy() == pytest.approx(found.adjacency)
    claimed = found.target >= 0
    assert claimed.sum() == 7
    mechanism = scm.mechanism(torch.arange(K)[:, None], started.model.target_weights(torch.arange(K)[:, None]))
    each = np.flatnonzero(claimed)
    assert mechanism.shift.numpy()[each, found.target[each]] == pytest.approx(found.shift[each])
    assert mechanism.log_scale.numpy()[each, found.target[each]] == pytest.approx(found.log_scale[each])
    assert mechanism.retention.numpy()[each, found.target[each]] == pytest.approx(found.retention[each])


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_targets_are_given_whole_or_not_at_all(started: Started, temperature: float) -> None:
    weights = started.model.intervention_encoder(torch.arange(K), temperature).numpy()
    for k in range(K - 2):
        assert weights[k].tolist() == np.eye(P)[started.discovery.target[k]].tolist()
    assert weights[IDLE].tolist() == [0] * P
    # what was never tested stays to be learned
    assert weights[UNTESTED].sum() == pytest.approx(1) and weights[UNTESTED].max() < 1


@torch.no_grad()
def test_a_perturbation_without_target_changes_no_cell(started: Started) -> None:
    control = rows(started.data, started.data.cells(0, splits.TRAIN)[:10])
    virtual = started.model(control.expand(2, -1, -1), torch.tensor([[IDLE], [0]])).virtual
    torch.testing.assert_close(virtual[0], control)
    assert float((virtual[1] - control).abs().max()) > 0.1


@torch.no_grad()
def test_virtual_cells_have_the_mean_of_the_perturbed_ones(started: Started) -> None:
    control = rows(started.data, started.data.cells(0, splits.TRAIN))
    before = control.mean(0)
    for k in range(7):
        condition = started.data.conditions.index((k,))
        real = rows(started.data, started.data.cells(condition, splits.TRAIN)).mean(0) - before
        virtual = started.model(control[None], torch.tensor([[k]])).virtual[0].mean(0) - before
        assert float(torch.corrcoef(torch.stack([real, virtual]))[0, 1]) > 0.9


def test_the_anchor_is_the_noise_of_the_latents_found(started: Started) -> None:
    z = started.model.scm.abduct(torch.from_numpy(started.discovery.latents)).detach().numpy()
    assert started.anchor.z[started.discovery.index] == pytest.approx(z, abs=1e-5)
    others = np.setdiff1d(np.arange(len(started.data.split)), started.discovery.index)
    assert not started.anchor.z[others].any()


def test_where_it_starts_does_not_depend_on_random_weights(started: Started) -> None:
    other, _ = begin(started.data, started.start, started.config, seed=9)
    x = rows(started.data, np.arange(8))
    with torch.no_grad():
        torch.testing.assert_close(other.latents(x), started.model.latents(x))
        torch.testing.assert_close(other.decoder(other.latents(x)), started.model.decoder(started.model.latents(x)))


@pytest.mark.parametrize("n_hidden", [1, 2 * P, 20])
@torch.no_grad()
def test_there_are_hidden_units_enough_for_the_linear_map(started: Started, n_hidden: int) -> None:
    narrow = started.config.model_copy(update={"model": started.config.model.model_copy(update={"n_hidden": n_hidden})})
    model, _ = begin(started.data, started.start, narrow)
    assert model.encoder.hidden.out_features == max(n_hidden, 2 * P)
    x = rows(started.data, np.arange(8))
    torch.testing.assert_close(model.latents(x), started.model.latents(x))


def test_soft_interventions_and_nonlinear_equations_are_taken_over(started: Started) -> None:
    claimed = started.discovery.target >= 0
    soft = replace(started.discovery, kind="soft", retention=np.where(claimed, 0.3, 1.0))
    model, _ = begin(started.data, replace(started.start, discovery=soft), started.config)
    assert model.scm.retention().detach().numpy()[claimed] == pytest.approx(np.full(7, 0.3))
    bent = replace(
        started.discovery, kind="shift", equations="nonlinear", intercept=np.array([0.5, -1.0, 2.0]),
        log_scale=np.zeros(K), retention=np.ones(K),
    )  # fmt: skip
    model, anchor = begin(started.data, replace(started.start, discovery=bent), started.config)
    assert model.scm.intercept.tolist() == [0.5, -1, 2]
    u = bent.latents
    expected = u - np.maximum(u, 0) @ bent.adjacency - bent.intercept
    assert anchor.z[bent.index] == pytest.approx(expected, abs=1e-5)


def test_graph_and_given_targets_do_not_move_in_training(started: Started) -> None:
    fit = fit_model(started.data, started.config, P, start=started.start)
    fitted = fit.model
    assert len(fit.history) == 2
    assert fitted.scm.adjacency.detach().numpy() == pytest.approx(started.discovery.adjacency)
    weights = fitted.target_weights(torch.arange(K)).detach().numpy()
    for k in range(K - 2):
        assert weights[k].tolist() == np.eye(P)[started.discovery.target[k]].tolist()
    assert weights[IDLE].tolist() == [0] * P
    assert not torch.equal(fitted.encoder.hidden.weight.double(), started.model.encoder.hidden.weight)


def test_the_linear_method_makes_no_step(started: Started) -> None:
    config = started.config.model_copy(update={"model": started.config.model.model_copy(update={"method": "linear"})})
    fitted = fit_model(started.data, config, P, start=started.start)
    assert fitted.history == []
    x = rows(started.data, np.arange(8))
    with torch.no_grad():
        torch.testing.assert_close(
            fitted.model.latents(x.float()).double(), started.model.latents(x), atol=1e-3, rtol=1e-3
        )
