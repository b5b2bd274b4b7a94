"""A run as a page: what the template is filled with."""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from crlseq.errors import few
from crlseq.readout import enrichment
from crlseq.readout.drawing import HEAD, Drawing, draw, edge_width, heading, legend, limit_of
from crlseq.readout.layout import Point
from crlseq.report import charts
from crlseq.report.covariates import covariate_charts
from crlseq.report.evaluations import evaluation_tables
from crlseq.report.meanings import MEANINGS
from crlseq.report.methods import methods
from crlseq.report.pairs import pair_matrix
from crlseq.run.advice import limitations, what_next
from crlseq.run.citation import references
from crlseq.run.findings import findings
from crlseq.run.pairs import why_no_pairs
from crlseq.run.run import Run
from crlseq.run.summary import (
    Program,
    answers,
    combinations_in_words,
    controls_in_words,
    numbers_in_words,
    sets_in_words,
)
from crlseq.run.tables import by_program, shown
from crlseq.storage.files import written_whole
from crlseq.storage.text import escaped

GENES = 8  # of a card, that rise and that fall
DRIVERS = 8  # of a card
SETS = 4  # of a card and test
PATHWAYS = 6  # of a card, that the encoder reads
TESTS = {
    enrichment.OVER_REPRESENTATION: "by its top genes",
    enrichment.RANK: "by the ranking of all genes",
    enrichment.DRIVERS: "by its perturbations",
}
METRICS = ("pearson_delta", "l2", "mmd2")
NUMBERS = {"effects": "explains", "variance": "variance", "stability": "stability"}  # by a word of it, what it is
AGREED = 0.9  # correlation of loadings from which programs of two seeds count as the same
GUIDES = 20  # that are shown, the weakest first
ROWS = 300  # of a table: the page must open, whatever the screen
FONT = 12.0
PAGE, PHONE = (1200.0, 1200.0), (340.0, 1200.0)
# Size that a drawing may be shrunk to, below which one without labels takes its place up to this width.
SMALLEST, DESK = 0.8, 900


def write_report(run: Run, path: Path, enriched: pd.DataFrame | None = None) -> None:
    """Render ``templates/report.html.j2``, names from the data escaped; gene sets are those that `crlseq.enrich` found."""
    write_page("report.html.j2", path, _context(run, enriched))


def write_page(template: str, path: Path, context: Mapping[str, Any]) -> None:
    """Write what `render` gives."""
    page = render(template, context)
    with written_whole(path) as file:
        file.write_text(page, encoding="utf-8")


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page of a template, with the ``style`` of all pages; whatever is in the context is escaped."""
    style = files("crlseq.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    return escaped(_templates().get_template(template).render({**context, "style": Markup(style)}))


@cache
def _templates() -> jinja2.Environment:
    """The templates, each compiled once."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crlseq.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": _fixed, "signed": _signed, "brief": _brief}
    return environment


def _fixed(value: Any, decimals: int = 2, sign: str = "-") -> str:
    """So many decimals, without a minus before a zero; `sign` "+" also before what is not negative."""
    return "–" if value is None or value != value else f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"


def _signed(value: Any, decimals: int = 2) -> str:
    return _fixed(value, decimals, "+")


def _brief(value: Any) -> str:
    return "–" if value is None or value != value else f"{value:.3g}"


def _context(run: Run, enriched: pd.DataFrame | None) -> dict[str, Any]:
    script = files("crlseq.report").joinpath("templates/report.js").read_text(encoding="utf-8")
    interventions = by_program(run.interventions, run.interventions["shift"].abs())
    evaluated = evaluation_tables(run)
    questions = answers(run.facts, run.evaluation, run.history)
    if evaluated and len(questions) > 1:  # of all baselines, which a fit does not take the time for
        questions[1] = evaluated[0].answer
    # Without an effect the prediction is that nothing changes, which needs no comparison.
    evaluation = run.evaluation[:0] if run.facts.without_effect else run.evaluation
    return {
        "run": run,
        "info": run.facts,
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "findings": findings(run, enriched),
        "answers": [*zip(questions, what_next(run, questions), ("identified", "baselines", "converged"), strict=False)],
        "limitations": limitations(run),
        "meanings": MEANINGS,
        "methods": methods(run),
        "references": references(run.facts.version),
        "controls": "" if run.pairs is None else controls_in_words(run.facts),
        "pairs": pair_matrix(run),
        "no_pairs": why_no_pairs(run.facts) if run.pairs is None else "",
        "dag": _dag(run),
        "programs": [_card(program, enriched) for program in run.described.values()],
        "enriched": enriched is not None,
        "read_from_sets": sets_in_words(run.facts),
        "n_fitted_genes": run.programs["gene"].nunique(),
        "no_effect": run.facts.without_effect,
        "interventions": interventions[:ROWS].to_dict("records"),
        "second": None if run.second_targets is None else run.second_targets[:ROWS].to_dict("records"),
        "n_second": 0 if run.second_targets is None else len(run.second_targets),
        "guides": [] if run.guides is None else run.guides[:GUIDES].to_dict("records"),
        "n_guides": 0 if run.guides is None else len(run.guides),
        "n_named": 0 if run.guides is None else run.guides["guide"].nunique(),
        "n_weak": 0 if run.guides is None else run.guides.loc[run.guides["weak"], "guide"].nunique(),
        "arms": [] if run.arms is None else run.arms[:GUIDES].to_dict("records"),
        "n_arms": 0 if run.arms is None else len(run.arms),
        "n_lost": 0 if run.arms is None else int(run.arms["lost"].sum()),
        "covariates": covariate_charts(run),
        "contexts": [] if run.contexts is None else run.contexts[:ROWS].to_dict("records"),
        "n_contexts": 0 if run.contexts is None else len(run.contexts),
        "combined": combinations_in_words(run.facts),
        "interactions": [] if run.interactions is None else run.interactions[:ROWS].to_dict("records"),
        "n_interactions": 0 if run.interactions is None else len(run.interactions),
        "hits": "penetrance" in interventions and bool((interventions["program"] != "").any()),
        "largest_shift": limit_of(interventions["shift"].to_numpy()),
        "map": charts.intervention_map(run),
        "edges": run.edges[:ROWS].to_dict("records"),
        "ancestry": run.ancestry[:ROWS].to_dict("records"),
        "effects": charts.effects(run),
        "evaluation": evaluation[:ROWS].to_dict("records"),
        "means": _means(evaluation),
        "scatters": charts.scatters(evaluation),
        "evaluated": evaluated,
        "seeds": _seeds(run),
        "losses": charts.losses(run.history),
        "config": json.dumps(run.info["config"], indent=1, ensure_ascii=False),
    }


def _card(program: Program, enriched: pd.DataFrame | None) -> dict[str, Any]:
    sets = None
    if enriched is not None:  # the first sets of each test, as `crlseq.enrich` orders them
        tests = enriched[enriched["program"] == program.name].groupby("test", sort=False)
        sets = {TESTS[str(test)]: part[:SETS].to_dict("records") for test, part in tests}
    genes = {
        way: rows[:GENES].assign(shown=shown(rows)) for way, rows in (("rise", program.up), ("fall", program.down))
    }
    return {
        "program": program,
        "numbers": [
            (words, next((NUMBERS[key] for key in NUMBERS if key in words), "")) for words in numbers_in_words(program)
        ],
        "drivers": program.drivers[:DRIVERS].to_dict("records"),
        "more_drivers": max(0, len(program.drivers) - DRIVERS),
        "largest_shift": limit_of(program.drivers["shift"].to_numpy()),
        "genes": {name: table.to_dict("records") for name, table in genes.items()},
        "largest": limit_of(pd.concat([table["loading"] for table in genes.values()]).to_numpy()),
        "pathways": program.pathways[:PATHWAYS].to_dict("records"),
        "largest_pathway": limit_of(program.pathways["weight"].to_numpy(float)),
        "sets": sets,
    }


def _means(evaluation: pd.DataFrame) -> list[dict[str, Any]]:
    """Means over conditions, one row per prediction; None where the table lacks it."""
    titles = {
        "": "model",
        "_training": "training effects (sum over the parts if not fitted)",
        "_mean": "mean effect of all perturbations",
        "_no_change": "no change",
    }
    return [
        {"title": title} | {m: evaluation[m + ending].mean() if m + ending in evaluation else None for m in METRICS}
        for ending, title in titles.items()
        if len(evaluation)
    ]


def _seeds(run: Run) -> dict[str, Any] | None:
    """What the models of other seeds agree on, and their losses; None for a single seed."""
    if run.ensemble is None:
        return None
    kinds = {str(kind): part.drop(columns="kind") for kind, part in run.ensemble.groupby("kind", sort=False)}
    losses = [loss for loss in run.facts.training.seed_losses if loss is not None]
    return {
        "losses": (min(losses), max(losses)) if losses else None,
        "agreed": [
            (kind, int((part["agreement"] >= (AGREED if kind == "program" else 1.0)).sum()), len(part))
            for kind, part in kinds.items()
        ],
        "tables": {kind: part[:ROWS].to_dict("records") for kind, part in kinds.items()},
        "n_rows": {kind: len(part) for kind, part in kinds.items()},
    }


def _dag(run: Run) -> dict[str, Any]:
    """The drawing as the template puts it into SVG, with what is told of everything in it."""
    drawing = draw(run, FONT, PAGE, _text_width)
    narrow = draw(run, FONT, PHONE, _text_width, labels=False)
    return {
        **_placed(run, drawing),
        "narrow": _placed(run, narrow),
        "smallest": round(SMALLEST * (drawing.width + 8)),
        "least": min(round(SMALLEST * drawing.width), DESK),
        "head": HEAD * FONT,
        "heading": heading(run),
        "legend": legend(run),
    }


def _placed(run: Run, drawing: Drawing) -> dict[str, Any]:
    """Programs and edges of a drawing, with what is told of them."""
    programs = run.described
    edges = [
        {
            "edge": edge,
            "width": edge_width(edge.support) * FONT,
            "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in edge.points),
            "path": edge_path(edge.points, drawing),
            "about": f"{edge.source} → {edge.target}\n{programs[edge.source].title} "
            f"{'raises' if edge.weight > 0 else 'lowers'} {programs[edge.target].title}\n"
            f"weight {edge.weight:+.2f} (SD of the target per SD of the source)"
            + ("" if np.isnan(edge.support) else f", support {edge.support:.2f}"),
        }
        for edge in drawing.edges
    ]
    return {"drawing": drawing, "nodes": [(node, _about(node.program)) for node in drawing.nodes], "edges": edges}


def edge_path(points: list[Point], drawing: Drawing) -> str:
    """An edge as an SVG path: curves whose tangents point along the drawing, as the script of the page draws them."""
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for (a, b), (c, d) in pairwise(points):
        x, y = (a + c) / 2, (b + d) / 2
        bend = (a, y, c, y) if drawing.down else (x, b, x, d)
        path += "C{:.1f},{:.1f} {:.1f},{:.1f} {:.1f},{:.1f}".format(*bend, c, d)
    return path


def _about(program: Program) -> str:
    lines = [f"{program.name}  {program.title}", ", ".join(numbers_in_words(program))]
    if len(program.drivers):
        rows = program.drivers.to_dict("records")
        names = few([f"{row['perturbation']} ({_signed(row['shift'], 1)} SD)" for row in rows], 5)
        lines.append(f"perturbed by {names}")
    for what, programs in (("upstream", program.upstream), ("downstream", program.downstream)):
        if programs:
            lines.append(f"{what}: {', '.join(programs)}")
    return "\n".join(line for line in lines if line)


def _text_width(text: str, bold: bool) -> float:
    """No less than what the wide ones among the usual fonts need; which font a browser takes is not known here."""
    width = 0.0
    for c in text:
        if unicodedata.east_asian_width(c) in "WF":
            width += 1.1
        elif c in "mwMW@%…—":
            width += 1.0
        elif c.isupper() or c.isdigit():
            width += 0.72
        else:
            width += 0.35 if c in " .,:;il|'" else 0.64
    return FONT * width * (1.1 if bold else 1.0)
