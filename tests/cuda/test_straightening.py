"""Straightening on a device: the network of the CPU, and no step waits."""

from __future__ import annotations

import pytest
import torch

from crlseq.discovery.straighten import Phase, Straightener
from tests.cuda.device import CUDA, Mode, fake_cuda
from tests.discovery.test_straighten import bent, linear_fit

STEPS = 12


def trained(steps: int, device: torch.device) -> tuple[Straightener, float]:
    y, environment, _ = bent()
    network = Straightener(y, environment, linear_fit(y, environment).directions(), 0, device)
    return network, network.train(Phase(steps, 4.0))


def counts_of(steps: int) -> tuple[int, int, int]:
    with fake_cuda() as record, Mode():
        trained(steps, CUDA)
    return record.totals()


def test_it_is_that_of_the_cpu() -> None:
    """To rounding: the optimiser's sums are those of one kernel."""
    y = bent()[0]
    network, expected = trained(STEPS, torch.device("cpu"))
    with fake_cuda() as record, Mode():
        other, found = trained(STEPS, CUDA)
        means, variances = other.encode(y)
        solution = other.fit_prior("hard", fresh=True)
    assert record.launches.total() > 100 * STEPS
    assert means.device.type == solution.theta.device.type == "cpu"
    assert found == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip((means, variances), network.encode(y), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_step_waits_and_none_sends() -> None:
    few, many = counts_of(5), counts_of(15)
    launches, copies, waits = (b - a for a, b in zip(few, many, strict=True))
    assert copies == waits == 0
    assert launches <= 125 * 10
