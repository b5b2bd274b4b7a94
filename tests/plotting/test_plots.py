"""Plots: Axes in and out, labels that never overlap, names that are only names, the command."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.text import Text

import crlseq
from crlseq import plotting
from crlseq.errors import InputError, UsageError
from crlseq.plotting import style
from crlseq.plotting.cells import _half
from crlseq.run.run import Run
from tests.support import ROOT, check_refusal, files_below, invoke, succeeds
from tests.synthetic import synthetic_run, with_pairs

mpl.use("Agg")
import matplotlib.pyplot as plt

KINDS = ["dag", "pairs", "programs", "interventions", "history", "effects", "effects_map"]
EVIL = [
    "$x_{1$",
    "a$b$c",
    "_hidden",
    "<img src=x>",
    "line\nbreak\ttab",
    "x" * 300,
    "\\frac{1}{0}",
    "漢字",
    "",
    "a\x1b[1m",
]


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def texts(ax: Axes) -> list[Text]:
    """Every text with something in it."""
    ax.figure.canvas.draw()
    return [text for text in ax.findobj(Text) if text.get_visible() and text.get_text().strip()]


def overlaps(ax: Axes) -> list[tuple[str, str]]:
    """Pairs of texts whose bounding boxes meet."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(ax)]
    return [(a, b) for (a, box), (b, other) in combinations(boxes, 2) if box.overlaps(other)]


def cut_off(ax: Axes) -> float:
    """Inches by which what is drawn reaches beyond the figure."""
    ax.figure.canvas.draw()
    box, (width, height) = ax.figure.get_tightbbox(), ax.figure.get_size_inches()
    return max(0.0, -box.x0, -box.y0, box.x1 - width, box.y1 - height)


def random_dag(p: int, n: int, seed: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(p) for b in range(a + 1, p)]
    return [pairs[i] for i in sorted(rng.choice(len(pairs), n, replace=False))]


@pytest.mark.parametrize(("p", "n"), [(30, 33), (30, 70), (12, 14)])
def test_labels_of_a_dag_never_overlap(p: int, n: int) -> None:
    names = [f"TNFRSF{10 + k}" for k in range(5 * p)]  # long ones: the labels fill their lines
    ax = plotting.dag(synthetic_run(p, 5 * p, random_dag(p, n, seed=p + n), names=names))
    assert overlaps(ax) == []
    labels = [text for text in texts(ax) if text.get_text() in {f"P{k}" for k in range(p)}]
    assert len(labels) == p
    assert min(text.get_fontsize() for text in texts(ax)) >= 7  # legible, in points
    assert cut_off(ax) < 0.02  # all within the figure, which is a page or two wide
    assert ax.figure.get_size_inches()[0] < 25


def test_a_tangle_is_cut_to_its_strongest_edges() -> None:
    run = synthetic_run(40, 80, random_dag(40, 500, 0), verdict="not identified")
    edges = run.edges.assign(support=np.linspace(0, 1, 500))
    ax = plotting.dag(replace(run, edges=edges))
    assert "500 edges between 40 programs, of which the 150 strongest are drawn" in " ".join(
        t.get_text() for t in texts(ax)
    )
    widths = [patch.get_linewidth() for patch in ax.patches if type(patch).__name__ == "PathPatch"]
    assert len(widths) == 150
    assert min(widths) == pytest.approx(8 * (0.08 + 0.36 * edges["support"].nlargest(150).min()))


def test_labels_stay_in_their_boxes_and_discs_and_lines_tell_numbers() -> None:
    run = synthetic_run(3, 9, [(0, 1), (1, 2)])
    edges = run.edges.assign(support=[0.5, 1.0])
    ax = plotting.dag(replace(run, edges=edges))
    ax.figure.canvas.draw()
    patches = {type(p).__name__: [q for q in ax.patches if type(q) is type(p)] for p in ax.patches}
    boxes = [p.get_window_extent() for p in patches["FancyBboxPatch"]]
    labels = [t for t in texts(ax) if t.get_weight() == "bold" or "PERT" in t.get_text()]
    for text in labels:
        extent = text.get_window_extent()
        assert (
            sum(b.x0 <= extent.x0 and extent.x1 <= b.x1 and b.y0 <= extent.y0 and extent.y1 <= b.y1 for b in boxes) == 1
        )
    areas = np.array([circle.radius**2 for circle in patches["Circle"]])
    explained = np.array([run.described[f"P{k}"].effect_explained for k in range(3)])
    assert areas / areas.max() == pytest.approx(explained / explained.max(), rel=1e-6)
    half, full = (line.get_linewidth() for line in patches["PathPatch"])
    assert half < full
    raises = [patch.get_facecolor() for patch in patches["Polygon"]]
    assert raises[0] != raises[1] and [len(p.get_path().vertices) for p in patches["Polygon"]] == [5, 4]  # bar, arrow


def test_an_empty_graph_is_drawn_and_says_so() -> None:
    ax = plotting.dag(synthetic_run(7, 20, verdict="not identified"))
    words = " ".join(text.get_text() for text in texts(ax))
    assert "No edge is declared between 7 programs; the graph is not identified." in words
    assert sum(text.get_weight() == "bold" for text in texts(ax)) == 7
    assert overlaps(ax) == []


def test_a_dag_shrinks_into_the_axes_given() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4))
    assert crlseq.pl.dag(synthetic_run(12, 40, random_dag(12, 14, 1)), ax=left) is left
    assert not right.has_data()
    assert overlaps(left) == []
    assert {text.figure for text in texts(left)} == {figure}


@pytest.mark.parametrize("kind", KINDS)
def test_axes_in_and_out(kind: str, finished: Run) -> None:
    ax = getattr(plotting, kind)(finished)
    assert isinstance(ax, Axes)
    _, mine = plt.subplots()
    n = len(plt.get_fignums())
    assert getattr(plotting, kind)(finished, ax=mine) is mine
    assert len(plt.get_fignums()) == n  # no figure of its own beside the axes given


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_cut_off(kind: str, p: int) -> None:
    run = with_pairs(synthetic_run(p, 3 * p), {})
    ax = getattr(plotting, kind)(run, **({"n_genes": 2} if kind == "programs" else {}))
    assert cut_off(ax) < 0.02


@pytest.mark.parametrize("kind", [*KINDS, "embedding", "activity"])
def test_no_text_of_a_fit_is_cut_off(kind: str, finished: Run) -> None:
    ax = getattr(plotting, kind)(finished)
    assert cut_off(ax) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_only_names(kind: str) -> None:
    run = synthetic_run(4, 10, [(0, 1)], names=EVIL, genes=[*EVIL, "GENE"])
    ax = getattr(plotting, kind)(run)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        shown = {text.get_text() for text in texts(ax)}
    if kind in ("interventions", "effects"):
        assert {"$x_{1$", "a$b$c", "_hidden", "\\frac{1}{0}", "line break tab"} <= shown
        assert max(map(len, shown)) < 80


def test_the_map_of_effects_has_the_surest_genes_by_program() -> None:
    run = synthetic_run(3, 8, names=[*(f"PERT{i}" for i in range(7)), "GENE5"])
    ax = plotting.effects_map(run, top=12)
    values = ax.images[0].get_array()
    rows, columns = ([label.get_text() for label in labels] for labels in (ax.get_yticklabels(), ax.get_xticklabels()))
    assert values.shape == (12, len(columns)) and len(rows) == 12
    surest = run.effects.sort_values("p_value").drop_duplicates("gene")["gene"][:12]
    assert set(rows) == set(surest)
    known = run.effects.set_index(["gene", "perturbation"])["change"]
    assert values[3, 2] == pytest.approx(known[rows[3], columns[2]])
    program = dict(zip(run.interventions["perturbation"], run.interventions["program"], strict=True))
    assert [program[name] for name in columns] == sorted(program[name] for name in columns)
    squares = [c for c in ax.collections if len(c.get_offsets())]  # where gene and perturbation have one name
    own = [(columns.index("GENE5"), rows.index("GENE5"))] if "GENE5" in rows else []
    assert [tuple(map(int, place)) for c in squares for place in c.get_offsets()] == own
    nothing = replace(run, effect_rows=run.effects.assign(fdr=1.0))
    assert "No gene surely changes" in texts(plotting.effects_map(nothing))[0].get_text()


def test_a_volcano_names_the_surest_genes() -> None:
    run = synthetic_run(3, 9)
    ax = plotting.volcano(run, "PERT2")
    own = run.effects[run.effects["perturbation"] == "PERT2"]
    sure = int((own["fdr"] <= 0.05).sum())
    assert f"{sure} of 60 genes change" in ax.get_title(loc="left")
    assert sum(len(c.get_offsets()) for c in ax.collections) >= 60
    named = {text.get_text() for text in ax.texts}
    assert own["gene"].iloc[0] in named and named <= set(own["gene"][:12])
    assert overlaps(ax) == [] or not {pair for pair in overlaps(ax) if set(pair) <= named}
    with pytest.raises(InputError, match=r"Did you mean .*PERT2"):
        plotting.volcano(run, "pert-2")


def test_dots_and_violins_of_activity(finished: Run) -> None:
    ax = plotting.activity(finished, top=3)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) == 3
    dots = ax.collections[0]
    assert dots.get_sizes().max() <= 110 and len(dots.get_offsets()) == 3 * len(finished.program_names)
    strongest = max(finished.interventions.dropna(subset="shift").to_dict("records"), key=lambda row: abs(row["shift"]))
    place = labels.index(strongest["perturbation"]) * 3 + finished.program_names.index(strongest["program"])
    colour, share = dots.get_array()[place], dots.get_sizes()[place] / 110
    assert np.sign(colour) == np.sign(strongest["shift"]) and abs(colour) > 0.3 and share > 0.05
    ax = plotting.violin(finished, strongest["program"], perturbations=[strongest["perturbation"]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["control", strongest["perturbation"]]
    with pytest.raises(InputError, match="no program 'P77'"):
        plotting.violin(finished, "P77")


def test_a_cell_a_pair() -> None:
    known = {(0, 1): {"status": "upstream", "change": 0.5}, (1, 2): {"status": "likely", "change": -0.5}}
    ax = plotting.pairs(with_pairs(synthetic_run(3, 9), known))
    marks = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert marks == {(1, 0): "+", (2, 1): "−?", **dict.fromkeys([(0, 1), (0, 2), (1, 2), (2, 0)], "0")}
    colours = [patch.get_facecolor() for patch in ax.patches]
    assert len(colours) == 6 and len(set(colours)) == 3
    assert overlaps(ax) == []


def test_the_marks_of_many_programs_do_not_overlap() -> None:
    ax = plotting.pairs(with_pairs(synthetic_run(24, 48), {}))
    assert overlaps(ax) == []


def test_tables_are_cut_and_say_so() -> None:
    run = synthetic_run(5, 200)
    for kind, total in (("interventions", 180), ("effects", 200)):
        ax = getattr(plotting, kind)(run, top=20)
        assert len(ax.get_yticklabels()) == 20
        assert "20 strongest" in ax.get_title(loc="left") and str(total) in ax.get_title(loc="left")
    ax = plotting.programs(run, n_genes=3)
    assert len(ax.get_yticklabels()) <= 15


def test_the_map_has_the_shifts() -> None:
    run = synthetic_run(3, 9)
    image = plotting.interventions(run).images[0].get_array()
    rows = run.interventions.dropna(subset="shift")
    assert np.isfinite(image).sum() == len(rows) == (~image.mask).sum()
    assert sorted(image.compressed()) == pytest.approx(sorted(rows["shift"]))


@pytest.mark.parametrize("kind", ["interventions", "history", "effects"])
def test_nothing_to_show_is_said(kind: str) -> None:
    run = synthetic_run(2, 4, epochs=0)
    none = run.interventions.assign(program="", shift=np.nan, energy_distance=np.nan)
    ax = getattr(plotting, kind)(replace(run, interventions=none))
    assert any(word in texts(ax)[0].get_text() for word in ("No perturbation", "No network", "No single"))


def test_plots_and_report_have_one_palette() -> None:
    sheet = (ROOT / "crlseq" / "report" / "templates" / "report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): (#\w+)", sheet.splitlines()[0]))
    ours = {"up": style.UP, "down": style.DOWN, "disc": style.SOFT, "ink": style.INK, "line": style.LINE}
    assert ours.items() <= light.items()
    assert [to_hex(style.SIGNED(value)) for value in (0.0, 1.0)] == [style.DOWN, style.UP]
    assert min(style.SIGNED(0.5)[:3]) > 0.98  # white where nothing changes


def test_an_ellipse_contains_half_of_the_cells() -> None:
    """Also of cells that are far from normal: half of them do not respond."""
    rng = np.random.default_rng(0)
    cells = np.concatenate([rng.normal(size=(100, 2)), rng.normal(size=(101, 2)) * [3, 0.5] + [8, 2]])
    ellipse = _half(cells, "black")
    inside = ellipse.get_patch_transform().inverted().transform(cells)
    distance = (inside**2).sum(1)
    assert np.count_nonzero(distance < 1 - 1e-9) == 100 and np.median(distance) == pytest.approx(1)
    assert ellipse.get_center() == pytest.approx(cells.mean(0))
    line = _half(np.array([[-2.0, 0], [-1, 0], [0, 0], [1, 0], [2, 0]]), "black")  # three of five within 1 of the mean
    assert min(line.width, line.height) < 1e-3 and max(line.width, line.height) == pytest.approx(2)


def test_cells(finished: Run) -> None:
    ax = plotting.embedding(finished)
    legend = [text.get_text().strip() for text in ax.get_legend().get_texts()]
    assert legend[0] == "control" and 1 < len(legend) <= 7
    ax = plotting.embedding(finished, programs=["P2", "P0"], perturbations=["g0", "g1+g2"][:1])
    assert ax.get_xlabel().startswith("P2") and ax.get_ylabel().startswith("P0")
    cells = ax.collections[0].get_offsets()
    assert len(cells) == finished.info["input"]["n_cells"]
    assert [type(patch).__name__ for patch in ax.patches] == ["Ellipse"] * 2  # of control cells and g0
    for wrong in (["P0"], ["P0", "P0"], ["P0", "P9"]):
        with pytest.raises(UsageError, match="not two different programs of this run"):
            plotting.embedding(finished, programs=wrong)
    with pytest.raises(InputError, match="no perturbation 'nobody'"):
        plotting.embedding(finished, perturbations=["nobody"])
    with pytest.raises(UsageError, match="too many"):
        plotting.embedding(finished, perturbations=["g0"] * 9)
    with pytest.raises(InputError, match="never written"):
        plotting.embedding(synthetic_run(2, 4))
    with pytest.raises(InputError, match="one program"):
        plotting.embedding(synthetic_run(1, 4))


# --- the command


@pytest.mark.parametrize("kind", [*KINDS, "embedding", "activity"])
def test_plot(run_folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new" / "figure.png"
    answer = invoke("plot", run_folder, kind.replace("_", "-"), "--output", path, "--dpi", 40)
    assert (answer.code, answer.out) == (0, ""), answer.err
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert files_below(tmp_path) == {"new", "new/figure.png"}


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_other_formats_keep_text_and_are_the_same_twice(
    run_folder: Path, tmp_path: Path, suffix: str, start: bytes
) -> None:
    for name in ("a", "b"):
        succeeds("plot", run_folder, "dag", "--output", tmp_path / f"{name}.{suffix}")
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert content.startswith(start)
    assert content == (tmp_path / f"b.{suffix}").read_bytes()
    if suffix == "svg":
        assert b">P0<" in content.replace(b"\n", b"").replace(b" ", b"")


def test_plot_refuses(run_folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.png"
    there.write_text("mine")
    cases: list[tuple[list[object], int, str]] = [
        ([run_folder, "dag", "--output", tmp_path / "x.bmp"], 2, ".png, .svg or .pdf"),
        ([run_folder, "dag", "--output", tmp_path / "x"], 2, ".png, .svg or .pdf"),
        ([run_folder, "history", "--output", tmp_path / "x.png", "--top", 3], 2, "--top"),
        ([run_folder, "embedding", "--output", tmp_path / "x.png", "--program", "P0"], 2, "not two"),
        ([run_folder, "dag", "--output", there], 3, "--force"),
        ([run_folder, "dag", "--output", there / "x.png"], 3, "cannot be written"),
        ([tmp_path / "none", "dag", "--output", tmp_path / "x.png"], 3, "not a run folder"),
    ]
    for words, code, word in cases:
        check_refusal(*invoke("plot", *words), code, word)
    assert invoke("plot", run_folder, "portrait", "--output", tmp_path / "x.png").code == 2
    assert files_below(tmp_path) == {"there.png"} and there.read_text() == "mine"
    succeeds("plot", run_folder, "dag", "--output", there, "--force")


@pytest.mark.parametrize("kind", [*KINDS, "embedding"])
def test_a_run_of_an_earlier_version_is_drawn_or_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    """Its folder has no pairs, no columns of later versions and no cells."""
    folder = ROOT / "tests" / "run" / "folder_0202a24"
    answer = invoke("plot", folder, kind, "--output", tmp_path / "plot.svg")
    if kind == "embedding":
        check_refusal(*answer, 3, "has no crlseq.h5ad that holds them", "Draw another")
    elif kind == "effects_map":
        check_refusal(*answer, 3, "whose runs hold no effects on genes", "Fit again")
    else:
        assert (answer.code, (tmp_path / "plot.svg").exists()) == (0, True), answer.err
