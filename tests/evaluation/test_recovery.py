"""Recovery scores against values worked out by hand, and properties they must have."""

from __future__ import annotations

import itertools
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.evaluation.recovery import (
    closure,
    gene_list_scores,
    graph_scores,
    match_programs,
    mean_correlation,
    pair_scores,
    partition_agreement,
    penetrance_error,
    random_graph_scores,
    score_recovery,
)


def graph(p: int, *edges: tuple[int, int]) -> np.ndarray:
    found = np.zeros((p, p), dtype=bool)
    for source, target in edges:
        found[source, target] = True
    return found


def truth(adjacency: np.ndarray, *targets: int) -> dict[str, Any]:
    names = [f"g{i}" for i in range(len(targets))]
    return {"adjacency": adjacency * 0.8, "target": pd.DataFrame({"latent": targets}, index=names)}


def interventions(*programs: Any) -> pd.DataFrame:
    return pd.DataFrame({"perturbation": [f"g{i}" for i in range(len(programs))], "program": programs})


def edges(*pairs: str) -> pd.DataFrame:
    return pd.DataFrame([pair.split(">") for pair in pairs], columns=["source", "target"])


@st.composite
def dags(draw: st.DrawFn, p: int = 5) -> np.ndarray:
    order = draw(st.permutations(range(p)))
    kept = draw(st.sets(st.sampled_from(list(itertools.combinations(range(p), 2)))))
    return graph(p, *((order[j], order[k]) for j, k in kept))


def test_matching_by_hand():
    # Program B holds two of latent 0 and one of latent 1; A holds two of latent 1; C none that is left over.
    claims = ["B", "B", "B", "A", "A", None]
    latent_of, accuracy = match_programs(claims, np.array([0, 0, 1, 1, 1, 2]), 3)
    assert latent_of == {"A": 1, "B": 0}
    assert accuracy == pytest.approx(4 / 6)  # the third is in the wrong program, the sixth claims none


def test_matching_is_one_to_one_and_best_over_all():
    # Greedily P0 -> latent 0 (3) leaves P1 nothing: 3 right; P0 -> 1 and P1 -> 0 has 4 right.
    claims = ["P0"] * 5 + ["P1"] * 2
    latent_of, accuracy = match_programs(claims, np.array([0, 0, 0, 1, 1, 0, 0]), 2)
    assert latent_of == {"P0": 1, "P1": 0} and accuracy == pytest.approx(4 / 7)


def test_no_claim_at_all():
    assert match_programs([None, None], np.array([0, 1]), 2) == ({}, 0.0)


def test_partition_agreement_by_hand():
    targets = np.array([0, 0, 1, 1])
    assert partition_agreement(["X", "X", "Y", "Y"], targets) == 1
    # Pairs together: truth 2, found 1, both 1; expected 1 * 2 / 6, so (1 - 1/3) / (1.5 - 1/3).
    assert partition_agreement(["X", "X", None, None], targets) == pytest.approx((2 / 3) / (7 / 6))
    # One cluster of what claims nothing would have been right.
    assert partition_agreement([None, None, "Y", "Y"], targets) < 1


def test_closure_is_that_of_networkx():
    @settings(max_examples=50, deadline=None)
    @given(dags())
    def check(dag: np.ndarray) -> None:
        expected = nx.to_numpy_array(nx.transitive_closure(nx.from_numpy_array(dag, create_using=nx.DiGraph)))
        assert (closure(dag) == (expected != 0)).all()

    check()


def test_graph_scores_by_hand():
    chain = graph(4, (0, 1), (1, 2), (2, 3))  # six ancestral pairs
    found = graph(4, (0, 1), (2, 1), (2, 3))  # three ancestral pairs, two of them true
    scores = graph_scores(found, chain)
    assert scores["edge_precision"] == scores["edge_recall"] == scores["edge_f1"] == pytest.approx(2 / 3)
    assert scores["ancestor_precision"] == pytest.approx(2 / 3)
    assert scores["ancestor_recall"] == pytest.approx(2 / 6)
    assert scores["ancestor_f1"] == pytest.approx(4 / 9)
    assert scores["shd"] == 2  # 1 -> 2 is missing, 2 -> 1 is not true
    assert graph_scores(found, chain, n_unmatched=3)["shd"] == 5


def test_no_latent_is_its_own_ancestor() -> None:
    loop = graph(3, (0, 1), (1, 0), (1, 2))
    assert (closure(loop) == graph(3, (0, 1), (1, 0), (0, 2), (1, 2))).all()


def statuses(**status: str) -> pd.DataFrame:
    """Pairs such as ``P0_P1="upstream"``."""
    rows = [(*pair.split("_"), each) for pair, each in status.items()]
    return pd.DataFrame(rows, columns=["source", "target", "status"])


def test_pair_scores_by_hand() -> None:
    """The chain 0 -> 1 -> 2 has three pairs; P0, P1, P2 are its latents, P3 has none."""
    chain, latent_of = graph(3, (0, 1), (1, 2)), {"P0": 0, "P1": 1, "P2": 2}
    pairs = statuses(
        P0_P1="upstream", P0_P2="likely", P2_P1="upstream", P3_P1="upstream", P1_P3="likely", P1_P0="excluded",
        P2_P0="excluded", P1_P2="excluded", P3_P0="excluded", P0_P3="undecided",
    )  # fmt: skip
    scores = pair_scores(pairs, latent_of, chain)
    assert scores == pytest.approx({
        "pairs_true": 3,
        "upstream_right": 1, "upstream_wrong": 2, "upstream_precision": 1 / 3, "upstream_recall": 1 / 3,
        "likely_right": 2, "likely_wrong": 3, "likely_precision": 2 / 5, "likely_recall": 2 / 3,
        "both_ways": 0, "excluded_wrong": 1 / 3,  # 1 -> 2 is there; nothing is known of P3
    })  # fmt: skip


def test_both_ways_counts_unordered_pairs() -> None:
    pairs = statuses(P0_P1="both ways", P1_P0="both ways", P2_P0="both ways", P0_P2="both ways", P1_P2="undecided")
    scores = pair_scores(pairs, {"P0": 0, "P1": 1, "P2": 2}, graph(3))
    assert scores["both_ways"] == 2
    nothing = ("upstream_precision", "upstream_recall", "likely_precision", "likely_recall", "excluded_wrong")
    assert all(np.isnan(scores[name]) for name in nothing)
    assert pair_scores(pairs.iloc[:0], {}, graph(3, (0, 1)))["upstream_recall"] == 0


def test_both_directions_of_a_loop_are_true() -> None:
    pairs = statuses(P0_P1="upstream", P1_P0="excluded")
    scores = pair_scores(pairs, {"P0": 0, "P1": 1}, graph(2, (0, 1), (1, 0)))
    assert (scores["pairs_true"], scores["upstream_precision"], scores["excluded_wrong"]) == (2, 1, 1)


def test_penetrance_error_by_hand() -> None:
    """Of four perturbations one was not fitted and one has no share: (0.1 + 0.2) / 2."""
    found = pd.DataFrame({"perturbation": ["g1", "g0", "g2"], "penetrance": [0.5, 0.9, np.nan]})
    true = pd.DataFrame({"penetrance": [0.8, 0.7, 0.6, 0.5]}, index=["g0", "g1", "g2", "g3"])
    assert penetrance_error(found, true) == pytest.approx(0.15)
    assert np.isnan(penetrance_error(found.iloc[2:], true))


def test_same_ancestry_from_other_edges():
    chain, shortcut = graph(3, (0, 1), (1, 2)), graph(3, (0, 1), (1, 2), (0, 2))
    scores = graph_scores(shortcut, chain)
    assert scores["ancestor_f1"] == 1 and scores["shd"] == 1 and scores["edge_precision"] == pytest.approx(2 / 3)


@settings(max_examples=50, deadline=None)
@given(dags(), dags(), st.permutations(range(5)))
def test_scores_do_not_depend_on_names(found: np.ndarray, true: np.ndarray, order: list[int]) -> None:
    renamed = np.ix_(order, order)
    assert graph_scores(found, true) == graph_scores(found[renamed], true[renamed])
    there, back = graph_scores(found, true), graph_scores(true, found)
    assert there["shd"] == back["shd"] and there["edge_f1"] == back["edge_f1"]
    assert (there["shd"] == 0) == (found == true).all() == (there["edge_f1"] == 1)
    assert all(0 <= value <= 1 for name, value in there.items() if name != "shd")


def test_empty_graph_by_hand():
    scores = graph_scores(graph(4), graph(4, (0, 1), (1, 2)))
    assert scores.pop("shd") == 2 and set(scores.values()) == {0.0}
    assert graph_scores(graph(4), graph(4))["ancestor_f1"] == 1


def test_random_graphs_by_hand():
    # Two latents, one edge: half of the random graphs are right, the others differ in two places.
    scores = random_graph_scores(graph(2, (0, 1)), n=4000)
    assert scores["ancestor_f1"] == pytest.approx(0.5, abs=0.03) and scores["shd"] == pytest.approx(1, abs=0.06)
    # One edge among four latents: one of twelve ordered pairs.
    assert random_graph_scores(graph(4, (2, 0)), n=4000)["edge_f1"] == pytest.approx(1 / 12, abs=0.02)
    complete = graph(3, (0, 1), (0, 2), (1, 2))
    assert random_graph_scores(complete, n=4000)["edge_f1"] == pytest.approx(0.5, abs=0.03)


def test_mean_correlation_by_hand():
    rng = np.random.default_rng(0)
    u = rng.standard_normal((100, 3))
    u = np.linalg.qr(u - u.mean(0))[0]  # uncorrelated columns
    assert mean_correlation(u[:, [2, 0, 1]] * [-3, 1, 2] + 5, u) == pytest.approx(1)
    # One latent correlates 0.6 and 0.8 with two true ones: it is matched with the second, the first is left alone.
    mixed = np.stack([0.6 * u[:, 0] + 0.8 * u[:, 1], u[:, 2]], axis=1)
    assert mean_correlation(mixed, u) == pytest.approx((0.8 + 1 + 0) / 3)
    assert mean_correlation(np.ones((100, 3)) * [1, 2, 1e6], u) == 0
    with_constant = np.stack([np.full(100, 0.1), u[:, 0]], axis=1)
    assert mean_correlation(with_constant, u[:, :2]) == pytest.approx(0.5)


def test_score_recovery_by_hand():
    known = truth(graph(3, (0, 1), (1, 2)), 0, 1, 2, 2)
    scores = score_recovery(interventions("P2", "P0", "P1", "P1"), edges("P2>P0", "P0>P1"), known)
    assert scores["target_accuracy"] == scores["ari"] == scores["ancestor_f1"] == 1 and scores["shd"] == 0
    assert np.isnan(scores["mcc"]) and "pairs_true" not in scores and "penetrance_error" not in scores
    # P7 drives nothing: its edge joins no true latents and counts in the distance alone.
    scores = score_recovery(interventions("P2", "P0", "P1", "P1"), edges("P2>P0", "P0>P7"), known)
    assert scores["shd"] == 2 and scores["edge_precision"] == 1 and scores["edge_recall"] == 0.5
    assert (scores["edges_true"], scores["edges_right"], scores["edges_wrong"]) == (2, 1, 1)
    # Programs are renamed to latents for pairs as for edges.
    pairs = statuses(P2_P1="upstream", P1_P0="likely")
    known["target"]["penetrance"] = 0.5
    table = interventions("P2", "P0", "P1", "P1").assign(penetrance=[0.5, 0.6, 0.5, 0.4])
    scores = score_recovery(table, edges(), known, pairs=pairs)
    assert scores["upstream_precision"] == 1 and scores["likely_precision"] == 0.5
    assert scores["penetrance_error"] == pytest.approx(0.05)


@pytest.mark.parametrize("nothing", ["", None, float("nan")])
def test_no_target_claim_counts_as_wrong(nothing: Any) -> None:
    known = truth(graph(2, (0, 1)), 0, 0, 1, 1)
    scores = score_recovery(interventions("P0", "P0", "P1", nothing), edges("P0>P1"), known)
    assert scores["target_accuracy"] == 0.75 and scores["ari"] < 1 and scores["shd"] == 0


def test_a_perturbation_left_out_of_the_fit_counts_as_wrong():
    known = truth(graph(2, (0, 1)), 0, 1, 1)
    table = interventions("P0", "P1", "P1").iloc[:2]
    assert score_recovery(table, edges(), known)["target_accuracy"] == pytest.approx(2 / 3)


def test_gene_lists_by_hand() -> None:
    """P0 is latent 1 and lists a, b of b, c; P1 is latent 0 and lists c of a, c: two of three are right, two of four found."""
    programs = pd.DataFrame({
        "program": ["P0"] * 3 + ["P1"] * 3, "gene": list("abc") * 2, "loading": [0.1, -2.0, 0.0, 0.0, 0.0, 1.0],
    })  # fmt: skip
    true_latents = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    latents = np.stack([-2 * true_latents[:, 1], true_latents[:, 0]], 1)
    loaded = pd.DataFrame([[True, False, True], [False, True, True]], columns=list("abc"))
    found = gene_list_scores(programs, latents, true_latents, {"loaded": loaded})
    assert found == pytest.approx({"list_precision": 2 / 3, "list_recall": 2 / 4, "program_length": 1.5})
    without = gene_list_scores(programs, latents, true_latents, {})
    assert np.isnan(without["list_precision"]) and without["program_length"] == 1.5
