"""The loss terms of a model with a linear output layer, without an expression matrix.

With features h (H) of the decoder, output weights W (G, H), bias b and precisions D = diag(1 / noise), a cell is
x = W h + b + noise, and everything that the objective asks of genes is a product of the data with a table of H columns
or a product of the tables with one another:

    |x - W h - b|^2_D = |x - b|^2_D - 2 h (x - b) D W + h (W^T D W) h^T.

A virtual cell is its control cell plus the decoded difference, v_i = c_i + W d_i with d_i = h'_i - h_i, so that its
distances are those of real cells, corrected by products with W: with y = x W, Q = W^T W and s_i = 2 d_i y_i + d_i Q d_i

    |v_i - x_j|^2 = |c_i - x_j|^2 + s_i - 2 d_i y_j,
    |v_i - v_j|^2 = |c_i - c_j|^2 + s_i + s_j - M_ij - M_ji,      M_ij = d_i (2 y_j + Q d_j).

The cost of a cell is its non-zeros times H; what grows with G is G H^2, once for all cells of a step.

In float32 three differences of large numbers matter. Squares about b are taken about a fixed center, gene by gene, from
the deviations of single cells (`Rows.moments`). Products y enter as differences of cells and are centred on the controls' mean. Distances
of real cells lose the ratio of their squared norms to their distance, 2 to 10 on log-normalised values; they are
taken from norms in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import kl_divergence, mean_over_cells, mmd_of_distances
from crlseq.model.rows import Rows


@dataclass(frozen=True)
class StepCells:
    """The cells of a step: rows, of which the first `n_controls` are the controls and the rest the perturbed cells.

    ``control``, ``perturbed`` (C, B) rows of each pair; ``counts`` pairs of each condition, whose perturbed cells
    are neighbours in `rows`; ``norms`` (N,) float64 squared norms; ``center`` (G,) mean of control cells.
    """

    rows: Rows
    n_controls: int
    control: Tensor
    perturbed: Tensor
    counts: tuple[int, ...]
    norms: Tensor
    center: Tensor

    def places(self) -> Tensor:
        """(2, C, B) rows of the controls and of the perturbed cells."""
        return torch.stack([self.control, self.perturbed])

    def distances(self) -> tuple[Tensor, Tensor, Tensor]:
        """(C, B, B) squared distances control-control, perturbed-perturbed and control-perturbed."""
        n, rows, norms = self.n_controls, self.rows, self.norms
        controls, last = slice(0, n), n + sum(self.counts)
        within = _distance(rows.inner(controls, controls), norms[:n], norms[:n]).fill_diagonal_(0)
        across = _distance(rows.inner(slice(n, last), controls), norms[n:last], norms[:n])
        own = norms[self.perturbed]  # of rows that only fill up: anything
        perturbed = _distance(rows.inner_within(n, self.counts, own.shape[1]), own, own)
        row = (self.perturbed - n).clamp_min(0)
        return (
            within[self.control[:, :, None], self.control[:, None, :]],
            perturbed,
            across[row[:, None, :], self.control[:, :, None]],
        )


def _at(values: Tensor, cells: StepCells) -> Tensor:
    """(N, n) values of rows to (2, C, B, n) of controls and of perturbed cells; its gradient adds whole rows."""
    places = cells.places()
    return values.index_select(0, places.flatten()).view(*places.shape, -1)


def _distance(inner: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (a[..., :, None] + b[..., None, :] - 2 * inner.double()).clamp_min(0).to(inner.dtype)


def factored_terms(
    model: DiscrepancyVAE,
    cells: StepCells,
    conditions: Tensor,
    eps: tuple[Tensor, Tensor],
    bandwidth: float | Tensor,
    n_kernels: int,
    unbiased: bool,
    mask: Tensor | None = None,
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Terms ``mmd``, ``reconstruction``, ``kl`` and ``graph``, and posterior means (C, B, p) of controls and perturbed.

    The mean of `crlseq.model.losses.loss_terms` and `interventional_terms`, for Gaussian noise and the identity as
    output.

    Parameters
    ----------
    conditions
        (C, M) single perturbations of each condition, filled up with -1.
    eps
        Standard normal draws (C, B, p) of the control and of the perturbed cells.
    """
    scm, encoder, output = model.scm, model.encoder, model.decoder.output
    weight, n_genes = output.weight, len(output.weight)
    assert model.log_noise is not None
    precision = torch.exp(-model.log_noise)
    weighted = precision[:, None] * weight
    pre, y, y_weighted = map(cells.rows.product, (encoder.hidden.weight.T, weight, weighted))
    mean, variance = encoder.posterior(pre + encoder.hidden.bias)
    means, variances, products = _at(mean, cells), _at(variance, cells), _at(y_weighted, cells)

    noise = torch.stack(eps)
    z = means + variances.sqrt() * noise
    u = scm(z)
    mechanism = scm.mechanism(conditions, model.target_weights(conditions))
    features = model.decoder.features(torch.cat([u, scm(z[0], mechanism)[None]]))  # (3, C, B, H)
    h, h_virtual = features.tensor_split((2,))

    divergence = kl_divergence(means[0], variances[0])
    own = model.divergence(u[1], mechanism, noise[1], variances[1])
    kl = (mean_over_cells(divergence, mask) + mean_over_cells(own, mask)) / 2 / n_genes

    share = (
        torch.full_like(divergence, 1 / divergence.numel()) if mask is None else mask.to(divergence.dtype) / mask.sum()
    )
    squares = _squares(h, products, share, cells, output, precision, weighted)
    constant = model.log_noise.sum() + n_genes * math.log(2 * math.pi)
    reconstruction = 0.5 * (squares / 2 + constant) / n_genes

    y = y - y[: cells.n_controls].mean(0).detach()  # differences of cells alone count
    difference = h_virtual[0] - h[0]
    y_control, y_perturbed = _at(y, cells)
    moved: Tensor = difference @ _Gram.apply(weight)  # type: ignore[no-untyped-call]
    s = (difference * (2 * y_control + moved)).sum(-1)  # (C, B)
    m = difference @ (2 * y_control + moved).mT  # (C, B, B)
    within, perturbed, across = cells.distances()
    mmd = mmd_of_distances(
        (within + s[..., :, None] + s[..., None, :] - m - m.mT).clamp_min(0),
        perturbed,
        (across + s[..., :, None] - 2 * difference @ y_perturbed.mT).clamp_min(0),
        bandwidth, n_kernels, unbiased, mask, mask,
    ).mean()  # fmt: skip
    terms = {"mmd": mmd, "reconstruction": reconstruction, "kl": kl, "graph": scm.adjacency.abs().sum()}
    return terms, (means[0], means[1])


def _squares(
    h: Tensor,
    y: Tensor,
    share: Tensor,
    cells: StepCells,
    output: torch.nn.Linear,
    precision: Tensor,
    weighted: Tensor,
) -> Tensor:
    """Weighted squared residuals, summed over genes, mean over cells, summed over controls and perturbed cells."""
    shares, pairs = share.expand(2, *share.shape), share.count_nonzero()
    count = torch.zeros(len(cells.norms), dtype=share.dtype, device=share.device)
    count.index_add_(0, cells.places().flatten(), (shares > 0).to(share.dtype).flatten())
    first, second = cells.rows.moments(count, cells.center)
    offset = output.bias - cells.center
    about_bias = (second - 2 * offset * first) / pairs + 2 * offset**2
    features = (h * shares[..., None]).flatten(0, -2)
    cross = (features * (y.flatten(0, -2) - output.bias @ weighted)).sum()
    squared: Tensor = _Quadratic.apply(features.T @ h.flatten(0, -2), output.weight, precision)  # type: ignore[no-untyped-call]
    return precision @ about_bias - 2 * cross + squared


class _Gram(torch.autograd.Function):
    """Q = W^T W; one product in each direction."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.T @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        product: Tensor = weight @ (gradients[0] + gradients[0].T)
        return product


class _Quadratic(torch.autograd.Function):
    """sum_g D_g W_g A W_g^T for a symmetric A (H, H); the product W A serves the value and both gradients of genes."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, precision: Tensor) -> Tensor:
        product = weight @ a
        by_gene = (product * weight).sum(1)
        ctx.save_for_backward(weight, precision, product, by_gene)
        return by_gene @ precision

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, precision, product, by_gene = ctx.saved_tensors
        (g,) = gradients
        return g * (weight.T @ (precision[:, None] * weight)), 2 * g * precision[:, None] * product, g * by_gene
