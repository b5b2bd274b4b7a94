"""``pairs.csv`` of what interventions change."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crlseq.discovery.pairs import GUARDS, STATUSES, Bools, Pairs
from crlseq.run.tables import program_names


def pair_table(pairs: Pairs, robust: Bools, sign: np.ndarray) -> pd.DataFrame:
    """`crlseq.run.columns.PAIR_COLUMNS` of every ordered pair, ``robust`` (p, p); ``sign`` (p,) of the latents' programs."""
    passed = np.full(robust.shape, "", dtype=object)
    for k, i in np.argwhere(pairs.guards.any(0)):
        passed[k, i] = ", ".join(name for name, on in zip(GUARDS, pairs.guards[:, k, i], strict=True) if on)
    change, error = pairs.change * np.outer(sign, sign), pairs.error
    with np.errstate(invalid="ignore"):
        z = np.where(np.isfinite(error), change / error, np.nan)
    columns = {
        "change": change, "se": error, "z": z, "z_reversed": z.T, "fdr": pairs.fdr,
        "status": np.asarray(STATUSES, dtype=object)[pairs.status], "guards": passed, "detectable": pairs.detectable,
        "robust": robust,
    }  # fmt: skip
    names, off = np.asarray(program_names(len(change)), dtype=object), ~np.eye(len(change), dtype=bool)
    source, target = np.nonzero(off)
    table = pd.DataFrame({"source": names[source], "target": names[target]} | {k: v[off] for k, v in columns.items()})
    table.loc[~np.isfinite(error[off]), ["change", "se", "fdr", "detectable"]] = np.nan
    return table
