"""Metrics of predicted against measured cells of one condition; definitions and sources in each docstring."""

from __future__ import annotations

import numpy as np
import torch

from crlseq.model.losses import mmd_squared

MMD_KERNELS = 5


def pearson_delta(predicted: np.ndarray, measured: np.ndarray, control: np.ndarray) -> float:
    """corr(predicted - control, measured - control) of mean expressions (genes,); NaN if either does not vary."""
    a, b = predicted - control, measured - control
    a, b = a - a.mean(), b - b.mean()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else float("nan")


def l2_distance(predicted: np.ndarray, measured: np.ndarray) -> float:
    """|predicted - measured| of mean expressions (genes,)."""
    return float(np.linalg.norm(predicted - measured))


def unbiased_mmd(a: np.ndarray, b: np.ndarray, bandwidth: float) -> float:
    """Unbiased MMD^2 between cells (n, genes) and (m, genes), five kernels around `bandwidth` (Gretton et al. 2012)."""
    x, y = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    return float(mmd_squared(x, y, bandwidth, MMD_KERNELS))
