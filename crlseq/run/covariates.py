"""Covariates in words: which perturbations change what, and whether they do anything beyond it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from crlseq.errors import few
from crlseq.run.schema import DETECTABLE_FDR

NAMED = 6  # perturbations that a sentence names


def covariates_in_words(table: pd.DataFrame | None) -> list[str]:
    """A sentence for each covariate that perturbations change or differ in, and one for those that do nothing beyond."""
    if table is None or table.empty:
        return []
    words = []
    n = table["perturbation"].nunique()
    for name, rows in table.groupby("covariate", sort=False):
        sure = rows[rows["fdr"] <= DETECTABLE_FDR]
        who = [*dict.fromkeys(sure["perturbation"])]
        if not who:
            continue
        rate = f"(FDR {DETECTABLE_FDR:.0%}): {few([_told(sure, one) for one in who], NAMED)}"
        many = f"{len(who)} of {n} perturbations"
        if sure["kept"].any():
            verb = "changes" if len(who) == 1 else "change"
            words.append(f"{many} {verb} {name} {rate}. That is kept as their effect.")
        else:
            verb = "has cells that differ" if len(who) == 1 else "have cells that differ"
            words.append(f"{many} {verb} from controls in {name} {rate}. That is taken off.")
    tested = table[table["kept"] & table["beyond"].notna()]
    for one, rows in tested[tested["beyond"] > DETECTABLE_FDR].groupby("perturbation", sort=False):
        changed = few([*dict.fromkeys(rows["covariate"])])
        words.append(
            f"{one} changes {changed}, and no effect beyond that is detectable (FDR {rows['beyond'].iloc[0]:.2g})."
        )
    return words


def changes_in_words(table: pd.DataFrame | None, perturbation: str) -> list[str]:
    """A sentence on the covariates in which the cells of a perturbation surely differ from controls; none without any."""
    if table is None:
        return []
    sure = table[(table["perturbation"] == perturbation) & (table["fdr"] <= DETECTABLE_FDR)]
    told = [f"{row['covariate']} by {_size(row)} (FDR {row['fdr']:.2g})" for row in sure.to_dict("records")]
    return [f"Its cells differ from controls in {few(told)}."] if told else []


def _told(rows: pd.DataFrame, perturbation: str) -> str:
    """``CDK1 (+1.20 SD)`` or ``CDK1 (+31 % of cells G2M)``, by the surest level."""
    return f"{perturbation} ({_size(rows[rows['perturbation'] == perturbation].iloc[0].to_dict())})"


def _size(row: dict[Any, Any]) -> str:
    share = f"{100 * row['difference']:+.0f} % of cells {row['level']}"
    return (share if row["level"] else f"{row['difference']:+.2f} SD").replace("-", "−", 1)


def composition(table: pd.DataFrame, covariate: str, most: int) -> pd.DataFrame:
    """Rows of one covariate for the perturbations that surely differ most, at most so many, with `where` in that order."""
    rows = table[table["covariate"] == covariate]
    surest = rows.groupby("perturbation", sort=False).agg(
        fdr=("fdr", "min"), size=("difference", lambda own: own.abs().max())
    )
    order = surest.sort_values(["fdr", "size"], ascending=[True, False], kind="stable").index[:most]
    return rows[rows["perturbation"].isin(order)].assign(
        where=lambda part: order.get_indexer(pd.Index(part["perturbation"]))
    )
