"""Puts the results of `crlseq benchmark --suite field` into docs/benchmarks.md, beside what other papers report.

    python scripts/field_table.py FOLDER

FOLDER is the suite's. What stands between the two marks in the page is replaced; docs/field.csv gets the row of every fit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- field_table.py: begin -->", "<!-- end -->"
# The method of the paper that a setting is from, in crlseq.
OWN = {
    "squires": "squires", "squires-soft": "squires", "heavy-tails": "varimax", "toy": "paper", "cauca": "cauca",
    **dict.fromkeys(("buchholz", "buchholz-noisy", "buchholz-10", "buchholz-20", "buchholz-network"), "contrastive"),
    **dict.fromkeys(("varici", "varici-soft", "varici-quadratic"), "score-linear"), "varici-pairs": "score",
    "varici-many": "multi-node",
}  # fmt: skip
# By the authors' code on their own settings, with 2,500 cells an environment and their seeds, unless another source is said.
REPORTED = {
    "squires": "SHD 0, 3, 2, 0, 1; MCC ≥ 0.997; with 25,000 cells SHD 0 in 5 of 5",
    "buchholz": "linear contrastive: SHD 2, 2, 2",
    "buchholz-network": "SHD 1, 3, 1; MCC 0.94–0.97; the paper: SHD 1.0–3.6, MCC 0.97–0.99",
    "varici": "SHD 0, 1, 0 at the best threshold, 6–7 at its own",
    "varici-quadratic": "SHD 2–8; MCC 0.79–0.98",
    "varici-pairs": "SHD 2–8; MCC 0.79–0.98",
    "varici-many": "SHD 1–5",
    "cauca": "MCC 0.85 (0.76–0.94) with known targets and graph, median and quartiles of the paper's 30 runs",
}


def number(value: float, decimals: int = 2) -> str:
    """A number of the table; a dash where there is none."""
    return "–" if pd.isna(value) else f"{value:.{decimals}f}".removesuffix(".0")


def scored(rows: pd.DataFrame, method: str) -> str:
    """SHD and MCC of a method on a scenario, and its verdicts."""
    own = rows[rows["method"] == method]
    if not len(own):
        return "–"
    row = own.iloc[0]
    if row["refused"] == row["runs"]:
        return "refuses"
    return f"SHD {number(row['shd'], 1)}, MCC {number(row['mcc'])}; {row['verdict']}"


def by_scenario(table: pd.DataFrame) -> list[str]:
    """One line a scenario: what its authors report, their method in crlseq, crlseq's default, and the empty graph."""
    lines = [
        "| setting | authors | their method in crlseq | crlseq, default | empty graph |",
        "|---|---|---|---|---|",
    ]
    for scenario in dict.fromkeys(table["scenario"]):
        rows = table[table["scenario"] == scenario]
        own = OWN.get(scenario)
        empty = rows.loc[rows["method"] == "empty", "shd"]
        cells = (
            f"`{scenario}`", REPORTED.get(scenario, ""), f"`{own}`: {scored(rows, own)}" if own else "",
            scored(rows, "default"), f"SHD {number(empty.iloc[0], 1)}" if len(empty) else "–",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def by_method(table: pd.DataFrame) -> list[str]:
    """One line a method, over all scenarios."""
    lines = [
        "| method | claims that are right | fits | refused | MCC | targets | ancestor F1 | SHD | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(table["method"]):
        rows = table[table["method"] == method]
        sums = {name: int(rows[name].sum()) for name in ("claims_right", "claims", "runs", "refused")}
        median = {
            name: rows[name].dropna().quantile(0.5)
            for name in ("mcc", "target_accuracy", "ancestor_f1", "shd", "seconds")
        }
        scores = " | ".join(number(median[name]) for name in ("mcc", "target_accuracy", "ancestor_f1"))
        lines.append(
            f"| `{method}` | {sums['claims_right']} of {sums['claims']} | {sums['runs']} | {sums['refused']} | {scores} |"
            f" {number(median['shd'], 1)} | {number(median['seconds'], 1)} |"
        )
    return lines


def renewed(page: str, table: pd.DataFrame) -> str:
    """The page with the tables of today."""
    before, rest = page.split(BEGIN)
    after = rest.split(END, 1)[1]
    fits = table[~table["method"].isin(["random", "empty"])]
    said = f"Medians of {int(fits['runs'].sum())} fits, {int(fits['runs'].max())} at most of a method on a setting:"
    tables = [*by_scenario(table), "", *by_method(table)]
    return "\n".join([f"{before}{BEGIN}", said, "", *tables, f"{END}{after}"])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pd.read_csv(folder / "benchmark.csv").to_csv(PAGE.parent / "field.csv", index=False, float_format="%.4g")
    results = pd.read_csv(folder / "suite.csv")
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
