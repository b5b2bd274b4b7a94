"""Charts of covariates: of each perturbation the share of its cells in every level, or how far its numbers are from controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from crlseq.readout.drawing import limit_of
from crlseq.report.charts import NAMES, ROW
from crlseq.run.covariates import composition
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR
from crlseq.run.summary import short

SHOWN = 15  # perturbations of a chart
LEVELS = 8  # that are drawn; the rest is one part
BAR = 320.0  # width of all cells, or of the axis of numbers
STATE = 130.0  # width of the column of programs


def covariate_charts(run: Run) -> list[dict[str, Any]]:
    """A chart for each covariate: the perturbations that differ most from controls, beside the program that each moves."""
    table = run.covariates
    if table is None:
        return []
    return [_chart(run, str(name), composition(table, str(name), SHOWN)) for name in table["covariate"].unique()]


def _chart(run: Run, name: str, rows: pd.DataFrame) -> dict[str, Any]:
    named = [str(one) for one in rows.sort_values("where", kind="stable")["perturbation"].unique()]
    state = {row["perturbation"]: row for row in run.interventions.to_dict("records")}
    levels = [str(level) for level in rows["level"].unique() if level]
    lines = [_line(one, rows[rows["perturbation"] == one], state.get(one)) for one in named]
    chart: dict[str, Any] = {
        "name": name,
        "levels": [],
        "left": NAMES,
        "width": NAMES + BAR + STATE,
        "row": ROW,
        "bar": BAR,
    }
    if levels:
        chart["levels"] = sorted(levels)[:LEVELS]
        for line in lines:
            line["parts"] = _parts(line["rows"], "mean", chart["levels"])
        first = {"name": "controls", "shown": "controls", "sure": False, "state": ""}
        lines.insert(0, first | {"parts": _parts(lines[0]["rows"], "control", chart["levels"])})
    else:
        end = limit_of((rows["difference"].abs() + 2 * rows["se"]).to_numpy())
        chart |= {"end": end, "zero": NAMES + BAR / 2}
        for line in lines:
            row = line["rows"][0]
            low, at, high = (np.clip(row["difference"] + k * row["se"], -end, end) for k in (-2, 0, 2))
            line["x"] = [float(NAMES + BAR / 2 * (1 + value / end)) for value in (low, at, high)]
    return chart | {"rows": [line | {"y": i * ROW} for i, line in enumerate(lines)], "height": ROW * len(lines)}


def _line(name: str, rows: pd.DataFrame, state: dict[Any, Any] | None) -> dict[str, Any]:
    moved = "" if state is None or not state["program"] else f"{state['program']} {state['shift']:+.1f} SD"
    return {
        "name": name, "shown": short(name, 16), "rows": rows.to_dict("records"), "state": moved.replace("-", "−"),
        "sure": bool((rows["fdr"] <= DETECTABLE_FDR).any()),
    }  # fmt: skip


def _parts(rows: list[dict[str, Any]], column: str, levels: list[str]) -> list[dict[str, Any]]:
    """Bars of the levels, one behind the other; of many levels the rest is not drawn."""
    share = {row["level"]: float(row[column]) for row in rows}
    start, parts = NAMES, []
    for k, level in enumerate(levels):
        width = BAR * share.get(level, 0.0)
        # The same hue, from dark to light, as phases and clusters have no sides.
        parts.append(
            {
                "x": start,
                "width": width,
                "opacity": round(1 - 0.85 * k / max(len(levels) - 1, 1), 2),
                "level": level,
                "share": share.get(level, 0.0),
            }
        )
        start += width
    return parts
