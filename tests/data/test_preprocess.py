"""Normalisation worked out by hand, choice of genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from crlseq.config import DataConfig
from crlseq.data.matrix import open_screen
from crlseq.data.preprocess import Preprocessing, load, plan_preprocessing
from crlseq.data.values import Values, scan
from crlseq.errors import InputError


def record(**changes: object) -> Preprocessing:
    given: dict[str, object] = {
        "values": "counts", "reason": "", "layer": None, "target_sum": 10.0, "genes": ("0", "1"), "gene_choice": "",
        "n_genes_in_file": 3, "n_silent_genes": 0, **changes,
    }  # fmt: skip
    return Preprocessing(**given)  # type: ignore[arg-type]


def test_normalisation_by_hand() -> None:
    counts = sp.csr_matrix([[1.0, 3.0, 0.0], [5.0, 0.0, 15.0], [0.0, 0.0, 0.0]])
    found = record().apply(counts).toarray()
    # 10 / 4 of the first cell, 10 / 20 of the second; an empty cell stays empty
    np.testing.assert_allclose(found, np.log1p([[2.5, 7.5, 0.0], [2.5, 0.0, 7.5], [0, 0, 0]]), rtol=1e-15)
    assert (record(target_sum=None).apply(counts) != counts).nnz == 0


def test_plan_by_hand() -> None:
    x = np.array([[2, 2, 0, 0], [1, 9, 0, 0], [30, 10, 0, 0], [0, 4, 4, 0]], dtype=float)
    used = np.array([True, True, True, False])
    with open_screen(ad.AnnData(x)) as screen:
        found = scan(screen)
        plan = plan_preprocessing(screen, found, Values("counts", "because"), used, DataConfig(n_top_genes="all"))
        # Totals of used cells are 4, 10 and 40; the totals are of all genes.
        assert plan.target_sum == 10.0
        assert plan.genes == ("0", "1", "2")
        assert (plan.n_silent_genes, plan.n_genes_in_file) == (1, 4)
        assert plan.gene_choice == "all 3 genes with a non-zero value"
        loaded = load(screen, plan, 8)
        dense = loaded if isinstance(loaded, np.ndarray) else loaded.toarray()
        assert dense.dtype == np.float32
        np.testing.assert_allclose(dense, np.log1p(x[:, :3] * (10 / np.array([4, 10, 40, 8]))[:, None]), rtol=1e-6)
        listed = plan_preprocessing(screen, found, Values("log", ""), used, DataConfig(genes=("2", "0")))
        assert listed.genes == ("0", "2")  # the file's order
        assert listed.target_sum is None
        with pytest.raises(InputError, match="'3' is zero in every cell"):
            plan_preprocessing(screen, found, Values("log", ""), used, DataConfig(genes=("0", "3")))
        with pytest.raises(InputError, match="'x'"):
            plan_preprocessing(screen, found, Values("log", ""), used, DataConfig(genes=("x", "0")))


def test_most_variable_genes_of_continuous_values() -> None:
    x = np.random.default_rng(1).standard_normal((200, 6)) * np.array([1, 5, 1, 4, 0.1, 3])
    with open_screen(ad.AnnData(x)) as screen:
        config = DataConfig(n_top_genes=3)
        plan = plan_preprocessing(screen, scan(screen), Values("continuous", ""), np.ones(200, bool), config)
    assert plan.genes == ("1", "3", "5")


def test_unused_cells_have_no_say_in_the_genes() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((200, 4)) * np.array([3.0, 2.0, 1.0, 0.1])
    used = np.arange(200) < 100
    x[~used, 3] *= 1000
    with open_screen(ad.AnnData(x)) as screen:
        plan = plan_preprocessing(screen, scan(screen), Values("continuous", ""), used, DataConfig(n_top_genes=2))
    assert plan.genes == ("0", "1")


def test_other_cells_are_checked() -> None:
    record().check(sp.csr_matrix([[1.0, 2.0]]), "file")
    record(values="log").check(sp.csr_matrix([[1.5, 2.0]]), "file")
    for value in (np.nan, np.inf, 0.5, -1.0):
        with pytest.raises(InputError):
            record().check(sp.csr_matrix([[1.0, value]]), "file")
