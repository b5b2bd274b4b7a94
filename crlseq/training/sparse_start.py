"""Sparse loadings of a discovery: a factor model of all genes whose latents have the structural model as their prior.

    x = u B + c_batch + noise,   u ~ N(m_e, S_e) of the cell's condition e,   noise ~ N(0, D) by gene

with graph, targets and interventions, thus m_e and S_e (of hit and escaped cells together), as discovered. EM: the posterior of every cell's latents given
all genes; then the loadings under the spike-and-slab lasso (`crlseq.model.spike_slab.fit_masks`), centres and noise. The
posterior's covariance is part of the latents' second moments: regressing on point estimates, whose errors correlated
latents share, would load genes on programs that do not move them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crlseq.data.dataset import PerturbSeqData
from crlseq.discovery.moments import DTYPE
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.scm import LatentSCM
from crlseq.model.spike_slab import SpikeSlab, fit_masks

MAX_CELLS = 10_000  # that loadings are estimated on
ITERATIONS, TOLERANCE = 60, 0.1  # of EM; a change of the masks that ends it, in standard errors
LEAST_NOISE = 1e-2  # of a gene, as a share of the mean


@dataclass(frozen=True)
class Loadings:
    """``loading`` (p, G), ``center`` (G,), ``noise`` (G,) variances, and ``share`` (p,) of the masks that are of the slab."""

    loading: Tensor
    center: Tensor
    noise: Tensor
    share: Tensor

    def readout(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights (G, p) of the least-squares latents ``(x - center) D^-1 B' (B D^-1 B')^-1``, and their variances (p,)."""
        # Which are no positive numbers where a program has no genes of its own.
        precise = self.loading / self.noise
        covariance = torch.linalg.inv_ex(precise @ self.loading.T)[0]
        return (precise.T @ covariance).numpy(), covariance.diagonal().numpy()


def sparse_loadings(
    scm: LatentSCM,
    data: PerturbSeqData,
    cells: np.ndarray,
    latents: np.ndarray,
    variance: np.ndarray,
    prior: tuple[Tensor, Tensor] | None,
    start: tuple[np.ndarray, np.ndarray],
) -> Loadings:
    """Sparse loadings, by EM from a ``start`` of dense ones (p, G) and noise variances (G,).

    At most `MAX_CELLS` of the cells (n,) are looked at, with their latents (n, p) as discovered and posterior variances
    (p,). With the ``prior`` of each condition (`mixture_prior`) the structural model is the latents' prior; without it the
    latents stay as they are, and EM is of the loadings alone.
    """
    some = np.linspace(0, len(cells) - 1, min(MAX_CELLS, len(cells))).astype(int)
    chosen, n = cells[some], len(some)
    x, groups = data.x[chosen], [np.flatnonzero(data.condition[chosen] == c) for c in range(len(data.conditions))]
    scale = control_deviation(scm)
    batch = np.unique(data.batch[chosen], return_inverse=True)[1]
    member = torch.eye(int(batch.max()) + 1, dtype=DTYPE)[torch.from_numpy(batch)]  # (n, batches)
    size = member.sum(0)[:, None]
    mean_x = _product(x.T, member).T / size
    square = torch.from_numpy(data.moments(chosen)[1])
    total = square - (size / n * mean_x**2).sum(0)  # within batches

    loading, noise = (torch.from_numpy(part) for part in start)
    slab, share = SpikeSlab.of(n), torch.full_like(scale, 0.5)
    masks = (loading * scale[:, None] / noise.sqrt()).T
    u, spread = torch.from_numpy(latents[some]).to(DTYPE), n * torch.diag(torch.from_numpy(variance).to(DTYPE))
    center = mean_x - member.T @ u / size @ loading
    for _ in range(ITERATIONS):
        if prior is not None:
            precise = loading / noise
            score = _product(x, precise.T) - member @ (center @ precise.T)
            u, spread = _posterior(score, precise @ loading.T, groups, prior)
        mean_u = member.T @ u / size
        centred = u - member @ mean_u
        gram = centred.T @ centred + spread
        cross = _product(x.T, centred)  # centred latents sum to 0 in every batch, so x need not
        before, unit = masks, noise.sqrt()[:, None]
        masks, share = fit_masks(
            slab, masks, share, torch.ones_like(masks), cross / scale / unit, gram / scale[:, None] / scale
        )
        loading = (masks * unit / scale).T
        center = mean_x - mean_u @ loading
        noise = total + (loading * (gram @ loading - 2 * cross.T)).sum(0) / n
        noise = noise.clamp_min(least_noise(noise))
        if float((masks - before).abs().max()) < TOLERANCE / n**0.5:
            break
    return Loadings(loading, (size / n * center).sum(0), noise, share)


def least_noise(variances: np.ndarray | Tensor) -> float:
    """The smallest noise variance of a gene, of variances (G,): without one the likelihood has no bound."""
    return max(LEAST_NOISE * float(variances.mean()), 1e-8)


def _product(x: Any, table: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(x @ table.numpy(), dtype=np.float64))


def mixture_prior(model: DiscrepancyVAE, conditions: Tensor) -> tuple[Tensor, Tensor]:
    """Means (C, p) and covariances (C, p, p), float64, of linear latents of the cells, hit and escaped, of (C, M)."""
    found = [(c, w, hit) for c, parts in enumerate(conditions) for w, hit, _ in model.mixture(parts, torch.empty(0))]
    of, weights, kinds = zip(*found, strict=True)
    index, weight, kind = torch.tensor(of), torch.tensor(weights, dtype=DTYPE)[:, None], torch.cat(kinds)
    means, covariances = condition_prior(model.scm, kind, model.target_weights(kind))
    mean = torch.zeros(len(conditions), means.shape[1], dtype=DTYPE).index_add_(0, index, weight * means)
    apart = means - mean[index]
    spread = weight[..., None] * (covariances + apart[:, :, None] * apart[:, None])
    return mean, torch.zeros_like(spread[: len(conditions)]).index_add_(0, index, spread)


def condition_prior(scm: LatentSCM, conditions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Means (C, p) and covariances (C, p, p), float64, of linear latents of cells that (C, M) with weights (C, M, p) hit."""
    mechanism = scm.mechanism(conditions, weights)
    adjacency = (scm.adjacency * mechanism.retention[:, None, :]).to(DTYPE)
    total = torch.linalg.inv(torch.eye(adjacency.shape[-1], dtype=DTYPE) - adjacency)
    mean = ((scm.intercept + mechanism.shift).to(DTYPE)[:, None, :] @ total)[:, 0]
    return mean, total.mT @ (torch.exp(2 * mechanism.log_scale).to(DTYPE)[..., None] * total)


def control_deviation(scm: LatentSCM) -> Tensor:
    """(p,) standard deviations, float64, of latents over control cells if equations are linear."""
    total: Tensor = torch.linalg.inv(torch.eye(len(scm.graph), dtype=DTYPE) - scm.adjacency.to(DTYPE))
    return total.square().sum(0).sqrt()


def _posterior(
    score: Tensor, information: Tensor, groups: list[np.ndarray], prior: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Posterior means (n, p) of latents, and the sum over cells of their covariances.

    ``score`` (n, p) is ``(x - c) D^-1 B'``, ``information`` (p, p) ``B D^-1 B'``; ``groups`` are each condition's cells.
    """
    means, total = torch.empty_like(score), torch.zeros_like(information)
    for mean, covariance, cells in zip(*prior, groups, strict=False):
        if len(cells):
            precision = torch.linalg.inv(covariance)
            posterior = torch.linalg.inv(information + precision)
            means[cells] = (score[cells] + mean @ precision) @ posterior
            total += len(cells) * posterior
    return means, total
