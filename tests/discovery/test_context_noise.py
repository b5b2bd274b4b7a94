"""The likelihood of a screen with contexts: controls of each, and noise of programs that differs between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from crlseq.config import InterventionKind
from crlseq.discovery.likelihood import MAX_FITTED_LOG_SCALE, LinearModel, fit_linear
from crlseq.discovery.misfit import misfit
from crlseq.discovery.moments import DTYPE, Crossed, Moments, environment_moments
from crlseq.discovery.propose import leading_changes
from crlseq.discovery.reassign import assign_targets, reassign_targets
from crlseq.model.interventions import INTERVENTIONS

P, Q, FLOOR = 3, 5, 0.02
TARGETS = torch.tensor([0, 0, 1, 1, 2, 2])
CROSSED = Crossed(TARGETS, torch.tensor([0, 1, 2, 1, 0, 2]), 3)
NOISE = torch.tensor([[1.0, 1.0, 1.0], [0.5, 2.0, 1.2], [1.5, 0.6, 0.8]], dtype=DTYPE)
KINDS = tuple(INTERVENTIONS)


def somewhere(kind: InterventionKind, counts: Tensor | None = None) -> tuple[LinearModel, Tensor]:
    """A model of its own moments at parameters (1, P): a chain 0 -> 1 -> 2, shifts of 2, noise by context `NOISE`."""
    generator = torch.Generator().manual_seed(0)
    n = CROSSED.n_contexts + len(TARGETS)
    counts = torch.randint(50, 200, (n,), generator=generator).to(DTYPE) if counts is None else counts
    empty = Moments(torch.zeros(n, Q, dtype=DTYPE), torch.eye(Q, dtype=DTYPE).repeat(n, 1, 1), counts, CROSSED)
    model = LinearModel(empty, P, kind, FLOOR)
    graph = torch.zeros(1, P, P, dtype=DTYPE)
    graph[0, 0, 1], graph[0, 1, 2] = 1.0, -0.8
    k = len(TARGETS)
    theta = model.pack({
        "G": graph, "W": torch.randn(1, P, Q, generator=generator, dtype=DTYPE), "offset": torch.ones(1, Q, dtype=DTYPE),
        "shift": torch.tensor([[2.0, -2.0] * 3], dtype=DTYPE), "scale": torch.linspace(-0.4, 0.3, k, dtype=DTYPE)[None],
        "retention": torch.linspace(-1.0, 1.0, k, dtype=DTYPE)[None, : k if model.learns_retention else 0],
        "psi": torch.full((1, Q), -3.0, dtype=DTYPE),
        "context": (MAX_FITTED_LOG_SCALE * torch.atanh(NOISE[1:].log() / MAX_FITTED_LOG_SCALE)).reshape(1, -1),
    })  # fmt: skip
    mean, covariance = model.environments(theta, TARGETS[None])
    return model.like(replace(empty, means=mean[0], covariances=covariance[0])), theta


def test_controls_of_each_context_come_first() -> None:
    environment = torch.tensor([0, 0, 1, 2, 0, -1])
    context = torch.tensor([0, 2, 0, 2, 1, 1])
    assert CROSSED.numbered(environment, context).tolist() == [0, 2, 3, 4, 1, -1]
    model, _ = somewhere("hard")
    assert model.moments.n_controls == 3 and model.k == 6
    assert model.moments.control.tolist() == [0, 1, 2, 1, 0, 2]


def test_a_context_scales_the_programs_own_noise() -> None:
    model, theta = somewhere("hard")
    named = model.unpack(theta)
    total = torch.linalg.inv(torch.eye(P, dtype=DTYPE) - named["G"][0]) @ named["W"][0]
    noise = torch.diag(FLOOR + named["psi"][0].exp())
    for c in range(3):
        expected = total.T @ torch.diag(NOISE[c] ** 2) @ total + noise
        torch.testing.assert_close(model.moments.covariances[c], expected)
        torch.testing.assert_close(model.moments.means[c], torch.ones(Q, dtype=DTYPE))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_information_are_those_of_autograd(kind: InterventionKind) -> None:
    model, theta = somewhere(kind)
    mask, targets = torch.ones(1, P, P, dtype=DTYPE), TARGETS[None]

    def objective(t: Tensor) -> Tensor:
        return model.information(t[None], targets, mask)[0][0]

    off = (theta + 0.3).requires_grad_()
    gradient = model.information(off, targets, mask)[1]
    (expected,) = torch.autograd.grad(objective(off[0]), off)
    torch.testing.assert_close(gradient, expected)
    assert gradient[:, model.at["context"]].abs().min() > 1e-4
    curvature = torch.autograd.functional.hessian(objective, theta[0])
    free = model.free(mask)[0].bool()
    information = model.information(theta, targets, mask)[2][0]
    torch.testing.assert_close(information[free][:, free], curvature[free][:, free], rtol=1e-6, atol=1e-7)


def test_the_target_is_that_of_the_likelihood_in_its_context() -> None:
    model, theta = somewhere("hard")
    found = assign_targets(model, theta, model.moments)
    assert found.targets.tolist() == TARGETS.tolist()
    torch.testing.assert_close(found.shift, model.unpack(theta)["shift"][0])
    torch.testing.assert_close(found.log_scale, model.log_scale(model.unpack(theta)["scale"])[0])
    each = model.per_environment(theta, TARGETS[None], model.moments)[0, 3:]
    torch.testing.assert_close(found.nll[torch.arange(6), TARGETS], each)


def test_changes_are_from_controls_of_the_same_context() -> None:
    model, _ = somewhere("shift", torch.full((9,), 1e6, dtype=DTYPE))
    still = replace(model.moments, means=torch.zeros(9, Q, dtype=DTYPE))
    still.covariances[3:] = still.covariances[CROSSED.context]
    assert float(leading_changes(still).covariances.abs().max()) < 1e-9
    assert float(leading_changes(replace(still, crossed=None)).covariances.abs().max()) > 0.1


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Cells, environments and contexts: programs 0 -> 1 -> 2, noise by context as the first two of `NOISE`."""
    rng, parts = np.random.default_rng(seed), []
    mixing = rng.normal(size=(P, Q))
    for e, (i, a, c) in enumerate(
        [(-1, 0, 0), (-1, 0, 1), *((i, a, c) for i in range(P) for a in (2, -2) for c in (0, 1))]
    ):
        z = rng.normal(size=(400 if i >= 0 else 1500, P)) * NOISE[c].numpy()
        if i >= 0:
            z[:, i] = 0.7 * z[:, i] + a
        u = z.copy()
        u[:, 1] += u[:, 0] * (i != 1)
        u[:, 2] -= 0.8 * u[:, 1] * (i != 2)
        y = u @ mixing + 0.3 * rng.normal(size=(len(u), Q))
        parts.append((y, np.full(len(u), max(e - 1, 0)), np.full(len(u), c)))
    values, environment, context = (torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
    return values, environment, context


def test_noise_of_contexts_is_found_and_no_misfit() -> None:
    values, environment, context = drawn()
    crossed = Crossed(torch.arange(6).repeat_interleave(2), torch.tensor([0, 1] * 6), 2)
    number = crossed.numbered(environment, context)
    dense = reassign_targets(fit_linear(environment_moments(values, number, crossed=crossed), P, restarts=2))
    place = dense.targets[0][[0, 4, 8]]
    assert sorted(place.tolist()) == [0, 1, 2] and dense.targets[0].tolist() == place.repeat_interleave(4).tolist()
    assert misfit(dense).value < 1.1
    found = dense.model.context_scale(dense.model.unpack(dense.theta))[0].exp()[:, place]
    torch.testing.assert_close(found[1], NOISE[1], atol=0.1, rtol=0)
    graph = dense.adjacency()[place][:, place].abs()
    expected = torch.tensor([[0, 1, 0], [0, 0, 0.8], [0, 0, 0]], dtype=DTYPE)
    torch.testing.assert_close(graph, expected, atol=0.15, rtol=0)
    one = reassign_targets(fit_linear(environment_moments(values, environment), P, restarts=2))
    assert misfit(one).value > 1.5  # where all contexts have the same noise
