"""From one row per condition and predictor to means, paired differences and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from crlseq.evaluation.baselines import BASELINES

# Metric and whether larger is better, 1 being perfect; of the others 0 is. In the order of the tables.
METRICS: dict[str, bool] = {
    "pearson_delta": True,
    "l2": False,
    "l2_top_expressed": False,
    "rmse": False,
    "rmse_top_expressed": False,
    "mae": False,
    "wmse": False,
    "r2_weighted_delta": True,
    "pearson_delta_top_de": True,
    "pearson_delta_perturbed": True,
    "centroid_accuracy": True,
    "discrimination": True,
    "sign_agreement": True,
    "de_score": True,
    "mmd2": False,
    "energy_distance": False,
    "r2_delta": True,
    "legacy_mmd2": False,
    "legacy_r2": True,
    "legacy_rmse": False,
}
# Of the model's counterfactuals alone: see `crlseq.prediction.counterfactual`.
AXIOMS = ("composition", "effectiveness", "realised", "reversibility", "change")
MODEL, CEILING, FLOOR = "model", "split_half", "sampling_floor"
INTERPOLATED, RANGE = "interpolated_duplicate", "dynamic_range"  # the second is no predictor: see `truth.ceilings`
PREDICTORS = (MODEL, *BASELINES, CEILING, INTERPOLATED, RANGE, FLOOR)
WORDS = {
    "no_change": "no change", "mean": "the mean of perturbed cells", "matching_mean": "the matching mean",
    "ridge": "ridge",
}  # fmt: skip
N_BOOTSTRAP = 2000
COVERAGE = 0.95


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of (n,) values, drawn with replacement; NaN for fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng([seed, 10]).integers(len(values), size=(N_BOOTSTRAP, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def summarise(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """``group, predictor, metric, n, mean, low, high``: means over the conditions for which the metric is defined."""
    rows = []
    for (group, predictor), part in table.groupby(["group", "predictor"], sort=False):
        axioms = [name for name in AXIOMS if predictor == MODEL and name in table]
        for metric in (*_metrics(table), *axioms):
            values = part[metric].dropna().to_numpy()
            mean = float(values.mean()) if len(values) else float("nan")
            low, high = bootstrap_interval(values, seed)
            rows.append((group, predictor, metric, len(values), mean, low, high))
    return pd.DataFrame(rows, columns=["group", "predictor", "metric", "n", "mean", "low", "high"])


def compare(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Paired differences, model minus baseline, over conditions for which both are defined.

    ``group, metric, baseline, best, n, better, model, value, difference, low, high``: ``best`` marks the baseline with
    the best mean, ``better`` counts conditions where the model is strictly better. Its best baseline is chosen with
    the answers known, so that the comparison with it is the strictest.
    """
    rows = []
    for group, part in table.groupby("group", sort=False):
        for metric in _metrics(table):
            wide = part.pivot(index="condition", columns="predictor", values=metric)
            sign = 1.0 if METRICS[metric] else -1.0
            counts = wide[list(BASELINES)].notna().sum()
            usable = counts[counts == counts.max()].index if counts.max() else []
            best = (sign * wide[list(usable)].mean()).idxmax() if len(usable) else ""
            for baseline in BASELINES:
                both = wide[[MODEL, baseline]].dropna()
                difference = (both[MODEL] - both[baseline]).to_numpy()
                means = both.mean() if len(both) else pd.Series(np.nan, [MODEL, baseline])
                rows.append((
                    group, metric, baseline, baseline == best, len(both), int((sign * difference > 0).sum()),
                    float(means[MODEL]), float(means[baseline]), float(means[MODEL] - means[baseline]),
                    *bootstrap_interval(difference, seed),
                ))  # fmt: skip
    names = ["group", "metric", "baseline", "best", "n", "better", "model", "value", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=names)


def in_words(comparisons: pd.DataFrame) -> tuple[str, ...]:
    """A sentence a group against the additive baseline, and against the best by Pearson delta and by L2."""
    lines = []
    for group, part in comparisons.groupby("group", sort=False):
        best = part[part["best"]].set_index("metric")["baseline"]
        titles: dict[str, list[str]] = {"additive": []}
        for metric, name in (("pearson_delta", "Pearson delta"), ("l2", "L2")):
            if metric in best.index:
                titles.setdefault(best[metric], []).append(name)
        for baseline, by in titles.items():
            rows = part[part["baseline"] == baseline].set_index("metric").to_dict("index")
            correlation, distance = rows["pearson_delta"], rows["l2"]
            single = "the training effect (additive)" if "cells" in str(group) else "additive"
            name = single if baseline == "additive" else WORDS[baseline]
            if by:
                name += ", the best baseline," if len(by) == 2 else f", the best baseline by {by[0]},"
            row, metric = (correlation, "Pearson delta") if correlation["n"] else (distance, "L2")
            against = [_against(correlation, "Pearson delta", True)] if correlation["n"] else []
            against.append(_against(distance, "L2", False))
            lines.append(
                f"{group}: better than {name} on {row['better']} of {row['n']} by {metric}; {'; '.join(against)}."
            )
    return tuple(lines)


def limits(summary: pd.DataFrame) -> tuple[str, ...]:
    """A sentence a group: what halves of the measured cells say of each other, and what sampling alone leaves."""
    means = summary.set_index(["group", "predictor", "metric"])["mean"]
    return tuple(
        f"{group}: half of a condition's cells predict the other half with Pearson delta "
        f"{means[group, CEILING, 'pearson_delta']:.3g} and L2 {means[group, CEILING, 'l2']:.3g}; sampling error alone "
        f"puts the measured mean at L2 {means[group, FLOOR, 'l2']:.3g} from the true one."
        for group in summary["group"].unique()
    )


def _against(row: Mapping[Any, Any], name: str, larger: bool) -> str:
    text = f"{name} {row['model']:.3g} against {row['value']:.3g}"
    if np.isnan(row["low"]):
        return f"{text} (difference {row['difference']:.2g})"
    sign = 1 if larger else -1
    low, high = sorted((sign * row["low"], sign * row["high"]))
    word = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
    return f"{text} (difference {row['difference']:.2g} [{row['low']:.2g}, {row['high']:.2g}], {word})"


def _metrics(table: pd.DataFrame) -> list[str]:
    return [metric for metric in METRICS if metric in table]
