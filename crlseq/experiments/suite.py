"""A suite: many methods on many scenarios, as one page and one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from crlseq._version import __version__
from crlseq.experiments.benchmark import COLUMNS, benchmark, read_rows
from crlseq.experiments.scenarios import BASELINES, QUICK, SUITES, Suite
from crlseq.report.page import write_page
from crlseq.storage.csv import write_csv

NO_CLAIM = "not identified"
MEDIANS = ("mcc", "target_accuracy", "ancestor_f1", "shd", "seconds")


def run_suite(
    folder: str | Path,
    name: str = "field",
    quick: bool = False,
    threads: int | None = None,
    jobs: int = 1,
    note: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """The benchmark of a suite's scenarios, seeds and methods; writes ``suite.csv`` and ``suite.html`` as well.

    One row per scenario and method: ``group, scenario, method, runs, refused``, medians of ``mcc, target_accuracy,
    ancestor_f1, shd, seconds`` over the seeds, ``claims`` and ``claims_right`` (see `right`), ``verdict`` and ``reason``, the
    first one of a refusal. An unfinished suite goes on where it stopped; both files are of what there is.

    Raises
    ------
    UsageError, InputError
        As `crlseq.experiments.benchmark.benchmark`.
    """
    suite = (QUICK if quick else SUITES)[name]
    place = Path(folder)
    scenarios = [each for group in suite.scenarios.values() for each in group]
    try:
        benchmark(
            folder, scenarios=scenarios, seeds=suite.seeds, methods=suite.methods, threads=threads, jobs=jobs,
            simulator=suite.simulator, of_methods=suite.of_methods, note=note,
        )  # fmt: skip
    finally:  # of what there is, if it is interrupted
        table = summarised(pd.DataFrame(read_rows(place / "benchmark.csv"), columns=COLUMNS), suite)
        if len(table):
            write_csv(place / "suite.csv", table)
            n_all = len(scenarios) * len(suite.seeds) * len(suite.methods)
            write_page("suite.html.j2", place / "suite.html", page_of(table, suite, name, n_all))
    return table


def right(row: Mapping[str, Any] | pd.Series) -> float:
    """Whether what a fit claims is true; NaN if it claims nothing.

    "identified" and "partly identified": every declared edge, and for the second every pair called upstream; "ancestry
    only": every edge leads from an ancestor to a descendant. Where there is no true edge every one is wrong.
    """
    verdict = row["verdict"]
    if not isinstance(verdict, str) or verdict == NO_CLAIM:
        return float("nan")
    if verdict == "ancestry only":
        return float(row["ancestor_precision"] == 1 and (row["edges_true"] > 0 or row["edges_wrong"] == 0))
    wrong_pairs = verdict == "partly identified" and row["upstream_wrong"] > 0
    return float(row["edges_wrong"] == 0 and not wrong_pairs)


def summarised(rows: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """The table of `run_suite` from rows of a benchmark."""
    rows = rows.assign(right=[right(row) for _, row in rows.iterrows()])
    order = [*suite.methods, *BASELINES]
    found = []
    for group, scenarios in suite.scenarios.items():
        for scenario in scenarios:
            for method in order:
                own = rows[(rows["scenario"] == scenario) & (rows["method"] == method)]
                if len(own):
                    found.append({"group": group, "scenario": scenario, "method": method} | _counted(own))
    return pd.DataFrame(found)


def _counted(own: pd.DataFrame) -> dict[str, Any]:
    """What is said of a method's rows."""
    fitted = own[own["error"].isna()]
    verdicts = fitted["verdict"].value_counts()
    reasons = own["error"].dropna()
    return {
        "runs": len(own), "refused": len(reasons),
        **{name: _median(fitted[name]) for name in MEDIANS},
        "claims": int(own["right"].notna().sum()), "claims_right": int(own["right"].sum()),
        "verdict": ", ".join(f"{verdict} {n}" for verdict, n in verdicts.items()),
        "reason": reasons.iloc[0] if len(reasons) else "",
    }  # fmt: skip


def page_of(table: pd.DataFrame, suite: Suite, name: str, n_all: int) -> dict[str, Any]:
    """What the page is filled with."""
    fitted = table[~table["method"].isin(BASELINES)]
    order = [method for method in (*suite.methods, *BASELINES) if method in set(table["method"])]
    groups = [
        {
            "title": group,
            "scenarios": [
                {
                    "name": scenario,
                    "rows": (rows := table[table["scenario"] == scenario]).to_dict("records"),
                    "reasons": rows.loc[rows["reason"] != "", ["method", "reason"]].itertuples(index=False),
                }
                for scenario in scenarios
                if scenario in set(table["scenario"])
            ],
        }
        for group, scenarios in suite.scenarios.items()
        if group in set(table["group"])
    ]
    return {
        "name": name,
        "version": __version__,
        "seeds": len(suite.seeds),
        "n_done": int(fitted["runs"].sum()),
        "n_all": n_all,
        "methods": [_over_scenarios(table[table["method"] == method]) for method in order],
        "groups": groups,
    }


def _over_scenarios(rows: pd.DataFrame) -> dict[str, Any]:
    """One method over all scenarios: medians, and sums of counts."""
    sums = {name: int(rows[name].sum()) for name in ("runs", "refused", "claims", "claims_right")}
    return {"method": rows["method"].iloc[0], **sums, **{name: _median(rows[name]) for name in MEDIANS}}


def _median(values: pd.Series) -> float:
    """NaN without a value, and without a warning."""
    return float(values.dropna().astype(float).quantile(0.5))
