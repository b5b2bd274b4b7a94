"""``covariates.csv``: what perturbations do to covariates, or how their cells differ in what was there before."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crlseq.data.dataset import PerturbSeqData
from crlseq.run.columns import COVARIATE_COLUMNS
from crlseq.run.tables import significant


def covariate_table(data: PerturbSeqData, beyond: np.ndarray) -> pd.DataFrame | None:
    """`COVARIATE_COLUMNS` of every condition, covariate and level, those first that surely differ; None without covariates.

    ``beyond`` (K,) false discovery rates of effects beyond all covariates (`crlseq.discovery.beyond_covariates`).
    """
    found = data.adjustment
    if found is None:
        return None
    table = found.changes
    condition, column = table["condition"].to_numpy(), table["column"].to_numpy()
    names = np.array([each.name for each in found.columns], dtype=object)
    kept = found.kept[condition] != 0
    of_condition = np.array([beyond[parts[0]] if len(parts) == 1 else np.nan for parts in data.conditions])
    table = table.assign(
        perturbation=np.array(data.condition_names, dtype=object)[condition],
        covariate=names[found.owner[column]],
        level=np.array(found.levels, dtype=object)[column],
        kept=kept[np.arange(len(table)), column],
        beyond=of_condition[condition],
        **{
            name: significant(table[name].to_numpy())
            for name in ("mean", "control", "difference", "se", "p_value", "fdr")
        },
    )
    order = np.lexsort((column, condition, table["p_value"].fillna(1.0), table["fdr"].fillna(1.0)))
    return table[list(COVARIATE_COLUMNS)].iloc[order].reset_index(drop=True)
