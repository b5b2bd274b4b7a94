"""What models of other seeds agree on, worked out by hand, and found again behind any order and sign of programs."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crlseq.readout.ensemble import Reading, align, seed_agreement

LOADING = np.array([[1.0, 2.0, 0.0, 0.0, 1.0], [0.0, 1.0, 3.0, -1.0, 0.0], [2.0, 0.0, 0.0, 1.0, -1.0]])
SHIFT = np.array([[2.0, 0.0, 0.5], [0.0, -1.0, 0.0]])
EDGES = np.array([[0.0, 0.5, 0.0], [0.0, 0.0, -0.4], [0.0, 0.0, 0.0]])
KEPT = Reading(LOADING, SHIFT, EDGES)


@given(st.permutations(range(3)), st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=3))
def test_order_and_sign_of_programs_do_not_matter(order: list[int], signs: list[float]) -> None:
    sign = np.array(signs)
    other = Reading(
        (sign[:, None] * LOADING)[order], (SHIFT * sign)[:, order], (EDGES * np.outer(sign, sign))[np.ix_(order, order)]
    )
    found, correlation = align(other, KEPT)
    np.testing.assert_allclose(correlation, 1)
    for name in ("loading", "shift", "edges"):
        np.testing.assert_allclose(getattr(found, name), getattr(KEPT, name))


def test_agreement_is_counted_over_the_other_seeds() -> None:
    # The first other seed moves g0 by 4 instead of 2, and its second edge has the other sign; the second one has g0
    # on P2, and a first edge too weak to count.
    one = Reading(
        LOADING, np.array([[4.0, 0.0, 0.5], [0.0, -1.0, 0.0]]), np.array([[0, 0.7, 0], [0, 0, 0.4], [0, 0, 0]])
    )
    two = Reading(
        LOADING, np.array([[0.0, 0.0, 3.0], [0.0, -1.0, 0.0]]), np.array([[0, 0.05, 0], [0, 0, -0.4], [0, 0, 0]])
    )
    interventions = pd.DataFrame({"perturbation": ["g0", "g1"], "program": ["P0", ""]})  # of g1 nothing is claimed
    edges = pd.DataFrame({"source": ["P0", "P1"], "target": ["P1", "P2"]})
    table = seed_agreement(KEPT, [one, two], interventions, edges)
    assert list(table["kind"]) == ["program"] * 3 + ["intervention"] + ["edge"] * 2
    np.testing.assert_allclose(table["agreement"], [1, 1, 1, 0.5, 0.5, 0.5])
    assert table.loc[3, ["source", "target"]].tolist() == ["g0", "P0"]
    np.testing.assert_allclose(table["mean"][3:], [2.0, 1.25 / 3, -0.4 / 3])
    assert table["sd"][3] == pytest.approx(2.0)  # of 2, 4 and 0
