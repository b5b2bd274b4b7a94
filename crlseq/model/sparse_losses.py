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

In float32 three differences of large numbers matter. Squares about b come from moments of genes in float64
(`Rows.moments`). Products y enter as differences of cells and are centred on the
controls' mean. Distances of real cells lose the ratio of their squared norms to their distance, 2 to 10 on
log-normalised values; norms are float64, and so is the difference.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.expression_rows import Rows, product
from crlseq.model.losses import Kernel, kl_divergence, mean_over_cells


@dataclass(frozen=True)
class Pairs:
    """Which rows are the cells of each pair, and which pairs a row is in."""

    row: Tensor  # (2, C, B) rows of controls and of perturbed cells; 0 where there is no pair
    order: Tensor  # (2 n_pairs,) places in `row` of what is there, by their row
    start: Tensor  # (N + 1,) where those of each row begin in `order`

    def spread(self, values: Tensor) -> Tensor:
        """(N, n) values of rows to (2, C, B, n) of the cells of pairs, differentiable."""
        found: Tensor = _Spread.apply(values, self)  # type: ignore[no-untyped-call]
        return found

    def gather(self, values: Tensor) -> Tensor:
        """The transpose: (2, C, B, n) values to their sums (N, n) by row, always added in the same order.

        `index_add_`, also as the gradient of `index_select`, would add by atomics on CUDA, and one seed be several models.
        """
        return F.embedding_bag(
            self.order, values.reshape(-1, values.shape[-1]), self.start, mode="sum", include_last_offset=True
        )


@dataclass(frozen=True)
class StepCells:
    """The cells of a step, and all that the objective asks of them alone, whatever the model."""

    rows: Rows  # (N, G): first the controls, then the perturbed cells
    n_controls: int
    n_pairs: int | Tensor  # a number of the device where sets are padded
    pairs: Pairs
    mask: Tensor | None  # (C, B) pairs that are there, None for all
    moments: tuple[Tensor, Tensor]  # (G,) float64 sums of values and of their squares, over both cells of every pair
    within: Tensor  # (C, B, B) squared distances of control to control
    across: Tensor  # (C, B, B) squared distances of control to perturbed cells
    perturbed_kernel: Tensor  # (C,) mean kernel of pairs of perturbed cells


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return values.index_select(0, pairs.row.flatten()).view(*pairs.row.shape, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.pairs.gather(gradients[0]), None


@torch.no_grad()
def step_cells(
    rows: Rows, n_controls: int, pairs: Pairs, counts: tuple[int, ...], mask: Tensor | None, kernel: Kernel
) -> StepCells:
    """The cells of a step; ``counts`` are the pairs of each condition, whose perturbed cells are neighbours in `rows`."""
    n, n_pairs = n_controls, sum(counts)
    control, perturbed = pairs.row
    controls, norms = slice(0, n), rows.norms()
    within = _distance(rows.inner(controls, controls), norms[:n], norms[:n]).fill_diagonal_(0)
    across = _distance(rows.inner(slice(n, n + n_pairs), controls), norms[n:], norms[:n])
    own = norms.index_select(0, perturbed.flatten()).view_as(perturbed)  # of rows that only fill up: anything
    between_perturbed = _distance(rows.inner_within(perturbed, counts), own, own)
    row = (perturbed - n).clamp_min(0)
    return StepCells(
        rows, n, n_pairs, pairs, mask,
        moments=rows.moments(pairs.start.diff()),
        within=_picked(within, control, control),
        across=_picked(across, row, control).mT,
        perturbed_kernel=kernel.mean(between_perturbed, mask, mask, within=True),
    )  # fmt: skip


def _picked(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(C, B, B) entries of a table: ``table[rows[c, i], columns[c, j]]``."""
    place = rows[:, :, None] * table.shape[1] + columns[:, None, :]
    return table.flatten().index_select(0, place.flatten()).view_as(place)


def _distance(inner: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """|a|^2 + |b|^2 - 2 ab in float64, of inner products and squared norms."""
    distance = inner.to(torch.float64, copy=True).mul_(-2).add_(a[..., :, None]).add_(b[..., None, :])
    return distance.clamp_(min=0).to(inner.dtype)


def sparse_loss_terms(
    model: DiscrepancyVAE,
    cells: StepCells,
    conditions: Tensor,
    eps: tuple[Tensor, Tensor],
    kernel: Kernel,
    hit: tuple[Tensor, Tensor] | None = None,
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Terms ``mmd``, ``reconstruction``, ``kl`` and ``graph``, and posterior means (C, B, p) of controls and perturbed.

    The mean of `crlseq.model.losses.loss_terms` and `interventional_terms`, for Gaussian noise and the identity as
    output. ``conditions`` (C, M) are filled up with -1; ``eps`` are standard normal draws (C, B, p) of both sides;
    ``hit`` (C, B, M) says which perturbations hit a virtual cell, and with what probability (C, B) a perturbed cell was hit,
    NaN where that is not known; None: all are.
    """
    scm, encoder, mask = model.scm, model.encoder, cells.mask
    weight, bias = model.decoder.output.weight, model.decoder.output.bias
    n_genes = len(weight)
    assert model.log_noise is not None
    mean, variance = encoder.posterior(product(cells.rows, encoder.hidden.weight.T) + encoder.hidden.bias)
    y, gram = _Decoder.apply(weight, cells)  # type: ignore[no-untyped-call]
    means, variances, noise = cells.pairs.spread(mean), cells.pairs.spread(variance), torch.stack(eps)
    z = means + variances.sqrt() * noise
    u = scm(z)
    weights = model.target_weights(conditions)
    mechanism = scm.mechanism(conditions, weights)
    virtual = scm(z[0], mechanism) if hit is None else model.intervene(z[0], conditions, hit[0])
    features = model.decoder.features(torch.cat([u, virtual[None]]))  # (3, C, B, H)
    h, h_virtual = torch.split(features, [2, 1])  # one gradient, put together once

    divergence = kl_divergence(means[0], variances[0])
    changed = None if hit is None else model.changed(conditions, weights, hit[1])
    own = model.divergence(u[1], mechanism, noise[1], variances[1], changed)
    kl = (mean_over_cells(divergence, mask) + mean_over_cells(own, mask)) / 2 / n_genes

    squares = torch.exp(-model.log_noise) @ _squares(h, cells, weight, bias)
    constant = model.log_noise.sum() + n_genes * math.log(2 * math.pi)
    reconstruction = 0.5 * (squares / 2 + constant) / n_genes

    difference = h_virtual[0] - h[0]
    y_control, y_perturbed = cells.pairs.spread(y)
    moved = difference @ gram
    s = (difference * (2 * y_control + moved)).sum(-1)  # (C, B)
    m = difference @ (2 * y_control + moved).mT  # (C, B, B)
    within = (cells.within + s[..., :, None] + s[..., None, :] - m - m.mT).clamp_min(0)
    across = (cells.across + s[..., :, None] - 2 * difference @ y_perturbed.mT).clamp_min(0)
    virtual_kernel, kernel_across = kernel.mean(within, mask, mask, True), kernel.mean(across, mask, mask, False)
    mmd = (virtual_kernel + cells.perturbed_kernel - 2 * kernel_across).mean()
    terms = {"mmd": mmd, "reconstruction": reconstruction, "kl": kl, "graph": scm.adjacency.abs().sum()}
    return terms, (means[0], means[1])


def _squares(h: Tensor, cells: StepCells, weight: Tensor, output_bias: Tensor) -> Tensor:
    """(G,) squared residuals by gene, mean over pairs, summed over controls and perturbed cells."""
    first, second = cells.moments
    bias = output_bias.double()
    about_bias = ((second - 2 * bias * first) / cells.n_pairs + 2 * bias**2).to(h.dtype)
    explained: Tensor = _Explained.apply(h, weight, output_bias, cells)  # type: ignore[no-untyped-call]
    return about_bias + explained


class _Decoder(torch.autograd.Function):
    """y = X W, about its mean over controls (differences of cells alone count), and Q = W^T W; one gradient of W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, cells: StepCells) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        ctx.rows = cells.rows
        y = cells.rows.times(weight)
        return y.sub_(y[: cells.n_controls].mean(0)), weight.T @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        of_y, of_gram = gradients
        return ctx.rows.transposed_times(of_y).addmm_(weight, of_gram + of_gram.T), None


class _Explained(torch.autograd.Function):
    """By gene (G,): W_g A W_g^T - 2 W_g (X^T F - b f)_g^T with f the sum of the rows of F.

    F (N, H) are the features (2, C, B, H), summed over a row's pairs and divided by the number of pairs, and A (H, H)
    their second moments: what |x - b|^2 gives up when W h is taken away. U = W A - (X^T F - b f) serves the value and
    the gradient of W.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor, cells: StepCells) -> Tensor:
        if cells.mask is not None:
            h = h * cells.mask[..., None]
        flat, rows = h.flatten(0, -2), cells.pairs.gather(h).div_(cells.n_pairs)
        total = rows.sum(0)
        cross = cells.rows.transposed_times(rows).addr_(bias, total, alpha=-1)
        n, gram = cells.n_pairs, flat.T @ flat
        if isinstance(n, int):  # a factor of a product cannot be a number of the device
            u = torch.addmm(cross, weight, gram, beta=-1, alpha=1 / n)
        else:
            u = torch.addmm(cross, weight, gram / n, beta=-1)
        ctx.save_for_backward(h, weight, bias, total, u)
        ctx.cells = cells
        return cross.neg_().add_(u).mul_(weight).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        h, weight, bias, total, u = ctx.saved_tensors
        cells, g = ctx.cells, gradients[0]
        weighted = g[:, None] * weight
        of_rows = cells.rows.times(weighted).sub_(bias @ weighted)
        of_h = cells.pairs.spread(of_rows).view(-1, h.shape[-1])
        n, gram = cells.n_pairs, weight.T @ weighted
        if isinstance(n, int):
            of_h = of_h.addmm_(h.flatten(0, -2), gram, beta=-2 / n, alpha=2 / n)
        else:
            of_h = of_h.addmm_(h.flatten(0, -2), gram, beta=-2, alpha=2).div_(n)
        if cells.mask is not None:
            of_h.view_as(h).mul_(cells.mask[..., None])
        return of_h.view_as(h), u.mul_(2 * g[:, None]), 2 * g * (weight @ total), None
