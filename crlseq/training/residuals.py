"""Gene effects that the programs miss: a perturbation's own target first of all.

The latents are few, so that a knock-out's own transcript, and whatever else one perturbation alone does, is no program.
What is left of its mean effect in hit cells, ``m_k = (mean of its cells - mean of controls) / penetrance - effect through
the latents``, is kept as far as it stands out of sampling noise, in three parts (`missed_effects`):

1. what all perturbations share, and stands out of the error of the controls' mean, which every m_k has in common: the
   effect of being perturbed at all (Systema: Vinas Torne et al. 2025), which a combination has once and not once for
   each of its parts;
2. gene by gene, by the empirical-Bayes posterior mean under a unimodal prior, a mixture of normals about 0 whose weights
   are fitted to all genes (Stephens 2017, Biostatistics 18, "False discovery rates: a new deal"; the same for 1);
3. of what that leaves, spread thin over many genes, one share of the whole vector (James and Stein 1961). What the
   perturbations still have in common is the controls' error: it is taken out, and the rest held against the noise of
   the perturbation's own cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.threads import in_parallel

SOURCE_CELLS = 500  # controls whose latents carry the effect
EM_STEPS = 50
NULL_COUNT = 10.0  # genes without effect that the prior has seen: in doubt there is none
MIN_CELLS = 2


@dataclass(frozen=True)
class Missed:
    """Posterior means and standard deviations: of the common effect (G,), and of each perturbation's own (n, G)."""

    common: np.ndarray
    common_error: np.ndarray
    own: np.ndarray
    own_error: np.ndarray


@torch.no_grad()
def measure_missed(model: DiscrepancyVAE, data: PerturbSeqData, seed: int) -> None:
    """Write what the latents miss of single perturbations into `model`; 0 for those without cells of their own."""
    cells = data.cells_by_condition(splits.TRAIN)
    by_batch = controls_by_batch(data, cells[0])
    rng = np.random.default_rng([seed, 8])
    some = np.sort(rng.choice(cells[0], min(SOURCE_CELLS, len(cells[0])), replace=False))
    weight = model.encoder.hidden.weight
    control = torch.from_numpy(data.dense(some)).to(weight.device, weight.dtype)[None]
    z = model.encoder(control)[0]
    before = model.decoder.mean(model.scm(z))[0]
    known = [c for c, p in enumerate(data.conditions) if len(p) == 1 and len(cells[c]) >= MIN_CELLS]
    perturbations = [data.conditions[c][0] for c in known]
    # In place: of many perturbations each such array is as large as many cells.
    measured, noise, control_noise = (np.empty((len(known), data.n_genes)) for _ in range(3))
    for k, c in enumerate(known):
        measured[k], noise[k], control_noise[k] = mean_effect(data, cells[c], by_batch)
        latents = model.intervene(z, torch.tensor([[perturbations[k]]], device=weight.device))
        share = float(model.penetrance[perturbations[k]])
        measured[k] /= share
        noise[k] /= share**2
        control_noise[k] /= share**2
        measured[k] -= (model.decoder.mean(latents)[0] - before).cpu().double().numpy()
    if perturbations:
        missed = missed_effects(measured, noise, control_noise)
        for buffer, values in ((model.residual, missed.own), (model.residual_error, missed.own_error)):
            buffer[perturbations] = torch.from_numpy(values).to(buffer)
        model.common.copy_(torch.from_numpy(missed.common))
        model.common_error.copy_(torch.from_numpy(missed.common_error))


@torch.no_grad()
def measure_errors(model: DiscrepancyVAE, data: PerturbSeqData) -> None:
    """Write into a `model` without programs how large the effects may be that were not detected: the standard errors of the
    measured ones.
    """
    cells = data.cells_by_condition(splits.TRAIN)
    by_batch = controls_by_batch(data, cells[0])
    for own, parts in zip(cells, data.conditions, strict=True):
        if len(parts) == 1 and len(own) >= MIN_CELLS:
            _, noise, control_noise = mean_effect(data, own, by_batch)
            model.residual_error[parts[0]] = torch.from_numpy(np.sqrt(noise + control_noise)).to(model.residual_error)


def missed_effects(measured: np.ndarray, noise: np.ndarray, control_noise: np.ndarray) -> Missed:
    """What is kept of measured effects (n, G), whose squared errors are `noise` (own) + `control_noise` (shared)."""
    # The mean of few perturbations is made of their own effects: only what they agree on is shared.
    mean, spread, agreed = _agreement(measured)
    common, common_squared = shrink(agreed * mean, np.sqrt(control_noise.mean(0) + spread))
    left = measured - common
    own, squared = np.empty_like(left), np.empty_like(left)
    each = in_parallel(
        lambda k: shrink(left[k], np.sqrt(noise[k] + control_noise[k])), range(len(left)), torch.get_num_threads()
    )
    for k, found in enumerate(each):
        own[k], squared[k] = found
    rest = np.subtract(left, own, out=left)
    mean, _, agreed = _agreement(rest)
    for k in range(len(rest)):
        thin, error = rest[k] - agreed * mean, noise[k] + (1 - agreed) ** 2 * control_noise[k]
        share = _share_kept(thin, error)
        own[k] += share * thin
        squared[k] += share * error
    return Missed(common, np.sqrt(common_squared), own, np.sqrt(squared, out=squared))


def _agreement(effects: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean (G,) of effects (n, G), its squared error by their spread, and the share of its squares that is more."""
    mean = effects.mean(0)
    if len(effects) < 2:
        return mean, np.zeros_like(mean), 0.0
    spread = effects.var(0, ddof=1) / len(effects)
    return mean, spread, _share_kept(mean, spread)


def _share_kept(values: np.ndarray, squared_error: np.ndarray) -> float:
    """1 - expected squares of the noise / squares, not below 0: how much of a vector is no noise."""
    return max(0.0, 1 - float(squared_error.sum() / max(float((values**2).sum()), 1e-30)))


def shrink(effect: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and variances (n,) of effects measured with normal standard errors (n,); 0 where the error is."""
    shrunk, squared = np.zeros_like(effect), np.zeros_like(effect)
    known = error > 0
    d, s = effect[known], error[known]
    if not len(d):
        return shrunk, squared
    largest, smallest = 2 * np.sqrt(max(float((d**2 - s**2).max()), 0.0)), float(s.min()) / 10
    n_scales = max(0, int(np.ceil(np.log2(max(largest / smallest, 1.0)))))
    scales = np.concatenate([[0.0], smallest * 2.0 ** np.arange(1, n_scales + 1)])  # of the prior's normals
    variance = s[:, None] ** 2 + scales**2
    log_likelihood = -0.5 * (d[:, None] ** 2 / variance + np.log(variance))
    likelihood = np.exp(log_likelihood - log_likelihood.max(1, keepdims=True))
    share, pseudo = np.full(len(scales), 1 / len(scales)), np.eye(len(scales))[0] * NULL_COUNT
    for _ in range(EM_STEPS):
        posterior = likelihood * share
        posterior /= posterior.sum(1, keepdims=True)
        share = (posterior.sum(0) + pseudo) / (len(d) + NULL_COUNT)
    factor = scales**2 / variance
    shrunk[known] = d * (posterior * factor).sum(1)
    second = (posterior * (factor * s[:, None] ** 2 + (factor * d[:, None]) ** 2)).sum(1)
    squared[known] = np.maximum(second - shrunk[known] ** 2, 0.0)
    return shrunk, squared


def controls_by_batch(data: PerturbSeqData, controls: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray, int]]:
    """Mean, variance and number of the controls of each batch; of all controls under -1."""
    found = {-1: (*_moments(data, controls), len(controls))}
    for b in np.unique(data.batch[controls]):
        own = controls[data.batch[controls] == b]
        if len(own) >= MIN_CELLS:
            found[int(b)] = (*_moments(data, own), len(own))
    return found


def mean_effect(
    data: PerturbSeqData, cells: np.ndarray, controls: dict[int, tuple[np.ndarray, np.ndarray, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of cells minus that of controls of the same batches; squared errors of the cells and of the controls; (G,)."""
    mean, variance = _moments(data, cells)
    effect, squared = mean.copy(), np.zeros_like(mean)
    batches, counts = np.unique(data.batch[cells], return_counts=True)
    # Batches without controls share those of all.
    shares: dict[int, float] = {}
    for b, n in zip(batches, counts, strict=True):
        place = int(b) if int(b) in controls else -1
        shares[place] = shares.get(place, 0.0) + n / len(cells)
    for place, share in shares.items():
        center, spread, n = controls[place]
        effect -= share * center
        squared = squared + share**2 * spread / n
    return effect, variance / len(cells), squared


def _moments(data: PerturbSeqData, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance (G,) of cells."""
    mean, square = data.moments(cells)
    return mean, np.maximum(square - mean**2, 0.0) * len(cells) / max(len(cells) - 1, 1)
