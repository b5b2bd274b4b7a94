"""The report: one self-contained HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from crlseq.run import Run

TOP_GENES = 12
CHART = (640.0, 180.0)  # width and height of the loss chart in SVG units


def write_report(run: Run, path: Path) -> None:
    """Render ``templates/report.html.j2``; every name from the data is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crlseq"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path.write_text(
        environment.get_template("report.html.j2").render(_context(run)), encoding="utf-8", errors="replace"
    )


def _context(run: Run) -> dict[str, Any]:
    programs = []
    for program in run.info["programs"]:
        rows = run.programs[run.programs["program"] == program["name"]].head(TOP_GENES)
        programs.append({**program, "rows": rows.to_dict("records"), "largest": float(rows["loading"].abs().max())})
    interventions = run.interventions.sort_values(["program", "shift"], key=_program_order, kind="stable")
    return {
        "info": run.info,
        "programs": programs,
        "interventions": interventions.to_dict("records"),
        "largest_shift": max(float(interventions["shift"].abs().max()), 1e-12),
        "edges": run.edges.to_dict("records"),
        "evaluation": run.evaluation.to_dict("records"),
        "curves": _curves(run.history),
        "chart": CHART,
    }


def _program_order(column: pd.Series) -> pd.Series:
    return pd.to_numeric(column.str[1:]).fillna(np.inf) if column.name == "program" else -column.abs()


def _curves(history: pd.DataFrame) -> list[dict[str, str]]:
    """Points of training and validation loss, both scaled to the chart, early extremes cut off; none without epochs."""
    if history.empty:
        return []
    columns = [name for name in ("total", "validation_total") if name in history]
    values = history[columns].to_numpy()
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    x = np.linspace(0, CHART[0], len(history)) if len(history) > 1 else np.zeros(1)
    curves = []
    for k, name in enumerate(columns):
        y = CHART[1] * (1 - (np.clip(values[:, k], low, high) - low) / max(high - low, 1e-12))
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        curves.append({"name": "validation" if name.startswith("validation") else "training", "points": points})
    return curves
