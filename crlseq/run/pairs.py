"""Pairs of programs in words: what each status of ``pairs.csv`` means, and one sentence for every pair. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from crlseq.run.schema import RunInfo


@dataclass(frozen=True)
class Status:
    """What a status means. In its mark "±" stands for the sign of the change."""

    mark: str  # in a matrix, also without colour
    means: str
    means_not: str


# As `crlseq.discovery.pairs` names and orders them; importing them from there would import torch.
STATUSES = {
    "upstream": Status(
        "±",
        "where the target is perturbed, it loses what the source gave it (+ raises it, − lowers it), and every guard is passed.",
        "This does not say that the source acts on it directly; declared edges do.",
    ),
    "likely": Status(
        "±?",
        "the same change is seen, but not every guard is passed, so that something else may explain it.",
        "Do not build on such a pair alone.",
    ),
    "both ways": Status(
        "⇄",
        "each changes where the other is perturbed: a hidden common cause, a feedback cycle or nonlinear equations.",
        "The order of the two is not told.",
    ),
    "excluded": Status(
        "0",
        "no change is seen, and one that matters would have been.",
        "Perturbations that only shift the target leave the effects of its parents in place, and show no change.",
    ),
    "undecided": Status(
        "·",
        "cells are too few, perturbations too weak, or other explanations too near, to tell.",
        "This is no evidence against an effect.",
    ),
}
SEEN = "change"  # the guard without which nothing is surely seen
# What else could explain a change that does not pass a guard: {k} is the source, {i} the target.
OTHERWISE = {
    SEEN: "chance",
    "one way": "the reverse, which is not shown to be smaller",
    "controls": "what correlates the programs in control cells, such as a hidden common cause or shared second targets",
    "beside": "second targets of perturbations of {i}, which change more than its own covariances",
    "escaped": "{k} itself, which sets the cells that are hit",
    "dose": "perturbations of {i} whose strength depends on {k}",
}


def sentence(pair: Mapping[str, Any], size: float) -> str:
    """What is known of an ordered pair, a row of ``pairs.csv``, in one or two sentences with numbers.

    ``size`` is the smallest change, in standard deviations of control cells, that "excluded" is about.
    """
    k, i, status = pair["source"], pair["target"], pair["status"]
    change, wider = f"{_number(pair['change'], '+')} ± {_number(pair['se'])} SD", pair["detectable"]
    acts = f"{'raises' if pair['change'] > 0 else 'lowers'} it: where {i} is perturbed, it loses {change} of what {k} gave it"
    again = " It is seen again with other components, and without any one perturbation." if pair["robust"] else ""
    if status == "upstream":
        return f"{k} is upstream of {i} and {acts}.{again}"
    if status == "likely":
        return f"{k} is likely upstream of {i} and {acts}. {_not_ruled_out(pair)}{again}"
    if status == "both ways":
        return (
            f"{k} and {i} each change where the other is perturbed ({i}: {change}; {k}: z {_number(pair['z_reversed'], '+', 1)}): "
            "a hidden common cause, a feedback cycle or nonlinear equations. Their order is not told."
        )
    if status == "excluded":
        return f"No effect of {k} on {i} is seen ({change}). A change above {wider:.2f} SD would have been seen."
    return _undecided(pair, change, size)


def _undecided(pair: Mapping[str, Any], change: str, size: float) -> str:
    """Why a pair is undecided, and what would settle it."""
    k, i, wider = pair["source"], pair["target"], pair["detectable"]
    if math.isnan(pair["se"]):
        return (
            f"Whether {k} is upstream of {i} cannot be told: no perturbation of {i} is strong enough in enough cells."
        )
    if SEEN in pair["guards"].split(", "):
        return f"Whether {k} is upstream of {i} is open, although their covariance changes where {i} is perturbed ({change}). {_not_ruled_out(pair)}"
    if wider <= size:
        return f"Whether {k} is upstream of {i} is open: {change}, near the smallest change that would be seen, {wider:.2f} SD."
    times = (wider / size) ** 2
    return (
        f"Whether {k} is upstream of {i} is open ({change}): only a change above {wider:.2f} SD would have been seen. "
        f"{f'{times:.0f}' if times >= 10 else f'{times:.1f}'} times as many cells of perturbations of {i} would show one of {size:g} SD."
    )


def _not_ruled_out(pair: Mapping[str, Any]) -> str:
    """What else could explain the change, by the guards that the pair does not pass."""
    passed = pair["guards"].split(", ")
    others = [
        why.format(k=pair["source"], i=pair["target"]) + f" (guard {name})"
        for name, why in OTHERWISE.items()
        if name not in passed
    ]
    return f"Not ruled out: {'; '.join(others)}."


def _number(value: float, sign: str = "-", decimals: int = 2) -> str:
    """A number without a minus before a zero, with a true minus sign."""
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}".replace("-", "−")


def told(pairs: pd.DataFrame, facts: RunInfo) -> pd.DataFrame:
    """``pairs.csv`` of a run with a column ``sentence``."""
    assert facts.discovery is not None and facts.discovery.pairs is not None
    size, rows = facts.discovery.pairs.size, _rows(pairs)
    told_ = [
        f"In {row['context']}: {sentence(row, size)}" if row.get("context") else sentence(row, size) for row in rows
    ]
    return pairs.assign(sentence=pd.Series(told_, pairs.index, dtype=object))


def _rows(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in pairs.to_dict("records")]


def mark(pair: Mapping[str, Any]) -> str:
    """What stands for a pair in a matrix."""
    known = STATUSES.get(pair["status"])
    return "?" if known is None else known.mark.replace("±", "+" if pair["change"] > 0 else "−")


def matrix(pairs: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Marks of all pairs, sources by targets, both in the order of ``names``; the diagonal is empty. Where contexts differ,
    theirs are joined by "/".
    """
    marks = pairs.assign(mark=pd.Series([mark(pair) for pair in _rows(pairs)], pairs.index, dtype=object))
    wide = marks.groupby(["source", "target"])["mark"].agg("/".join).unstack()
    return wide.reindex(index=list(names), columns=list(names)).fillna("")


def by_status(pairs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The pairs of every status that occurs, the surest first."""
    groups = {str(status): part for status, part in pairs.groupby("status", sort=False)}
    order = [*(name for name in STATUSES if name in groups), *(name for name in groups if name not in STATUSES)]
    return {
        name: groups[name].sort_values("z", key=lambda z: -z.abs(), kind="stable", na_position="last") for name in order
    }


def counts(pairs: pd.DataFrame) -> str:
    """How many ordered pairs have each status."""
    parts = []
    for status, part in by_status(pairs).items():
        twice = f" ({len(part) // 2} seen from either side)" if status == "both ways" else ""
        parts.append(f"{len(part)} {status}{twice}")
    n = len(pairs.drop_duplicates(["source", "target"]))
    apart = f", with a status by context in {n - int((pairs['context'] == '').sum())}" if "context" in pairs else ""
    return f"{n} ordered pairs{apart}: {', '.join(parts)}" if parts else "one program, so no pair"


def legend(pairs: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Mark, status and meaning of every status that occurs; "±" stands for either sign."""
    return [(STATUSES[name].mark, name, STATUSES[name].means) for name in by_status(pairs) if name in STATUSES]


def why_no_pairs(facts: RunInfo) -> str:
    """Why a run has no ``pairs.csv``, in a sentence."""
    if facts.format == 1:
        return "This run was written before crlseq judged pairs of programs; fit again for them."
    if facts.without_effect:
        return "No perturbation has a detectable effect, so there are no programs and no pairs of them."
    if facts.discovery is None:
        return "No targets were found by likelihood, so pairs of programs are not judged."
    return "Under nonlinear equations pairs of programs are not judged."
