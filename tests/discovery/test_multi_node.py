"""Unknown sets of programs: exact on population covariances, the paper's linear setting on cells, silent where it cannot tell."""

from __future__ import annotations

import numpy as np
import pytest

from crlseq.discovery.methods import method_of, multi_node
from crlseq.discovery.methods.multi_node import (
    Recovered,
    agreed,
    covariances,
    curved,
    jackknife,
    p_value,
    recover,
    refined,
    settled,
)
from crlseq.discovery.verdict import Verdict, judge_multi_node
from crlseq.errors import InputError
from tests.discovery.test_discover import CONFIG, Screen
from tests.discovery.varici import Latents, mcc

Floats = np.ndarray


class Setting(Latents):
    """Each perturbation acts on a random set of programs; columns (programs) are linearly independent."""

    def __init__(self, p: int, seed: int, linear: bool = True) -> None:
        super().__init__(p, seed, linear)
        self.sets = self.rng.random((p, p)) < 0.5
        while np.linalg.matrix_rank(self.sets) < p:
            self.sets = self.rng.random((p, p)) < 0.5
        self.inner = self.rng.normal(size=(p, p))

    def population(self) -> Floats:
        """(p + 1, p, p) covariances of y = u M."""
        found = []
        for hit in np.vstack([np.zeros(self.p, dtype=bool), self.sets]):
            noise = np.linalg.inv(np.eye(self.p) - self.weights * ~hit)
            found.append(noise.T * (self.variance * np.where(hit, 0.25, 1.0)) @ noise)
        return self.inner.T @ np.array(found) @ self.inner

    def cells(self, n: int, **changes: float) -> tuple[Floats, Floats, Floats]:
        """Latents, components and environments."""
        u, environment = self.screen(n, [tuple(np.flatnonzero(row)) for row in self.sets], **changes)
        return u, u @ self.inner, environment

    def place(self, found: Recovered) -> list[int] | None:
        """The program that was found for each true one; None if the sets are wrong."""
        columns = found.sets.T.tolist()
        return (
            [columns.index(own) for own in self.sets.T.tolist()]
            if sorted(columns) == sorted(self.sets.T.tolist())
            else None
        )


def answer_of(y: Floats, environment: Floats, p: int) -> tuple[Recovered, np.ndarray, Verdict]:
    """What is recovered, its edges, and the verdict if hard interventions are asked for."""
    s, n = covariances(y, environment, p, None), np.bincount(environment).astype(float)
    found, rival = recover(s, n)
    found, swapped = settled(found, s, n)
    edges = agreed(found, swapped, jackknife(y, environment, None, found), s, n)
    tests = p_value(found), curved(y, environment, found)
    return found, edges, judge_multi_node(*tests, rival, int(edges.sum()), 2.0, True)


@pytest.mark.parametrize("p", [1, 2, 4, 5])
@pytest.mark.parametrize("seed", range(2))
def test_population_covariances_give_sets_programs_and_graph(p: int, seed: int) -> None:
    model = Setting(p, seed)
    found, _ = recover(model.population(), np.full(p + 1, 1000.0))
    place = model.place(found)
    assert place is not None and abs(found.deviance) < 1e-3
    mixed = (found.directions @ model.inner.T)[place]
    scale = np.diag(mixed)
    np.testing.assert_allclose(mixed / scale[:, None], np.eye(p), atol=1e-3)
    weights = found.adjacency[np.ix_(place, place)] * scale[:, None] / scale
    np.testing.assert_allclose(weights, model.weights, atol=1e-3)


def test_the_papers_linear_setting() -> None:
    """Five programs, 10,000 cells an environment: all sets, at most one wrong edge in all."""
    wrong = of = 0
    for seed in range(10, 14):
        model = Setting(5, seed)
        u, y, environment = model.cells(10_000)
        found, edges, verdict = answer_of(y, environment, 5)
        place = model.place(found)
        assert place is not None and mcc(y @ found.directions.T, u) > 0.99
        assert verdict.answer == "identified"
        wrong, of = wrong + int((edges[np.ix_(place, place)] != model.graph).sum()), of + int(model.graph.sum())
    assert of >= 15 and wrong <= 1, (wrong, of)


def test_soft_interventions_give_ancestors_and_a_hard_verdict_has_to_be_asked_for() -> None:
    model = Setting(5, 3)
    _, y, environment = model.cells(5_000, kept=0.5)
    found, edges, _ = answer_of(y, environment, 5)
    place = model.place(found)
    assert place is not None
    upstream = np.linalg.inv(np.eye(5) - 0.01 * model.graph) > 1e-12
    assert edges.any() and not (edges[np.ix_(place, place)] & ~upstream).any()
    assert judge_multi_node(0.5, 0.5, np.inf, 3, 2.0, False).answer == "ancestry only"


def test_deviance_is_chi_squared() -> None:
    """Of true sets: 50 degrees of freedom with five programs, so that the mean of 20 is 50 with an error of 2.2."""
    found = []
    for seed in range(20):
        model = Setting(5, seed)
        _, y, environment = model.cells(1000)
        s, root = covariances(y, environment, 5, None), np.linalg.inv(model.inner)
        flag = np.linalg.qr(root)[0].T  # u = root' y: the first k columns span the equations of program k
        found.append(refined(flag, model.sets, s, np.bincount(environment).astype(float)).deviance)
    assert 43 < np.mean(found) < 57


def test_an_intervention_that_differs_between_environments_is_seen() -> None:
    model = Setting(4, 0)
    _, y, environment = model.cells(5_000)
    model.variance[:] *= 2
    last = model.draw(5_000, tuple(np.flatnonzero(model.sets[3]))) @ model.inner
    y[environment == 4] = last
    assert answer_of(y, environment, 4)[2].answer == "not identified"


@pytest.mark.parametrize("seed", [100, 107])
def test_quadratic_equations_are_seen(seed: int) -> None:
    """Two models whose covariances linear equations describe: p = .01 and more."""
    _, y, environment = Setting(4, seed, linear=False).cells(2_500)
    verdict = answer_of(y, environment, 4)[2]
    assert verdict.answer == "not identified" and "products of others" in verdict.reason


def test_perturbations_that_change_means_alone_leave_sets_open() -> None:
    rng = np.random.default_rng(0)
    y, environment = rng.normal(size=(8_000, 3)), np.repeat(np.arange(4), 2_000)
    y[np.arange(8_000), environment - 1] += 2.0 * (environment > 0)
    verdict = answer_of(y, environment, 3)[2]
    assert verdict.answer == "not identified" and "nearly as well" in verdict.reason


def test_a_screen_with_one_hard_perturbation_for_each_program() -> None:
    screen = Screen(perturbations_per_latent=1, cells_per_perturbation=3000, n_control=6000)
    found = method_of("multi-node").find(screen.task(CONFIG, effect=np.ones(4))).discovery
    assert found is not None and sorted(found.target) == [0, 1, 2, 3]


def test_more_perturbations_than_sets_can_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_node, "MOST", 3)
    screen = Screen(perturbations_per_latent=1)
    with pytest.raises(InputError, match="all sets of up to 3 perturbations, and 4 have a detectable effect"):
        method_of("multi-node").find(screen.task(CONFIG, effect=np.ones(4)))
