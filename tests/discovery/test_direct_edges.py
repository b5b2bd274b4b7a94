"""Direct edges: derivatives, chains without shortcuts whatever share of a program is its own, hidden causes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from crlseq.discovery.changes import Changes
from crlseq.discovery.direct_edges import _Problem, beside_mediators, direct_edges, through_silent, unconfirmed
from crlseq.discovery.hits import Floats
from crlseq.discovery.pairs import STATUSES, judge_pairs

GRAPH = np.zeros((4, 4))
GRAPH[0, 1], GRAPH[1, 2], GRAPH[0, 3] = 0.8, -0.9, 0.7
ORDER = np.triu(np.ones((4, 4), dtype=bool), 1)
NONE = np.zeros((4, 4), dtype=bool)


def seen(graph: Floats, omega: Floats, error: float = 0.03) -> Changes:
    """Exact changes of a graph."""
    p = len(graph)
    e = -omega @ np.linalg.inv(np.eye(p) - graph)
    np.fill_diagonal(e, 0)
    unknown = np.full(p, np.nan)
    return Changes(e, np.full((p, p), error), unknown, np.zeros((p, p)), np.zeros((p, p, p)), 0.0, [[] for _ in graph])


@pytest.mark.parametrize("own", [0.35, 0.5, 0.85, 1.0])
def test_a_chain_has_no_shortcut_whatever_share_of_a_program_is_its_own(own: float) -> None:
    found = direct_edges(seen(GRAPH, own * np.eye(4)), ORDER, NONE)
    np.testing.assert_array_equal(found.effect != 0, GRAPH != 0)
    assert found.misfit < 1
    assert not found.hidden.any()
    assert (np.sign(found.effect) == np.sign(GRAPH)).all()


def test_effects_where_programs_are_as_expected() -> None:
    found = direct_edges(seen(GRAPH, 0.75 * np.eye(4)), ORDER, NONE)
    np.testing.assert_allclose(found.effect, GRAPH, atol=1e-3)
    assert np.isfinite(found.error[GRAPH != 0]).all()
    assert np.isnan(found.error[GRAPH == 0]).all()


def test_a_hidden_cause_explains_a_pair_seen_both_ways() -> None:
    omega = 0.75 * np.eye(4)
    omega[2, 3] = omega[3, 2] = 0.4
    both = NONE.copy()
    both[2, 3] = both[3, 2] = True
    found = direct_edges(seen(GRAPH, omega), ORDER, both)
    np.testing.assert_allclose(found.hidden[2, 3], 0.4, atol=0.01)
    np.testing.assert_array_equal(found.effect != 0, GRAPH != 0)


def test_a_cycle() -> None:
    graph = GRAPH.copy()
    graph[2, 1] = 0.6
    total = np.linalg.inv(np.eye(4) - graph)
    changes = seen(graph, 0.75 * np.eye(4))
    changes.e[:] = -0.75 * total / np.diag(total)  # an intervention on i opens the cycle through i
    np.fill_diagonal(changes.e, 0)
    cycle = ORDER.copy()
    cycle[2, 1] = True
    found = direct_edges(changes, cycle, NONE)
    np.testing.assert_allclose(found.effect, graph, atol=0.01)


def test_an_edge_through_a_program_whose_parents_no_intervention_shows() -> None:
    graph = np.zeros((4, 4))
    graph[0, 1], graph[1, 2], graph[0, 3] = 0.8, 0.9, 0.7
    changes = seen(graph, 0.75 * np.eye(4))
    changes.e[:, 1] = 0  # do(1) is a mere shift, so that 0 -> 2 has no link
    cut = np.array([-0.5, 0.0, -0.5 + (changes.e[:, 2] ** 2).sum(), -0.5 + (changes.e[:, 3] ** 2).sum()])
    found = direct_edges(changes, ORDER, NONE)
    assert found.effect[0, 2] != 0
    hard = through_silent(replace(changes, cut=cut), found, NONE)
    np.testing.assert_array_equal(np.argwhere(hard), [[0, 2]])
    soft = through_silent(replace(changes, cut=cut + np.array([0.5, 0, 0.5, 0.5])), found, NONE)
    assert not soft.any()  # nobody's noise changes: 1 is a root


def test_an_edge_is_direct_if_it_is_worth_its_price_beside_what_it_may_go_through() -> None:
    graph = np.zeros((4, 4))
    graph[0, 1], graph[1, 2] = 0.8, 0.9
    changes = seen(graph, 0.75 * np.eye(4))
    changes.e_error[:, 2] = 0.2
    changes.e[:3, 2] = -1.0, -0.4, 0.0  # 5 and 2 errors
    found = direct_edges(changes, ORDER, NONE)
    np.testing.assert_array_equal(np.argwhere(found.effect), [[0, 1], [0, 2]])
    # Beside 1 -> 2 what is left of 1 is 1 - 0.8 * 0.4, with an error of 0.2 |(1, 0.8)|: 2.7 errors.
    left = beside_mediators(changes, found, found.effect != 0, ORDER)
    np.testing.assert_array_equal(np.argwhere(left), [[0, 1]])
    excluded = ORDER & ~(np.arange(4)[:, None] == 1)
    np.testing.assert_array_equal(beside_mediators(changes, found, ORDER, excluded), found.effect != 0)


def test_the_price_beside_mediators_grows_with_the_misfit() -> None:
    changes = seen(GRAPH, 0.75 * np.eye(4), error=0.1)
    found = direct_edges(changes, ORDER, NONE)
    assert beside_mediators(changes, found, NONE, NONE).sum() == 3
    changes.e[[3, 3, 3], [0, 1, 2]] = 0.5, -0.5, 0.5  # five errors where no edge may be
    assert not beside_mediators(changes, found, NONE, NONE).any()


def test_edges_of_the_likelihood_that_interventions_speak_against() -> None:
    edges = GRAPH != 0
    edges[0, 2] = edges[3, 2] = True  # a shortcut of a chain, and one that is nowhere seen
    pairs = judge_pairs(seen(GRAPH, 0.75 * np.eye(4), error=0.05))
    np.testing.assert_array_equal(unconfirmed(pairs, edges, NONE), edges & (GRAPH == 0))
    # An effect of 0.3 is seen with 80 % power if its error is below 0.3 / 2.84, and these pairs are decided by nothing.
    blind = replace(pairs, error=pairs.error + 0.3, status=np.full((4, 4), STATUSES.index("undecided")))
    assert not unconfirmed(blind, edges, NONE).any()
    assert unconfirmed(blind, edges, NONE, straightened=True)[3, 2]
    alike = NONE.copy()
    alike[0, 3] = alike[3, 0] = True
    found = unconfirmed(blind, edges, alike)
    assert found[0, 2] and found[3, 2] and not found[1, 2]


def test_a_share_of_a_variance_is_at_most_all_of_it() -> None:
    problem = _Problem(
        *(getattr(seen(GRAPH, 2 * np.eye(4)), n) for n in ("e", "e_error")), ~np.eye(4, dtype=bool), [(0, 1)], []
    )
    assert problem.fit(problem.start())[0][1:].max() <= 1


def test_edges_that_are_not_worth_their_price_go() -> None:
    weak = np.where(np.arange(4)[:, None] == 0, 0.05, 0) * (GRAPH != 0)
    found = direct_edges(seen(weak, 0.75 * np.eye(4)), ORDER, NONE)
    assert not found.effect.any()


def test_pairs_without_an_error_do_not_take_part() -> None:
    changes = seen(GRAPH, 0.75 * np.eye(4))
    changes.e_error[:, 3] = np.inf
    found = direct_edges(changes, ORDER, NONE)
    assert not found.effect[:, 3].any()
    assert found.effect[0, 1] != 0


def test_derivatives_by_differences() -> None:
    rng = np.random.default_rng(0)
    changes = seen(GRAPH, np.eye(4))
    off = ~np.eye(4, dtype=bool)
    problem = _Problem(changes.e, changes.e_error, off, [(0, 1), (1, 2), (0, 2), (2, 1)], [(2, 3), (0, 3)])
    theta = problem.start() + 0.1 * rng.standard_normal(4 + 2 + 4 + 1)
    _, jacobian = problem.residuals(theta)
    for i in range(len(theta)):
        step = 1e-6 * np.eye(len(theta))[i]
        difference = (problem.residuals(theta + step)[0] - problem.residuals(theta - step)[0]) / 2e-6
        np.testing.assert_allclose(jacobian[:, i], difference, atol=1e-5)
