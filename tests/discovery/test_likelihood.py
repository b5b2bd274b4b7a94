"""The Gaussian interventional likelihood: against LatentSCM, torch.distributions and autograd; recovery; odd input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from crlseq.config import InterventionKind
from crlseq.discovery import likelihood as linear
from crlseq.discovery.likelihood import LinearModel, Solution, allowed_edges, fit_linear
from crlseq.discovery.moments import DTYPE, Moments, environment_moments
from crlseq.model.interventions import INTERVENTIONS
from tests.structural import GRAPH, LOG_SCALES, RETENTIONS, SHIFTS, TARGETS, P, Q, Truth, matched, truth

KINDS = tuple(INTERVENTIONS)
K = len(TARGETS)
FLOOR = 0.02


def at_truth(true: Truth, kind: InterventionKind, moments: Moments) -> tuple[LinearModel, Tensor]:
    """The model of `moments`, and the parameters (1, P) of the truth."""
    model = LinearModel(moments, P, kind, FLOOR)
    scale = linear.MAX_FITTED_LOG_SCALE * torch.atanh(LOG_SCALES / linear.MAX_FITTED_LOG_SCALE)
    return model, model.pack({
        "G": true.scm.adjacency[None], "W": true.W[None], "shift": SHIFTS[None], "scale": scale[None],
        "retention": RETENTIONS.logit()[None, : K if model.learns_retention else 0],
        "psi": torch.full((1, Q), math.log(true.noise - FLOOR), dtype=DTYPE), "offset": true.offset[None],
    })  # fmt: skip


def somewhere(
    kind: InterventionKind, restarts: int = 2, fit_noise: bool = True
) -> tuple[LinearModel, Tensor, Tensor, Tensor]:
    """A model of arbitrary moments, with arbitrary parameters, targets and a cyclic graph with edges missing."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DTYPE)

    spread = normal(K + 1, Q, 2 * Q)
    counts = torch.randint(5, 200, (K + 1,), generator=generator).to(DTYPE)
    model = LinearModel(Moments(normal(K + 1, Q), spread @ spread.mT / Q, counts), P, kind, FLOOR, fit_noise)
    theta = 0.6 * normal(restarts, model.size)
    targets = torch.randint(P, (restarts, K), generator=generator)
    mask = (torch.rand(restarts, P, P, generator=generator) < 0.7).to(DTYPE)
    return model, theta, targets, mask


@pytest.mark.parametrize("kind", KINDS)
def test_implied_moments_are_those_of_the_structural_model(kind: InterventionKind) -> None:
    true = truth(kind)
    moments = true.moments(100)
    model, theta = at_truth(true, kind, moments)
    mean, covariance = model.environments(theta, TARGETS[None])
    torch.testing.assert_close(mean[0], moments.means)
    torch.testing.assert_close(covariance[0], moments.covariances)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_of_the_structural_model_have_the_implied_moments(kind: InterventionKind) -> None:
    true = truth(kind)
    model, theta = at_truth(true, kind, true.moments(100))
    mean, covariance = model.environments(theta, TARGETS[None])
    drawn = environment_moments(*true.cells(5000))
    sd = covariance[0].diagonal(dim1=1, dim2=2).sqrt()
    assert float(((drawn.means - mean[0]) / sd).abs().max()) < 5 / math.sqrt(5000)
    difference = (drawn.covariances - covariance[0]) / (sd[:, :, None] * sd[:, None])
    assert float(difference.abs().max()) < 5 * math.sqrt(2 / 5000)


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_minus_the_log_likelihood_of_the_cells(kind: InterventionKind) -> None:
    values, environment = truth().cells(20)
    model, theta, targets, mask = somewhere(kind)
    model = LinearModel(environment_moments(values, environment), P, kind, FLOOR)
    named = model.unpack(theta)
    named["G"] = named["G"] * mask
    mean, covariance = model.environments(model.pack(named), targets)
    constant = 0.5 * Q * math.log(2 * math.pi)
    for r in range(2):
        cell = -MultivariateNormal(mean[r, environment], covariance[r, environment]).log_prob(values) - constant
        ridge = linear.EDGE_RIDGE * (named["G"][r] ** 2).sum()
        ridge += 0.5 * (named["shift"][r] ** 2).sum() / (linear.LARGE_SHIFT**2 * len(values))
        for name in ("retention", "scale"):
            free = name == "retention" or INTERVENTIONS[kind].scales
            ridge += 0.5 * linear.PERTURBATION_RIDGE * (named[name][r] ** 2).sum() * free
        objective = model.information(theta, targets, mask)[0][r]
        torch.testing.assert_close(objective, cell.mean() + ridge)
        each = model.per_environment(model.pack(named), targets, model.moments)[r]
        expected = torch.stack([cell[environment == c].mean() for c in range(K + 1)])
        torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("fit_noise", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_autograd(kind: InterventionKind, fit_noise: bool) -> None:
    model, theta, targets, mask = somewhere(kind, fit_noise=fit_noise)
    theta.requires_grad_()
    nll, gradient, _ = model.information(theta, targets, mask)
    (expected,) = torch.autograd.grad(nll.sum(), theta)
    if not fit_noise:
        expected[:, model.at["psi"]] = 0
    torch.testing.assert_close(gradient, expected)
    for name in model.at:
        moves = bool(gradient[:, model.at[name]].abs().sum() > 1e-6)
        still = {"psi"} if not fit_noise else set()
        still |= set() if model.intervention.scales else {"scale"}
        still |= set() if model.learns_retention else {"retention"}
        assert moves == (name not in still), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_information_is_the_curvature_where_the_moments_are_the_models_own(kind: InterventionKind) -> None:
    true = truth(kind)
    model, theta = at_truth(true, kind, true.moments(100))
    mask = torch.ones(1, P, P, dtype=DTYPE)
    _, gradient, information = model.information(theta, TARGETS[None], mask)

    def objective(t: Tensor) -> Tensor:
        return model.information(t[None], TARGETS[None], mask)[0][0]

    curvature = torch.autograd.functional.hessian(objective, theta[0])
    free = model.free(mask)[0].bool()
    torch.testing.assert_close(information[0][free][:, free], curvature[free][:, free], rtol=1e-6, atol=1e-7)
    assert not information[0][free][:, ~free].any()  # what is fixed has no say in a step
    # nothing but the ridge pulls at the truth
    ridge = torch.zeros_like(theta)
    ridge[:, model.at["G"]] = 2 * linear.EDGE_RIDGE
    ridge[:, model.at["shift"]] = 1 / (linear.LARGE_SHIFT**2 * model.moments.counts.sum())
    ridge[:, model.at["scale"]] = ridge[:, model.at["retention"]] = linear.PERTURBATION_RIDGE
    torch.testing.assert_close(gradient, ridge * theta * free)


def test_exact_moments_of_hard_interventions_give_the_graph() -> None:
    for seed in range(3):
        found = fit_linear(truth("hard", seed=seed).moments(1000), P, "hard", restarts=2)
        assert bool(found.converged.all())
        torch.testing.assert_close(
            matched(found.adjacency(), found.targets[0]), GRAPH.abs(), atol=0.01, rtol=0  # a ridge remains
        )  # fmt: skip


def test_exact_moments_give_shifts_scales_and_offset() -> None:
    true = truth("hard")
    found = fit_linear(true.moments(10_000), P, "hard", restarts=2)
    named = found.model.unpack(found.theta)
    torch.testing.assert_close(named["shift"][0].abs(), SHIFTS.abs(), atol=0.01, rtol=0)
    torch.testing.assert_close(found.model.log_scale(named["scale"])[0], LOG_SCALES, atol=0.01, rtol=0)
    torch.testing.assert_close(named["offset"][0], true.offset, atol=0.01, rtol=0)


def test_read_out_gives_the_latents_back_with_its_error() -> None:
    true = truth("hard")
    found = fit_linear(true.moments(10_000), P, "hard", restarts=2)
    directions = found.directions()
    loadings = found.model.unpack(found.theta)["W"][0]
    torch.testing.assert_close(loadings @ directions, torch.eye(P, dtype=DTYPE), atol=1e-6, rtol=0)
    place = found.targets[0, ::2]
    hat = true.W @ directions[:, place]  # true latents to those read out
    torch.testing.assert_close(hat.abs(), torch.eye(P, dtype=DTYPE), atol=0.02, rtol=0)
    noise = found.model.floor + found.model.unpack(found.theta)["psi"][0].exp()
    error = (directions**2 * noise[:, None]).sum(0)
    torch.testing.assert_close(error, true.noise * (directions**2).sum(0), rtol=0.05, atol=0)


def test_under_shifts_any_graph_has_the_same_likelihood_and_under_hard_interventions_not() -> None:
    """``T W = T' W'`` with ``W' = (I - G') (I - G)^-1 W``: the mixing takes up the graph."""
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(P, P, generator=generator, dtype=DTYPE) * (1 - torch.eye(P, dtype=DTYPE))
    eye = torch.eye(P, dtype=DTYPE)
    for kind in KINDS:
        true = truth(kind)
        model, theta = at_truth(true, kind, true.moments(100))
        named = model.unpack(theta)
        turned = model.pack({
            **named, "G": other[None], "W": (eye - other) @ torch.linalg.inv(eye - named["G"]) @ named["W"]
        })  # fmt: skip
        before, after = (model.per_environment(t, TARGETS[None], model.moments) for t in (theta, turned))
        if INTERVENTIONS[kind].graph == "nothing":
            torch.testing.assert_close(before, after)
        else:
            torch.testing.assert_close(before[:, 0], after[:, 0])  # control cells never tell
            assert float((after - before)[:, 1:].max()) > 0.1


def taken_away(model: LinearModel, theta: Tensor) -> Tensor:
    """Total effects of all programs on each perturbation's target, times what it takes away of them (K, p)."""
    named = model.unpack(theta)
    total = torch.linalg.inv(torch.eye(P, dtype=DTYPE) - named["G"][0]) - torch.eye(P, dtype=DTYPE)
    return total[:, TARGETS].T * (1 - model.retention(named["retention"])[0])[:, None]


def test_soft_interventions_tell_ancestry_and_no_more() -> None:
    """Total effects on a program can grow by any factor if its perturbations take a smaller share of them away."""
    true = truth("soft")
    model, theta = at_truth(true, "soft", true.moments(100))
    named, eye = model.unpack(theta), torch.eye(P, dtype=DTYPE)
    total = torch.linalg.inv(eye - named["G"][0])
    factor = torch.tensor([1.0, 1.4, 1.2, 2.0], dtype=DTYPE)
    other = eye - torch.linalg.inv(eye + (total - eye) * factor)
    retention = 1 - (1 - RETENTIONS) / factor[TARGETS]
    turned = model.pack({
        **named, "G": other[None], "W": ((eye - other) @ total @ true.W)[None], "retention": retention.logit()[None]
    })  # fmt: skip
    before, after = (model.per_environment(t, TARGETS[None], model.moments) for t in (theta, turned))
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(taken_away(model, theta), taken_away(model, turned))
    assert float((other - named["G"][0]).abs().max()) > 0.3


def test_exact_moments_of_soft_interventions_give_what_they_take_away() -> None:
    true = truth("soft")
    model, theta = at_truth(true, "soft", true.moments(10_000))
    found = model.solve(model.start(TARGETS[None]), TARGETS[None], allowed_edges(P, "soft"))
    assert found.converged.tolist() == [True]
    torch.testing.assert_close(taken_away(model, found.theta).abs(), taken_away(model, theta).abs(), atol=0.02, rtol=0)


def test_a_shift_fit_explains_shifts_without_any_edge() -> None:
    moments = truth("shift").moments(500)
    found = fit_linear(moments, P, "shift", restarts=2)
    assert not found.adjacency().any()
    mean, covariance = found.model.environments(found.theta, found.targets)
    torch.testing.assert_close(mean[0], moments.means, atol=0.02, rtol=0)
    torch.testing.assert_close(covariance[0], moments.covariances, atol=0.02, rtol=0)
    assert not allowed_edges(P, "shift").any()
    assert float(allowed_edges(P, "hard").sum()) == P * (P - 1)


def test_converged_says_whether_steps_sufficed() -> None:
    model = LinearModel(truth().moments(200), P, "hard", FLOOR)
    targets, mask = TARGETS[None], allowed_edges(P, "hard")
    start = model.start(targets)
    enough = model.solve(start, targets, mask)
    assert enough.converged.tolist() == [True]
    assert model.solve(start, targets, mask, steps=2).converged.tolist() == [False]
    gradient = model.information(enough.theta, targets, mask)[1]
    assert float(gradient.abs().max()) < 1e-3
    # and then it stays where it is
    again = model.solve(enough.theta, targets, mask)
    assert torch.equal(again.theta, enough.theta)
    assert again.converged.tolist() == [True]


def dense_fit(moments: Moments, targets: Tensor, kind: InterventionKind = "hard") -> Solution:
    return fit_linear(moments, P, kind, noise_floor=FLOOR, targets=targets[None])


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_names_of_programs_do_not_matter(kind: InterventionKind) -> None:
    moments = environment_moments(*truth(kind).cells(200))
    new = torch.tensor([2, 0, 3, 1])  # new name of each program
    one, two = dense_fit(moments, TARGETS, kind), dense_fit(moments, new[TARGETS], kind)
    torch.testing.assert_close(one.nll, two.nll)
    torch.testing.assert_close(one.adjacency(), two.adjacency()[new][:, new], atol=1e-5, rtol=1e-4)


def test_order_of_perturbations_does_not_matter() -> None:
    moments = environment_moments(*truth().cells(200))
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.tensor([0]), order + 1])
    mixed = Moments(moments.means[rows], moments.covariances[rows], moments.counts[rows])
    one, two = dense_fit(moments, TARGETS), dense_fit(mixed, TARGETS[order])
    torch.testing.assert_close(one.nll, two.nll)
    shifts = [s.model.unpack(s.theta)["shift"][0] for s in (one, two)]
    torch.testing.assert_close(shifts[0][order], shifts[1], atol=1e-5, rtol=1e-4)


def test_restarts_as_one_batch_are_single_runs() -> None:
    moments = environment_moments(*truth().cells(100))
    model = LinearModel(moments, P, "hard", FLOOR)
    targets = torch.stack([TARGETS, TARGETS.roll(1), TARGETS.flip(0)])
    mask = allowed_edges(P, "hard").expand(3, -1, -1)
    batch = model.solve(model.start(targets), targets, mask, steps=12)
    for r in range(3):
        single = model.solve(model.start(targets[r : r + 1]), targets[r : r + 1], mask[:1], steps=12)
        torch.testing.assert_close(batch.nll[r], single.nll[0])
        torch.testing.assert_close(batch.theta[r], single.theta[0], atol=1e-6, rtol=1e-5)
        assert batch.converged[r] == single.converged[0]
    assert torch.equal(batch.best().targets, targets[int(batch.nll.argmin())][None])
    assert float(batch.best().nll) == float(batch.nll.min())


def test_edges_that_are_not_allowed_stay_away() -> None:
    model = LinearModel(environment_moments(*truth().cells(100)), P, "hard", FLOOR)
    mask = (GRAPH != 0).to(DTYPE)[None]
    found = model.solve(model.start(TARGETS[None]), TARGETS[None], mask)
    assert not found.adjacency()[GRAPH == 0].any()
    torch.testing.assert_close(found.adjacency().abs()[GRAPH != 0], GRAPH.abs()[GRAPH != 0], atol=0.2, rtol=0)


def test_a_soft_fit_started_from_a_hard_one_takes_over_what_they_share() -> None:
    moments = truth("hard").moments(1000)
    hard = dense_fit(moments, TARGETS)
    soft = LinearModel(moments, P, "soft", FLOOR)
    named, before = soft.unpack(soft.adopt(hard)), hard.model.unpack(hard.theta)
    for name in ("G", "W", "shift", "scale", "psi", "offset"):
        assert torch.equal(named[name], before[name])
    found = soft.solve(soft.adopt(hard), hard.targets, hard.mask)
    torch.testing.assert_close(found.nll, hard.nll, atol=1e-3, rtol=0)  # nested, and these moments are of hard ones
    back = hard.model.adopt(found)
    assert back.shape == hard.theta.shape


def rank_one(moments: Moments) -> Moments:
    one = torch.ones(Q, Q, dtype=DTYPE)
    return replace(moments, covariances=moments.covariances * 0 + one, means=moments.means[:, :1].expand(-1, Q))


def constant_component(moments: Moments) -> Moments:
    covariances, means = moments.covariances.clone(), moments.means.clone()
    covariances[:, 0] = covariances[:, :, 0] = 0
    means[:, 0] = 1
    return replace(moments, covariances=covariances, means=means)


def no_shift(moments: Moments) -> Moments:
    return replace(
        moments, means=moments.means[:1].expand(K + 1, -1), covariances=moments.covariances[:1].expand(K + 1, -1, -1)
    )


def no_variance(moments: Moments) -> Moments:
    return replace(moments, covariances=torch.zeros_like(moments.covariances))


def far_away(moments: Moments) -> Moments:
    means = moments.means.clone()
    means[1] += 1e4
    return replace(moments, means=means)


def copies(moments: Moments) -> Moments:
    """All environments but the control are the same."""
    rows = torch.tensor([0] + [1] * K)
    return Moments(moments.means[rows], moments.covariances[rows], moments.counts[rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoil", [rank_one, constant_component, no_shift, no_variance, far_away, copies])
def test_degenerate_moments_never_give_nan(spoil: object, kind: InterventionKind) -> None:
    assert callable(spoil)
    found = fit_linear(spoil(truth(kind).moments(50)), P, kind, restarts=2, steps=25)
    for value in (found.theta, found.nll, found.adjacency(), found.directions()):
        assert bool(torch.isfinite(value).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit_noise", [True, False])
def test_two_cells_an_environment_never_give_nan(kind: InterventionKind, fit_noise: bool) -> None:
    values, environment = truth(kind).cells(30)
    first = torch.cat([torch.nonzero(environment == c)[:2, 0] for c in range(K + 1)])
    moments = environment_moments(values[first][:, :P] if not fit_noise else values[first], environment[first])
    found = fit_linear(moments, P, kind, restarts=2, steps=25, fit_noise=fit_noise)
    for value in (found.theta, found.nll):
        assert bool(torch.isfinite(value).all())


def test_one_seed_one_result() -> None:
    moments = environment_moments(*truth().cells(60))
    one, two = (fit_linear(moments, P, "hard", restarts=3, seed=4, steps=10) for _ in range(2))
    assert torch.equal(one.theta, two.theta)
