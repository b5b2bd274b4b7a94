"""Edge decisions: dispersion of right and of wrong models, the graph from exact moments, a DAG from anything."""

from __future__ import annotations

import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.config import InterventionKind
from crlseq.discovery import edges
from crlseq.discovery.edges import MIN_EFFECT, reachable, select_edges
from crlseq.discovery.likelihood import LinearModel, Solution, allowed_edges, fit_linear
from crlseq.discovery.misfit import misfit
from crlseq.discovery.moments import DTYPE, Moments, environment_moments
from tests.structural import GRAPH, NO_EDGES, TARGETS, P, matched, truth


def is_dag(adjacency: torch.Tensor) -> bool:
    return nx.is_directed_acyclic_graph(nx.from_numpy_array(adjacency.numpy(), create_using=nx.DiGraph))


def dense(moments: Moments, kind: InterventionKind = "hard") -> Solution:
    return fit_linear(moments, P, kind, restarts=1, targets=TARGETS[None])


def test_reachable_by_hand() -> None:
    chain = torch.diag(torch.ones(4), 1)
    assert torch.equal(reachable(chain), torch.triu(torch.ones(5, 5), 1).bool())
    assert not reachable(torch.zeros(3, 3)).any()
    assert reachable(torch.tensor([[0.0, 1], [1, 0]])).all()  # a cycle reaches itself
    assert not reachable(torch.zeros(1, 1)).any()


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("seed", range(3))
def test_exact_moments_give_the_exact_graph(seed: int, kind: InterventionKind) -> None:
    edges = select_edges(dense(truth("hard", seed=seed).moments(500), kind))
    adjacency = matched(edges.adjacency, TARGETS)
    assert torch.equal(adjacency != 0, GRAPH != 0)
    if kind == "hard":
        torch.testing.assert_close(adjacency, GRAPH.abs(), atol=0.02, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_cells_give_the_graph(seed: int) -> None:
    edges = select_edges(dense(environment_moments(*truth(seed=seed).cells(150, seed))))
    assert torch.equal(matched(edges.adjacency, TARGETS) != 0, GRAPH != 0)


def test_no_edges_are_found_where_there_are_none() -> None:
    for seed in range(3):
        moments = environment_moments(*truth(graph=NO_EDGES, seed=seed).cells(150, seed))
        assert not select_edges(dense(moments)).adjacency.any()


def test_edges_that_came_back_together_go_again_if_superfluous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one edge is missing, all that could stand for it pass the score test: here all that close no cycle."""
    solution = dense(truth().moments(500))
    right = select_edges(solution).adjacency != 0
    order = list(nx.topological_sort(nx.from_numpy_array(right.numpy(), create_using=nx.DiGraph)))
    every = torch.zeros(P, P, dtype=DTYPE)
    for place, j in enumerate(order):
        every[j, order[place + 1 :]] = 1
    assert int(every.sum()) > int(right.sum())
    monkeypatch.setattr(edges, "_with_absent", lambda now, threshold: every[None])
    assert torch.equal(select_edges(solution).adjacency != 0, right)


def test_a_larger_dispersion_asks_more_of_an_edge() -> None:
    solution = dense(environment_moments(*truth().cells(60)))
    few, many = select_edges(solution, scale=60.0), select_edges(solution, scale=1.0)
    assert few.dispersion == 60 and many.dispersion == 1
    assert int((few.adjacency != 0).sum()) < 3 == int((many.adjacency != 0).sum())


def test_a_small_edge_goes_only_where_the_model_does_not_describe_the_moments() -> None:
    graph = GRAPH.clone()
    graph[1, 2] = 0.15
    solution = dense(truth(graph=graph).moments(20_000))
    described = select_edges(solution)
    assert described.dispersion == 1
    assert abs(float(described.adjacency[1, 2])) == pytest.approx(0.15, abs=0.02)
    wald = edges._Profile(described.solution, 1.5).wald().view(P, P)
    assert float(wald[1, 2]) > math.log(20_000 * 9)  # and not for want of cells
    chance = 3 * misfit(solution).error  # of few environments a dispersion is in part that
    assert int((select_edges(solution, scale=1.5 + chance).adjacency != 0).sum()) == 2
    halfway = select_edges(solution, scale=1.05 + chance)  # up to 0.125
    assert int((halfway.adjacency != 0).sum()) == 3
    assert int((select_edges(solution, min_effect=0.4, scale=1.05 + chance).adjacency != 0).sum()) == 2
    assert int((select_edges(solution, min_effect=0.4, scale=1.0 + chance).adjacency != 0).sum()) == 3
    assert 0.15 < MIN_EFFECT < 0.8


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.sampled_from([0, 3, 20]),
    kind=st.sampled_from(["hard", "soft"]),
    count=st.sampled_from([2.0, 30.0, 1e5]),
)
def test_any_solution_gives_a_dag_without_small_edges(
    seed: int, steps: int, kind: InterventionKind, count: float
) -> None:
    """Random moments of anything, cyclic structure and all, fitted not at all, hardly, or well."""
    generator = torch.Generator().manual_seed(seed)
    p, q, k = 3, 4, 5
    spread = torch.randn(k + 1, q, 2 * q, generator=generator, dtype=DTYPE)
    moments = Moments(
        torch.randn(k + 1, q, generator=generator, dtype=DTYPE),
        spread @ spread.mT / q,
        torch.full((k + 1,), count, dtype=DTYPE),
    )
    model = LinearModel(moments, p, kind, 0.05)
    targets = torch.randint(p, (1, k), generator=generator)
    start = model.start(targets)
    start[:, model.at["G"]] = torch.randn(1, p * p, generator=generator, dtype=DTYPE)
    solution = model.solve(start, targets, allowed_edges(p, kind), steps)
    edges = select_edges(solution, scale=1.0)
    assert is_dag(edges.adjacency)
    assert bool(torch.isfinite(edges.adjacency).all())
    assert not edges.adjacency.diagonal().any()
    assert float(edges.solution.nll[0]) < float("inf")


def test_an_empty_mask_stays_empty_in_the_backward_steps_and_edges_come_back_forward() -> None:
    solution = dense(truth().moments(500))
    model = solution.model
    none = model.solve(solution.theta * (~_is_edge(model)), solution.targets, torch.zeros_like(solution.mask))
    assert torch.equal(matched(select_edges(none).adjacency, TARGETS) != 0, GRAPH != 0)


def _is_edge(model: LinearModel) -> torch.Tensor:
    edge = torch.zeros(1, model.size, dtype=torch.bool)
    edge[:, model.at["G"]] = True
    return edge


def test_the_solution_that_comes_back_is_the_refit_without_the_other_edges() -> None:
    solution = dense(environment_moments(*truth().cells(100)))
    before = solution.theta.clone(), solution.mask.clone()
    edges = select_edges(solution)
    assert torch.equal(solution.theta, before[0]) and torch.equal(solution.mask, before[1])  # nothing is written to
    assert torch.equal(edges.solution.mask[0] != 0, edges.adjacency != 0)
    assert torch.equal(edges.solution.adjacency(), edges.adjacency)
    refit = edges.solution.model.solve(edges.solution.theta, edges.solution.targets, edges.solution.mask)
    torch.testing.assert_close(refit.nll, edges.solution.nll, atol=1e-4, rtol=0)


def test_an_information_that_rounding_made_indefinite() -> None:
    """Flat directions may come out below 0; with as much on top as it takes the others keep their errors."""
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    information = basis @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, -1e-8], dtype=torch.float64)) @ basis.T
    assert torch.linalg.cholesky_ex(information + 1e-9 * torch.diag(information.diagonal()))[1] > 0
    root = edges._root(information.clone())
    torch.testing.assert_close(root @ root.T, information, rtol=0, atol=1e-6)
    sound = information + torch.eye(6, dtype=torch.float64)
    root = edges._root(sound.clone())
    torch.testing.assert_close(root @ root.T, sound + 1e-9 * torch.diag(sound.diagonal()), rtol=0, atol=1e-14)
