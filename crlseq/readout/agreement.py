"""Do the tables agree with the cells? How much of a perturbation's effect its program carries, and whether its cells contradict
that program.

With the mean change m of a perturbation's cells against controls, its penetrance pi, shift a and its program's total effect T,
``pi a T`` is what the tables say of it. T is here taken from the *other* perturbations of the program, and genes that the
perturbation targets are left out.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import norm

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.mean_effects import cells_alone, controls_by_batch, mean_effect
from crlseq.discovery.effects import benjamini_hochberg
from crlseq.readout.programs import Interventions, Programs
from crlseq.run.columns import AGREEMENT
from crlseq.run.schema import DETECTABLE_FDR
from crlseq.threads import in_parallel

LEAST, MOST = 0.5, 2.0  # measured over told effect, along it: beyond, the program is not what the perturbation does


def effect_agreement(
    data: PerturbSeqData, programs: Programs, interventions: Interventions, penetrance: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns `AGREEMENT`, (K,) each, NaN where they cannot be told; ``penetrance`` (K,).

    ``explained``: (|m|^2 - |m - pi a T|^2) / (|m|^2 - its squared errors), T with the perturbation's own part.
    ``agrees``: the coefficient of m on pi a T by others, 1 where they agree; ``agrees_se``; ``disagrees``: it is surely
    (FDR 5 %) below `LEAST` or above `MOST`. Where more than half of the squares of what others tell is their own noise, they
    tell nothing.
    """
    found = {name: np.full(len(interventions.target), np.nan) for name in AGREEMENT}  # some are told elsewhere
    cells = data.cells_by_condition(splits.TRAIN)
    controls = controls_by_batch(data, cells[0])
    alone = cells_alone(data, cells)
    some_controls = data.x[data.control_pool(splits.TRAIN)]  # read once; of a store those in memory
    strength, target = penetrance * interventions.shift, interventions.target
    product, square, spread = np.zeros((3, *programs.total_effect.shape))
    for k, own in alone.items():
        if target[k] >= 0:
            weight = len(own) * strength[k] * _tells(data, k)
            change, noise, _ = mean_effect(data, own, controls)
            product[target[k]] += weight * change
            spread[target[k]] += weight**2 * noise
            square[target[k]] += weight * strength[k]

    def told_of(k: int) -> tuple[float, float, float]:
        """``explained``, ``agrees`` and ``agrees_se`` of a perturbation."""
        explained, agrees, error_of = np.full(3, np.nan)
        change, noise, shared = mean_effect(data, alone[k], controls)
        told = strength[k] * programs.total_effect[target[k]]
        known = ~np.isnan(told)
        size = float((change**2 - noise - shared)[known].sum())
        if size > 0:
            # What of the noise is in the program, too, is no effect.
            explained = min(float((change**2 - (change - told) ** 2)[known].sum()) / size, 1.0)
        weight = len(alone[k]) * strength[k] * _tells(data, k)
        others = square[target[k]] - weight * strength[k]
        factor = np.divide(strength[k] * _tells(data, k), others, out=np.zeros_like(told), where=others > 0)
        told = (product[target[k]] - weight * change) * factor
        error = (spread[target[k]] - weight**2 * noise).clip(0.0) * factor**2  # of what others tell, in its squares too
        length = float(told @ told - error.sum())
        if length > float(error.sum()):
            groups = (data.x[alone[k]], len(alone[k])), (some_controls, len(cells[0]))
            along = [float((x @ told.astype(np.float32)).var(ddof=1, dtype=np.float64)) / n for x, n in groups]
            along.append(float((change**2 * error).sum()))
            agrees, error_of = float(change @ told) / length, np.sqrt(sum(along)) / length
        return explained, agrees, error_of

    chosen = [k for k in alone if target[k] >= 0]
    for k, row in zip(chosen, in_parallel(told_of, chosen, torch.get_num_threads()), strict=True):
        found["explained"][k], found["agrees"][k], found["agrees_se"][k] = row
    beyond = np.maximum(LEAST - found["agrees"], found["agrees"] - MOST) / found["agrees_se"]
    fdr = benjamini_hochberg(norm.sf(beyond))
    found["disagrees"] = np.where(np.isnan(beyond), np.nan, (fdr <= DETECTABLE_FDR).astype(float))
    return found


def _tells(data: PerturbSeqData, k: int) -> np.ndarray:
    """(G,) 1 of genes that a perturbation says something of: those it does not target."""
    tells = np.ones(data.n_genes)
    tells[list(data.own_genes[k])] = 0.0
    return tells
