"""The loss terms of a model with a linear output layer, without an expression matrix.

With features h (H) of the decoder, output weights W (G, H), bias b and precisions D = diag(1 / noise), a cell is
x = W h + b + noise, and everything that the objective asks of genes is a product of the data with a table of H columns
or a product of the tables with one another:

    |x_g - W_g h - b_g|^2 = |x_g - b_g|^2 - 2 W_g h (x_g - b_g) + W_g h h^T W_g^T      summed over cells, gene by gene.

A virtual cell is its control cell plus the decoded difference, v_i = c_i + W d_i with d_i = h'_i - h_i, so that its
distances are those of real cells, corrected by products with W: with y = x W, Q = W^T W and s_i = 2 d_i y_i + d_i Q d_i

    |v_i - x_j|^2 = |c_i - x_j|^2 + s_i - 2 d_i y_j,
    |v_i - v_j|^2 = |c_i - c_j|^2 + s_i + s_j - M_ij - M_ji,      M_ij = d_i (2 y_j + Q d_j).

The cost of a cell is its non-zeros times H; what grows with G is G H^2, once for all cells of a step. Effects that the
latents miss (`DiscrepancyVAE.residual`) are measured after training and are 0 here.

In float32 three differences of large numbers matter. Squares about b are taken about a fixed center, gene by gene,
from the deviations of single cells (`Rows.moments`). Products y enter as differences of cells and are centred on the
controls' mean. Distances of real cells lose the ratio of their squared norms to their distance, 2 to 10 on
log-normalised values; norms are float64, and so is the difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import kl_divergence, mean_over_cells, mmd_of_distances
from crlseq.model.rows import Rows, product


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
    n_genes = len(output.weight)
    assert model.log_noise is not None
    mean, variance = encoder.posterior(product(cells.rows, encoder.hidden.weight.T) + encoder.hidden.bias)
    y, gram = _Decoder.apply(output.weight, cells.rows)  # type: ignore[no-untyped-call]
    means, variances = _at(mean, cells), _at(variance, cells)

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
    squares = torch.exp(-model.log_noise) @ _squares(h, share, cells, output)
    constant = model.log_noise.sum() + n_genes * math.log(2 * math.pi)
    reconstruction = 0.5 * (squares / 2 + constant) / n_genes

    y = y - y[: cells.n_controls].mean(0).detach()  # differences of cells alone count
    difference = h_virtual[0] - h[0]
    y_control, y_perturbed = _at(y, cells)
    moved = difference @ gram
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


def _squares(h: Tensor, share: Tensor, cells: StepCells, output: torch.nn.Linear) -> Tensor:
    """(G,) squared residuals by gene, mean over cells, summed over controls and perturbed cells."""
    places, shares, pairs = cells.places().flatten(), share.expand(2, *share.shape), share.count_nonzero()
    count = share.new_zeros(len(cells.norms))
    count.index_add_(0, places, (shares > 0).to(share.dtype).flatten())
    first, second = cells.rows.moments(count, cells.center)
    offset = output.bias - cells.center
    about_bias = (second - 2 * offset * first) / pairs + 2 * offset**2
    features = (h * shares[..., None]).flatten(0, -2)
    by_row = features.new_zeros(len(cells.norms), h.shape[-1]).index_add(0, places, features)
    explained: Tensor = _Explained.apply(  # type: ignore[no-untyped-call]
        by_row, features.T @ h.flatten(0, -2), output.weight, output.bias, cells.rows
    )
    return about_bias + explained


class _Decoder(torch.autograd.Function):
    """y = X W and Q = W^T W; one gradient of W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        ctx.rows = rows
        return rows.times(weight), weight.T @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        of_y, of_gram = gradients
        return ctx.rows.transposed_times(of_y).addmm_(weight, of_gram + of_gram.T), None


class _Explained(torch.autograd.Function):
    """By gene (G,): W_g A W_g^T - 2 W_g (X^T F - b f)_g^T with f the sum of the rows of F.

    F (N, H) are the features, summed over a row's pairs by share, and A (H, H) their second moments: what |x - b|^2
    gives up when W h is taken away. U = W A - (X^T F - b f) serves the value and the gradient of W.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, a: Tensor, weight: Tensor, bias: Tensor, rows: Rows) -> Tensor:
        total = features.sum(0)
        cross = rows.transposed_times(features).addr_(bias, total, alpha=-1)
        u = (weight @ a).sub_(cross)
        ctx.save_for_backward(weight, bias, total, u)
        ctx.rows = rows
        return cross.neg_().add_(u).mul_(weight).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        weight, bias, total, u = ctx.saved_tensors
        g = gradients[0]
        weighted = g[:, None] * weight
        of_features = -2 * (ctx.rows.times(weighted) - bias @ weighted)
        return of_features, weight.T @ weighted, 2 * g[:, None] * u, 2 * g * (weight @ total), None
