"""From one row per condition and predictor to means, paired differences and sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from crlseq.errors import UsageError
from crlseq.evaluation.baselines import BASELINES

# Metric and whether larger is better, 1 being perfect; of the others 0 is. In the order of the tables. More come with
# `register_metric`.
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
OWN = frozenset(METRICS)
Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]
REGISTERED: dict[str, Metric] = {}  # those that came with `register_metric`
# Of the model's counterfactuals alone: see `crlseq.prediction.counterfactual`.
AXIOMS = ("composition", "effectiveness", "realised", "reversibility", "change")
MODEL, CEILING, FLOOR = "model", "split_half", "sampling_floor"
INTERPOLATED, RANGE = "interpolated_duplicate", "dynamic_range"  # the second is no predictor: see `truth.ceilings`
JUDGES = {"pearson_delta": "Pearson delta", "l2": "L2"}  # the metrics of the sentences
N_BOOTSTRAP = 2000
COVERAGE = 0.95


def register_metric(name: str, function: Metric, larger_is_better: bool) -> None:
    """Judge predictors by another metric of means as well, in every later `crlseq.evaluate` of this process.

    ``function(predicted, measured, control)`` gets mean expressions (conditions, genes) and returns a number per condition,
    NaN where it is undefined. A perfect prediction has 1 if larger is better, else 0. UsageError if crlseq has a metric of
    this name.

    Examples
    --------
    >>> import crlseq
    >>> from crlseq.evaluation.compare import METRICS, REGISTERED
    >>> crlseq.register_metric("worst_gene", lambda predicted, measured, _: abs(predicted - measured).max(1), False)
    >>> found = crlseq.evaluate(crlseq.load("RUN"))
    >>> worst = found.conditions.set_index("predictor")["worst_gene"]
    >>> bool((worst["model"] > 0).all()), METRICS.pop("worst_gene")
    (True, False)
    >>> _ = REGISTERED.pop("worst_gene")
    """
    if name in OWN or name in AXIOMS:
        raise UsageError(f"{name!r} is one of crlseq's own metrics.", "Choose another name.")
    METRICS[name], REGISTERED[name] = larger_is_better, function


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of (n,) values, drawn with replacement; NaN for fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(_draws(len(values), seed) @ values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


@lru_cache(maxsize=2)
def _draws(n: int, seed: int) -> np.ndarray:
    """(N_BOOTSTRAP, n) weights of n values in the mean of each draw."""
    drawn = np.random.default_rng([seed, 10]).integers(n, size=(N_BOOTSTRAP, n))
    places = drawn + n * np.arange(N_BOOTSTRAP)[:, None]
    return np.bincount(places.ravel(), minlength=N_BOOTSTRAP * n).reshape(N_BOOTSTRAP, n) / n


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
            baselines = [name for name in BASELINES if name in wide]
            sign = 1.0 if METRICS[metric] else -1.0
            counts = wide[baselines].notna().sum()
            usable = counts[counts == counts.max()].index if counts.max() else []
            best = (sign * wide[list(usable)].mean()).idxmax() if len(usable) else ""
            for baseline in baselines:
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


def in_words(comparisons: pd.DataFrame, who: str = "the model") -> tuple[str, ...]:
    """A sentence a group: whether `who` is better than the best baseline by Pearson delta, and whether by L2."""
    lines = []
    for group, part in comparisons[comparisons["best"] & (comparisons["n"] > 0)].groupby("group", sort=False):
        rows = part.set_index("metric").to_dict("index")
        told = [_against(metric, rows[metric], str(group)) for metric in JUDGES if metric in rows]
        n = max(row["n"] for row in rows.values())
        conditions = f"{n} condition{'s' * (n != 1)}"
        lines.append(f"{group}, {conditions}: against the best baseline, {who} is {' and '.join(told)}.")
    return tuple(lines)


def _against(metric: str, row: Mapping[Any, Any], group: str) -> str:
    sign = 1 if METRICS[metric] else -1
    low, high = sorted((sign * row["low"], sign * row["high"]))
    word = "better" if low > 0 else "worse" if high < 0 else "not clearly different"
    rival = baseline_in_words(str(row["baseline"]), group)
    return f"{word} by {JUDGES[metric]} ({digits(row['model'])}; {rival} {digits(row['value'])})"


def digits(value: float) -> str:
    """Three significant digits."""
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def baseline_in_words(baseline: str, group: str) -> str:
    """What a baseline is called; of held-out cells the sum of single effects is the training effect itself."""
    return "the training effect" if baseline == "additive" and "cells" in group else BASELINES[baseline].words


def _metrics(table: pd.DataFrame) -> list[str]:
    return [metric for metric in METRICS if metric in table]
