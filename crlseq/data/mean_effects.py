"""Mean effects of perturbations: their cells against controls of the same batches, with squared errors."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from crlseq.data.dataset import PerturbSeqData

MIN_CELLS = 2

Controls = dict[int, tuple[np.ndarray, np.ndarray, int]]  # mean, variance and number of controls, by batch


def controls_by_batch(data: PerturbSeqData, controls: np.ndarray) -> Controls:
    """Mean, variance and number of the controls of each batch; of all controls under -1."""
    found = {-1: (*_moments(data, controls), len(controls))}
    for b in np.unique(data.batch[controls]):
        own = controls[data.batch[controls] == b]
        if len(own) >= MIN_CELLS:
            found[int(b)] = (*_moments(data, own), len(own))
    return found


def mean_effect(
    data: PerturbSeqData, cells: np.ndarray, controls: Controls
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of cells minus that of controls of the same batches; squared errors of the cells and of the controls; (G,)."""
    mean, variance = _moments(data, cells)
    effect, squared = mean.copy(), np.zeros_like(mean)
    for place, share in shares_of_controls(data.batch[cells], controls).items():
        center, spread, n = controls[place]
        effect -= share * center
        squared = squared + share**2 * spread / n
    if data.adjustment is not None:
        squared = squared + data.adjustment.variance(cells) * controls[-1][1]
    return effect, variance / len(cells), squared


def shares_of_controls(batch: np.ndarray, controls: Container[int]) -> dict[int, float]:
    """Share of the cells, of these batches, that each entry of `controls` is the comparison of; batches without controls
    share those of all, under -1.
    """
    batches, counts = np.unique(batch, return_counts=True)
    shares: dict[int, float] = {}
    for b, n in zip(batches, counts, strict=True):
        place = int(b) if int(b) in controls else -1
        shares[place] = shares.get(place, 0.0) + n / len(batch)
    return shares


def _moments(data: PerturbSeqData, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance (G,) of cells."""
    mean, square = data.moments(cells)
    variance = np.maximum(square - mean**2, 0.0) * len(cells) / max(len(cells) - 1, 1)
    if data.adjustment is not None:
        mean = mean - data.adjustment.mean(cells) @ data.covariate_slopes
    return mean, variance
