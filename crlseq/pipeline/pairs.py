"""``pairs.csv`` of what interventions change."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crlseq.discovery.pairs import GUARDS, STATUSES, Bools, Pairs
from crlseq.run.tables import pair_table


def pairs_of(pairs: Pairs, robust: Bools, sign: np.ndarray) -> pd.DataFrame:
    """The table; ``sign`` (p,) of the latents' programs."""
    passed = np.full(robust.shape, "", dtype=object)
    for k, i in np.argwhere(pairs.guards.any(0)):
        passed[k, i] = ", ".join(name for name, on in zip(GUARDS, pairs.guards[:, k, i], strict=True) if on)
    status = np.asarray(STATUSES, dtype=object)[pairs.status]
    change = pairs.change * np.outer(sign, sign)
    return pair_table(change, pairs.error, pairs.fdr, status, passed, pairs.detectable, robust)
