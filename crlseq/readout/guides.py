"""``guides.csv``: each guide beside the others of its gene."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.readout.effects import control_sums, measured_effect, own_transcript
from crlseq.run.columns import GUIDE_COLUMNS


def guide_table(data: PerturbSeqData, guides: pd.DataFrame, hit: np.ndarray | None) -> pd.DataFrame:
    """`GUIDE_COLUMNS` of the guides that were compared (`crlseq.discovery.guide_agreement.guide_agreement`), the weakest first.

    ``knock_down`` is the log2 fold change of the own transcript, NaN where it is not fitted; ``penetrance`` the mean probability
    that a cell was hit, by ``hit`` (cells,), NaN where it cannot be told.
    """
    columns = {name: np.full(len(guides), np.nan) for name in ("knock_down", "knock_down_se", "penetrance")}
    if data.guides is not None and len(guides):
        controls = control_sums(data, data.cells(0, splits.TRAIN, splits.VALIDATION))
        number = {name: i for i, name in enumerate(data.guides.names)}
        place = {name: k for k, name in enumerate(data.perturbation_names)}
        condition = {parts[0]: c for c, parts in enumerate(data.conditions) if len(parts) == 1}
        for row, (guide, gene) in enumerate(zip(guides["guide"], guides["perturbation"], strict=True)):
            k = place[gene]
            own = data.cells(condition[k], splits.TRAIN, splits.VALIDATION)
            own = own[data.guides.number[own] == number[guide]]
            if (transcript := own_transcript(data, k, controls)) is not None:
                effect = measured_effect(data, own, controls)
                columns["knock_down"][row] = effect.log2_fold_change[transcript]
                columns["knock_down_se"][row] = effect.log2_fold_change_se[transcript]
            if hit is not None and np.isfinite(hit[own]).any():
                columns["penetrance"][row] = np.nanmean(hit[own])
    table = guides.assign(**columns)[list(GUIDE_COLUMNS)]
    return table.sort_values(["fdr", "strength"], kind="stable").reset_index(drop=True)
