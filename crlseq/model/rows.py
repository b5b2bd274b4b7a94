"""Rows of expression, sparse or dense, as an objective needs them: products, inner products, moments by gene.

Nothing here forms a dense matrix of all cells and genes from sparse rows: a product with a table (G, n) costs
non-zeros times n, whatever the number of genes. `torch.nn.functional.embedding_bag` is that product on the CPU and on
CUDA alike, with threads and vector instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Rows(Protocol):
    """N cells by G genes."""

    def product(self, table: Tensor) -> Tensor:
        """(G, n) to (N, n), differentiable in the table."""

    def inner(self, a: slice, b: slice) -> Tensor:
        """(a, b) inner products of cells."""

    def moments(self, weights: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over cells of ``w (x - center)`` and of ``w (x - center)^2``, (G,) each, in float64."""


@dataclass(frozen=True)
class DenseRows:
    """Rows that are stored densely."""

    x: Tensor  # (N, G)

    def product(self, table: Tensor) -> Tensor:
        """(G, n) to (N, n)."""
        return self.x @ table

    def inner(self, a: slice, b: slice) -> Tensor:
        """(a, b) inner products of cells."""
        return self.x[a] @ self.x[b].T

    def moments(self, weights: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over cells of ``w (x - center)`` and of ``w (x - center)^2``."""
        x, w = self.x.double() - center, weights.double()
        return w @ x, w @ x**2


@dataclass(frozen=True)
class SparseRows:
    """Rows by their non-zeros (CSR), and the same by gene (CSC), which the gradient of a product reads.

    ``start`` (N + 1,), ``gene`` and ``value`` (nnz,); ``gene_start`` (G + 1,), ``cell`` and ``gene_value`` (nnz,).
    """

    start: Tensor
    gene: Tensor
    value: Tensor
    gene_start: Tensor
    cell: Tensor
    gene_value: Tensor

    @classmethod
    def from_csr(cls, start: Tensor, gene: Tensor, value: Tensor, n_genes: int) -> SparseRows:
        """The CSC by a stable sort: for devices without a quicker way."""
        counts = (start[1:] - start[:-1]).long()
        row = torch.repeat_interleave(torch.arange(len(counts), device=start.device), counts)
        by_gene, order = torch.sort(gene, stable=True)
        edges = torch.arange(n_genes + 1, device=gene.device, dtype=gene.dtype)
        gene_start = torch.searchsorted(by_gene, edges, out_int32=gene.dtype == torch.int32)
        return cls(start, gene, value, gene_start, row[order].to(gene.dtype), value[order])

    def product(self, table: Tensor) -> Tensor:
        """(G, n) to (N, n)."""
        found: Tensor = _Product.apply(table, self)  # type: ignore[no-untyped-call]
        return found

    def inner(self, a: slice, b: slice) -> Tensor:
        """(a, b) inner products: the rows of b laid out by gene, (G, b), are the table that those of a read."""
        first, last = int(self.start[b.start]), int(self.start[b.stop])
        n = b.stop - b.start
        counts = (self.start[b.start + 1 : b.stop + 1] - self.start[b.start : b.stop]).long()
        column = torch.repeat_interleave(torch.arange(n, device=counts.device), counts)
        table = self.value.new_zeros((len(self.gene_start) - 1) * n)
        table.scatter_(0, self.gene[first:last].long() * n + column, self.value[first:last])
        first, last = int(self.start[a.start]), int(self.start[a.stop])
        start = self.start[a.start : a.stop + 1] - first
        return _bags(table.view(-1, n), self.gene[first:last], start, self.value[first:last])

    def moments(self, weights: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over cells of ``w (x - center)`` and of ``w (x - center)^2``, from those of the non-zeros."""
        w, value = weights.double()[self.cell.long()], self.gene_value.double()
        first, second, total = self._by_gene(w * value), self._by_gene(w * value**2), weights.double().sum()
        return first - total * center, second - 2 * center * first + total * center**2

    def _by_gene(self, values: Tensor) -> Tensor:
        """(nnz,) in the order of the CSC to sums (G,)."""
        running = torch.cat([values.new_zeros(1), values.cumsum(0)])[self.gene_start.long()]
        return running[1:] - running[:-1]


class _Product(torch.autograd.Function):
    """Y = X T, and for the gradient X^T dY: both read one of the two orders of the same non-zeros."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: SparseRows) -> Tensor:
        ctx.rows = rows
        return _bags(table.detach(), rows.gene, rows.start, rows.value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows: SparseRows = ctx.rows
        return _bags(gradients[0].contiguous(), rows.cell, rows.gene_start, rows.gene_value), None


def _bags(table: Tensor, index: Tensor, start: Tensor, value: Tensor) -> Tensor:
    return F.embedding_bag(index, table, start, mode="sum", per_sample_weights=value, include_last_offset=True)
