"""Differences of precision matrices: exact on population covariances, near the truth on cells, silent where not hard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crlseq.config import ModelConfig
from crlseq.discovery.methods import method_of
from crlseq.discovery.methods.multi_node import agreed, along, covariances, curved, jackknife, p_value, settled
from crlseq.discovery.methods.squires import by_likelihood
from crlseq.discovery.score_differences import precisions
from crlseq.discovery.verdict import Verdict, judge_squires
from crlseq.errors import InputError
from crlseq.experiments.peers import varici
from tests.discovery.test_discover import CONFIG, Screen


class Model:
    """Random linear equations of p programs, mixed into p components, with one intervention each."""

    def __init__(self, p: int, seed: int, hard: bool = True) -> None:
        rng = np.random.default_rng(seed)
        self.p, self.rng = p, rng
        order = rng.permutation(p)
        weights = np.triu(rng.uniform(0.4, 1.2, (p, p)) * rng.choice([-1, 1], (p, p)) * (rng.random((p, p)) < 0.5), 1)
        self.adjacency = np.zeros((p, p))
        self.adjacency[np.ix_(order, order)] = weights
        self.mixing = rng.normal(size=(p, p))
        self.scale = rng.choice([0.4, 2.5], p)  # of the noise under intervention
        self.kept = 0.0 if hard else 0.6

    def latents_of_noise(self, target: int) -> np.ndarray:
        """(p, p) from noise to latents, under the intervention on a program; -1: none."""
        graph, noise = self.adjacency.copy(), np.ones(self.p)
        if target >= 0:
            graph[:, target] *= self.kept
            noise[target] = self.scale[target]
        return np.linalg.inv(np.eye(self.p) - graph.T) * noise

    def population(self) -> np.ndarray:
        roots = [self.mixing @ self.latents_of_noise(k) for k in range(-1, self.p)]
        return np.array([np.linalg.inv(root @ root.T) for root in roots])

    def cells(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        each = [
            self.rng.normal(size=(n, self.p)) @ (self.mixing @ self.latents_of_noise(k)).T for k in range(-1, self.p)
        ]
        return np.concatenate(each), np.repeat(np.arange(self.p + 1), n)


@pytest.mark.parametrize("p", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", range(5))
def test_population_covariances_give_the_truth(p: int, seed: int) -> None:
    model = Model(p, seed)
    found, _ = by_likelihood(np.linalg.inv(model.population()), np.full(p + 1, 1e4))
    assert abs(found.deviance) < 1e-4
    program = found.sets.argmax(1)
    mixed = (found.directions @ model.mixing)[program]
    scale = np.diag(mixed)
    np.testing.assert_allclose(mixed / scale[:, None], np.eye(p), atol=1e-6)
    weights = found.adjacency[np.ix_(program, program)] * scale[:, None] / scale
    np.testing.assert_allclose(weights, model.adjacency, atol=1e-6)


def answer_of(y: np.ndarray, environment: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray, Verdict]:
    """Sets, edges, and the verdict if hard interventions are asked for."""
    s, n = covariances(y, environment, p, None), np.bincount(environment).astype(float)
    found, swapped = by_likelihood(s, n)
    edges = agreed(found, swapped, jackknife(y, environment, None, found), s, n)
    verdict = judge_squires(p_value(found), curved(y, environment, found), int(edges.sum()), True)
    return found.sets, edges, verdict


@pytest.mark.slow
def test_cells_give_edges_or_no_claim() -> None:
    """Twelve models of 25,000 cells an environment: nearly all edges are found, and none is false."""
    accepted = true = false = of = 0
    for seed in range(12):
        model = Model(5, seed)
        y, environment = model.cells(25_000)
        sets, edges, verdict = answer_of(y, environment, 5)
        if verdict.answer != "identified":
            continue
        program = sets.argmax(0)
        truth = (model.adjacency != 0)[np.ix_(program, program)]
        accepted += 1
        of, true, false = of + truth.sum(), true + (edges & truth).sum(), false + (edges & ~truth).sum()
    assert accepted >= 9 and true >= 0.8 * of and false == 0, (accepted, true, of, false)


@pytest.mark.parametrize("seed", range(3))
def test_soft_interventions_look_the_same_so_that_single_edges_are_not_claimed(seed: int) -> None:
    model = Model(5, seed, hard=False)
    found, _ = by_likelihood(np.linalg.inv(model.population()), np.full(6, 1e4))
    program = found.sets.argmax(1)
    assert abs(found.deviance) < 1e-4
    assert not np.allclose(np.abs(found.adjacency[np.ix_(program, program)]), np.abs(model.adjacency), atol=0.05)
    assert judge_squires(0.5, 0.5, 3, False).answer == "ancestry only"


def test_perturbations_of_two_programs_are_seen() -> None:
    """Every precision is that of two interventions at once: two rows change."""
    model = Model(4, 1)
    theta = model.population()
    two = np.concatenate([theta[:1], theta[1:] + np.roll(theta[1:], 1, 0) - theta[0]])
    found, _ = by_likelihood(np.linalg.inv(two), np.full(5, 2_500.0))
    assert judge_squires(p_value(found), 0.5, 3, True).answer == "not identified"


def test_noise_of_measurement_is_taken_off() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=(200_000, 3)) * [1.0, 1.5, 2.0] + 0.5 * rng.normal(size=(200_000, 3))
    known, unknown = (precisions(y, np.zeros(len(y), dtype=int), 0, noise)[0] for noise in (0.25, None))
    np.testing.assert_allclose(known, np.diag(1 / np.square([1.0, 1.5, 2.0])), atol=0.01)
    np.testing.assert_allclose(np.diag(unknown), 1 / (np.square([1.0, 1.5, 2.0]) + 0.25), rtol=0.02)


def test_a_screen_with_one_hard_perturbation_for_each_program() -> None:
    screen = Screen(perturbations_per_latent=1, cells_per_perturbation=3000, n_control=6000)
    found = method_of("squires").find(screen.task(CONFIG, effect=np.ones(4))).discovery
    assert found is not None and found.adjacency.shape == (4, 4)
    assert sorted(found.target) == [0, 1, 2, 3]
    place = np.array([found.target[np.flatnonzero(screen.target == k)[0]] for k in range(4)])
    latents = torch.from_numpy(screen.latents)[found.index].numpy()
    between = np.abs(np.corrcoef(found.latents.T, latents.T)[:4, 4:])
    assert min(between[place[k], k] for k in range(4)) > 0.8


def test_it_asks_for_one_perturbation_for_each_program() -> None:
    screen = Screen()
    with pytest.raises(InputError, match="needs one perturbation for each program: 12 have a detectable effect, and 4"):
        method_of("squires").find(screen.task(ModelConfig(n_latents=4)))


def test_an_edge_between_programs_that_others_part_may_be_reversed() -> None:
    """Varici's setting, half of the parents' influence kept: 2 -> 4 under interventions on both is described as well by 4 -> 2,
    and in the order that is found 0 or 1 may stand between them.
    """
    screen = varici(seed=0, soft=True)
    u, environment = screen.obsm["true_latents"], screen.obs["perturbation"].cat.codes.to_numpy().astype(np.int64)
    s, n = covariances(u, environment, 5, None), np.bincount(environment).astype(float)
    found, _ = by_likelihood(s, n)
    program = found.sets.argmax(0)  # of each place of the order
    order = [4, 1, 0, 2, 3]
    apart = along(np.eye(5)[order], np.arange(5)[:, None] == order, s, n)
    assert abs(apart.deviance - found.deviance) < 1 and sorted(program) == [0, 1, 2, 3, 4]
    _, swapped = settled(apart, s, n)
    edges = agreed(apart, swapped, np.full((5, 5), 0.05), s, n)
    assert abs(apart.adjacency[0, 3]) > 0.3 and not edges[0, 3]  # 4 -> 2
    assert edges[2, 4]  # 0 -> 3, which is true
