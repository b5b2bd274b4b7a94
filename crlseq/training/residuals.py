"""Gene effects that the programs miss: a perturbation's own target first of all.

The latents are few, so that a knock-out's own transcript, and whatever else one perturbation alone does, is no program.
What is left of its mean effect, ``r = (mean of its cells - mean of controls) - effect through the latents``, is kept
as far as it stands out of sampling noise: r is shrunk by the empirical-Bayes posterior mean under a unimodal prior, a
mixture of normals about 0 whose weights are fitted to all genes (Stephens 2017, Biostatistics 18, "False discovery
rates: a new deal"); what that leaves is shrunk as one vector (James and Stein 1961), for effects spread thin.
"""

from __future__ import annotations

import numpy as np
import torch

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.model.discrepancy_vae import DiscrepancyVAE

SOURCE_CELLS = 500  # controls whose latents carry the effect
EM_STEPS = 50
NULL_COUNT = 10.0  # genes without effect that the prior has seen: in doubt there is none
MIN_CELLS = 2


@torch.no_grad()
def residual_effects(model: DiscrepancyVAE, data: PerturbSeqData, seed: int) -> np.ndarray:
    """(K, G) float32 effects of single perturbations beyond the model's; 0 for those without cells of their own."""
    cells = data.cells_by_condition(splits.TRAIN)
    by_batch = _controls_by_batch(data, cells[0])
    effects = np.zeros((len(data.perturbation_names), data.n_genes), dtype=np.float32)
    rng = np.random.default_rng([seed, 8])
    some = np.sort(rng.choice(cells[0], min(SOURCE_CELLS, len(cells[0])), replace=False))
    weight = model.encoder.hidden.weight
    control = torch.from_numpy(data.dense(some)).to(weight.device, weight.dtype)[None]
    for c, parts in enumerate(data.conditions):
        if len(parts) != 1 or len(cells[c]) < MIN_CELLS:
            continue
        measured, error = _mean_effect(data, cells[c], by_batch)
        output = model(control, torch.tensor([[parts[0]]], device=weight.device))
        through = (output.virtual - control).mean((0, 1)).cpu().double().numpy()
        effects[parts[0]] = _kept(measured - through, error)
    return effects


def _kept(missed: np.ndarray, error: np.ndarray) -> np.ndarray:
    """What stands out gene by gene, and of the rest, spread thin over many genes, as much as stands out as a whole."""
    sparse = shrink(missed, error)
    rest = missed - sparse
    return np.asarray(sparse + rest * max(0.0, 1 - float((error**2).sum() / max((rest**2).sum(), 1e-30))))


def shrink(effect: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Posterior means (n,) of effects measured with normal standard errors (n,); where the error is 0, 0."""
    shrunk = np.zeros_like(effect)
    known = error > 0
    d, s = effect[known], error[known]
    if not len(d):
        return shrunk
    largest = 2 * np.sqrt(max(float((d**2 - s**2).max()), 0.0))
    smallest = float(s.min()) / 10
    n_scales = max(0, int(np.ceil(np.log2(max(largest / smallest, 1.0)))))
    scales = np.concatenate([[0.0], smallest * 2.0 ** np.arange(1, n_scales + 1)])  # of the prior's normals
    variance = s[:, None] ** 2 + scales**2
    log_likelihood = -0.5 * (d[:, None] ** 2 / variance + np.log(variance))
    likelihood = np.exp(log_likelihood - log_likelihood.max(1, keepdims=True))
    share = np.full(len(scales), 1 / len(scales))
    pseudo = np.zeros(len(scales))
    pseudo[0] = NULL_COUNT
    for _ in range(EM_STEPS):
        posterior = likelihood * share
        posterior /= posterior.sum(1, keepdims=True)
        share = (posterior.sum(0) + pseudo) / (len(d) + NULL_COUNT)
    shrunk[known] = d * (posterior * (scales**2 / variance)).sum(1)
    return shrunk


def _controls_by_batch(data: PerturbSeqData, controls: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray, int]]:
    """Mean, variance and number of the controls of each batch; of all controls under -1."""
    found = {-1: (*_moments(data, controls), len(controls))}
    for b in np.unique(data.batch[controls]):
        own = controls[data.batch[controls] == b]
        if len(own) >= MIN_CELLS:
            found[int(b)] = (*_moments(data, own), len(own))
    return found


def _mean_effect(
    data: PerturbSeqData, cells: np.ndarray, controls: dict[int, tuple[np.ndarray, np.ndarray, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of cells minus that of controls of the same batches, and its standard error, (G,) each."""
    mean, variance = _moments(data, cells)
    effect, squared = mean.copy(), variance / len(cells)
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
    return effect, np.sqrt(squared)


def _moments(data: PerturbSeqData, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance (G,) of cells."""
    x = data.x[cells]
    mean = np.asarray(x.mean(0), dtype=float).ravel()
    square = np.asarray(x.multiply(x).mean(0) if not isinstance(x, np.ndarray) else (x**2).mean(0), dtype=float).ravel()
    n = len(cells)
    return mean, np.maximum(square - mean**2, 0.0) * n / max(n - 1, 1)
