"""The damped solve: of another model than the linear one, restarts apart, and what it does where there is no way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crlseq.discovery import scoring
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
    theta, nll, converged = solve(lambda t, _: one_factor(moments, t), theta, torch.ones_like(theta), moments.cells())
    end, gradient, _ = one_factor(moments, theta)
    assert bool(converged.all()) and torch.equal(nll, end) and float(gradient.abs().max()) < 1e-2
    torch.testing.assert_close(theta[:, :Q].abs(), LOADING.abs().expand(3, -1), atol=0.02, rtol=0)
    torch.testing.assert_close(theta[:, Q:].exp(), NOISE.expand(3, -1), atol=0.02, rtol=0)


def test_what_is_not_free_stays() -> None:
    moments = exact()
    truth = torch.cat([LOADING, NOISE.log()])[None]
    free = torch.ones_like(truth)
    free[:, 0] = 0

    def score(t: Tensor, informed: bool) -> Score:
        nll, gradient, information = one_factor(moments, t)
        assert information is not None
        return nll, gradient * free, information * free[:, :, None] * free[:, None] + torch.diag_embed(1 - free)

    start = truth + 0.3
    theta, _, converged = solve(score, start, free, moments.cells())
    assert theta[0, 0] == start[0, 0] and converged.tolist() == [True]


def test_a_search_without_a_way_down_stays_and_does_not_converge() -> None:
    def hopeless(t: Tensor, informed: bool) -> Score:
        return torch.full((len(t),), torch.inf, dtype=DTYPE), torch.ones_like(t), torch.eye(2, dtype=DTYPE)[None]

    start = torch.zeros(1, 2, dtype=DTYPE)
    theta, _, converged = solve(hopeless, start, torch.ones(1, 2), torch.tensor(10.0))
    assert torch.equal(theta, start) and converged.tolist() == [False]


def test_a_kept_information_leads_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five restarts of which steps make the information anew each time, or keep it with BFGS updates."""
    moments, informed = exact(), [0, 0]
    start = torch.randn(5, 2 * Q, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    ends = []
    for kept, n in enumerate((250, 1)):
        monkeypatch.setattr(scoring, "KEPT_PARAMETERS", n)

        def score(t: Tensor, with_information: bool, kept: int = kept) -> Score:
            nll, gradient, information = one_factor(moments, t)
            informed[kept] += int(with_information)
            return nll, gradient, information if with_information else None

        ends.append(solve(score, start, torch.ones_like(start), 1e6 * moments.cells()))
    assert informed[1] < informed[0]
    assert all(bool(converged.all()) for _, _, converged in ends)
    torch.testing.assert_close(ends[0][1], ends[1][1], atol=1e-8, rtol=0)
    torch.testing.assert_close(ends[0][0], ends[1][0], atol=1e-4, rtol=0)


def test_bfgs_updates_give_the_change_of_the_gradient_that_was_seen() -> None:
    """After a step s that changed the gradient by y the curvature maps s to y; the restart without a step keeps its own."""
    information = torch.tensor([[[2.0, 0.5], [0.5, 1.0]]] * 2, dtype=DTYPE)
    curvature = scoring._Curvature(information, torch.arange(2), torch.zeros(2, dtype=DTYPE))
    before = curvature.solved(torch.ones(2, 2, dtype=DTYPE))
    step, change = torch.tensor([[1.0, -0.5]] * 2, dtype=DTYPE), torch.tensor([[3.0, 0.2]] * 2, dtype=DTYPE)
    curvature.learn(torch.tensor([True, False]), step, change)
    torch.testing.assert_close(curvature.solved(change)[0], step[0])
    torch.testing.assert_close(curvature.solved(torch.ones(2, 2, dtype=DTYPE))[1], before[1])
