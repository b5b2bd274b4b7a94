"""Virtual cells under a fitted condition, and how they compare with cells held out of the fit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from crlseq.analysis.metrics import l2_distance, pearson_delta, unbiased_mmd
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import median_bandwidth

SOURCE_CELLS = 1000
COMPARED_CELLS = 500


@torch.no_grad()
def virtual_cells(model: DiscrepancyVAE, control: np.ndarray, perturbations: np.ndarray, seed: int) -> np.ndarray:
    """(n, G) control cells as they would be under a condition: abduction, action, prediction.

    Parameters
    ----------
    control
        (n, G) expression of real control cells.
    perturbations
        (M,) single perturbations, filled up with -1.
    """
    weight = model.encoder.hidden.weight
    x = torch.from_numpy(control).to(weight.device, weight.dtype)[None]
    generator = torch.Generator(weight.device).manual_seed(seed)
    shape = (1, len(control), model.scm.graph.shape[0])
    eps = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
    output = model(x, torch.from_numpy(perturbations).to(weight.device)[None], eps)
    return np.asarray(output.virtual[0].cpu().double().numpy())


def evaluate_held_out(model: DiscrepancyVAE, data: PerturbSeqData, seed: int) -> pd.DataFrame:
    """One row a condition: virtual cells against held-out cells (test cells; validation cells without those).

    Columns ``condition``, ``split``, ``n_cells``, ``mmd2`` (unbiased, bandwidth = median squared distance of
    the condition's cells to real controls, the same for every model), ``mmd2_no_change`` (real control cells in
    place of virtual ones), ``pearson_delta``, ``l2``, ``l2_no_change``. Every change is taken against the mean
    of real control cells.
    """
    tested = bool((data.split == splits.TEST).any())
    code = splits.TEST if tested else splits.VALIDATION
    controls = data.cells(0, splits.TRAIN, splits.VALIDATION, splits.TEST)
    held_out = data.cells_by_condition(code)
    table = data.perturbation_table()
    rows = []
    for c in range(1, len(data.conditions)):
        cells = held_out[c]
        if len(cells) < 2:
            continue
        rng = np.random.default_rng([seed, 6, c])
        alike = controls[np.isin(data.batch[controls], data.batch[cells])]
        source = alike if len(alike) >= 2 else controls
        source = np.sort(rng.choice(source, min(SOURCE_CELLS, len(source)), replace=False))
        control, measured = data.dense(source).astype(float), data.dense(cells).astype(float)
        virtual = virtual_cells(model, control, table[c], seed)
        mean = control.mean(0)
        few = rng.permutation(len(measured))[:COMPARED_CELLS]
        some = rng.permutation(len(control))[:COMPARED_CELLS]
        both = torch.from_numpy(np.concatenate([control[some], measured[few]]))
        bandwidth = median_bandwidth(both)
        rows.append({
            "condition": data.condition_names[c],
            "split": splits.SPLITS[code],
            "n_cells": len(cells),
            "mmd2": unbiased_mmd(virtual[some], measured[few], bandwidth),
            "mmd2_no_change": unbiased_mmd(control[some], measured[few], bandwidth),
            "pearson_delta": pearson_delta(virtual.mean(0), measured.mean(0), mean),
            "l2": l2_distance(virtual.mean(0), measured.mean(0)),
            "l2_no_change": l2_distance(mean, measured.mean(0)),
        })  # fmt: skip
    columns = ["condition", "split", "n_cells", "mmd2", "mmd2_no_change", "pearson_delta", "l2", "l2_no_change"]
    return pd.DataFrame(rows, columns=columns)
