"""Where programs and edges of a DAG lie in a drawing: layers along the arrows, few crossings, no overlaps.

The layered method of Sugiyama, Tagawa and Toda (1981), in the four classical steps:

1. every node gets a layer behind those of its parents, and is pulled towards its children;
2. an edge over several layers gets a place of its own in those between, so that it passes no node;
3. each layer is ordered by the barycentres of its neighbours, forth and back, and by swaps of neighbours, and the
   order with the fewest crossings is kept;
4. places are those nearest to the mean of their neighbours that keep order and distance (isotonic regression).

Nodes are boxes that hold their label, so that labels cannot overlap. Edges run straight through the band of a layer and
bend between bands alone, so that they cross no box. Nodes without an edge stand in rows below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import networkx as nx
import numpy as np
from scipy.optimize import isotonic_regression

# In units of the text's size.
GAP = 1.7  # between boxes of a layer
LAYER_GAP = 4.0  # between layers, where edges bend
STUB = 1.2  # straight end of an edge, with its head, before it bends
LANE = 1.2  # what an edge takes in a layer that it passes
PORT = 1.9  # between edges at one side of a box, at most
SWEEPS = 12
ROUNDS = 12  # of the places in step 4

Point = tuple[float, float]


class Box(NamedTuple):
    """A node: its centre and size, in the units of the sizes that were given."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """A drawing. The origin is its upper left corner, y grows downwards.

    ``edges`` holds the points of each edge in the order given. Along ``down`` (else to the right) the first two
    belong to the source, the last two to the target; an edge runs through them with tangents along that direction.
    """

    width: float
    height: float
    down: bool
    boxes: dict[str, Box]
    edges: list[list[Point]]


class _Node(NamedTuple):
    """What has a place in a layer: a program, or the lane of an edge to ``lane_to`` that passes the layer."""

    name: str
    layer: int
    lane_to: str | None = None


def lay_out(sizes: Mapping[str, Point], edges: Sequence[tuple[str, str]], page: Point, text: float) -> Layout:
    """Lay a DAG out, downwards or to the right: whichever is shrunk less to fit on the page.

    ``sizes`` of the boxes and ``page`` are widths and heights; distances are measured by the size of the ``text``.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(sizes)
    graph.add_edges_from(edges)
    if not nx.is_directed_acyclic_graph(graph):
        raise ValueError("the graph has a cycle.")
    # In units of the text's size, in which the distances above are.
    own = {name: (width / text, height / text) for name, (width, height) in sizes.items()}
    found = [_layered(graph, own, edges, down, page[0] / text) for down in (True, False)]
    best = min(found, key=lambda layout: max(layout.width / page[0], layout.height / page[1]))
    boxes = {name: Box(*(text * value for value in box)) for name, box in best.boxes.items()}
    lines = [[(text * x, text * y) for x, y in line] for line in best.edges]
    return Layout(text * best.width, text * best.height, best.down, boxes, lines)


def crossings(above: Sequence[int], below: Sequence[int]) -> int:
    """Crossings of edges between two layers; the ends of each edge by their place in the layer."""
    a, b = np.asarray(above), np.asarray(below)
    return int(((a[:, None] < a) & (b[:, None] > b)).sum())


def _layered(
    graph: nx.DiGraph[str], sizes: Mapping[str, Point], edges: Sequence[tuple[str, str]], down: bool, width: float
) -> Layout:
    layer = _layers(graph)
    joined = {name: _Node(name, layer[name]) for name in sizes if name in layer}
    chains = []
    for source, target in edges:
        lanes = [_Node(source, i, target) for i in range(layer[source] + 1, layer[target])]
        chains.append([joined[source], *lanes, joined[target]])
    columns: list[list[_Node]] = [[] for _ in set(layer.values())]
    for node in dict.fromkeys([*joined.values(), *(node for chain in chains for node in chain)]):
        columns[node.layer].append(node)
    links = [pair for chain in chains for pair in pairwise(chain)]
    columns = _ordered(columns, links)
    box = {node: (LANE, 0.0) if node.lane_to else sizes[node.name][:: 1 if down else -1] for c in columns for node in c}
    across = {node: size[0] for node, size in box.items()}
    place = _places(columns, links, across)
    bands, start = [], -STUB
    for column in columns:
        depth = max(box[node][1] for node in column) + 2 * STUB
        bands.append((start, start + depth))
        start += depth + LAYER_GAP

    def point(a: float, b: float) -> Point:
        return (a, b) if down else (b, a)

    boxes = {node.name: Box(*point(place[node], sum(bands[node.layer]) / 2), *sizes[node.name]) for node in joined.values()}  # fmt: skip
    out, into = _ports(chains, place, across)
    lines = []
    for i, (source_node, *passed, target_node) in enumerate(chains):
        at, to = place[source_node] + out[i], place[target_node] + into[i]
        first, last = bands[source_node.layer], bands[target_node.layer]
        points = [point(at, (sum(first) + box[source_node][1]) / 2), point(at, first[1])]
        points += [point(place[lane], end) for lane in passed for end in bands[lane.layer]]
        points += [point(to, last[0]), point(to, (sum(last) - box[target_node][1]) / 2)]
        lines.append(points)
    right = max([0.0, *(b.x + b.width / 2 for b in boxes.values()), *(x for line in lines for x, _ in line)])
    bottom = max((b.y + b.height / 2 for b in boxes.values()), default=-LAYER_GAP)
    alone = [name for name in sizes if name not in layer]
    if alone:
        grid, right, bottom = _grid(alone, sizes, bottom + LAYER_GAP, right, max(right, width))
        boxes |= grid
    return Layout(right, max(bottom, 0.0), down, {name: boxes[name] for name in sizes}, lines)


def _layers(graph: nx.DiGraph[str]) -> dict[str, int]:
    """Layers of nodes with edges: the longest path from a source; then nodes with more children than parents move on."""
    order = [node for node in nx.lexicographical_topological_sort(graph, key=list(graph).index) if graph.degree(node)]
    layer: dict[str, int] = {}
    for node in order:
        layer[node] = max((layer[parent] + 1 for parent in graph.predecessors(node)), default=0)
    for node in reversed(order):
        if graph.out_degree(node) > graph.in_degree(node):
            layer[node] = min(layer[child] for child in graph.successors(node)) - 1
    used = sorted(set(layer.values()))
    return {node: used.index(i) for node, i in layer.items()}


def _ordered(columns: list[list[_Node]], links: list[tuple[_Node, _Node]]) -> list[list[_Node]]:
    parents: dict[_Node, list[_Node]] = {node: [] for column in columns for node in column}
    children: dict[_Node, list[_Node]] = {node: [] for node in parents}
    between: list[list[tuple[_Node, _Node]]] = [[] for _ in columns]
    for a, b in links:
        children[a].append(b)
        parents[b].append(a)
        between[a.layer].append((a, b))
    at = {node: i for column in columns for i, node in enumerate(column)}

    def crossed(*layers: int) -> int:
        lines = [between[i] for i in layers if i >= 0]
        return sum(crossings([at[a] for a, _ in line], [at[b] for _, b in line]) for line in lines)

    best, fewest = [list(column) for column in columns], crossed(*range(len(columns)))
    for sweep in range(SWEEPS):
        if not fewest:
            break
        forth = sweep % 2 == 0
        near = parents if forth else children
        for column in columns if forth else columns[::-1]:
            # A node without neighbours on that side stays where it is.
            mean = {n: float(np.mean([at[m] for m in near[n]])) if near[n] else float(at[n]) for n in column}
            column.sort(key=mean.__getitem__)
            at |= {node: i for i, node in enumerate(column)}
        for i, column in enumerate(columns):
            _swap(column, at, partial(crossed, i - 1, i))
        total = crossed(*range(len(columns)))
        if total < fewest:
            best, fewest = [list(column) for column in columns], total
    return best


def _swap(column: list[_Node], at: dict[_Node, int], cost: Callable[[], int]) -> None:
    """Swap neighbours as long as that saves crossings; `at` has every node's place in its layer."""
    now, better = cost(), True
    while better and now:
        better = False
        for i in range(len(column) - 1):
            a, b = column[i], column[i + 1]
            at[a], at[b] = i + 1, i
            then = cost()
            if then < now:
                column[i], column[i + 1], now, better = b, a, then, True
            else:
                at[a], at[b] = i, i + 1


def _places(
    columns: list[list[_Node]], links: list[tuple[_Node, _Node]], across: Mapping[_Node, float]
) -> dict[_Node, float]:
    """Centres across the layers, with boxes at 0 or beyond."""
    near: dict[_Node, list[_Node]] = {node: [] for column in columns for node in column}
    for a, b in links:
        near[a].append(b)
        near[b].append(a)
    place: dict[_Node, float] = {}
    offsets = []
    for column in columns:
        size = np.array([across[node] for node in column])
        offset = np.cumsum(np.concatenate([[0.0], (size[1:] + size[:-1]) / 2 + GAP]))
        offsets.append(offset)
        place |= dict(zip(column, offset - offset[-1] / 2, strict=True))
    for turn in range(ROUNDS):
        for i in range(len(columns))[:: 1 if turn % 2 == 0 else -1]:
            wish = np.array([np.mean([place[m] for m in near[node]]) for node in columns[i]])
            # Lanes weigh more: a long edge that is straight is easier to follow.
            weight = [4.0 if node.lane_to else 1.0 for node in columns[i]]
            fitted = isotonic_regression(wish - offsets[i], weights=weight).x
            place |= dict(zip(columns[i], fitted + offsets[i], strict=True))
    low = min((place[node] - across[node] / 2 for node in place), default=0.0)
    place = {node: float(value - low) for node, value in place.items()}
    # Parts that no edge joins move together as far as boxes allow: no wish above keeps them near one another.
    before = {b: a for column in columns for a, b in pairwise(column)}
    for part in sorted(nx.connected_components(nx.Graph(links)), key=lambda own: min(place[node] for node in own)):
        room = [
            place[node] - across[node] / 2 - (place[other] + across[other] / 2 + GAP if other else 0.0)
            for node in part
            if (other := before.get(node)) not in part
        ]
        place |= {node: place[node] - min(room) for node in part}
    return place


def _ports(
    chains: list[list[_Node]], place: Mapping[_Node, float], across: Mapping[_Node, float]
) -> tuple[list[float], list[float]]:
    """Where edges leave and enter their boxes, from the centre, in the order of where they lead."""
    out, into = [0.0] * len(chains), [0.0] * len(chains)
    for end, beside, found in ((0, 1, out), (-1, -2, into)):
        by_node: dict[_Node, list[int]] = {}
        for i, chain in enumerate(chains):
            by_node.setdefault(chain[end], []).append(i)
        for node, members in by_node.items():
            step = min(PORT, 0.8 * across[node] / len(members))
            for rank, i in enumerate(sorted(members, key=[place[chain[beside]] for chain in chains].__getitem__)):
                found[i] = (rank - (len(members) - 1) / 2) * step
    return out, into


def _grid(
    names: Sequence[str], sizes: Mapping[str, Point], top: float, right: float, width: float
) -> tuple[dict[str, Box], float, float]:
    """Boxes in columns as wide as the widest of them, and the new right and bottom end of the drawing."""
    column = max(sizes[name][0] for name in names)
    n_columns = max(1, int((width + GAP) // (column + GAP)))
    boxes: dict[str, Box] = {}
    for row in range(0, len(names), n_columns):
        part = names[row : row + n_columns]
        height = max(sizes[name][1] for name in part)
        for i, name in enumerate(part):
            boxes[name] = Box(i * (column + GAP) + column / 2, top + height / 2, *sizes[name])
            right = max(right, boxes[name].x + column / 2)
        top += height + GAP
    return boxes, right, top - GAP
