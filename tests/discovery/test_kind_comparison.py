"""Kinds of intervention: told apart on cells of a known structural model; the verdict that this leads to."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from crlseq.config import InterventionKind
from crlseq.discovery import kind_comparison
from crlseq.discovery.kind_comparison import KindComparison, compare_kinds, paired_error, without_graph
from crlseq.discovery.likelihood import Solution, fit_linear
from crlseq.discovery.moments import Moments, environment_moments, fold_moments
from crlseq.discovery.verdict import Verdict, judge
from tests.structural import AROUND, CHAIN, GRAPH, NO_EDGES, TARGETS, P, matched, truth


@lru_cache
def compared(
    of: InterventionKind, asked: InterventionKind | None = None, graph: Tensor = GRAPH, seed: int = 0, n: int = 200
) -> KindComparison:
    """Comparison on cells of the structural model under interventions ``of`` a kind."""
    values, environment = truth(of, graph, seed=seed).cells(n, seed)
    dense = fit_linear(environment_moments(values, environment), P, "hard", restarts=2, noise_floor=0.03)
    folds = fold_moments(values, environment, None, 3, torch.Generator().manual_seed(seed))
    return compare_kinds(dense, folds, asked)


def outcome(found: KindComparison) -> tuple[InterventionKind, Verdict]:
    """The kind of the model that is left, and the verdict."""
    return found.edges.solution.model.kind, judge(found.evidence)


@pytest.mark.parametrize("seed", range(2))
def test_hard_interventions_are_seen(seed: int) -> None:
    found = compared("hard", seed=seed)
    kind, verdict = outcome(found)
    assert (kind, verdict.answer) == ("hard", "identified")
    assert torch.equal(matched(found.edges.adjacency, found.edges.solution.targets[0]) != 0, GRAPH != 0)
    assert "cut their targets off" in verdict.reason and "single edges are identified" in verdict.reason
    assert set(found.held_out) == {"hard", "no edges", "shift"}
    assert found.held_out["hard"] < found.held_out["no edges"] < found.held_out["shift"]
    assert found.evidence.gain > 3 * found.evidence.error > 0
    assert found.evidence.n_edges == 3


@pytest.mark.parametrize("seed", range(2))
def test_soft_interventions_are_seen(seed: int) -> None:
    found = compared("soft", seed=seed)
    kind, verdict = outcome(found)
    assert (kind, verdict.answer) == ("soft", "ancestry only")
    assert found.edges.adjacency.any()
    assert "weaken the input of their targets" in verdict.reason and "ancestry is identified" in verdict.reason
    assert set(found.held_out) == {"soft", "no edges", "shift"}
    assert found.held_out["soft"] < found.held_out["no edges"]


@pytest.mark.parametrize("seed", [0, 2])
def test_soft_interventions_are_not_called_hard_for_an_edge_around_a_program(seed: int) -> None:
    """Of 0 -> 1 -> 2 -> 3 hard interventions need 0 -> 2: that was called identified with as few cells."""
    found = compared("soft", graph=CHAIN, seed=seed, n=100)
    kind, verdict = outcome(found)
    assert verdict.answer == "ancestry only"
    assert not matched(found.edges.adjacency, found.edges.solution.targets[0]).tril().any()  # edges lead to descendants
    assert (kind, found.evidence.n_around) == (("soft", 0) if seed == 0 else ("hard", 1))
    if kind == "hard":
        assert (
            "1 edge goes around a program, and soft interventions on that program would look the same" in verdict.reason
        )
        asked = compared("soft", "hard", graph=CHAIN, seed=seed, n=100)
        assert (asked.evidence.n_around, judge(asked.evidence).answer) == (0, "identified")


@pytest.mark.parametrize("seed", range(2))
def test_hard_interventions_are_seen_beside_a_true_edge_around_a_program(seed: int) -> None:
    found = compared("hard", graph=AROUND, seed=seed, n=400)
    assert outcome(found)[1].answer == "identified"
    assert torch.equal(matched(found.edges.adjacency, found.edges.solution.targets[0]) != 0, AROUND != 0)


@pytest.mark.parametrize("seed", range(2))
def test_shifts_are_seen_and_tell_no_graph(seed: int) -> None:
    found = compared("shift", seed=seed)
    kind, verdict = outcome(found)
    assert (kind, verdict.answer) == ("shift", "not identified")
    assert not found.edges.adjacency.any()
    assert found.held_out["shift"] == pytest.approx(found.held_out["no edges"], abs=0.02)


@pytest.mark.parametrize("of", ["hard", "soft"])
def test_a_graph_that_is_truly_empty_is_not_identified(of: InterventionKind) -> None:
    found = compared(of, graph=NO_EDGES)
    kind, verdict = outcome(found)
    assert (kind, verdict.answer) == ("shift", "not identified")
    assert not found.edges.adjacency.any() and found.evidence.n_edges == 0
    assert verdict.reason.startswith("No edge improves the fit enough to be selected.")


def test_shifts_that_were_asked_for_leave_the_graph_open_whatever_the_data() -> None:
    found = compared("hard", "shift")
    kind, verdict = outcome(found)
    assert (kind, verdict.answer) == ("shift", "not identified")
    assert not found.edges.adjacency.any()
    assert verdict.reason.startswith("Shifts were asked for")


@pytest.mark.parametrize("asked", ["hard", "soft"])
def test_a_kind_that_was_asked_for_is_taken_and_the_verdict_comes_from_the_data(asked: InterventionKind) -> None:
    kind, verdict = outcome(compared("hard", asked))
    assert kind == asked
    assert verdict.answer == {"hard": "identified", "soft": "ancestry only"}[asked]
    kind, verdict = outcome(compared("hard", asked, graph=NO_EDGES))
    assert (kind, verdict.answer) == ("shift", "not identified")


def test_edges_that_gain_nothing_on_held_out_cells_are_not_claimed() -> None:
    values, environment = truth("hard").cells(200)
    dense = fit_linear(environment_moments(values, environment), P, "hard", targets=TARGETS[None], noise_floor=0.03)
    shifted = truth("shift").cells(200)  # the held-out cells are of shifts
    folds = fold_moments(*shifted, None, 2, torch.Generator().manual_seed(0))
    found = compare_kinds(dense, folds, "hard")
    verdict = judge(found.evidence)
    assert verdict.answer == "not identified"
    assert found.evidence.gain < 2 * found.evidence.error
    assert "Edges do not predict held-out cells better" in verdict.reason
    assert not found.edges.adjacency.any()


def test_held_out_likelihoods_are_per_held_out_cell_and_the_gain_their_difference() -> None:
    found = compared("hard")
    cells = 200 * (len(TARGETS) + 4)  # each held out once
    difference = found.held_out["no edges"] - found.held_out["hard"]
    assert found.evidence.gain == pytest.approx(difference * cells, rel=1e-9)


def test_a_fold_that_runs_away_loses_no_more_than_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    values, environment = truth("hard").cells(200, 0)
    dense = fit_linear(environment_moments(values, environment), P, "hard", restarts=2, noise_floor=0.03)
    folds = fold_moments(values, environment, None, 3, torch.Generator().manual_seed(0))
    whole = compare_kinds(dense, folds, "hard")

    held_out = kind_comparison._held_out

    def runs_away(solution: Solution, train: Moments, test: Moments) -> torch.Tensor:
        value = held_out(solution, train, test)
        return value + 1e5 if bool(solution.mask.any()) and test is folds[0][1] else value

    monkeypatch.setattr(kind_comparison, "_held_out", runs_away)
    found = compare_kinds(dense, folds, "hard")
    edges = whole.evidence.n_edges
    assert edges == 3
    # The other two folds gain what they did; the first loses an edge's unit each, and a scale's each against shifts.
    assert 0.4 * whole.evidence.gain < found.evidence.gain < whole.evidence.gain
    alone = compare_kinds(dense, folds[:1], "hard")
    assert -(edges + dense.model.k) <= alone.evidence.gain <= -edges


def test_a_rival_that_runs_away_in_a_fold_lends_a_graph_no_more_than_its_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, environment = truth("hard").cells(200, 0)
    dense = fit_linear(environment_moments(values, environment), P, "hard", restarts=2, noise_floor=0.03)
    folds = fold_moments(values, environment, None, 3, torch.Generator().manual_seed(0))
    whole, first = compare_kinds(dense, folds, "hard"), compare_kinds(dense, folds[:1], "hard")

    held_out = kind_comparison._held_out

    def runs_away(solution: Solution, train: Moments, test: Moments) -> torch.Tensor:
        value = held_out(solution, train, test)
        scaled = solution.model.kind == "hard" and not bool(solution.mask.any())
        return value + 1e5 if scaled and test is folds[0][1] else value

    monkeypatch.setattr(kind_comparison, "_held_out", runs_away)
    found = compare_kinds(dense, folds, "hard")
    # In the first fold free scales count as mere shifts and a unit for each; the other two are compared as before.
    worse = (first.held_out["shift"] - first.held_out["no edges"]) * float(folds[0][1].counts.sum()) + dense.model.k
    assert found.evidence.gain == pytest.approx(whole.evidence.gain + worse, abs=1e-6)
    # Against mere shifts alone, in all folds, the graph would seem to gain more.
    assert found.evidence.gain < (found.held_out["shift"] - found.held_out["hard"]) * len(values)


def test_a_graph_has_to_beat_the_better_model_without_edges() -> None:
    """Under mere shifts free noise scales are needless parameters; beating them alone would be no sign of a graph."""
    found = compared("shift", "hard")
    assert found.held_out["shift"] < found.held_out["no edges"]
    cells = 200 * (len(TARGETS) + 4)
    assert found.evidence.gain == pytest.approx((found.held_out["shift"] - found.held_out["hard"]) * cells, rel=1e-9)
    assert judge(found.evidence).answer == "not identified"


def test_environments_without_cells_in_a_fold_have_no_say() -> None:
    values, environment = truth("hard").cells(200)
    whole = environment_moments(values, environment)
    dense = fit_linear(whole, P, "hard", targets=TARGETS[None], noise_floor=0.03)
    only_control = environment_moments(values[environment == 0], environment[environment == 0], None, len(TARGETS) + 1)
    folds: list[tuple[Moments, Moments]] = [(whole, only_control)]
    found = compare_kinds(dense, folds, "hard")
    assert all(value == value for value in found.held_out.values())  # no NaN
    assert abs(found.evidence.gain) < 20  # control cells do not tell models apart


def test_shifts_in_place_of_a_graph_are_those_of_the_comparison() -> None:
    """Whether a graph fails on held-out cells or for another reason, the same model is left."""
    graph, asked = compared("hard", "hard").edges, compared("hard", "shift").edges
    left = without_graph(graph)
    assert torch.equal(left.solution.theta, asked.solution.theta) and left.dispersion == asked.dispersion
    assert not left.adjacency.any()


def test_the_error_of_a_gain_is_that_of_cells_paired() -> None:
    """Cell by cell: two fitted Gaussians of each environment, and the variance of the difference of their logs."""
    values, environment = truth("hard", seed=0).cells(1000, 0)
    hard = fit_linear(environment_moments(values, environment), P, "hard", restarts=2, noise_floor=0.03)
    without = hard.refitted(mask=torch.zeros_like(hard.mask), steps=30)
    logs = []
    for solution in (hard, without):
        mean, covariance = (
            value[0][environment] for value in solution.model.environments(solution.theta, solution.targets)
        )
        logs.append(torch.distributions.MultivariateNormal(mean, covariance).log_prob(values))
    gain = logs[0] - logs[1]
    expected = (
        sum(float(gain[environment == c].var() * (environment == c).sum()) for c in range(len(TARGETS) + 1)) ** 0.5
    )
    assert paired_error(hard, without) == pytest.approx(expected, rel=0.05)
    assert paired_error(hard, hard) == pytest.approx(0, abs=1e-6)
