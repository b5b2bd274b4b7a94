"""The latent DAG as a drawing."""

from __future__ import annotations

import textwrap
from itertools import pairwise

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from crlseq.plotting.style import DOWN, INK, SOFT, TEXT, UP, finish
from crlseq.readout.drawing import HEAD, LINE, Edge, Node, draw, edge_width, heading, legend
from crlseq.run.run import Run

FONT = 8.0  # points, as are all lengths here
PAGE = (720.0, 540.0)
EDGE = 4.0  # around the drawing


def dag(run: Run, *, ax: Axes | None = None, show: bool = False) -> Axes:
    """Draw the declared DAG in layers.

    A program is a box with its strongest perturbations; the area of its disc is the share of the perturbations' effects
    that it explains. Edges are wide where their support over bootstraps is high; orange with an arrow: the source raises
    the target, blue with a bar: it lowers it. Without an edge all programs are drawn, and the title says so. Everything
    is shrunk to fit ``ax``; None makes a figure in which the text has eight points. ``show``: whether to show the figure.

    Examples
    --------
    >>> import crlseq
    >>> crlseq.pl.dag(crlseq.load("RUN")).figure.savefig("dag.png")
    """
    drawing = draw(run, FONT, PAGE, _text_width)
    width = max(drawing.width, 300.0)
    letters = int(width / (0.62 * FONT))
    head = textwrap.wrap(heading(run), letters)
    foot = textwrap.wrap(" ".join(legend(run)), letters)
    top, bottom = -LINE * FONT * (len(head) + 0.7), drawing.height + LINE * FONT * (len(foot) + 1)
    size = (width + 2 * EDGE, bottom - top + 2 * EDGE)
    if ax is None:
        ax = plt.figure(figsize=(size[0] / 72, size[1] / 72)).add_axes((0, 0, 1, 1))
    ax.set(xlim=(-EDGE, width + EDGE), ylim=(bottom + EDGE, top - EDGE), aspect="equal", anchor="NW")
    ax.set_axis_off()
    # Text and lines shrink with the axes: points of the figure per point of the drawing.
    place, figure = ax.get_position(), ax.get_figure(root=True)
    assert figure is not None
    inches = figure.get_size_inches() * (place.width, place.height)
    scale = min(1.0, 72 * inches[0] / size[0], 72 * inches[1] / size[1])
    for i, text in enumerate(head):
        ax.text(0, top + (i + 0.5) * LINE * FONT, text, size=FONT * scale, color=INK, va="center", **TEXT)
    for i, text in enumerate(foot):
        y = drawing.height + (i + 1.5) * LINE * FONT
        ax.text(0, y, text, size=0.9 * FONT * scale, color=SOFT, va="center", **TEXT)
    for edge in drawing.edges:
        _draw_edge(ax, edge, drawing.down, scale)
    for node in drawing.nodes:
        _draw_node(ax, node, scale)
    return finish(ax, show)


def _text_width(text: str, bold: bool) -> float:
    if not text.strip():
        return 0.0
    font = FontProperties(size=FONT, weight="bold" if bold else "normal")
    # A pair of dollar signs would be measured as a formula. At few dots per inch letters are set wider than they are.
    return 1.06 * float(TextPath((0, 0), text.replace("$", "S"), prop=font).get_extents().x1)


def _draw_node(ax: Axes, node: Node, scale: float) -> None:
    box = node.box
    ax.add_patch(
        FancyBboxPatch(
            (box.x - box.width / 2, box.y - box.height / 2), box.width, box.height, boxstyle="round,pad=0,rounding_size=5",
            facecolor="white", edgecolor=SOFT, linewidth=0.8 * scale, zorder=3,
        )
    )  # fmt: skip
    ax.add_patch(Circle(node.disc, node.radius, facecolor=SOFT, edgecolor="none", zorder=4))
    for i, line in enumerate(node.lines):
        x, y = node.line_at(i, FONT)
        weight = "normal" if i else "bold"
        ax.text(x, y, line, size=FONT * scale, va="center", color=INK, weight=weight, zorder=5, **TEXT)


def _draw_edge(ax: Axes, edge: Edge, down: bool, scale: float) -> None:
    colour = UP if edge.weight > 0 else DOWN
    vertices, codes = [edge.points[0]], [Path.MOVETO]
    for a, b in pairwise(edge.points):
        middle = ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2)
        vertices += [(a[0], middle[1]), (b[0], middle[1]), b] if down else [(middle[0], a[1]), (middle[0], b[1]), b]
        codes += [Path.CURVE4] * 3
    line = {"edgecolor": colour, "linewidth": edge_width(edge.support) * FONT * scale}
    ax.add_patch(PathPatch(Path(vertices, codes), facecolor="none", zorder=2, **line))
    # The head, drawn as if to the right from where the line ends: an arrow, or a bar across.
    h, (x, y) = HEAD * FONT, edge.points[-1]
    arrow, bar = [(0, -h / 2), (h, 0), (0, h / 2)], [(-0.1 * h, -h), (0.3 * h, -h), (0.3 * h, h), (-0.1 * h, h)]
    head = [(x + b, y + a) if down else (x + a, y + b) for a, b in (arrow if edge.weight > 0 else bar)]
    ax.add_patch(Polygon(head, facecolor=colour, edgecolor="none", zorder=2))
