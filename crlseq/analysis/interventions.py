"""The map from perturbations to programs: target weights, shifts and retentions in users' units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from crlseq.analysis.programs import Programs
from crlseq.model.discrepancy_vae import DiscrepancyVAE


@dataclass(frozen=True)
class Interventions:
    """One row a single perturbation.

    ``weight`` (K, p) points of the simplex; ``target`` (K,) the program of the largest weight; ``shift`` (K,)
    what that program is moved by, in its standard deviations; ``retention`` (K,) share of its parents'
    contribution that it keeps; ``noise_scale`` (K,) factor on its own noise.
    """

    weight: np.ndarray
    target: np.ndarray
    shift: np.ndarray
    retention: np.ndarray
    noise_scale: np.ndarray


@torch.no_grad()
def find_interventions(model: DiscrepancyVAE, programs: Programs) -> Interventions:
    """Read the interventions off the fitted model, each perturbation alone."""
    n = len(model.scm.shift)
    alone = torch.arange(n, device=model.scm.shift.device)[:, None]  # (K, 1)
    weights = model.target_weights(alone)
    mechanism = model.scm.mechanism(alone, weights)
    weight = weights[:, 0].cpu().double().numpy()
    rows, target = np.arange(n), weight.argmax(1)
    return Interventions(
        weight=weight,
        target=target,
        shift=mechanism.shift.cpu().double().numpy()[rows, target] / programs.scale[target],
        retention=mechanism.keep.cpu().double().numpy()[rows, target],
        noise_scale=mechanism.log_scale.exp().cpu().double().numpy()[rows, target],
    )
