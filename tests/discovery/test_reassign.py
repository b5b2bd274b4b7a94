"""Targets by likelihood: closed form against a search, recovery of a known truth, perturbations outside the fit."""

from __future__ import annotations

import math

import pytest
import torch

from crlseq.config import InterventionKind
from crlseq.discovery import reassign
from crlseq.discovery.likelihood import MAX_FITTED_LOG_SCALE, LinearModel, Solution
from crlseq.discovery.moments import DTYPE, Moments
from crlseq.discovery.reassign import assign_targets, move, reassign_targets, settle_targets

P, Q = 3, 6
TRUE = torch.tensor([0, 0, 1, 1, 2, 2])


def parameters(model: LinearModel, seed: int = 0) -> torch.Tensor:
    """A chain 0 -> 1 -> 2 with shifts of either sign and the noise of targets reduced (1, P)."""
    generator = torch.Generator().manual_seed(seed)
    graph = torch.diag(torch.tensor([1.0, -0.8], dtype=DTYPE), 1)
    return model.pack({
        "G": graph[None], "W": torch.randn(1, P, Q, generator=generator, dtype=DTYPE),
        "shift": torch.tensor([[2.0, -1.0, 1.5, -2.0, 1.0, 2.5]], dtype=DTYPE),
        "scale": torch.full((1, model.k), -0.4, dtype=DTYPE),
        "retention": torch.zeros(1, model.k if model.kind == "soft" else 0, dtype=DTYPE),
        "psi": torch.full((1, Q), -1.5, dtype=DTYPE), "offset": torch.randn(1, Q, generator=generator, dtype=DTYPE),
    })  # fmt: skip


def exact(kind: InterventionKind, targets: torch.Tensor = TRUE) -> tuple[LinearModel, torch.Tensor]:
    """A model whose moments are those that its parameters imply."""
    counts = torch.full((len(targets) + 1,), 200.0, dtype=DTYPE)
    k = len(targets) + 1
    model = LinearModel(
        Moments(torch.zeros(k, Q, dtype=DTYPE), torch.eye(Q, dtype=DTYPE).repeat(k, 1, 1), counts), P, kind
    )
    theta = parameters(model)
    mean, covariance = model.environments(theta, targets[None])
    return LinearModel(Moments(mean[0], covariance[0], counts), P, kind), theta


@pytest.mark.parametrize("kind", ["hard", "soft", "shift"])
def test_moments_of_the_model_give_its_targets_shifts_and_scales(kind: InterventionKind) -> None:
    model, theta = exact(kind)
    found = assign_targets(model, theta, model.moments)
    assert torch.equal(found.targets, TRUE)
    # a retention of sigmoid(0) = 1/2 is one of those tried
    torch.testing.assert_close(found.shift, model.unpack(theta)["shift"][0])
    scale = 0.0 if kind == "shift" else MAX_FITTED_LOG_SCALE * math.tanh(-0.4 / MAX_FITTED_LOG_SCALE)
    torch.testing.assert_close(found.log_scale, torch.full((6,), scale, dtype=DTYPE))
    retention = {"hard": 0.0, "soft": 0.5, "shift": 1.0}[kind]
    assert found.retention[2:].tolist() == [retention] * 4  # program 0 has no parents: any retention is as good


def test_the_closed_form_is_the_minimum_of_the_likelihood_and_its_value() -> None:
    model, theta = exact("hard")
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(7, Q, generator=generator, dtype=DTYPE)
    spread = torch.randn(7, Q, Q, generator=generator, dtype=DTYPE)
    other = Moments(
        model.moments.means + noise, model.moments.covariances + spread @ spread.mT / Q, model.moments.counts
    )
    found = assign_targets(model, theta, other)
    at = move(model, theta, found, torch.ones(6, dtype=torch.bool))
    value = model.per_environment(at, found.targets[None], other)[0, 1:]
    torch.testing.assert_close(value, found.nll.min(1).values)
    for name in ("shift", "scale"):
        for step in (-0.05, 0.05):
            near = at.clone()
            near[:, model.at[name]] += step
            worse = model.per_environment(near, found.targets[None], other)[0, 1:]
            inside = found.log_scale.abs() < 0.97 * MAX_FITTED_LOG_SCALE
            assert bool((worse > value)[inside].all())
    for target in range(P):  # every other target, at its own best shift and scale, is no better than claimed
        same = torch.full((6,), target)
        forced = assign_targets(model, theta, other).nll[:, target]
        assert bool((model.per_environment(at, same[None], other)[0, 1:] >= forced - 1e-12).all())


def test_perturbations_outside_the_fit_are_assigned_from_their_own_cells_alone() -> None:
    model, theta = exact("hard")
    m = model.moments
    others = Moments(
        torch.stack([torch.full((Q,), torch.nan, dtype=DTYPE), m.means[5]]),
        torch.stack([torch.full((Q, Q), torch.nan, dtype=DTYPE), m.covariances[5]]),
        torch.tensor([3.0, 50.0], dtype=DTYPE),
    )
    found = assign_targets(model, theta, others)
    assert found.targets.tolist() == [2]
    assert found.shift.tolist() == pytest.approx([1.0])
    assert found.nll.shape == (1, P)


def solved(targets: torch.Tensor) -> Solution:
    model, theta = exact("hard")
    mask = (model.unpack(theta)["G"] != 0).to(DTYPE)
    return model.solve(theta, targets[None], mask, steps=20)


def test_a_wrong_target_is_mended_and_the_likelihood_rises() -> None:
    wrong = TRUE.clone()
    wrong[3] = 2
    before = solved(wrong)
    after = reassign_targets(before)
    assert torch.equal(after.targets[0], TRUE)
    assert float(after.nll[0]) < float(before.nll[0])


def test_nothing_moves_where_the_targets_are_right() -> None:
    before = solved(TRUE)
    assert reassign_targets(before) is before


def test_a_program_keeps_the_perturbation_that_gains_least_by_leaving() -> None:
    model, theta = exact("hard", torch.tensor([0, 0, 1, 1, 1, 1]))
    before = torch.tensor([0, 0, 1, 1, 2, 2])  # nothing targets program 2, but two were put there
    mask = (model.unpack(theta)["G"] != 0).to(DTYPE)
    after = reassign_targets(model.solve(theta, before[None], mask, steps=0), rounds=1)
    assert set(after.targets[0].tolist()) == {0, 1, 2}


def test_another_partition_is_fitted_from_a_start_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without steps after a move the parameters stay those of the wrong partition: in a valley of their own."""
    monkeypatch.setattr(reassign, "MOVED_STEPS", 0)
    wrong = TRUE.clone()
    wrong[3] = 2
    before = solved(wrong)
    model, mask = before.model, before.mask
    best = float(model.solve(model.start(TRUE[None]), TRUE[None], mask).nll[0])
    moved, settled = reassign_targets(before), settle_targets(before)
    assert torch.equal(moved.targets[0], TRUE) and float(moved.nll[0]) > best + 0.01
    assert torch.equal(settled.targets[0], TRUE) and float(settled.nll[0]) == best


def test_a_partition_that_stays_is_not_fitted_again() -> None:
    before = solved(TRUE)
    assert settle_targets(before) is before
