"""Mean effects of perturbations: their cells against controls of the same batches, with squared errors."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import TypeVar

import numpy as np

from crlseq.data.dataset import PerturbSeqData

MIN_CELLS = 2
Made = TypeVar("Made")

Controls = dict[int, tuple[np.ndarray, np.ndarray, int]]  # mean, variance and number of controls, by batch


def controls_by_batch(data: PerturbSeqData, controls: np.ndarray) -> Controls:
    """Mean, variance and number of the controls of each batch; of all controls under -1."""
    return by_batch(data, controls, lambda own: (*_moments(data, own), len(own)))


def by_batch(data: PerturbSeqData, controls: np.ndarray, make: Callable[[np.ndarray], Made]) -> dict[int, Made]:
    """``make(own)`` of all controls under -1, and of those of each batch that has `MIN_CELLS`."""
    batch = data.batch[controls]
    parts = {int(b): own for b in np.unique(batch) if len(own := controls[batch == b]) >= MIN_CELLS}
    return {place: make(own) for place, own in {-1: controls, **parts}.items()}


def cells_alone(data: PerturbSeqData, cells: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """The ``cells`` (by condition) of each perturbation that has `MIN_CELLS` of them by itself."""
    pairs = zip(data.conditions, cells, strict=True)
    return {parts[0]: own for parts, own in pairs if len(parts) == 1 and len(own) >= MIN_CELLS}


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
