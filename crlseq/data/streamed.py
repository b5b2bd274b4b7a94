"""Expression of a prepared store, whose rows are read when they are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from crlseq.data.preprocess import Preprocessing
from crlseq.data.store import StoredMatrix

STREAMED_ROWS = 1024  # of a store, read at once: what is in float64 on the way


class StreamedExpression:
    """Normalised expression (cells, fitted genes) of a store: rows are read when asked for, as in memory to the bit.

    `matrix` has cells as in the store; for `place` see `Preprocessing.places`; rows are CSR if few are not 0; the cells in
    `held` are asked for again and again and stay in memory. `nnz` is how many values are not 0, None if rows are dense.
    """

    def __init__(
        self, matrix: StoredMatrix, record: Preprocessing, place: np.ndarray, nnz: int | None, held: np.ndarray
    ) -> None:
        self.matrix, self.record, self.place, self.nnz = matrix, record, place, nnz
        self.shape = (matrix.shape[0], len(record.genes))
        self.slot: np.ndarray | None = np.full(matrix.shape[0], -1, dtype=np.int32)
        self.held = self._read(held)
        self.slot[held] = np.arange(len(held))

    def __getstate__(self) -> dict[str, Any]:
        """Without what is held: another process reads every row."""
        return {**vars(self), "slot": None, "held": None}

    def __getitem__(self, index: slice | np.ndarray) -> sp.csr_matrix | np.ndarray:
        """Rows by a slice or by cells in any order, float32."""
        if isinstance(index, slice):
            index = np.arange(self.shape[0])[index]
        rows = self._rows(index)
        return rows.toarray() if self.nnz is None else rows

    def _rows(self, index: np.ndarray) -> sp.csr_matrix:
        slot = np.full(len(index), -1) if self.slot is None else self.slot[index]
        if len(index) and slot.min() >= 0:
            return sp.csr_matrix(self.held[slot])
        fresh = slot < 0
        cells, where = np.unique(index[fresh], return_inverse=True)
        read = self._read(cells)
        if fresh.all():
            return read if len(cells) == len(index) and (np.diff(where) == 1).all() else read[where]
        kept = np.flatnonzero(~fresh)
        position = np.empty(len(index), dtype=np.int64)
        position[kept] = np.arange(len(kept))
        position[fresh] = len(kept) + where
        return sp.csr_matrix(sp.vstack([self.held[slot[kept]], read], format="csr"))[position]

    def _read(self, cells: np.ndarray) -> sp.csr_matrix:
        starts = range(0, max(len(cells), 1), STREAMED_ROWS)
        parts = [self.record.expression(self.matrix[cells[i : i + STREAMED_ROWS]], self.place) for i in starts]
        return parts[0] if len(parts) == 1 else sp.csr_matrix(sp.vstack(parts, format="csr"))
