"""Kinds of intervention: told apart on cells of a known structural model; verdicts and their reasons."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from crlseq.config import InterventionKind
from crlseq.discovery.likelihood import fit_linear
from crlseq.discovery.moments import Moments, environment_moments, fold_moments
from crlseq.discovery.verdict import KindComparison, compare_kinds
from tests.structural import GRAPH, NO_EDGES, TARGETS, P, matched, truth


@lru_cache
def compared(
    of: InterventionKind, asked: InterventionKind | None = None, edges: bool = True, seed: int = 0, n: int = 200
) -> KindComparison:
    """Comparison on cells of the structural model under interventions ``of`` a kind."""
    values, environment = truth(of, GRAPH if edges else NO_EDGES, seed=seed).cells(n, seed)
    dense = fit_linear(environment_moments(values, environment), P, "hard", restarts=2, noise_floor=0.03)
    folds = fold_moments(values, environment, None, 3, torch.Generator().manual_seed(seed))
    return compare_kinds(dense, folds, asked)


@pytest.mark.parametrize("seed", range(2))
def test_hard_interventions_are_seen(seed: int) -> None:
    found = compared("hard", seed=seed)
    assert (found.kind, found.verdict) == ("hard", "identified")
    assert torch.equal(matched(found.edges.adjacency, found.edges.solution.targets[0]) != 0, GRAPH != 0)
    assert found.edges.solution.model.kind == "hard"
    assert "cut their targets off" in found.reason and "single edges are identified" in found.reason
    assert set(found.held_out) == {"hard", "no edges", "shift"}
    assert found.held_out["hard"] < found.held_out["no edges"] < found.held_out["shift"]
    assert found.gain > 3 * found.error > 0


@pytest.mark.parametrize("seed", range(2))
def test_soft_interventions_are_seen(seed: int) -> None:
    found = compared("soft", seed=seed)
    assert (found.kind, found.verdict) == ("soft", "ancestry only")
    assert found.edges.solution.model.kind == "soft"
    assert found.edges.adjacency.any()
    assert "weaken the input of their targets" in found.reason and "single edges are less certain" in found.reason
    assert set(found.held_out) == {"soft", "no edges", "shift"}
    assert found.held_out["soft"] < found.held_out["no edges"]


@pytest.mark.parametrize("seed", range(2))
def test_shifts_are_seen_and_tell_no_graph(seed: int) -> None:
    found = compared("shift", seed=seed)
    assert (found.kind, found.verdict) == ("shift", "not identified")
    assert found.edges.solution.model.kind == "shift"
    assert not found.edges.adjacency.any()
    assert found.held_out["shift"] == pytest.approx(found.held_out["no edges"], abs=0.02)


@pytest.mark.parametrize("of", ["hard", "soft"])
def test_a_graph_that_is_truly_empty_is_not_identified(of: InterventionKind) -> None:
    found = compared(of, edges=False)
    assert (found.kind, found.verdict) == ("shift", "not identified")
    assert not found.edges.adjacency.any()
    assert found.reason == "No edge is worth its parameter, and mere shifts fit every graph as well as the empty one."


def test_shifts_that_were_asked_for_leave_the_graph_open_whatever_the_data() -> None:
    found = compared("hard", "shift")
    assert (found.kind, found.verdict) == ("shift", "not identified")
    assert not found.edges.adjacency.any()
    assert found.reason.startswith("Shifts were asked for")


@pytest.mark.parametrize("asked", ["hard", "soft"])
def test_a_kind_that_was_asked_for_is_taken_and_the_verdict_comes_from_the_data(asked: InterventionKind) -> None:
    found = compared("hard", asked)
    assert found.kind == asked == found.edges.solution.model.kind
    assert found.verdict == {"hard": "identified", "soft": "ancestry only"}[asked]
    empty = compared("hard", asked, edges=False)
    assert (empty.kind, empty.verdict) == ("shift", "not identified")


def test_edges_that_gain_nothing_on_held_out_cells_are_not_claimed() -> None:
    values, environment = truth("hard").cells(200)
    dense = fit_linear(environment_moments(values, environment), P, "hard", targets=TARGETS[None], noise_floor=0.03)
    shifted = truth("shift").cells(200)  # the held-out cells are of shifts
    folds = fold_moments(*shifted, None, 2, torch.Generator().manual_seed(0))
    found = compare_kinds(dense, folds, "hard")
    assert found.verdict == "not identified"
    assert found.gain < 2 * found.error
    assert "no better with edges than without" in found.reason
    assert not found.edges.adjacency.any()


def test_held_out_likelihoods_are_per_held_out_cell_and_the_gain_their_difference() -> None:
    found = compared("hard")
    cells = 200 * (len(TARGETS) + 4)  # each held out once
    difference = found.held_out["no edges"] - found.held_out["hard"]
    assert found.gain == pytest.approx(difference * cells, rel=1e-9)


def test_a_graph_has_to_beat_the_better_model_without_edges() -> None:
    """Under mere shifts free noise scales are needless parameters; beating them alone would be no sign of a graph."""
    found = compared("shift", "hard")
    assert found.held_out["shift"] < found.held_out["no edges"]
    cells = 200 * (len(TARGETS) + 4)
    assert found.gain == pytest.approx((found.held_out["shift"] - found.held_out["hard"]) * cells, rel=1e-9)
    assert found.verdict == "not identified"


def test_environments_without_cells_in_a_fold_have_no_say() -> None:
    values, environment = truth("hard").cells(200)
    whole = environment_moments(values, environment)
    dense = fit_linear(whole, P, "hard", targets=TARGETS[None], noise_floor=0.03)
    only_control = environment_moments(values[environment == 0], environment[environment == 0], None, len(TARGETS) + 1)
    folds: list[tuple[Moments, Moments]] = [(whole, only_control)]
    found = compare_kinds(dense, folds, "hard")
    assert all(value == value for value in found.held_out.values())  # no NaN
    assert abs(found.gain) < 20  # control cells do not tell models apart
