"""What a drawing of the DAG shows and where: the same for the plot and for the report, which only put it on paper."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from crlseq.readout.layout import Box, Point, lay_out
from crlseq.run.run import Run
from crlseq.run.summary import Program, short

# In units of the font's size.
LINE, MARGIN, LARGEST, HEAD = 1.3, 0.7, 1.6, 0.75
SMALLEST = 0.2  # radius of the disc of a program that explains nothing
LABEL = 22  # characters of a line of a label
DRAWN = 150  # edges at most: more are a tangle that nobody reads, and take long to lay out


@dataclass(frozen=True)
class Node:
    """A program: its box, the lines of its label and the disc before them."""

    program: Program
    box: Box
    lines: list[str]
    disc: Point
    radius: float

    def line_at(self, i: int, font: float) -> Point:
        """Left end and middle of line `i` of the label."""
        left = self.box.x - self.box.width / 2 + 2 * (MARGIN + LARGEST) * font
        return left, self.box.y + (i - (len(self.lines) - 1) / 2) * LINE * font


@dataclass(frozen=True)
class Edge:
    """A declared edge through `points`; the last one is where its head begins, which is `HEAD` long."""

    source: str
    target: str
    weight: float
    support: float
    points: list[Point]


@dataclass(frozen=True)
class Drawing:
    """A DAG to draw: sizes in the unit of `font`, origin at the upper left."""

    width: float
    height: float
    down: bool
    font: float
    nodes: list[Node]
    edges: list[Edge]


def draw(run: Run, font: float, page: Point, width_of: Callable[[str, bool], float], labels: bool = True) -> Drawing:
    """Lay a run's DAG out, in the unit of ``font``: ``page`` is what it should fit on, ``width_of`` a text, bold or not.

    Without ``labels`` boxes have the names of programs alone.
    """
    programs = run.described
    if not programs:
        return Drawing(0.0, 0.0, True, font, [], [])
    lines = {}
    for name, program in programs.items():  # and, in one or two lines, its strongest perturbations
        words = textwrap.wrap(short(program.label, 2 * LABEL), LABEL, break_on_hyphens=False) or [""]
        lines[name] = [name, *(short(line, LABEL) for line in words[:2])] if labels else [name]
    # Boxes of one size: sizes that say nothing would compete with those of the discs.
    text = max(width_of(line, i == 0) for own in lines.values() for i, line in enumerate(own))
    tall = max(2 * LARGEST, LINE * max(map(len, lines.values()))) + 2 * MARGIN
    size = (text + (2 * LARGEST + 3 * MARGIN) * font, tall * font)
    # The strongest by support, then weight, in the order of the table.
    strength = np.lexsort((-run.edges["weight"].abs(), -run.edges["support"].fillna(0.0)))
    rows = run.edges.iloc[np.sort(strength[:DRAWN])].to_dict("records")
    layout = lay_out(dict.fromkeys(programs, size), [(row["source"], row["target"]) for row in rows], page, font)
    # Area of each disc, 1 for the largest; all 0 where the run does not tell what programs explain.
    explained = {name: max(float(np.nan_to_num(p.effect_explained)), 0.0) for name, p in programs.items()}
    largest = max(explained.values()) or 1.0
    nodes = [
        Node(
            programs[name], box, lines[name], (box.x - box.width / 2 + (MARGIN + LARGEST) * font, box.y),
            font * max(SMALLEST, LARGEST * float(np.sqrt(explained[name] / largest))),
        )
        for name, box in layout.boxes.items()
    ]  # fmt: skip
    edges = []
    for row, points in zip(rows, layout.edges, strict=True):
        x, y = points[-1]
        end = (x, y - HEAD * font) if layout.down else (x - HEAD * font, y)
        edges.append(Edge(row["source"], row["target"], float(row["weight"]), float(row["support"]), [*points[:-1], end]))  # fmt: skip
    return Drawing(layout.width, layout.height, layout.down, font, nodes, edges)


def limit_of(values: np.ndarray) -> float:
    """End of a symmetric colour scale: the largest of |values|; 1 where there are none."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


def edge_width(support: float) -> float:
    """Width of an edge, as a share of the font's size, by its bootstrap support; NaN without a bootstrap."""
    return 0.18 if np.isnan(support) else 0.08 + 0.36 * support


def heading(run: Run) -> str:
    """How many edges, and whether to believe them."""
    if run.facts.without_effect:
        return "No perturbation has a detectable effect: there are no programs and no graph."
    verdict, n = run.facts.identification.verdict, len(run.edges)
    edges = "No edge is declared" if not n else "1 edge" if n == 1 else f"{n} edges"
    drawn = f", of which the {DRAWN} strongest are drawn" if n > DRAWN else ""
    return f"{edges} between {len(run.program_names)} programs{drawn}; the graph is {verdict}."


def legend(run: Run) -> list[str]:
    """How to read the drawing, as sentences."""
    sentences = []
    if any(not np.isnan(program.effect_explained) for program in run.described.values()):
        sentences.append("Disc area: share of the perturbations' effects that the program explains.")
    if len(run.edges):
        supported = run.edges["support"].notna().any()
        width = "Edge width: bootstrap support." if supported else "Without a bootstrap, all edges have the same width."
        sentences += ["Arrow: the source raises the target; bar: it lowers it.", width]
        if run.facts.identification.verdict == "partly identified":
            sentences.append("Edges are drawn between programs whose order is shown; there may be others.")
    return sentences
