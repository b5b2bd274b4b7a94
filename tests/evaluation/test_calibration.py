"""Calibration of supports, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from crlseq.evaluation.recovery import calibration, edge_supports

ADJACENCY = np.array([[0, 1.2, 0], [0, 0, 0], [0, -0.8, 0]])  # 0 -> 1 <- 2


def test_supports_are_matched_to_true_edges_by_the_perturbations_of_their_programs() -> None:
    truth = {"adjacency": ADJACENCY, "target": pd.DataFrame({"latent": [0, 1, 2, 2]}, index=list("abcd"))}
    claims = pd.DataFrame(
        {"perturbation": list("abcd"), "program": ["P2", "P0", "P1", "P1"]}
    )  # P2 is 0, P0 is 1, P1 is 2
    support = [[0, 0.1, 0.2], [0.95, 0, 0], [0.6, 0, 0]]
    found = edge_supports(support, claims, truth).set_index(["source", "target"])
    assert len(found) == 6
    assert found[found["true"]].index.to_list() == [("P1", "P0"), ("P2", "P0")]
    assert found.loc[("P1", "P0"), "support"] == 0.95
    assert found.loc[("P0", "P2"), "support"] == 0.2


def test_a_program_without_a_latent_has_no_true_edge() -> None:
    truth = {"adjacency": ADJACENCY, "target": pd.DataFrame({"latent": [0, 1]}, index=list("ab"))}
    claims = pd.DataFrame({"perturbation": list("ab"), "program": ["P0", None]})
    found = edge_supports([[0, 1], [1, 0]], claims, truth)
    assert not found["true"].any() and (found["support"] == 1).all()


def test_calibration_by_hand() -> None:
    supports = pd.DataFrame({
        "support": [1.0, 0.9, 0.95, 0.7, 0.89, 0.05, 0.0, 0.1],
        "true": [True, True, False, True, False, False, False, True],
    })  # fmt: skip
    found = calibration(supports)
    assert found["support"].tolist() == [0.9, 0.7, 0.1, 0.0]
    assert found["pairs"].tolist() == [3, 2, 1, 2]
    assert found["true"].tolist() == [2, 1, 1, 0]
    assert found["share_true"].tolist() == pytest.approx([2 / 3, 0.5, 1, 0])
    assert found["mean_support"].tolist() == pytest.approx([0.95, 0.795, 0.1, 0.025])


def test_no_pair_is_no_row() -> None:
    assert calibration(pd.DataFrame({"support": [], "true": []})).empty
