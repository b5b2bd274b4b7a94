"""Layered drawings of DAGs: no overlaps, edges that pass no box, few crossings."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.readout.layout import Box, Layout, crossings, lay_out

PAGE = (900.0, 700.0)


def laid_out(n: int, edges: list[tuple[int, int]], page: tuple[float, float] = PAGE) -> Layout:
    sizes = {f"P{i}": (60.0 + 7 * (i % 5), 30.0 + 3 * (i % 3)) for i in range(n)}
    return lay_out(sizes, [(f"P{a}", f"P{b}") for a, b in edges], page, 10.0)


def overlap(a: Box, b: Box) -> bool:
    return abs(a.x - b.x) < (a.width + b.width) / 2 and abs(a.y - b.y) < (a.height + b.height) / 2


def curve(layout: Layout, line: list[tuple[float, float]]) -> np.ndarray:
    """Points along an edge, as it is drawn: a cubic between any two of its points, with tangents along the drawing."""
    t = np.linspace(0, 1, 30)[:, None]
    pieces = []
    for a, b in pairwise(np.array(line)):
        middle = (a + b) / 2
        c, d = (np.array([a[0], middle[1]]), np.array([b[0], middle[1]])) if layout.down else (np.array([middle[0], a[1]]), np.array([middle[0], b[1]]))  # fmt: skip
        pieces.append((1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * c + 3 * (1 - t) * t**2 * d + t**3 * b)
    return np.concatenate(pieces)


graphs = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] < e[1]), unique=True, max_size=20)
        if n > 1
        else st.just([]),
    )
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(graph=graphs, wide=st.booleans())
def test_boxes_do_not_overlap_and_edges_pass_none(graph: tuple[int, list[tuple[int, int]]], wide: bool) -> None:
    n, edges = graph
    layout = laid_out(n, edges, (2000.0, 300.0) if wide else (300.0, 2000.0))
    assert list(layout.boxes) == [f"P{i}" for i in range(n)]
    for a, b in combinations(layout.boxes.values(), 2):
        assert not overlap(a, b)
    for box in layout.boxes.values():
        assert box.x - box.width / 2 >= -1e-9 and box.x + box.width / 2 <= layout.width + 1e-9
        assert box.y - box.height / 2 >= -1e-9 and box.y + box.height / 2 <= layout.height + 1e-9
    for (a, b), line in zip(edges, layout.edges, strict=True):
        along = np.array(line)[:, 1 if layout.down else 0]
        assert (np.diff(along) >= -1e-9).all()
        points = curve(layout, line)
        for box in layout.boxes.values():
            inside = (np.abs(points[:, 0] - box.x) < box.width / 2 - 1e-6) & (np.abs(points[:, 1] - box.y) < box.height / 2 - 1e-6)  # fmt: skip
            assert not inside.any()
        source, target = layout.boxes[f"P{a}"], layout.boxes[f"P{b}"]
        ends = (source.y + source.height / 2, target.y - target.height / 2) if layout.down else (source.x + source.width / 2, target.x - target.width / 2)  # fmt: skip
        assert (along[0], along[-1]) == pytest.approx(ends)


def test_crossings_by_hand() -> None:
    assert crossings([0, 1], [1, 0]) == 1
    assert crossings([0, 1], [0, 1]) == 0
    assert crossings([0, 0], [0, 1]) == 0  # edges of one node do not cross
    assert crossings([0, 1, 2], [2, 1, 0]) == 3


def drawn_crossings(layout: Layout) -> int:
    """Pairs of edges that meet, by the curves themselves; edges of one node do not count."""
    lines = [curve(layout, line) for line in layout.edges]
    ends = [(line[0], line[-1]) for line in layout.edges]
    found = 0
    for (i, a), (j, b) in combinations(enumerate(lines), 2):
        if any(np.allclose(p, q, atol=40) for p, q in zip(ends[i], ends[j], strict=True)):
            continue
        found += int((np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1)) < 1.0).any())
    return found


def test_a_tree_and_a_ladder_have_no_crossings() -> None:
    tree = [(i, 2 * i + k) for i in range(1, 8) for k in (0, 1)]
    shuffled = {0: 0, **dict(zip(range(1, 16), np.random.default_rng(0).permutation(range(1, 16)), strict=True))}
    assert drawn_crossings(laid_out(16, [(int(shuffled[a]), int(shuffled[b])) for a, b in tree])) == 0
    ladder = [(0, 2), (2, 4), (4, 6), (1, 3), (3, 5), (5, 7)]
    assert drawn_crossings(laid_out(8, ladder)) == 0
    # One crossing cannot be avoided in two layers of K(2, 2) with its ends held by two chains.
    assert drawn_crossings(laid_out(4, [(0, 2), (0, 3), (1, 2), (1, 3)])) <= 1


def test_parts_without_an_edge_between_them_stand_close() -> None:
    edges = [(0, 6), (0, 7), (0, 9), (1, 4), (2, 9), (3, 5), (5, 8), (6, 9)]
    layout = laid_out(10, edges)
    assert not layout.down
    lowest = max(y for (a, b), line in zip(edges, layout.edges, strict=True) if 9 in (a, b) for _, y in line)
    parts = [[0, 2, 6, 7, 9], [1, 4], [3, 5, 8]]
    ends = [
        (min(box.y - box.height / 2 for box in own), max(box.y + box.height / 2 for box in own))
        for own in ([layout.boxes[f"P{i}"] for i in part] for part in parts)
    ]
    ends[0] = (ends[0][0], max(ends[0][1], lowest + 6))  # half of a lane
    ends.sort()
    for (_, bottom), (top, _) in pairwise(ends):
        assert top - bottom == pytest.approx(17.0, abs=6.0)  # the gap between boxes, which differ in size by 6


def test_the_shape_follows_the_page_and_the_text() -> None:
    chain = [(i, i + 1) for i in range(5)]
    assert not laid_out(6, chain, (2000.0, 300.0)).down
    tall = laid_out(6, chain, (300.0, 2000.0))
    assert tall.down
    ys = [box.y for box in tall.boxes.values()]
    assert ys == sorted(ys)
    assert laid_out(6, chain).boxes == laid_out(6, chain).boxes
    small, large = (lay_out({"A": (10 * s, 5 * s), "B": (10 * s, 5 * s)}, [("A", "B")], PAGE, s) for s in (1.0, 2.0))
    assert large.boxes["B"].x - large.boxes["A"].x == pytest.approx(2 * (small.boxes["B"].x - small.boxes["A"].x))


def test_without_edges_boxes_stand_in_rows() -> None:
    layout = lay_out(dict.fromkeys("ABCDE", (40.0, 20.0)), [], (100.0, 100.0), 10.0)
    assert [(box.x, box.y) for box in layout.boxes.values()] == [(20, 10), (77, 10), (20, 47), (77, 47), (20, 84)]
    assert layout.edges == []


def test_a_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="cycle"):
        laid_out(3, [(0, 1), (1, 2), (2, 0)])
