"""Latents of simulated cells: graphs, interventions, hits and structural equations, by hand and by what they must hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crlseq.data.simulated_latents import (
    GUIDE_SD,
    LOOP_RADIUS,
    Effects,
    System,
    draw_effects,
    draw_graph,
    draw_hidden,
    draw_latents,
    draw_penetrance,
    solve,
    with_loop,
    with_second_targets,
)

SIZE = (0.6, 1.4)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def topological_order(adjacency: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    """Latents after their parents; shorter than p if there is a cycle."""
    order: list[int] = []
    while free := [
        k for k in range(len(adjacency)) if k not in order and all(j in order for j in np.flatnonzero(adjacency[:, k]))
    ]:
        order += free
    return order


def test_graphs_are_acyclic_in_a_random_order_with_the_density_asked_for() -> None:
    graphs = [draw_graph(10, 1.5, (0.5, 1.2), rng(seed))[0] for seed in range(200)]
    assert all(len(topological_order(graph)) == 10 for graph in graphs)
    edges = np.array([np.count_nonzero(graph) for graph in graphs])
    assert abs(edges.mean() - 15) < 4 * np.sqrt(45 * (1 / 3) * (2 / 3) / 200)  # 45 pairs, each with probability 1/3
    against_index = sum(np.count_nonzero(np.tril(graph)) for graph in graphs) / edges.sum()
    assert 0.45 < against_index < 0.55
    weights = np.abs(np.concatenate([graph[graph != 0] for graph in graphs]))
    assert 0.5 <= weights.min() < 0.51 and 1.19 < weights.max() <= 1.2
    assert np.count_nonzero(draw_graph(4, 1.5, SIZE, rng())[0]) == 6  # the complete DAG
    assert np.count_nonzero(draw_graph(1, 0.0, SIZE, rng())[0]) == 0


class NoNoise:
    """A generator whose standard normals are all 1, so that the equations can be worked out by hand."""

    def standard_normal(self, shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.ones(shape)


# A chain 2 -> 0 -> 1 with G[2, 0] = 2 and G[0, 1] = -1; perturbation 3 targets 1 and shifts 2 as well.
CHAIN = np.zeros((3, 3))
CHAIN[2, 0], CHAIN[0, 1] = 2, -1
EFFECTS = Effects(
    target=np.array([0, 2, 0, 1]),
    shift=np.array([1.5, -4, -1, 2]),
    log_scale=np.log([2.0, 1, 1, 1]),
    retention=np.array([0.5, 1, 0, 0]),
    second_latent=np.array([-1, -1, -1, 2]),
    second_shift=np.array([0, 0, 0, 0.5]),
)


def by_hand(members: tuple[int, ...], hit: list[list[bool]], equations: Any, hidden: np.ndarray) -> np.ndarray:
    """Latents where all z are 1, and all hidden causes."""
    system, ones = System(CHAIN, np.array([2, 0, 1]), hidden), NoNoise()
    struck = np.array(hit, dtype=bool).reshape(len(hit), len(members))
    return draw_latents(system, EFFECTS, members, struck, equations, ones, ones)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("members", "equations", "expected"),
    [
        ((), "linear", [3, -2, 1]),
        ((), "relu", [3, -2, 1]),
        ((0,), "linear", [4.5, -3.5, 1]),  # on 0: half of the parent's 2, twice z, plus 1.5
        ((1,), "linear", [-5, 6, -3]),  # on 2: shift -4, retention 1
        ((1,), "relu", [1, 0, -3]),  # ReLU hides the negative parent
        ((0, 2), "linear", [2.5, -1.5, 1]),  # both on 0: retentions 0.5 * 0, scales 2 * 1, shifts 1.5 - 1
        ((0, 1), "linear", [0.5, 0.5, -3]),
        ((3,), "linear", [4, 3, 1.5]),  # 2 is shifted by 0.5 and keeps its parents; 1 is cut off
    ],
)
def test_structural_equations_by_hand(members: tuple[int, ...], equations: Any, expected: list[float]) -> None:
    hit = [[True] * len(members)] * 2
    assert np.allclose(by_hand(members, hit, equations, np.zeros((0, 3))), [expected, expected])


def test_cells_that_are_not_hit_are_as_controls() -> None:
    found = by_hand((0, 1), [[False, False], [True, False], [False, True], [True, True]], "linear", np.zeros((0, 3)))
    assert np.allclose(found, [[3, -2, 1], [4.5, -3.5, 1], [-5, 6, -3], [0.5, 0.5, -3]])


def test_hidden_causes_act_like_parents() -> None:
    hidden = np.array([[0.5, 0, 1.0]])  # of 0 and 2
    # Control: u2 = 1 + 1, u0 = 2 * 2 + 1 + 0.5, u1 = 1 - u0.
    assert np.allclose(by_hand((), [[]], "linear", hidden), [[5.5, -4.5, 2]])
    # Half of what 0 receives is kept: (2 * 2 + 0.5) / 2 + 2 + 1.5; all of it is cut by perturbation 2.
    assert np.allclose(by_hand((0,), [[True]], "linear", hidden)[0, 0], 5.75)
    assert np.allclose(by_hand((2,), [[True]], "linear", hidden)[0, 0], 0)


@pytest.mark.parametrize(("intervention", "scale"), [("hard", 0.7), ("soft", 0.7), ("shift", 1.0)])
def test_kinds_of_intervention(intervention: Any, scale: float) -> None:
    effects = draw_effects(4, 12, intervention, (1.5, 5.0), (0.4, 0.5), rng())
    assert set(effects.target[:4]) == {0, 1, 2, 3}
    assert np.allclose(np.exp(effects.log_scale), scale)
    assert ((np.abs(effects.shift) >= 1.5) & (np.abs(effects.shift) <= 5)).all() and np.abs(effects.shift).max() > 3
    low, high = {"hard": (0, 0), "soft": (0.4, 0.5), "shift": (1, 1)}[intervention]
    assert (effects.retention >= low).all() and (effects.retention <= high).all()
    assert (effects.second_latent == -1).all() and (effects.second_shift == 0).all()


def test_second_targets() -> None:
    plain = draw_effects(5, 400, "hard", (1.0, 3.0), (0, 0), rng())
    both = with_second_targets(plain, 5, 0.4, rng(1))
    chosen = both.second_latent >= 0
    assert chosen.sum() == 160 and (both.second_shift[~chosen] == 0).all()
    assert (both.second_latent[chosen] != both.target[chosen]).all()
    step = (both.second_latent - both.target)[chosen] % 5
    assert np.bincount(step, minlength=5)[1:].min() > 20  # 40 expected of each of the four others
    share = np.abs(both.second_shift[chosen] / both.shift[chosen])
    assert 0.3 <= share.min() < 0.32 and 0.78 < share.max() <= 0.8
    assert 60 < (both.second_shift > 0).sum() < 100
    assert (both.target == plain.target).all() and (both.shift == plain.shift).all()


def test_penetrance_of_guides() -> None:
    one = draw_penetrance(4000, 1, (0.3, 0.9), rng())
    assert one.shape == (4000, 1) and one.min() >= 0.3 and one.max() <= 0.9
    assert one.mean() == pytest.approx(0.6, abs=4 * 0.6 / np.sqrt(12 * 4000))
    # Far from the bounds the guides of a perturbation differ by GUIDE_SD.
    three = draw_penetrance(4000, 3, (0.0, 1.0), rng())
    middle = np.abs(three.mean(1) - 0.5) < 0.05
    assert three[middle].std(1, ddof=1).mean() == pytest.approx(0.886 * GUIDE_SD, rel=0.07)  # c4 of three values
    assert three.min() == 0 and three.max() == 1
    assert (draw_penetrance(50, 3, (0.0, 0.0), rng()) == 0).all()
    assert (draw_penetrance(50, 3, (1.0, 1.0), rng()) == 1).all()


def test_hidden_causes_are_three_latents_with_weights_of_either_sign() -> None:
    weights = draw_hidden(200, 8, rng())
    assert (np.count_nonzero(weights, axis=1) == 3).all()
    size = np.abs(weights[weights != 0])
    assert size.min() >= 0.7 and size.max() <= 1.2
    assert 0.4 < (weights[weights != 0] > 0).mean() < 0.6


def test_hidden_causes_correlate_what_parents_leave() -> None:
    """Cov(u - u G) = I + L'L."""
    system = System(CHAIN, np.array([2, 0, 1]), np.array([[0.8, -1.1, 0], [0, 0.7, 0.9]]))
    latents = draw_latents(system, EFFECTS, (), np.zeros((40_000, 0), dtype=bool), "linear", rng(1), rng(2))
    left = latents - latents @ CHAIN
    expected = np.array([[1.64, -0.88, 0], [-0.88, 2.7, 0.63], [0, 0.63, 1.81]])
    assert np.cov(left.T) == pytest.approx(expected, abs=0.08)  # four standard errors of the largest entry


@pytest.mark.parametrize("expected_parents", [0.0, 0.75, 2.5])
def test_a_feedback_edge_closes_a_loop(expected_parents: float) -> None:
    for seed in range(20):
        dag, order = draw_graph(6, expected_parents, SIZE, rng(seed))
        looped = with_loop(dag, order, SIZE, rng(seed))
        changed = np.argwhere(looped != dag)
        assert len(changed) == (1 if dag.any() else 2)
        assert len(topological_order(looped)) < 6
        assert np.abs(np.linalg.eigvals(np.abs(looped))).max() <= LOOP_RADIUS


@pytest.mark.parametrize("expected_parents", [0.75, 2.5])
def test_a_loop_is_solved_exactly(expected_parents: float) -> None:
    dag, order = draw_graph(6, expected_parents, SIZE, rng(3))
    graph = with_loop(dag, order, SIZE, rng(3))
    system, own, kept = System(graph, order, np.zeros((0, 6))), rng(4).standard_normal((50, 6)), np.ones((50, 6))
    exact = own @ np.linalg.inv(np.eye(6) - graph)
    np.testing.assert_allclose(solve(system, own, kept, "linear"), exact, atol=1e-10)
    kept[:, 2] = 0.3  # an intervention takes most of what one latent receives
    weakened = graph * np.where(np.arange(6) == 2, 0.3, 1.0)
    np.testing.assert_allclose(
        solve(system, own, kept, "linear"), own @ np.linalg.inv(np.eye(6) - weakened), atol=1e-10
    )
    bent = solve(system, own, kept, "relu")
    np.testing.assert_allclose(bent, own + kept * (np.maximum(bent, 0) @ graph), atol=1e-10)
