"""The genes that a prediction changes most."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

from crlseq.prediction.predict import NORMAL_QUANTILE


def top_changes(virtual: ad.AnnData, perturbation: str, n: int = 10) -> pd.DataFrame:
    """``gene, change, error`` of at most n genes with the largest absolute effects, the largest first; fewer where fewer change.

    ``virtual`` is what `crlseq.prediction.predict.predict` returned, ``perturbation`` one of its predictions. ``change`` is
    in the fit's values, as that of ``effects.csv``: of natural logarithms, unless values are continuous. ``error`` is the
    standard error, from the half width of the 95 % interval.
    """
    place = list(virtual.uns["crlseq_prediction"]["perturbations"]).index(perturbation)
    effect, lower, upper = (
        np.asarray(virtual.varm[f"crlseq_{name}"])[:, place] for name in ("effect", "effect_lower", "effect_upper")
    )
    names = virtual.var.get("symbol", virtual.var_names)
    first = np.argsort(-np.abs(effect), kind="stable")[:n]
    first = first[effect[first] != 0]
    error = (upper - lower) / (2 * NORMAL_QUANTILE)
    return pd.DataFrame({
        "gene": np.asarray(names, dtype=object)[first], "change": effect[first], "error": error[first],
    })  # fmt: skip
