"""Splits: every cell gets one code, nothing of a held-out condition is trained on."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.data.splits import TEST, TRAIN, UNUSED, VALIDATION, split_cells

screens = st.tuples(
    st.lists(st.integers(0, 25), min_size=1, max_size=6),  # cells a condition
    st.integers(0, 5),  # dropped cells
    st.lists(st.sampled_from(["fitted", "held out", "left out"]), min_size=6, max_size=6),
    st.floats(0.001, 0.499),
    st.floats(0, 0.99),
    st.integers(0, 2**32 - 1),
)


@given(screens)
@settings(max_examples=300, deadline=None)
def test_properties(screen: tuple[list[int], int, list[str], float, float, int]) -> None:
    sizes, n_dropped, roles, validation, test, seed = screen
    condition = np.concatenate([np.full(n_dropped, -1), np.repeat(np.arange(len(sizes)), sizes)])
    condition = np.random.default_rng(seed).permutation(condition)
    fitted = np.array([role == "fitted" for role in roles[: len(sizes)]])
    held_out = np.array([role == "held out" for role in roles[: len(sizes)]])

    def draw(seed: int) -> np.ndarray:
        return split_cells(condition, fitted, held_out, validation, test, np.random.default_rng(seed))

    split = draw(seed)
    assert split.shape == condition.shape
    assert np.isin(split, [UNUSED, TRAIN, VALIDATION, TEST]).all()
    assert (split[condition < 0] == UNUSED).all()
    np.testing.assert_array_equal(split, draw(seed))
    for c, size in enumerate(sizes):
        codes = split[condition == c]
        if held_out[c]:
            assert (codes == TEST).all()
        elif not fitted[c]:
            assert (codes == UNUSED).all()
        else:
            assert (codes != UNUSED).all()
            assert (codes == TRAIN).sum() >= min(2, size)
            for code, share in ((TEST, test), (VALIDATION, validation)):
                taken = int((codes == code).sum())
                assert taken in (0, round(share * size))
                assert taken != 1


def test_by_hand() -> None:
    condition = np.repeat([0, 1, 2, 3], [20, 10, 3, 10])
    everything = np.array([True, True, True, False])
    split = split_cells(condition, everything, ~everything, 0.2, 0.3, np.random.default_rng(0))
    counts = [np.bincount(split[condition == c], minlength=4).tolist() for c in range(4)]
    # unused, train, validation, test; a third condition of three cells gives none away
    assert counts == [[0, 10, 4, 6], [0, 5, 2, 3], [0, 3, 0, 0], [0, 0, 0, 10]]


def test_seeds_differ() -> None:
    condition = np.repeat([0, 1], 50)
    yes, no = np.array([True, True]), np.array([False, False])
    a, b = (split_cells(condition, yes, no, 0.1, 0.2, np.random.default_rng(seed)) for seed in (0, 1))
    assert (a != b).any()
