"""The solve: of another model than the linear one, against dense scoring, and what it does where there is no way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crlseq.discovery import scoring
from crlseq.discovery.moments import DTYPE, Moments
from crlseq.discovery.scoring import Deviations, Factor, positive_root, solve

LOADING = torch.tensor([1.0, -0.5, 2.0, 0.8], dtype=DTYPE)
NOISE = torch.tensor([0.3, 0.5, 0.2, 0.4], dtype=DTYPE)
Q = len(NOISE)


@dataclass
class OneFactor:
    """Factor analysis, ``S = w w' + diag(exp psi)`` with parameters (w, psi): ``dS/dw_i = e_i w' + w e_i'``."""

    theta: Tensor
    nll: Tensor
    gradient: Tensor
    moving: Tensor
    full: Tensor

    @property
    def searched(self) -> Tensor:
        return torch.ones(len(self.theta), dtype=torch.bool)

    def information(self) -> Tensor:
        return self.full[self.moving][:, self.moving]


def one_factor(moments: Moments, theta: Tensor, fixed: int = 0) -> OneFactor:
    """The score, with the first parameters ``fixed``."""
    w, noise, eye = theta[:Q], theta[Q:].exp(), torch.eye(Q, dtype=DTYPE)
    half = torch.einsum("ia,b->iab", eye, w)
    slopes = torch.cat([half + half.mT, torch.einsum("ia,ib,i->iab", eye, eye, noise)])  # (P, q, q)
    fit = Deviations(moments, torch.zeros(1, Q, dtype=DTYPE), (w[:, None] * w + torch.diag(noise))[None])
    gradient = 0.5 * torch.einsum("ab,pab->p", fit.by_covariance[0], slopes)
    moved = fit.precision[0] @ slopes
    moving = torch.arange(fixed, 2 * Q)
    free = torch.arange(2 * Q) >= fixed
    return OneFactor(theta, fit.nll, gradient * free, moving, 0.5 * torch.einsum("iab,jba->ij", moved, moved))


def exact() -> Moments:
    covariance = LOADING[:, None] * LOADING + torch.diag(NOISE)
    return Moments(torch.zeros(1, Q, dtype=DTYPE), covariance[None], torch.tensor([500.0], dtype=DTYPE))


def starts() -> list[Tensor]:
    return list(torch.randn(3, 2 * Q, generator=torch.Generator().manual_seed(0), dtype=DTYPE))


def dense_scoring(moments: Moments, theta: Tensor) -> Tensor:
    """The reference: scoring with the information of every step, halved until it leads downhill, to the end."""
    at = one_factor(moments, theta)
    for _ in range(200):
        step, share = -torch.linalg.solve(at.information(), at.gradient), 1.0
        while share > 1e-9 and not one_factor(moments, at.theta + share * step).nll < at.nll:
            share /= 2
        at = one_factor(moments, at.theta + share * step)
    return at.theta


def test_the_score_of_a_one_factor_model_is_that_of_autograd() -> None:
    for theta in starts():
        theta.requires_grad_()
        score = one_factor(exact(), theta)
        torch.testing.assert_close(score.gradient, torch.autograd.grad(score.nll, theta)[0])


def test_a_one_factor_model_is_solved() -> None:
    for theta in starts():
        end, converged = solve(lambda t: one_factor(exact(), t), theta, 500.0)
        assert converged and float(end.gradient.abs().max()) < 1e-2
        torch.testing.assert_close(end.theta[:Q].abs(), LOADING.abs(), atol=0.02, rtol=0)
        torch.testing.assert_close(end.theta[Q:].exp(), NOISE, atol=0.02, rtol=0)


def test_the_end_is_that_of_scoring_with_the_information_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On moments that no factor describes, where observed and expected information differ."""
    monkeypatch.setattr(scoring, "TOLERANCE", 1e-14)
    spread = torch.randn(Q, 3 * Q, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    moments = replace(exact(), covariances=exact().covariances + 0.02 * spread @ spread.mT / Q)
    for start in starts():
        theta = torch.cat([LOADING, NOISE.log()]) + 0.2 * start
        end, _ = solve(lambda t: one_factor(moments, t), theta, 500.0)
        torch.testing.assert_close(end.theta, dense_scoring(moments, theta), atol=1e-6, rtol=0)


def test_a_good_factor_to_begin_with_saves_the_information() -> None:
    made = 0

    class Counted(OneFactor):
        def information(self) -> Tensor:
            nonlocal made
            made += 1
            return super().information()

    def score(theta: Tensor) -> OneFactor:
        return Counted(**vars(one_factor(exact(), theta)))

    truth = torch.cat([LOADING, NOISE.log()])
    factor = Factor.exact(one_factor(exact(), truth))
    end, converged = solve(score, truth + 0.05, 500.0, factor=factor)
    assert converged and made == 0
    assert solve(score, truth + 0.05, 500.0)[1] and made > 0
    torch.testing.assert_close(end.theta, truth, atol=0.02, rtol=0)


def test_the_bound_of_a_step_is_one_of_what_is_searched() -> None:
    """``f = (y^2 + (x - 10 y)^2) / 2`` with the best x = 10 y set: from y = 1 the step of y is 1 over the Schur complement
    1.01 x 101 - 100 / 1.01 of the damped information, though x moves by ten times as much, beyond the bound.
    """

    @dataclass
    class Settled(OneFactor):
        @property
        def searched(self) -> Tensor:
            return torch.tensor([False, True])

    def score(theta: Tensor) -> Settled:
        y = theta[1]
        information = torch.tensor([[1.0, -10.0], [-10.0, 101.0]], dtype=DTYPE)
        return Settled(
            torch.stack([10 * y, y]), y**2 / 2, torch.stack([0 * y, y]), torch.arange(2), information.clone()
        )

    end, _ = solve(score, torch.tensor([0.0, 1.0], dtype=DTYPE), 500.0, steps=1)
    assert float(end.theta[1]) == pytest.approx(1 - 1 / (1.01 * 101 - 100 / 1.01), abs=1e-6)
    assert scoring.MAX_STEP < 10 / (1.01 * 101 - 100 / 1.01)


def test_what_is_not_free_stays() -> None:
    start = torch.cat([LOADING, NOISE.log()]) + 0.3
    end, converged = solve(lambda t: one_factor(exact(), t, fixed=1), start, 500.0)
    assert converged and end.theta[0] == start[0] and end.theta[1] != start[1]


def test_a_search_without_a_way_down_stays_and_does_not_converge() -> None:
    def hopeless(t: Tensor) -> OneFactor:
        return OneFactor(t, torch.tensor(torch.inf), torch.ones_like(t), torch.arange(2), torch.eye(2, dtype=DTYPE))

    start = torch.zeros(2, dtype=DTYPE)
    end, converged = solve(hopeless, start, 10.0)
    assert torch.equal(end.theta, start) and not converged


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 8), lost=st.lists(st.integers(0, 3), unique=True))
def test_a_factor_without_some_parameters_is_that_of_what_is_left(seed: int, n: int, lost: list[int]) -> None:
    """Of any curvature of n parameters and four more that may go, at places 1, 3, 5 and so on."""
    spread = torch.randn(n + 4, 2 * (n + 4), generator=torch.Generator().manual_seed(seed), dtype=DTYPE)
    curvature, moving = spread @ spread.T, 2 * torch.arange(n + 4) + 1
    gone = torch.zeros(2 * (n + 4), dtype=torch.bool)
    gone[moving[n:][torch.tensor(lost, dtype=torch.long)]] = True
    left = Factor(torch.linalg.cholesky(curvature), moving).without(gone)
    kept = ~gone[moving]
    assert torch.equal(left.moving, moving[kept])
    torch.testing.assert_close(left.root @ left.root.T, curvature[kept][:, kept])
    gradient = torch.ones(len(gone), dtype=DTYPE)
    step = left.solved(gradient)
    assert not step[gone].any() and not step[::2].any()
    torch.testing.assert_close(curvature[kept][:, kept] @ step[left.moving], torch.ones(int(kept.sum()), dtype=DTYPE))


def test_an_information_that_rounding_made_indefinite() -> None:
    """Flat directions may come out below 0; with as much on top as it takes the others keep their errors."""
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=DTYPE, generator=torch.Generator().manual_seed(0)))[0]
    information = basis @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, -1e-8], dtype=DTYPE)) @ basis.T
    assert torch.linalg.cholesky_ex(information + 1e-9 * torch.diag(information.diagonal()))[1] > 0
    root = positive_root(information.clone())
    torch.testing.assert_close(root @ root.T, information, rtol=0, atol=1e-6)
    sound = information + torch.eye(6, dtype=DTYPE)
    root = positive_root(sound.clone())
    torch.testing.assert_close(root @ root.T, sound + 1e-9 * torch.diag(sound.diagonal()), rtol=0, atol=1e-14)
