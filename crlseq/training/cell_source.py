"""Cells of a screen as tensors on the device that trains, and numbers on their way there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from crlseq.data.dataset import ROWS, PerturbSeqData
from crlseq.model.expression_rows import DenseRows, Rows, SparseRows
from crlseq.training.memory import out_of_memory

RESIDENT = 0.5  # of a device's free memory, that a screen may take for good


def sent(device: torch.device, **arrays: np.ndarray) -> dict[str, Tensor]:
    """Arrays of whole numbers as int64 on the device: on CUDA in one copy, which the host does not wait for."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    flat = np.concatenate([array.ravel() for array in arrays.values()], dtype=np.int64)
    parts = torch.split(_sent(flat, device), [array.size for array in arrays.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    made = torch.from_numpy(array)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


class CellSource:
    """Cells of the screen on the device.

    On the CPU rows are sparse or dense as they are stored. On CUDA they are dense, and all lie there for good, from the first
    time that some are asked for, if that takes at most `RESIDENT` of the free memory, else all their non-zeros if those do,
    in memory or in a store alike; else those of a step are sent.
    """

    def __init__(self, data: PerturbSeqData, device: torch.device, dtype: torch.dtype) -> None:
        self.data, self.device, self.dtype = data, device, dtype
        self.all: Tensor | None = None  # (cells, G)
        self.non_zeros: tuple[Tensor, Tensor, Tensor] | None = None  # CSR of all: starts, genes, values
        self.starts = np.zeros(1, dtype=np.int64)  # the same starts, which the host knows
        self._looked_for_room = device.type == "cpu"

    def _look_for_room(self) -> None:
        """Once, and not before cells are asked for: a fit without epochs sends nothing."""
        self._looked_for_room = True
        try:
            self._settle()
        except Exception as error:  # other programs take of the memory as well
            if not out_of_memory(error):
                raise
            self.all = self.non_zeros = None
        torch.cuda.synchronize(self.device)  # from here on every stream may read it

    def _settle(self) -> None:
        """Send the screen, if there is room for it."""
        x, (n, n_genes) = self.data.x, self.data.x.shape
        blocks = [slice(i, i + ROWS) for i in range(0, n, ROWS)]
        room = RESIDENT * torch.cuda.mem_get_info(self.device)[0]
        if n * n_genes * self.dtype.itemsize < room:
            self.all = torch.empty(n, n_genes, dtype=self.dtype, device=self.device)
            for block in blocks:
                self.all[block] = self._of(x[block])
        elif not isinstance(x, np.ndarray) and x.nnz is not None and 12 * x.nnz < room:
            gene = torch.empty(x.nnz, dtype=torch.int32, device=self.device)
            value = torch.empty(x.nnz, dtype=torch.float32, device=self.device)
            sizes = [np.zeros(1, dtype=np.int64)]
            first = 0
            for block in blocks:
                rows: Any = x[block]
                gene[first : first + rows.nnz] = _sent(rows.indices.astype(np.int32), self.device)
                value[first : first + rows.nnz] = _sent(rows.data, self.device)
                sizes.append(np.diff(rows.indptr))
                first += rows.nnz
            self.starts = np.concatenate(sizes).cumsum()
            self.non_zeros = _sent(self.starts, self.device), gene, value

    def dense(self, index: np.ndarray, at: Tensor | None = None) -> Tensor:
        """(...) cell indices to (..., G); ``at`` are the same on the device, if they are there."""
        if self.device.type == "cpu":
            rows = torch.from_numpy(self.data.dense(index.ravel())).to(self.dtype)
        else:
            rows = self._dense(index.ravel(), None if at is None else at.flatten())
        return rows.reshape(*index.shape, -1)

    def rows(self, index: np.ndarray, at: Tensor | None = None) -> Rows:
        """(N,) cell indices to their rows; ``at`` as in `dense`."""
        if self.device.type != "cpu":
            return DenseRows(self._dense(index, at))
        chosen = self.data.x[index]
        if isinstance(chosen, np.ndarray):
            return DenseRows(torch.from_numpy(chosen).to(self.dtype))
        row = np.repeat(np.arange(len(index), dtype=chosen.indices.dtype), np.diff(chosen.indptr))
        start, gene, value = self._csr(chosen)
        return SparseRows(start, torch.from_numpy(row), gene, value, *self._csr(chosen.tocsc()))

    def _csr(self, x: Any) -> tuple[Tensor, ...]:
        start, gene, value = map(torch.from_numpy, (x.indptr, x.indices, x.data))
        return start.to(gene.dtype), gene, value.to(self.dtype)

    def _dense(self, index: np.ndarray, at: Tensor | None) -> Tensor:
        """(N, G) rows on CUDA."""
        if not self._looked_for_room:
            self._look_for_room()
        if self.all is None and self.non_zeros is None:
            return self._of(self.data.x[index])
        at = sent(self.device, index=index)["index"] if at is None else at
        if self.all is not None:
            return self.all.index_select(0, at)
        assert self.non_zeros is not None
        start, gene, value = self.non_zeros
        first = start.index_select(0, at)
        n = start.index_select(0, at + 1) - first
        before = n.cumsum(0) - n
        size = int((self.starts[index + 1] - self.starts[index]).sum())
        entry = torch.arange(size, device=self.device) + (first - before).repeat_interleave(n, output_size=size)
        return self._laid_out(n, gene.index_select(0, entry), value.index_select(0, entry), size)

    def _of(self, x: Any) -> Tensor:
        """Rows of the host's, (N, G) on CUDA."""
        if isinstance(x, np.ndarray):
            return _sent(x, self.device).to(self.dtype)
        gene, value = _sent(x.indices, self.device), _sent(x.data, self.device)
        return self._laid_out(sent(self.device, n=np.diff(x.indptr))["n"], gene, value, x.nnz)

    def _laid_out(self, n: Tensor, gene: Tensor, value: Tensor, size: int) -> Tensor:
        """(N, G) rows with `n` non-zeros each, `size` in all."""
        made = torch.zeros(len(n), self.data.n_genes, dtype=self.dtype, device=self.device)
        row = torch.arange(len(n), device=self.device).repeat_interleave(n, output_size=size)
        made.view(-1).scatter_(0, row * self.data.n_genes + gene, value.to(self.dtype))
        return made
