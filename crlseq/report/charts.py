"""Places of the marks in the charts of the report; the template only puts them into SVG.

Lengths are in SVG units. Names are full here: the template shortens what it shows and has the whole name in a title.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from crlseq.readout.drawing import limit_of
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR
from crlseq.run.summary import BASELINES, assignment, best_baseline, short, strongest

MAP_ROWS = 150
NUMBERED = 20  # programs up to which cells of the map are wide enough for a number
EFFECT_ROWS = 40
DOTS = 1000  # of a scatter
ROW = 17.0  # height of a line of a map
NAMES = 120.0  # width of its names
SIZE = (300.0, 170.0)  # of a chart's inside
PAD = (52.0, 8.0, 12.0, 34.0)  # left, top, right, bottom: ticks and titles
FRAME = {
    "left": PAD[0], "top": PAD[1], "width": SIZE[0], "height": SIZE[1],
    "full_width": PAD[0] + SIZE[0] + PAD[2], "full_height": PAD[1] + SIZE[1] + PAD[3],
}  # fmt: skip


def intervention_map(run: Run) -> dict[str, Any] | None:
    """Perturbations by programs: shifts, and rings where bootstrap replicates chose another program."""
    rows, left_out = strongest(run.interventions, MAP_ROWS)
    if rows.empty:
        return None
    names = run.program_names
    cell = 38.0 if len(names) <= NUMBERED else 22.0
    end = limit_of(rows["shift"].to_numpy())
    shares = assignment(run.facts.bootstrap, rows)
    lines = []
    for i, row in enumerate(rows.to_dict("records")):
        target = names.index(row["program"])
        others = [] if shares is None else [k for k in np.flatnonzero(np.nan_to_num(shares[i]) > 0) if k != target]
        lines.append({
            "name": row["perturbation"], "shown": short(row["perturbation"], 16), "y": i * ROW, "program": row["program"],
            "x": NAMES + target * cell, "shift": row["shift"], "share": abs(row["shift"]) / end,
            "rings": [
                {"x": NAMES + (k + 0.5) * cell, "radius": 1.5 + 5.5 * float(np.sqrt(shares[i, k])), "program": names[k], "share": float(shares[i, k])}
                for k in others if shares is not None
            ],
        })  # fmt: skip
    return {
        "rows": lines,
        "columns": [(NAMES + (k + 0.5) * cell, name) for k, name in enumerate(names)],
        "rules": [NAMES + k * cell for k in range(len(names) + 1)],
        "cell": cell,
        "numbered": len(names) <= NUMBERED,
        "row": ROW,
        "left": NAMES,
        "width": NAMES + cell * len(names) + 1,
        "height": ROW * len(lines),
        "left_out": left_out,
        "rings": any(line["rings"] for line in lines),
        "end": end,
    }


def effects(run: Run) -> dict[str, Any] | None:
    """Energy distances of the perturbations that differ most from control, on a scale that is linear about 0."""
    tested = run.interventions[run.interventions["energy_distance"].notna()]
    if tested.empty:
        return None
    table = tested.sort_values("energy_distance", ascending=False, kind="stable")[:EFFECT_ROWS]
    found = tested["fdr"] <= DETECTABLE_FDR
    values = table["energy_distance"].to_numpy()
    unit = max(float(tested.loc[found, "energy_distance"].min()) if found.any() else limit_of(tested["energy_distance"].to_numpy()), 1e-12)  # fmt: skip

    def scaled(value: float) -> float:
        return float(np.sign(value) * np.log10(1 + abs(value) / unit))

    low, high = min(0.0, scaled(values.min())), max(scaled(values.max()), 1e-12)
    width = 460.0

    def at(value: float) -> float:
        return NAMES + width * (scaled(value) - low) / (high - low)

    first = int(np.floor(np.log10(unit)))
    ticks = [0.0] + [10.0**k for k in range(first, first + 12) if unit <= 10.0**k <= values.max()]
    return {
        "rows": [
            {
                "name": row["perturbation"], "shown": short(row["perturbation"], 16), "y": (i + 0.5) * ROW,
                "x": at(row["energy_distance"]), "found": bool(row["fdr"] <= DETECTABLE_FDR), **row,
            }
            for i, row in enumerate(table.to_dict("records"))
        ],
        "ticks": [(at(value), f"{value:g}") for value in ticks],
        "zero": at(0.0),
        "left": NAMES,
        "row": ROW,
        "width": NAMES + width + 14,
        "height": ROW * len(table),
        "n_found": int(found.sum()),
        "n_tested": len(tested),
        "left_out": len(tested) - len(table),
    }  # fmt: skip


def scatters(evaluation: pd.DataFrame) -> list[dict[str, Any]]:
    """Every condition by the metric of the best simple prediction (x) and of the model (y)."""
    charts = []
    for metric, title, sign in (("l2", "L2 of means", -1), ("pearson_delta", "Pearson Δ", 1)):
        best, table = best_baseline(evaluation, metric, sign)
        if table.empty:
            continue
        x, y = table["rival"].to_numpy(), table[metric].to_numpy()
        low = min(x.min(), y.min()) if sign > 0 else 0.0
        low, high = float(low), float(max(x.max(), y.max()))
        across, up = _axis(low, high, SIZE[0], False), _axis(low, high, SIZE[1], True)
        names = table["condition"].tolist()
        charts.append({
            "title": f"{title}: model (up) against {BASELINES[best]} (across)",
            "note": f"the model is better on {int((sign * (y - x) > 0).sum())} of {len(x)}, {'above' if sign > 0 else 'below'} the line",
            "x_ticks": across[1], "y_ticks": up[1], "frame": FRAME,
            "diagonal": [(across[0](v), up[0](v)) for v in (across[2], across[3])],
            "dots": [
                {"x": across[0](a), "y": up[0](b), "name": name, "better": sign * (b - a) > 0, "model": b, "rival": a}
                for name, a, b in zip(names[:DOTS], x[:DOTS], y[:DOTS], strict=True)
            ],
            "left_out": max(0, len(x) - DOTS),
        })  # fmt: skip
    return charts


def losses(history: pd.DataFrame) -> list[dict[str, Any]]:
    """Every loss term by epoch, of training and of validation cells; terms that never change are left out."""
    if history.empty:
        return []
    terms = [str(name) for name in history if name not in ("epoch", "temperature") and not str(name).startswith("validation_")]  # fmt: skip
    epochs = history["epoch"].to_numpy(float) + 1
    charts = []
    for term in sorted(terms, key=lambda name: name != "total"):
        columns = [name for name in (term, f"validation_{term}") if name in history]
        values = history[columns].to_numpy(float)
        finite = values[np.isfinite(values)]
        if not finite.size or (term != "total" and np.ptp(finite) <= 1e-9 * np.abs(finite).max()):
            continue
        # The first epochs may lie far above the rest, of which little would be seen.
        low, high = float(finite.min()), float(np.quantile(finite, 0.98))
        across, up = _axis(float(epochs[0]), float(epochs[-1]), SIZE[0], False, whole=True), _axis(low, high, SIZE[1], True)  # fmt: skip
        charts.append({
            "title": term, "x_ticks": across[1], "y_ticks": up[1], "frame": FRAME,
            "lines": [
                {
                    "name": "validation" if name.startswith("validation_") else "training",
                    "points": [
                        (across[0](epoch), up[0](float(np.clip(value, up[2], up[3]))))
                        for epoch, value in zip(epochs, values[:, k], strict=True) if np.isfinite(value)
                    ],
                }
                for k, name in enumerate(columns)
            ],
        })  # fmt: skip
    return charts


def _axis(
    low: float, high: float, length: float, upward: bool, whole: bool = False
) -> tuple[Callable[[float], float], list[tuple[float, str]], float, float]:
    """Place of a value along an axis, its ticks, and the values at its ends."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    steps = _ticks(low, high, whole)
    start, end = min(low, steps[0]), max(high, steps[-1])
    offset = PAD[1] if upward else PAD[0]

    def at(value: float) -> float:
        share = (value - start) / (end - start)
        return offset + length * (1 - share if upward else share)

    return at, [(at(value), f"{value:.4g}") for value in steps], start, end


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    """Round numbers from about `low` to about `high`, some five of them; whole ones for epochs."""
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough))
    if whole:
        step = max(1.0, round(step))
        return [float(value) for value in np.arange(np.ceil(low / step) * step, high + 1e-9, step)] or [low]
    return [round(k * step, 12) for k in range(int(np.floor(low / step)), int(np.ceil(high / step)) + 1)]
