"""What the latents leave over of single effects: a perturbation's own target first of all.

The latents are few, so that a knock-out's own transcript, and whatever else one perturbation alone does, is no program.
Effects in hit cells are estimated from all of them together (`effects.estimate_effects`), and what the latents do not make
of such an effect is carried past them: the single effect of the model, through latents and past them, is the estimate.

A part of what is left over all perturbations share (`shared_effect`): the effect of being perturbed at all (Systema: Vinas
Torne et al. 2025), which a combination has once and not once for each of its parts. The error of the controls' means,
which measured effects share as well, is in none of the estimates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.mean_effects import cells_alone, controls_by_batch, mean_effect, shares_of_controls
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.threads import counted, in_parallel
from crlseq.training.effects import estimate_effects

SOURCE_CELLS = 500  # controls whose latents carry the effect


@torch.no_grad()
def measure_missed(model: DiscrepancyVAE, data: PerturbSeqData, seed: int) -> None:
    """Write what the latents miss of single perturbations into `model`; 0 for those without cells of their own."""
    cells = data.cells_by_condition(splits.TRAIN)
    controls = controls_by_batch(data, cells[0])
    alone = cells_alone(data, cells)
    if not alone:
        return
    perturbations = list(alone)
    share = model.penetrance[perturbations].cpu().double().numpy()[:, None]
    places = {batch: i for i, batch in enumerate(controls)}
    shares = np.zeros((len(alone), len(places)))
    # In place: of many perturbations each such array is as large as many cells.
    measured, noise = (np.empty((len(alone), data.n_genes)) for _ in range(2))
    changes = in_parallel(lambda own: mean_effect(data, own, controls)[:2], alone.values(), torch.get_num_threads())
    for k, (own, change) in enumerate(zip(counted(alone.values(), len(alone)), changes, strict=True)):
        measured[k], noise[k] = change
        for batch, part in shares_of_controls(data.batch[own], controls).items():
            shares[k, places[batch]] = part
    measured /= share
    noise /= share**2
    used = shares.any(0)
    shares = shares[:, used]
    control_noise = np.stack([spread / n for _, spread, n in controls.values()])[used]
    found = estimate_effects(measured, noise, shares / share, control_noise)
    del measured, noise
    some = np.sort(np.random.default_rng([seed, 8]).choice(cells[0], min(SOURCE_CELLS, len(cells[0])), replace=False))
    left, squared = found.effect, np.square(found.error, out=found.error)
    _take_latents(left, model, data.dense(some), perturbations)
    common, common_squared = shared_effect(left)
    left -= common
    squared -= common_squared
    model.residual[perturbations] = torch.from_numpy(left).to(model.residual)
    error = np.sqrt(squared.clip(0.0, out=squared), out=squared)
    model.residual_error[perturbations] = torch.from_numpy(error).to(model.residual_error)
    model.common.copy_(torch.from_numpy(common))
    model.common_error.copy_(torch.from_numpy(np.sqrt(common_squared)))
    model.control_error.copy_(torch.from_numpy(shares.mean(0) @ found.control_error))


@torch.no_grad()
def measure_errors(model: DiscrepancyVAE, data: PerturbSeqData) -> None:
    """Write into a `model` without programs how large the effects may be that were not detected: the standard errors of the
    measured ones.
    """
    cells = data.cells_by_condition(splits.TRAIN)
    controls = controls_by_batch(data, cells[0])
    for k, own in cells_alone(data, cells).items():
        _, noise, control_noise = mean_effect(data, own, controls)
        model.residual_error[k] = torch.from_numpy(np.sqrt(noise + control_noise)).to(model.residual_error)


def _take_latents(effects: np.ndarray, model: DiscrepancyVAE, control: np.ndarray, perturbations: list[int]) -> None:
    """Take from effects (n, G) the mean change through the latents of hit cells, which start as `control` cells."""
    weight = model.encoder.hidden.weight
    z = model.encoder(torch.from_numpy(control).to(weight.device, weight.dtype)[None])[0]
    before: Tensor = model.decoder.mean(model.scm(z))[0]
    for effect, perturbation in zip(effects, perturbations, strict=True):
        latents = model.intervene(z, torch.tensor([[perturbation]], device=weight.device))
        effect -= (model.decoder.mean(latents)[0] - before).cpu().double().numpy()


def shared_effect(effects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and variances (G,) of what effects (n, G) have in common.

    The mean of few perturbations is made of their own effects: of its squares only the share counts that is more than
    their spread makes (James and Stein 1961).
    """
    n, mean = len(effects), effects.mean(0)
    if n < 2:
        return np.zeros_like(mean), np.zeros_like(mean)
    spread = sum(((effect - mean) ** 2 for effect in effects), 0 * mean) / (n * (n - 1))
    agreed = max(0.0, 1 - float(spread.sum()) / max(float((mean**2).sum()), 1e-30))
    return agreed * mean, agreed * spread
