"""The misfit: of right and of wrong models, its error, and what it counts as described."""

from __future__ import annotations

import math

import pytest
import torch

from crlseq.config import InterventionKind
from crlseq.discovery.likelihood import Solution, fit_linear
from crlseq.discovery.misfit import CHANCE, DESCRIBED, Misfit, misfit
from crlseq.discovery.moments import Moments, environment_moments
from tests.structural import TARGETS, P, truth


def dense(moments: Moments, kind: InterventionKind = "hard") -> Solution:
    return fit_linear(moments, P, kind, restarts=1, targets=TARGETS[None])


def test_a_model_describes_up_to_the_threshold_and_chance_on_top() -> None:
    assert Misfit(DESCRIBED, 0.0).describes and Misfit(DESCRIBED + 0.9 * CHANCE * 0.1, 0.1).describes
    assert not Misfit(DESCRIBED + 1e-6, 0.0).describes and not Misfit(DESCRIBED + 1.1 * CHANCE * 0.1, 0.1).describes
    assert Misfit(0.5, 0.1).dispersion == 1 and Misfit(1.7, 0.1).dispersion == 1.7


@pytest.mark.parametrize(("kind", "n"), [("hard", 60), ("hard", 400), ("shift", 200), ("soft", 200)])
def test_misfit_is_one_within_chance_where_the_model_holds(kind: InterventionKind, n: int) -> None:
    z = []
    for seed in range(4):
        found = misfit(dense(environment_moments(*truth(kind, seed=seed).cells(n, seed)), kind))
        z.append((found.value - 1) / found.error)
        assert found.describes
    assert max(map(abs, z)) < 3.5
    assert abs(sum(z)) / 2 < 3  # the mean of four


def test_the_standard_deviation_of_the_misfit_is_that_of_the_misfit() -> None:
    true = truth()
    found = [misfit(dense(environment_moments(*true.cells(60, seed)))) for seed in range(40)]
    spread = float(torch.tensor([each.value for each in found]).std())
    assert spread == pytest.approx(
        sum(each.error for each in found) / 40, rel=0.25
    )  # two standard errors of a deviation of 40


def test_misfit_grows_where_the_model_is_wrong() -> None:
    values, environment = truth().cells(300)
    bent = torch.cat([values[:, :4], torch.nn.functional.leaky_relu(values[:, 4:], 0.2)], 1)
    as_shift = fit_linear(environment_moments(values, environment), P, "shift", targets=TARGETS[None])
    wrong_targets = fit_linear(environment_moments(values, environment), P, "hard", targets=TARGETS.roll(1)[None])
    for solution in (dense(environment_moments(bent, environment)), as_shift, wrong_targets):
        found = misfit(solution)
        assert found.value > 1 + 10 * found.error
        assert found.dispersion == found.value
        assert not found.describes


def test_dispersion_is_at_least_one_and_one_without_environments_large_enough() -> None:
    exact = dense(truth().moments(1000))  # closer to the saturated model than chance allows
    assert misfit(exact).value < 0.1
    assert misfit(exact).dispersion == 1
    few = dense(truth().moments(8))  # q + 1
    assert misfit(few) == Misfit(1.0, math.inf)
    assert misfit(few).describes
