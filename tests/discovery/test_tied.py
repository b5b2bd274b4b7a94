"""Perturbations of one gene in several contexts share their target."""

from __future__ import annotations

import torch

from crlseq.discovery.likelihood import fit_linear
from crlseq.discovery.moments import DTYPE, Crossed, Moments, environment_moments
from crlseq.discovery.propose import propose_targets
from crlseq.discovery.reassign import assign_targets, reassign_targets

TIED = Crossed(torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.int64), 1)


def weak_second(tied: Crossed | None) -> Moments:
    """Two clear perturbations of axes 0 and 1; of each the second context shifts a little along the other axis instead."""
    means = torch.zeros(5, 2, dtype=DTYPE)
    means[1, 0], means[3, 1] = 3.0, 3.0
    means[2, 1], means[4, 0] = 0.4, 0.4
    covariance = torch.eye(2, dtype=DTYPE).repeat(5, 1, 1)
    return Moments(means, covariance, torch.full((5,), 200.0, dtype=DTYPE), tied)


def test_sums_are_over_those_that_are_tied() -> None:
    values = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 5.0], [4.0, 7.0]], dtype=DTYPE)
    together = weak_second(TIED).together(values)
    assert together.tolist() == [[3.0, 1.0], [3.0, 1.0], [7.0, 12.0], [7.0, 12.0]]
    assert weak_second(None).together(values) is values


def test_proposals_vote_for_one_target_a_gene() -> None:
    generator = torch.Generator().manual_seed(0)
    free = propose_targets(weak_second(None), 2, 1, generator)[0]
    assert free[0] != free[1] and free[1] == free[2]
    tied = propose_targets(weak_second(TIED), 2, 1, generator)[0]
    assert tied[0] == tied[1] != tied[2] == tied[3]


def test_the_likelihood_moves_contexts_together() -> None:
    rng = torch.Generator().manual_seed(1)
    environment = torch.arange(5).repeat_interleave(torch.tensor([600, 200, 200, 200, 200]))
    values = torch.randn((len(environment), 2), generator=rng, dtype=DTYPE) + weak_second(None).means[environment]
    free, tied = (environment_moments(values, environment, crossed=own) for own in (None, TIED))
    wrong = fit_linear(free, 2, targets=torch.tensor([[0, 1, 1, 0]]))
    assert assign_targets(wrong.model, wrong.theta, free).targets.tolist() == [0, 1, 1, 0]
    found = reassign_targets(fit_linear(tied, 2, targets=torch.tensor([[0, 0, 1, 1]])))
    assert found.targets[0].tolist() == [0, 0, 1, 1]
    assert assign_targets(found.model, found.theta, tied).targets.tolist() == [0, 0, 1, 1]
