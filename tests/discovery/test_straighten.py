"""Straightening: starts exactly linear, makes a bent toy straighter, repeats to the bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crlseq.discovery.likelihood import Solution, fit_linear
from crlseq.discovery.misfit import misfit
from crlseq.discovery.moments import DTYPE, Moments, environment_moments
from crlseq.discovery.straighten import SHRINK, Phase, Straightener, StraighteningVAE, without_background
from tests.structural import P, Q, truth

SHIFTS = torch.tensor([[0.0, 0], [3, 0], [-3, 0], [0, 3], [0, -3]], dtype=DTYPE)


def bent(seed: int = 0, n: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    """Two independent programs, each shifted both ways, seen through a layer of leaky ReLUs: components (N, 4),
    environments and programs."""
    generator = torch.Generator().manual_seed(seed)
    environment = torch.repeat_interleave(torch.arange(5), torch.tensor([3 * n, n, n, n, n]))
    u = torch.randn(len(environment), 2, generator=generator, dtype=DTYPE) + SHIFTS[environment]
    angle = torch.tensor([0.4, 1.9, 3.5, 5.0], dtype=DTYPE)
    y = torch.nn.functional.leaky_relu(u @ torch.stack([angle.cos(), angle.sin()]) + 0.3, 0.1)
    y = y + 0.1 * torch.randn(y.shape, generator=generator, dtype=DTYPE)
    return (y - y.mean(0)) / y.std(), environment, u


def linear_fit(y: Tensor, environment: Tensor) -> Solution:
    return fit_linear(environment_moments(y, environment), 2, "hard", targets=torch.tensor([[0, 0, 1, 1]]))


def explained(u: Tensor, v: Tensor) -> float:
    """Least R2 of the columns of u, linear in v."""
    x = torch.cat([v, torch.ones(len(v), 1, dtype=DTYPE)], 1)
    left = u - x @ torch.linalg.lstsq(x, u).solution
    return float((1 - left.var(0) / u.var(0)).min())


@pytest.fixture
def start() -> tuple[Straightener, Tensor, Tensor]:
    y, environment, _ = bent()
    directions = linear_fit(y, environment).directions()
    return Straightener(y, environment, directions), y, directions


def test_the_network_starts_exactly_linear_with_controls_whitened(start: tuple[Straightener, Tensor, Tensor]) -> None:
    straightener, y, directions = start
    mean, variance = straightener.encode(y)
    control = y[straightener.environment == 0]
    encoder = straightener.vae.encoder.detach().to(DTYPE)
    torch.testing.assert_close(mean, (y - control.mean(0)) @ encoder, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(variance, torch.full_like(variance, math.exp(-2)), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cov(mean[: len(control)].T), torch.eye(2, dtype=DTYPE), atol=1e-4, rtol=0)
    # of the span of the directions that were given
    left = encoder - directions @ torch.linalg.lstsq(directions, encoder).solution
    assert float(left.abs().max()) < 1e-5
    # and the decoder is the least-squares line
    v = torch.randn(9, 2)
    vae = straightener.vae
    torch.testing.assert_close(vae.decode(v), v @ vae.decoder + vae.center)
    fitted = torch.linalg.lstsq(mean, y - control.mean(0)).solution
    torch.testing.assert_close(vae.decoder.detach().to(DTYPE), fitted, atol=1e-4, rtol=0)


def test_a_component_that_latents_explain_wholly_keeps_some_noise() -> None:
    y, environment, _ = bent()
    y[:, 3] = 0
    vae = StraighteningVAE(y, environment == 0, torch.eye(4, 2, dtype=DTYPE))
    torch.testing.assert_close(vae.log_noise.detach()[[0, 1, 3]], torch.full((3,), math.log(1e-3)))


def test_a_bent_toy_becomes_straighter() -> None:
    y, environment, u = bent()
    solution = linear_fit(y, environment)
    straightener = Straightener(y, environment, solution.directions())
    before = explained(u, straightener.encode(y)[0])
    straightener.train(Phase(400, 4.0))
    straightener.train(Phase(200, settle=True))
    after = explained(u, straightener.encode(y)[0])
    assert before < 0.9
    assert 1 - after < 0.8 * (1 - before)
    fitted = straightener.fit_prior("hard", fresh=True)
    assert misfit(fitted).value < 0.5 * misfit(solution).value
    assert torch.equal(fitted.targets[0, [0, 2]], fitted.targets[0, [1, 3]])


def test_causal_training_keeps_the_kind_and_lowers_the_loss() -> None:
    y, environment, _ = bent()
    straightener = Straightener(y, environment, linear_fit(y, environment).directions())
    first = straightener.train(Phase(100), "hard")
    later = straightener.train(Phase(200, settle=True), "hard")
    assert later < first
    assert straightener.solution is not None
    assert straightener.solution.model.kind == "hard"
    assert straightener.optimizer.param_groups[0]["lr"] < 1e-4  # cooled down


def test_one_seed_one_result() -> None:
    y, environment, _ = bent(n=40)
    directions = linear_fit(y, environment).directions()

    def trained(seed: int) -> Tensor:
        straightener = Straightener(y, environment, directions, seed)
        torch.rand(7)  # the global generator has no say
        straightener.train(Phase(30), "hard")
        return straightener.encode(y)[0]

    one, again, other = trained(1), trained(1), trained(2)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_moments_are_of_the_aggregated_posterior(start: tuple[Straightener, Tensor, Tensor]) -> None:
    straightener, y, _ = start
    mean, variance = straightener.encode(y)
    found = straightener.moments()
    for c in range(5):
        own = straightener.environment == c
        expected = torch.cov(mean[own].T, correction=0) + torch.diag(variance[own].mean(0))
        torch.testing.assert_close(found.covariances[c], expected)
        torch.testing.assert_close(found.means[c], mean[own].mean(0))


def test_a_free_prior_is_drawn_to_the_pooled_covariance_by_pseudo_cells(
    start: tuple[Straightener, Tensor, Tensor],
) -> None:
    straightener = start[0]
    moments = straightener.moments()
    mean, covariance = straightener._prior(None, fresh=False)
    assert torch.equal(mean, moments.means)
    pull = SHRINK * 2
    expected = (150 * moments.covariances[1] + pull * moments.pooled()) / (150 + pull)
    torch.testing.assert_close(covariance[1], expected)


def test_the_prior_is_kept_where_fresh_targets_are_no_better(start: tuple[Straightener, Tensor, Tensor]) -> None:
    straightener = start[0]
    first = straightener.fit_prior("hard", fresh=True)
    second = straightener.fit_prior("hard", fresh=True)
    assert float(second.nll[0]) <= float(first.nll[0]) + 1e-9
    assert not second.model.fit_noise and second.model.q == second.model.p == 2


def test_background_is_what_varies_where_no_perturbation_shifts() -> None:
    """One program of variance 4 along e0, background of variance 9 along e1 + e2 half of which programs' direction sees:
    y0 = 2 u + b, y1 = 3 b, noise 0.01; shifts along e0 alone. Slope of y0 on y1 within environments is 1/3 but for noise.
    """
    covariance = torch.diag(torch.full((3,), 0.01, dtype=DTYPE))
    covariance[:2, :2] += torch.tensor([[5.0, 3.0], [3.0, 9.0]], dtype=DTYPE)
    means = torch.tensor([[0.0, 0, 0], [4, 0, 0], [-6, 0, 0]], dtype=DTYPE)
    moments = Moments(means, covariance.repeat(3, 1, 1), torch.full((3,), 100.0, dtype=DTYPE))
    cells = torch.tensor([[2.0, 0, 0], [1, 3, 0], [0, 0, 5]], dtype=DTYPE)
    found = without_background(cells, moments, 1, 0.01)
    assert found.shape == (3, 1)
    sign = torch.sign(found[0])
    torch.testing.assert_close(found[:, 0] * sign, torch.tensor([2.0, 1 - 9 / 9.01, 0], dtype=DTYPE))


def test_without_background_the_span_of_shifts_is_only_turned() -> None:
    true = truth(noise=0.1)
    moments = true.moments(1000)
    y, _ = true.cells(20)
    found = without_background(y, moments, P, 0.1)
    assert found.shape == (len(y), P)
    shifts = moments.means[1:] - moments.means[0]
    turned = without_background(shifts, moments, P, 0.1)
    torch.testing.assert_close(turned @ turned.T, shifts @ shifts.T)


def test_latents_are_given_all_directions_where_shifts_are_too_few_or_many() -> None:
    moments = truth(noise=0.1).moments(1000)
    y = torch.eye(Q, dtype=DTYPE)
    assert without_background(y, moments, Q, 0.1).shape == (Q, Q)
    quiet = replace(moments, means=torch.zeros_like(moments.means))
    assert without_background(y, quiet, P, 0.1).shape == (Q, P)
