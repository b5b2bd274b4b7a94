"""What the plots share: colours, axes, and text that is only text."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from crlseq.run.summary import short
from crlseq.storage.files import written_whole
from crlseq.storage.text import escaped

# The report has the same (report.css). Orange and blue are told apart with every kind of colour vision, and so is each pair of Okabe and Ito's colours.
UP, DOWN, SOFT, INK = "#b35806", "#2166ac", "#6e7781", "#1b1f24"
FAINT, LINE = "#b9bfc5", "#d0d7de"  # small marks behind others; frames and rules
SIGNED = LinearSegmentedColormap.from_list("signed", [DOWN, "white", UP])
DISTINCT = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8C6D00", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
FEWEST = 10  # letters of a line of a title
TEXT: dict[str, Any] = {"parse_math": False}  # a dollar sign in a gene's name starts no formula


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """The Axes given, or those of a new figure of that size in inches."""
    if ax is not None:
        return ax
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def finish(ax: Axes, show: bool, title: str = "") -> Axes:
    """Write the title, broken between words so that it ends within the figure; show the figure if asked; return its Axes."""
    label, figure = ax.set_title(title, fontsize=9, loc="left", **TEXT), ax.get_figure(root=True)
    assert figure is not None
    for letters in range(len(title), FEWEST, -2):
        with warnings.catch_warnings():  # about letters that the font lacks: they come with the drawing itself
            warnings.simplefilter("ignore")
            figure.draw_without_rendering()  # which places the axes
        if label.get_window_extent().x1 <= figure.bbox.x1:
            break
        label.set_text("\n".join(line for each in title.split("\n") for line in textwrap.wrap(each, letters)))
    if show:
        plt.show()
    return ax


NOTHING = "No perturbation has a detectable effect: there are no programs."


def note(ax: Axes | None, text: str, show: bool) -> Axes:
    """An empty plot that says why it is empty."""
    ax = axes_of(ax, 4, 2)
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", wrap=True, transform=ax.transAxes, color=SOFT, **TEXT)
    return finish(ax, show)


def bare(ax: Axes, x: str = "", y: str = "") -> None:
    """Take away the frame above and to the right, name the axes, and write small numbers along them."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel(x, fontsize=8, **TEXT)
    ax.set_ylabel(y, fontsize=8, **TEXT)
    ax.tick_params(labelsize=7)


def label_ticks(ax: Axes, axis: str, names: Sequence[str], **look: Any) -> None:
    """Names at 0, 1, ... of an axis."""
    getattr(ax, f"set_{axis}ticks")(range(len(names)))
    getattr(ax, f"set_{axis}ticklabels")([short(name) for name in names], **TEXT, **look)


def write_figure(figure: Any, output: Path, dpi: int = 150) -> None:
    """Write a matplotlib figure in the format that the file's name says: text stays text, and equal figures give equal files."""
    suffix = output.suffix.lower()
    stamp: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})
    with (
        written_whole(output) as file,
        mpl.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "crlseq"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # shown as a box
        figure.savefig(file, format=suffix[1:], dpi=dpi, metadata=stamp)
        if suffix == ".svg":  # whose texts are names
            file.write_text(escaped(file.read_text(encoding="utf-8")), encoding="utf-8")
