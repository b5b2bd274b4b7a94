"""The damped solve: of another model than the linear one, restarts apart, and what it does where there is no way."""

from __future__ import annotations

import torch
from torch import Tensor

from crlseq.discovery.moments import DTYPE, Moments
from crlseq.discovery.scoring import Deviations, Score, solve

LOADING = torch.tensor([1.0, -0.5, 2.0, 0.8], dtype=DTYPE)
NOISE = torch.tensor([0.3, 0.5, 0.2, 0.4], dtype=DTYPE)
Q = len(NOISE)


def one_factor(moments: Moments, theta: Tensor) -> Score:
    """Factor analysis, ``S = w w' + diag(exp psi)`` with parameters (w, psi): ``dS/dw_i = e_i w' + w e_i'``."""
    w, noise, eye = theta[:, :Q], theta[:, Q:].exp(), torch.eye(Q, dtype=DTYPE)
    half = torch.einsum("ia,rb->riab", eye, w)
    slopes = torch.cat([half + half.mT, torch.einsum("ia,ib,ri->riab", eye, eye, noise)], 1)  # (R, P, q, q)
    covariance = w[:, :, None] * w[:, None] + torch.diag_embed(noise)
    fit = Deviations(moments, torch.zeros(len(theta), 1, Q, dtype=DTYPE), covariance[:, None])
    gradient = 0.5 * torch.einsum("rab,rpab->rp", fit.by_covariance[:, 0], slopes)
    moved = fit.precision @ slopes
    return fit.nll, gradient, 0.5 * torch.einsum("riab,rjba->rij", moved, moved)


def exact() -> Moments:
    covariance = LOADING[:, None] * LOADING + torch.diag(NOISE)
    return Moments(torch.zeros(1, Q, dtype=DTYPE), covariance[None], torch.tensor([500.0], dtype=DTYPE))


def starts() -> Tensor:
    return torch.randn(3, 2 * Q, generator=torch.Generator().manual_seed(0), dtype=DTYPE)


def test_the_score_of_a_one_factor_model_is_that_of_autograd() -> None:
    theta = starts().requires_grad_()
    nll, gradient, _ = one_factor(exact(), theta)
    torch.testing.assert_close(gradient, torch.autograd.grad(nll.sum(), theta)[0])


def test_scoring_solves_a_one_factor_model() -> None:
    moments, theta = exact(), starts()
    theta, (_, gradient, _), converged = solve(
        lambda t: one_factor(moments, t), theta, torch.ones_like(theta), moments.cells()
    )
    assert bool(converged.all()) and float(gradient.abs().max()) < 1e-2
    torch.testing.assert_close(theta[:, :Q].abs(), LOADING.abs().expand(3, -1), atol=0.02, rtol=0)
    torch.testing.assert_close(theta[:, Q:].exp(), NOISE.expand(3, -1), atol=0.02, rtol=0)


def test_what_is_not_free_stays() -> None:
    moments = exact()
    truth = torch.cat([LOADING, NOISE.log()])[None]
    free = torch.ones_like(truth)
    free[:, 0] = 0

    def score(t: Tensor) -> Score:
        nll, gradient, information = one_factor(moments, t)
        return nll, gradient * free, information * free[:, :, None] * free[:, None] + torch.diag_embed(1 - free)

    start = truth + 0.3
    theta, _, converged = solve(score, start, free, moments.cells())
    assert theta[0, 0] == start[0, 0] and converged.tolist() == [True]


def test_a_search_without_a_way_down_stays_and_does_not_converge() -> None:
    def hopeless(t: Tensor) -> Score:
        return torch.full((len(t),), torch.inf, dtype=DTYPE), torch.ones_like(t), torch.eye(2, dtype=DTYPE)[None]

    start = torch.zeros(1, 2, dtype=DTYPE)
    theta, _, converged = solve(hopeless, start, torch.ones(1, 2), torch.tensor(10.0))
    assert torch.equal(theta, start) and converged.tolist() == [False]
