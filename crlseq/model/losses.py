"""Losses: reconstruction, KL divergence, maximum mean discrepancy, graph sparsity -> named terms.

    total = alpha MMD^2(virtual, perturbed) + reconstruction + beta KL + lambda |adjacency|_1

Cells come as (C, B, .): C conditions of up to B cells; masks (C, B) say which rows are cells.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crlseq.model.discrepancy_vae import DiscrepancyVAE, Inference, ModelOutput


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(..., n, G) and (..., m, G) to (..., n, m) squared Euclidean distances |a|^2 + |b|^2 - 2 a b^T.

    Centred at b's mean: the cancellation in float32 grows with the rows' squared norm.
    """
    center, one_set = b.mean(-2, keepdim=True), a is b
    b = b - center
    a = b if one_set else a - center
    of_b = (b * b).sum(-1)
    of_a = of_b if one_set else (a * a).sum(-1)
    inner = a @ b.transpose(-1, -2)
    return (of_a[..., :, None] + of_b[..., None, :] - 2 * inner).clamp_min(0)


def multi_kernel(distance: Tensor, bandwidth: float | Tensor, n_kernels: int) -> Tensor:
    """sum_{i < n} exp(-d^2 / b_i), b_i = bandwidth * 2^(i - n // 2), of squared distances, elementwise.

    Bandwidths double, so each kernel is the square of the next wider one: one exponential in all.
    """
    kernel: Tensor = _MultiKernel.apply(distance, bandwidth, n_kernels)  # type: ignore[no-untyped-call]
    return kernel


class _MultiKernel(torch.autograd.Function):
    """Value and slope in one pass: the derivative by d^2 is -sum_i exp(-d^2 / b_i) / b_i."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, bandwidth: float | Tensor, n_kernels: int) -> Tensor:
        widest = bandwidth * 2.0 ** (n_kernels - 1 - n_kernels // 2)
        kernel = torch.exp(distance / -widest)
        total, slope = kernel.clone(), kernel.clone()
        for i in range(1, n_kernels):
            kernel.mul_(kernel)
            total.add_(kernel)
            slope.add_(kernel, alpha=2.0**i)
        ctx.save_for_backward(slope.div_(-widest))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None


def median_bandwidth(cells: Tensor) -> float:
    """Median squared distance between pairs of distinct cells (n, G): the median heuristic."""
    distance = squared_distances(cells, cells)
    rows, columns = torch.triu_indices(len(cells), len(cells), offset=1)
    return max(float(distance[rows, columns].median()), 1e-12)


@dataclass(frozen=True)
class Kernel:
    """`multi_kernel`, and the estimator of MMD^2."""

    bandwidth: float | Tensor
    n_kernels: int
    unbiased: bool = True  # U-statistic: no diagonals, can be negative, needs two cells a side; else the V-statistic

    def mean(self, distance: Tensor, rows: Tensor | None, columns: Tensor | None, within: bool) -> Tensor:
        """Mean over the pairs (..., n, m) of cells that masks (..., n) and (..., m) keep, within one set or between two."""
        kernel, without_diagonal = multi_kernel(distance, self.bandwidth, self.n_kernels), within and self.unbiased
        if rows is None or columns is None:
            n, m = distance.shape[-2:]
            if not without_diagonal:
                return kernel.mean((-1, -2))
            return (kernel.sum((-1, -2)) - kernel.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (m - 1))
        weight = rows.to(kernel.dtype)[..., :, None] * columns.to(kernel.dtype)[..., None, :]
        if without_diagonal:
            weight = weight * (1 - torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device))
        return (kernel * weight).sum((-1, -2)) / weight.sum((-1, -2))


def mmd_squared(
    a: Tensor, b: Tensor, kernel: Kernel, a_mask: Tensor | None = None, b_mask: Tensor | None = None
) -> Tensor:
    """Squared maximum mean discrepancy (Gretton et al. 2012, JMLR 13, eqs. 3 and 5) of cells (..., n, G) and (..., m, G).

    Masks (..., n) and (..., m) are 1 for cells and 0 for rows that only fill up.
    """
    distances = squared_distances(a, a), squared_distances(b, b), squared_distances(a, b)
    return mmd_of_distances(*distances, kernel, a_mask, b_mask)


def mmd_of_distances(
    within_a: Tensor,
    within_b: Tensor,
    between: Tensor,
    kernel: Kernel,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
) -> Tensor:
    """`mmd_squared` from squared distances (..., n, n), (..., m, m) and (..., n, m)."""
    within = kernel.mean(within_a, a_mask, a_mask, within=True) + kernel.mean(within_b, b_mask, b_mask, within=True)
    return within - 2 * kernel.mean(between, a_mask, b_mask, within=False)


def kl_divergence(mean: Tensor, variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) summed over latents: (..., p) to (...)."""
    return 0.5 * (mean**2 + variance - variance.log() - 1).sum(-1)


def mean_over_cells(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (C, B) values of cells."""
    if mask is None:
        return values.mean()
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum()


def loss_terms(
    model: DiscrepancyVAE, output: ModelOutput, control: Tensor, perturbed: Tensor, kernel: Kernel, mask: Tensor | None
) -> dict[str, Tensor]:
    """Unweighted terms ``mmd``, ``reconstruction``, ``kl`` and ``graph``, each a scalar.

    Without a noise model the reconstruction is the mean squared error and the KL the sum over latents, as published.
    With Gaussian noise they are the negative log-likelihood and the KL of a cell, divided by the number of genes.
    """
    kl = mean_over_cells(kl_divergence(output.mean, output.variance), mask)
    if model.log_noise is not None:
        kl = kl / control.shape[-1]
    mmd = mmd_squared(output.virtual, perturbed, kernel, mask, mask).mean()
    reconstruction = _reconstruction(model, output.reconstruction, control, mask)
    return {"mmd": mmd, "reconstruction": reconstruction, "kl": kl, "graph": model.scm.adjacency.abs().sum()}


def interventional_terms(
    model: DiscrepancyVAE, inference: Inference, perturbed: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """``reconstruction`` and ``kl`` of perturbed cells under their own conditions, on the scale of `loss_terms`."""
    kl = mean_over_cells(inference.divergence, mask) / perturbed.shape[-1]
    return {"reconstruction": _reconstruction(model, inference.reconstruction, perturbed, mask), "kl": kl}


def anchor_term(mean: Tensor, anchor: Tensor, variance: Tensor, n_genes: int, mask: Tensor | None = None) -> Tensor:
    """Squared distance of posterior means to given ones, ``sum_k (mean - anchor)^2 / (2 variance)``, per gene.

    The negative log-likelihood of ``anchor`` (C, B, p) as a measurement of z with noise ``variance`` (p,).
    """
    return mean_over_cells(0.5 * ((mean - anchor) ** 2 / variance).sum(-1), mask) / n_genes


def _reconstruction(model: DiscrepancyVAE, reconstructed: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    squared = (reconstructed - x) ** 2
    if model.log_noise is None:
        return mean_over_cells(squared.mean(-1), mask)
    nll = 0.5 * (squared * torch.exp(-model.log_noise) + model.log_noise + math.log(2 * math.pi))
    return mean_over_cells(nll.mean(-1), mask)


def weighted_total(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Sum of terms times weights; a term of weight 0 takes no part, so that its NaN cannot either."""
    return torch.stack([weights[name] * term for name, term in terms.items() if weights[name] != 0]).sum()
