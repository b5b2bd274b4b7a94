"""The map from perturbations to programs: target weights, shifts and retentions in users' units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.readout.programs import Programs


@dataclass(frozen=True)
class Interventions:
    """One row per single perturbation.

    ``weight`` (K, p) points of the simplex; ``target`` (K,) the program of the largest weight, -1
    without a claim (all else is NaN then); ``shift`` (K,)
    what that program is moved by, in its standard deviations; ``retention`` (K,) share of its parents'
    contribution that it keeps; ``noise_scale`` (K,) factor on its own noise.
    """

    weight: np.ndarray
    target: np.ndarray
    shift: np.ndarray
    retention: np.ndarray
    noise_scale: np.ndarray


@torch.no_grad()
def find_interventions(model: DiscrepancyVAE, programs: Programs, claims: np.ndarray | None = None) -> Interventions:
    """Read the interventions off the fitted model, each perturbation alone; ``claims`` (K,) bool, None for all."""
    n = len(model.scm.shift)
    alone = torch.arange(n, device=model.scm.shift.device)[:, None]  # (K, 1)
    weights = model.target_weights(alone)
    mechanism = model.scm.mechanism(alone, weights)
    weight = weights[:, 0].cpu().double().numpy()
    rows, target = np.arange(n), weight.argmax(1)
    claimed = (weight.max(1) > 0) & (True if claims is None else claims)

    def of_target(values: torch.Tensor) -> np.ndarray:
        return np.where(claimed, values.cpu().double().numpy()[rows, target], np.nan)

    return Interventions(
        weight=np.where(claimed.reshape(-1, 1), weight, np.nan),
        target=np.where(claimed, target, -1),
        shift=of_target(mechanism.shift) / programs.scale[target],
        retention=of_target(mechanism.keep),
        noise_scale=of_target(mechanism.log_scale.exp()),
    )
