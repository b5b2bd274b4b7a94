"""What ``crlseq evaluate RUN --output RUN/NAME.csv`` left in a run folder, for the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from crlseq.evaluation.baselines import BASELINES
from crlseq.evaluation.compare import CEILING, FLOOR, INTERPOLATED, METRICS, MODEL, RANGE, compare, in_words
from crlseq.run.run import Run
from crlseq.run.summary import Answer, answer_of
from crlseq.storage.csv import read_csv

SHOWN = {
    "pearson_delta": "Pearson Δ", "pearson_delta_top_de": "Pearson Δ, 20 top genes", "l2": "L2",
    "r2_weighted_delta": "weighted R²", "de_score": "DE score", "discrimination": "discrimination", "mmd2": "MMD²",
}  # fmt: skip
CARRYING = ("pearson_delta", "l2")  # the metrics of the answer
TITLES = {
    **{name: baseline.words for name, baseline in BASELINES.items()}, MODEL: "model", "additive": "sum of training effects", CEILING: "(ceiling: the other half of the cells)",
    INTERPOLATED: "(ceiling: that half or the mean of all, by certainty)", FLOOR: "(floor: sampling error)",
}  # fmt: skip


@dataclass(frozen=True)
class EvaluationTable:
    """A table of ``crlseq evaluate``: its file, the answer, sentences, and means by group of conditions."""

    name: str
    answer: Answer
    sentences: tuple[str, ...]
    metrics: dict[str, str]
    groups: list[dict[str, Any]]


def evaluation_tables(run: Run) -> list[EvaluationTable]:
    """The tables in the run's folder, by name; other files there are none of ours and are passed over."""
    if run.path is None:
        return []
    tables = {path.name: _read(path) for path in sorted(run.path.glob("*.csv"))}
    return [_evaluated(name, table, run.facts.seed) for name, table in tables.items() if table is not None]


def _read(path: Path) -> pd.DataFrame | None:
    needed = ("condition", "group", "predictor")
    try:
        columns = pd.read_csv(path.absolute(), nrows=0).columns
        if not {*needed, *CARRYING} <= set(columns):
            return None
        table = read_csv(path, {name: str if name in needed else float for name in columns})
    except (OSError, ValueError):
        return None
    known = {MODEL, "no_change", "mean"} <= set(table["predictor"])
    return table[table["predictor"] != RANGE] if known else None


def _evaluated(name: str, table: pd.DataFrame, seed: int) -> EvaluationTable:
    comparisons = compare(table[["condition", "group", "predictor", *CARRYING]], seed)
    best = comparisons[comparisons["best"] & comparisons["low"].notna()]
    found: dict[str, list[float]] = {}
    parts, several = [], comparisons["group"].nunique() > 1
    for row in best.to_dict("records"):
        low, high = (row["low"], row["high"]) if METRICS[row["metric"]] else (-row["high"], -row["low"])
        parts.append(
            (f"{row['group']}: " if several else "")
            + f"{SHOWN[row['metric']]} {row['model']:.3g} against {row['value']:.3g} ({TITLES.get(row['baseline'], row['baseline'])}), "
            f"better on {row['better']} of {row['n']} conditions"
        )
        found.setdefault(SHOWN[row["metric"]], []).append(1.0 if low > 0 else -1.0 if high < 0 else 0.0)
    # Over several groups of conditions: better only if worse in none.
    signs = {title: min(own) if min(own) < 0 else max(own) for title, own in found.items()}
    answer, grade = answer_of(signs) if signs else ("too few conditions to tell", "open")
    sentences = in_words(comparisons)
    metrics = {metric: title for metric, title in SHOWN.items() if metric in table}
    groups = []
    for group, part in table.groupby("group", sort=False):
        means = part.groupby("predictor", sort=False)[list(metrics)].mean()
        rivals = means.loc[[predictor for predictor in means.index if predictor in (MODEL, *BASELINES)]]
        top = {m: rivals[m].max() if METRICS[m] else rivals[m].min() for m in metrics}
        rows = [
            {
                "title": TITLES.get(str(predictor), str(predictor)),
                "cells": [(values[m], predictor in rivals.index and values[m] == top[m]) for m in metrics],
            }
            for predictor, values in means.iterrows()
        ]
        groups.append({"name": group, "n": part["condition"].nunique(), "rows": rows})
    reason = f"By {name}, against the best baseline by each metric. {'; '.join(parts)}."
    return EvaluationTable(name, Answer("Better than baselines?", grade, answer, reason), sentences, metrics, groups)
