"""Batches: each perturbed cell once an epoch, partners from the cell's own batch, masks that count."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.data.batches import SHARED, ControlPartners, epoch_batches

epochs = st.tuples(
    st.lists(st.integers(0, 30), min_size=1, max_size=5),  # perturbed cells a condition
    st.integers(1, 20),  # controls
    st.integers(1, 3),  # experimental batches
    st.integers(3, 12),  # batch size; with 2, an odd cell is left over
    st.integers(1, 4),  # conditions a step
    st.integers(0, 2**32 - 1),
)


@given(epochs)
@settings(max_examples=200, deadline=None)
def test_properties(epoch: tuple[list[int], int, int, int, int, int]) -> None:
    sizes, n_controls, n_batches, batch_size, per_step, seed = epoch
    rng = np.random.default_rng(seed)
    cells = [
        np.asarray(part)
        for part in np.split(rng.permutation(n_controls + sum(sizes)), np.cumsum([n_controls, *sizes])[:-1])
    ]
    batch = rng.integers(0, n_batches, n_controls + sum(sizes))
    partners = ControlPartners(cells[0], batch)

    def draw() -> list[tuple[int, np.ndarray, np.ndarray]]:
        rows = []
        for step in epoch_batches(cells, partners, batch_size, per_step, np.random.default_rng(seed)):
            assert step.perturbed.shape == step.control.shape == step.mask.shape
            assert 1 <= len(step.condition) == len(step.mask) <= per_step
            assert step.mask.shape[1] == step.mask.sum(1).max() <= batch_size
            for c, perturbed, control, mask in zip(
                step.condition, step.perturbed, step.control, step.mask, strict=True
            ):
                n = int(mask.sum())
                assert n >= 2
                assert mask[:n].all()  # rows fill up at the end
                rows.append((int(c), perturbed[mask], control[mask]))
        return rows

    rows = draw()
    seen: Counter[int] = Counter()
    with_controls = set(batch[cells[0]].tolist())
    for c, perturbed, control in rows:
        assert c > 0
        assert set(perturbed.tolist()) <= set(cells[c].tolist())
        assert set(control.tolist()) <= set(cells[0].tolist())
        seen.update(perturbed.tolist())
        own = np.isin(batch[perturbed], list(with_controls))
        assert (batch[control[own]] == batch[perturbed[own]]).all()
        for b in with_controls:
            of_batch = control[batch[perturbed] == b]
            pool = int((batch[cells[0]] == b).sum())
            # No control is used again while the pool lasts.
            assert len(set(of_batch.tolist())) >= min(pool, len(of_batch))
    expected = [cell for part in cells[1:] if len(part) >= 2 for cell in part.tolist()]
    assert seen == Counter(expected)
    again = draw()
    assert all(np.array_equal(a[1], b[1]) and np.array_equal(a[2], b[2]) for a, b in zip(rows, again, strict=True))


def test_pieces_are_even() -> None:
    cells = [np.arange(10), np.arange(10, 31)]  # 21 cells in batches of at most 10: three of seven
    steps = epoch_batches(cells, ControlPartners(cells[0], np.zeros(31, int)), 10, 8, np.random.default_rng(0))
    assert [step.mask.sum(1).tolist() for step in steps] == [[7, 7, 7]]


def test_partners_are_fresh_in_every_epoch() -> None:
    cells = [np.arange(50), np.arange(50, 90)]
    partners, rng = ControlPartners(cells[0], np.zeros(90, int)), np.random.default_rng(0)
    first, second = ({**pairs(step)} for _ in range(2) for step in epoch_batches(cells, partners, 64, 1, rng))
    assert first.keys() == second.keys()
    assert first != second


def pairs(step: object) -> dict[int, int]:
    return dict(zip(step.perturbed[0].tolist(), step.control[0].tolist(), strict=True))  # type: ignore[attr-defined]


def test_the_pieces_of_a_step_share_their_controls_and_all_controls_are_drawn_alike() -> None:
    cells = [np.arange(200), *(np.arange(200 + 40 * i, 240 + 40 * i) for i in range(6))]
    partners, rng = ControlPartners(cells[0], np.zeros(440, int)), np.random.default_rng(0)
    used: Counter[int] = Counter()
    for _ in range(300):
        for step in epoch_batches(cells, partners, 20, 4, rng):
            distinct, times = np.unique(step.control[step.mask], return_counts=True)
            assert len(distinct) <= SHARED * 20
            assert times.max() <= len(step.condition)  # at most once a piece
            used.update(step.control[step.mask].tolist())
    expected = 300 * 240 / 200
    assert max(abs(used[control] - expected) for control in range(200)) < 0.4 * expected  # five deviations
