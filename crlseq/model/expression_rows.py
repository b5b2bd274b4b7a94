"""Rows of expression, sparse or dense, as an objective needs them: products, inner products, moments by gene.

On the CPU nothing forms a dense matrix from sparse rows: a product with a table (G, n) costs non-zeros times n, whatever
the number of genes. `torch.nn.functional.embedding_bag` is that product, with threads and vector instructions. On CUDA
the rows of a step are dense, however they are stored: its products take less time than those of scattered reads, and no
number of the host is needed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH = 64  # columns of a table that are read at a time


@dataclass(frozen=True)
class DenseRows:
    """N cells by G genes, stored densely. As for `SparseRows`, methods are without a gradient; see `product`."""

    x: Tensor  # (N, G)

    def times(self, table: Tensor) -> Tensor:
        """X T: (G, n) to (N, n)."""
        return self.x @ table

    def transposed_times(self, values: Tensor) -> Tensor:
        """X^T V: (N, n) to (G, n)."""
        return self.x.T @ values

    def norms(self) -> Tensor:
        """(N,) float64 squared norms."""
        return self.x.double().square().sum(1)

    def inner(self, a: slice, b: slice) -> Tensor:
        """(a, b) inner products of cells."""
        return self.x[a] @ self.x[b].T

    def inner_within(self, members: Tensor, counts: tuple[int, ...]) -> Tensor:
        """(C, B, B) inner products within C sets of up to B rows, ``members`` (C, B), which are the last rows in this order.

        Of each set the first of `counts` are rows; where members only fill up, numbers are finite and without a meaning.
        """
        full = min(counts) == members.shape[1]
        x = self.x[len(self.x) - members.numel() :] if full else self.x.index_select(0, members.flatten())
        x = x.view(*members.shape, -1)
        return x @ x.mT

    def moments(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of values and of their squares, (G,) float64 each, over cells of which each counts so many times."""
        x = self.x.double()
        return counts.double() @ x, counts.double() @ x**2


@dataclass(frozen=True)
class SparseRows:
    """Rows by their non-zeros (CSR), and the same by gene (CSC), which the gradient of a product reads; on the CPU.

    Entries are picked by `index_select`, which is five times as fast as an index in brackets.
    """

    start: Tensor  # (N + 1,)
    row: Tensor  # (nnz,), as the next two
    gene: Tensor
    value: Tensor
    gene_start: Tensor  # (G + 1,)
    cell: Tensor  # (nnz,), as the next
    gene_value: Tensor

    def times(self, table: Tensor) -> Tensor:
        """X T: (G, n) to (N, n)."""
        return _bags(table, self.gene, self.start, self.value)

    def transposed_times(self, values: Tensor) -> Tensor:
        """X^T V: (N, n) to (G, n), from the order by gene."""
        return _bags(values, self.cell, self.gene_start, self.gene_value)

    def norms(self) -> Tensor:
        """(N,) float64 squared norms."""
        return torch.segment_reduce(self.value.double().square(), "sum", offsets=self.start.long())

    def inner(self, a: slice, b: slice) -> Tensor:
        """(a, b) inner products: the rows of b laid out by gene, (G, b), are the table that those of a read."""
        n, entries = b.stop - b.start, self._entries(b)
        table = self._table(n)
        place = self.gene[entries] * n + (self.row[entries] - b.start)
        table.view(-1).scatter_(0, place.long(), self.value[entries])
        return self._read(table, a)

    def inner_within(self, members: Tensor, counts: tuple[int, ...]) -> Tensor:
        """(C, B, B) inner products within sets; rows and columns beyond a set's size are 0."""
        width = members.shape[1]
        first = len(self.start) - 1 - sum(counts)
        found = self.value.new_zeros(len(counts), width, width)
        column = torch.cat([torch.arange(n, dtype=self.gene.dtype) for n in counts])  # in its set
        entries = self._entries(slice(first, first + sum(counts)))
        place = (self.gene[entries] * width).add_(column.index_select(0, self.row[entries] - first)).long()
        table = self._table(width)
        for c, (begin, end) in enumerate(itertools.pairwise(_bounds(first, counts))):
            own = self._entries(slice(begin, end))
            place_of = place[own.start - entries.start : own.stop - entries.start]
            table.view(-1).scatter_(0, place_of, self.value[own])
            found[c, : counts[c]] = self._read(table, slice(begin, end))
            table.view(-1).scatter_(0, place_of, 0.0)  # what was written, and not the whole table
        return found

    def _entries(self, rows: slice) -> slice:
        """Entries of consecutive rows."""
        return slice(int(self.start[rows.start]), int(self.start[rows.stop]))

    def _table(self, n: int) -> Tensor:
        """(G, n) zeros."""
        return self.value.new_zeros(len(self.gene_start) - 1, n)

    def _read(self, table: Tensor, rows: slice) -> Tensor:
        """(rows, n) products of consecutive rows with a table."""
        entries = self._entries(rows)
        start = self.start[rows.start : rows.stop + 1] - entries.start
        return _bags(table, self.gene[entries], start, self.value[entries])

    def moments(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of values and of their squares by gene."""
        value, offsets = self.gene_value.double(), self.gene_start.long()
        weighted = counts.double().index_select(0, self.cell).mul_(value)
        first = torch.segment_reduce(weighted, "sum", offsets=offsets)
        return first, torch.segment_reduce(weighted * value, "sum", offsets=offsets)


Rows = DenseRows | SparseRows


def _bounds(first: int, counts: tuple[int, ...]) -> list[int]:
    """Where sets of neighbouring rows begin, and the last one ends."""
    return list(itertools.accumulate(counts, initial=first))


def product(rows: Rows, table: Tensor) -> Tensor:
    """X T: (G, n) to (N, n), differentiable in the table."""
    found: Tensor = _Product.apply(table, rows)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return rows.times(table.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.transposed_times(gradients[0]), None


def _bags(table: Tensor, index: Tensor, start: Tensor, value: Tensor) -> Tensor:
    """Sums over the entries of each row, ``start[i] <= e < start[i + 1]``, of ``value[e] table[index[e]]``.

    `WIDTH` columns at a time: what is read at random stays in a core's cache, four times as fast as 384.
    """
    n = table.shape[1]
    if n <= WIDTH:
        return _bag(table.contiguous(), index, start, value)
    found = table.new_empty(len(start) - 1, n)
    for first in range(0, n, WIDTH):
        columns = slice(first, first + WIDTH)
        found[:, columns] = _bag(table[:, columns].contiguous(), index, start, value)
    return found


def _bag(table: Tensor, index: Tensor, start: Tensor, value: Tensor) -> Tensor:
    return F.embedding_bag(index, table, start, mode="sum", per_sample_weights=value, include_last_offset=True)
