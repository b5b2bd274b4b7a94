"""Lost chromosome arms in words: whose cells lost which genes, and which programs are made of such losses."""

from __future__ import annotations

import pandas as pd

from crlseq.errors import few
from crlseq.run.schema import DETECTABLE_FDR

NAMED = 8  # perturbations with a sentence of their own
WHERE = {
    "distal": "beyond it on {at}", "proximal": "between it and the centromere on {at}", "other arm": "on {at}",
    "before": "before it on chromosome {at}", "after": "behind it on chromosome {at}",
}  # fmt: skip


def losses_in_words(arms: pd.DataFrame | None) -> list[str]:
    """A sentence for each perturbation whose cells lost a part of their chromosome, the surest first; of many, the rest as one."""
    if arms is None:
        return []
    lost = arms[arms["lost"]]
    by = {str(name): rows for name, rows in lost.groupby("perturbation", sort=False)}
    names = [*by]
    words = [_loss(name, by[name]) for name in names[:NAMED]]
    if len(names) > NAMED:
        words.append(
            f"Cells of {len(names) - NAMED} more perturbations may have lost a part of their chromosome (arms.csv)."
        )
    return words


def _loss(name: str, rows: pd.DataFrame) -> str:
    """``STAT1: the 40 fitted genes beyond it on 2q fall by 0.30 ± 0.04: ...``"""
    told = [
        f"the {row['n_genes']} fitted genes {WHERE[row['part']].format(at=row['chromosome'] + row['arm'])} fall by "
        f"{-row['change']:.2f} ± {row['se']:.2f}"
        for row in rows.to_dict("records")
    ]
    return f"{name}: {' and '.join(told)} (log expression): its cells may have lost that part of the chromosome."


def programs_in_words(arms: pd.DataFrame | None, interventions: pd.DataFrame) -> list[str]:
    """A sentence for each program with total effects that lower, as its driver does, what a driver's cells lost."""
    if arms is None:
        return []
    detected = interventions.loc[interventions["fdr"] <= DETECTABLE_FDR, ["perturbation", "program"]]
    own = arms[arms["lost"] & (arms["program_fdr"] <= DETECTABLE_FDR)].merge(detected, on="perturbation")
    drivers = detected["program"].value_counts()
    return [
        f"{program} may in part be a lost piece of a chromosome: its genes there fall, as in the cells of "
        f"{few([*dict.fromkeys(rows['perturbation'])])} ({rows['perturbation'].nunique()} of its {drivers[program]} drivers)."
        for program, rows in own.groupby("program", sort=True)
    ]
