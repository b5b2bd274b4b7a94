"""Expression of a prepared store that is never held whole: rows are read and normalised when they are asked for."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from crlseq.data.preprocess import Preprocessing
from crlseq.data.store import StoredMatrix

ROWS = 1024  # cells read at once: what is in float64 on the way


class StreamedExpression:
    """Normalised expression (cells, fitted genes) with the rows that an array in memory would have, to the bit.

    `matrix` has cells as in the store; for `place` see `Preprocessing.places`; rows are CSR if `sparse`; the cells in
    `held` are asked for again and again and stay in memory.
    """

    def __init__(
        self, matrix: StoredMatrix, record: Preprocessing, place: np.ndarray, sparse: bool, held: np.ndarray
    ) -> None:
        self.matrix, self.record, self.place, self.sparse = matrix, record, place, sparse
        self.shape = (matrix.shape[0], len(record.genes))
        self.slot = np.full(matrix.shape[0], -1, dtype=np.int32)
        self.held = self._read(held)
        self.slot[held] = np.arange(len(held))

    def __getitem__(self, index: slice | np.ndarray) -> sp.csr_matrix | np.ndarray:
        """Rows by a slice or by cells in any order, float32."""
        if isinstance(index, slice):
            index = np.arange(self.shape[0])[index]
        rows = self._rows(index)
        return rows if self.sparse else rows.toarray()

    def _rows(self, index: np.ndarray) -> sp.csr_matrix:
        slot = self.slot[index]
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
        parts = []
        for i in range(0, max(len(cells), 1), ROWS):
            parts.append(self.record.expression(self.matrix[cells[i : i + ROWS]], self.place))
        return parts[0] if len(parts) == 1 else sp.csr_matrix(sp.vstack(parts, format="csr"))
