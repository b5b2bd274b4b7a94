"""Score differences under linear mixing: exact for population moments, the paper's settings, and what they cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crlseq.discovery import score_differences
from crlseq.discovery.methods import method_of
from crlseq.discovery.methods.score_linear import declared, recover, undirected, with_errors
from crlseq.discovery.score_differences import fit_log_odds, normal, products
from crlseq.discovery.verdict import judge_scores
from tests.discovery.test_discover import CONFIG, Screen
from tests.discovery.test_squires import Model
from tests.discovery.varici import Latents, components, distance, mcc


@pytest.mark.parametrize("p", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_population_moments_give_the_truth(p: int, seed: int) -> None:
    """Gaussian environments: R_k = (Theta_0 - Theta_k) S_0 (Theta_0 - Theta_k)."""
    model = Model(p, seed)
    theta = model.population()
    apart = theta[0] - theta[1:]
    found = recover(apart @ np.linalg.inv(theta[0]) @ apart, np.linalg.inv(theta), hard=True)
    mixed = found.directions @ model.mixing
    np.testing.assert_allclose(mixed, np.diag(np.diag(mixed)), atol=1e-6 * np.abs(mixed).max())
    np.testing.assert_array_equal((found.effects > 1e-6) & ~np.eye(p, dtype=bool), model.adjacency != 0)
    assert found.left < 1e-6


@pytest.mark.parametrize("p", [5, 8])
def test_linear_equations_at_the_papers_size(p: int) -> None:
    """10,000 cells an environment, 20 features."""
    model = Latents(p, 20)
    u, environment = model.screen(10_000, model.one_each())
    y = components(u @ model.mixing(20), p)
    found, error = with_errors(y, environment, products(y, environment, 0), hard=True)
    edges, against = declared(found, error)
    assert mcc(y @ found.directions.T, u) >= 0.99
    assert judge_scores(found.left, int(edges.sum()), against, True).answer == "identified"
    assert model.graph.sum() >= p and distance(edges, model.edges()) <= 1


@pytest.mark.slow
def test_quadratic_equations_at_the_papers_size() -> None:
    """Programs are found; parents that act weakly (by .5 of their size) may be missed."""
    wrong = of = 0
    for seed in (21, 22, 23):
        model = Latents(5, seed, linear=False)
        u, environment = model.screen(10_000, model.one_each())
        y = components(u @ model.mixing(20), 5)
        found, error = with_errors(y, environment, products(y, environment, 0), hard=True)
        edges, against = declared(found, error)
        assert mcc(y @ found.directions.T, u) >= 0.99 and not against
        wrong, of = wrong + distance(edges, model.edges()), of + model.graph.sum()
    assert of >= 15 and wrong <= 0.2 * of, (wrong, of)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cells are Gaussian the network gains nothing, however long it is trained."""
    monkeypatch.setattr(score_differences, "STEPS", 100)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("seed", range(3))
def test_under_soft_interventions_no_false_ancestor(seed: int) -> None:
    model = Latents(5, seed)
    u, environment = model.screen(10_000, model.one_each(), kept=0.5)
    y = components(u @ model.mixing(20), 5)
    found, error = with_errors(y, environment, products(y, environment, 0), hard=False)
    edges, _ = declared(found, error)
    graph = model.edges()
    upstream = np.linalg.inv(np.eye(5) - 0.01 * graph) > 1e-12
    assert edges.any() and not (edges & ~upstream).any()


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("seed", range(3))
def test_perturbations_of_two_programs_are_seen(seed: int) -> None:
    model = Latents(5, seed)
    hits = [(int(k), int(other)) for k, other in zip(model.target, np.roll(model.target, 1), strict=True)]
    u, environment = model.screen(10_000, hits)
    y = components(u @ model.mixing(20), 5)
    found, error = with_errors(y, environment, products(y, environment, 0), hard=True)
    edges, against = declared(found, error)
    assert judge_scores(found.left, int(edges.sum()), against, True).answer == "not identified"


def test_a_classifier_is_used_only_where_cells_are_not_gaussian() -> None:
    for linear in (True, False):
        model = Latents(5, 21, linear)
        u, environment = model.screen(5000, model.one_each())
        assert (fit_log_odds(u, environment, 0).network is None) == linear


def test_gaussian_cells_pass_for_normal_and_others_do_not() -> None:
    """Chance 1e-3 each; a ReLU bends what a program does by half of a standard deviation, where means and variances are fitted."""
    for seed in range(10):
        u, environment = Latents(5, seed).screen(2500, Latents(5, seed).one_each())
        assert normal(u, environment)
        assert not normal(*relu_chain(seed, 1.0))


def relu_chain(seed: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    """u_k = max(u_{k-1}, 0) + z_k, five programs in causal order; interventions add ``size``."""
    rng, environment = np.random.default_rng(seed), np.repeat(np.arange(6), [10_000] + [2000] * 5)
    u = rng.normal(size=(len(environment), 5)) + size * (environment[:, None] == np.arange(1, 6))
    for k in range(1, 5):
        u[:, k] += np.maximum(u[:, k - 1], 0)
    return u, environment


@pytest.mark.parametrize("size", [1.0, 2.0, 5.0])
def test_a_shifted_relu_chain_is_never_turned_around(size: float) -> None:
    """Normal densities give the reverse of all edges; a classifier finds the order, or no better odds."""
    u, environment = relu_chain(3, size)
    of_groups = products(u, environment, 0)
    found, error = with_errors(u, environment, of_groups, hard=True)
    edges, _ = declared(found, error)
    edges &= ~undirected(edges, found.order, of_groups, np.cov(u[environment == 0].T))
    assert not of_groups.described or not np.tril(edges).any()
    assert size != 2.0 or found.order.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("hard", [True, False])
def test_mere_shifts_tell_no_direction(hard: bool) -> None:
    """u_1 = u_0 + z_1, u_2 = u_1 + z_2: a shift's score difference is the same in all cells."""
    rng, environment = np.random.default_rng(0), np.repeat(np.arange(4), 5000)
    order, edges, mixing = np.arange(3), np.eye(3, k=1) > 0, rng.normal(size=(3, 3))
    u = rng.normal(size=(20_000, 3)) + 1.5 * (environment[:, None] == np.arange(1, 4))
    for k in (1, 2):
        u[:, k] += u[:, k - 1] * ~(hard & (environment == k + 1))
    y = u @ mixing
    told = ~undirected(edges, order, products(y, environment, 0), np.cov(y[environment == 0].T))
    np.testing.assert_array_equal(told & edges, edges & hard)


def test_gradients_are_those_of_the_density() -> None:
    """An independent program with Laplace noise in controls and normal noise under intervention: d = sign(u) - u."""
    rng = np.random.default_rng(0)
    n = 20_000
    u = np.concatenate([rng.laplace(size=(n, 2)), np.column_stack([rng.normal(size=n), rng.laplace(size=n)])])
    found = fit_log_odds(u, np.repeat([0, 1], n), 0)
    assert found.network is not None
    at = np.array([[-2.0, 0.3], [-1.5, 0.0], [1.5, -0.5], [2.0, 1.0]])
    np.testing.assert_allclose(found.gradients(at)[0][:, 0], np.sign(at[:, 0]) - at[:, 0], atol=0.35)
    np.testing.assert_allclose(found.gradients(at)[0][:, 1], 0, atol=0.35)


@pytest.mark.usefixtures("few_steps")
def test_products_of_other_cells_have_no_bias() -> None:
    """Environments without an effect: squares would be positive."""
    rng = np.random.default_rng(0)
    y, environment = rng.normal(size=(2000, 4)), np.repeat(np.arange(5), 400)
    found = products(y, environment, 0)
    own = np.einsum("ggcii->c", found.pairs) / len(found.pairs)
    other = np.einsum("cii->c", found.mean())
    assert (own > 0.05).all() and np.abs(other).max() < 0.5 * own.min()


def test_a_screen_with_one_hard_perturbation_for_each_program() -> None:
    screen = Screen(perturbations_per_latent=1, cells_per_perturbation=3000, n_control=6000)
    found = method_of("score-linear").find(screen.task(CONFIG, effect=np.ones(4))).discovery
    assert found is not None and sorted(found.target) == [0, 1, 2, 3]
    place = np.array([found.target[np.flatnonzero(screen.target == k)[0]] for k in range(4)])
    latents = torch.from_numpy(screen.latents)[found.index].numpy()
    between = np.abs(np.corrcoef(found.latents.T, latents.T)[:4, 4:])
    assert min(between[place[k], k] for k in range(4)) > 0.8
