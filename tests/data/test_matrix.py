"""Reading in blocks: the scan against numpy, whatever the block size and the storage."""

from __future__ import annotations

from unittest import mock

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crlseq.data import matrix
from crlseq.data.matrix import as_csr, open_screen
from crlseq.data.values import scan
from crlseq.errors import InputError

values = st.one_of(st.just(0.0), st.integers(-3, 9).map(float), st.floats(-1e6, 1e6, width=32))
arrays = hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=values)
storages = st.sampled_from([np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array])


@given(arrays, storages, st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_scan_against_numpy(x: np.ndarray, storage: type, block_values: int) -> None:
    with mock.patch.object(matrix, "BLOCK_VALUES", block_values), open_screen(ad.AnnData(storage(x))) as screen:
        found = scan(screen)
        whole = np.concatenate([block.toarray() for _, block in screen.blocks()])
        index = np.flatnonzero(np.arange(len(x)) % 3 != 1)
        np.testing.assert_array_equal(screen.rows(index).toarray(), x[index])
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_allclose(found.totals, x.sum(1), rtol=1e-12, atol=1e-6)
    np.testing.assert_array_equal(found.detected, (x != 0).sum(0))
    assert found.n_nonzero == (x != 0).sum()
    assert found.n_negative == (x < 0).sum()
    assert found.n_fractional == (x != np.rint(x)).sum()
    assert found.minimum == min(x.min(), 0)
    assert found.maximum == max(x.max(), 0)


@given(arrays, storages, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
@settings(max_examples=50, deadline=None)
def test_the_first_value_that_is_no_number_is_named(
    x: np.ndarray, storage: type, bad: float, data: st.DataObject
) -> None:
    cell = data.draw(st.integers(0, x.shape[0] - 1))
    gene = data.draw(st.integers(0, x.shape[1] - 1))
    x[cell, gene] = bad
    adata = ad.AnnData(storage(x))
    adata.obs_names, adata.var_names = [f"c{i}" for i in range(len(x))], [f"g{i}" for i in range(x.shape[1])]
    with open_screen(adata) as screen, pytest.raises(InputError, match=rf"'g{gene}' in cell 'c{cell}' is {bad}"):
        scan(screen)


def test_masked_values_are_missing() -> None:
    block = np.ma.masked_array([[1, 2], [3, 4]], [[False, True], [False, False]])
    found = as_csr(block).toarray()
    assert np.isnan(found[0, 1])
    assert found[1].tolist() == [3.0, 4.0]


def test_the_input_is_not_changed() -> None:
    x = sp.csr_matrix((np.array([1.0, 2.0, 3.0]), np.array([2, 0, 0]), np.array([0, 3])), shape=(1, 3))
    as_csr(x)
    assert x.indices.tolist() == [2, 0, 0]
    assert as_csr(x).toarray().tolist() == [[5.0, 0.0, 1.0]]
