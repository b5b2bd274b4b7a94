"""An AnnData that anndata cannot write is refused before it is fitted, and the remedy that is named works."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import crlseq
from crlseq.errors import InputError
from crlseq.pipeline.progress import Progress
from crlseq.run.writable import refuse_unwritable
from tests.support import FAST, small_screen


def column(slot: str, name: Any, value: Callable[[int], Any]) -> Callable[[ad.AnnData], None]:
    def put(adata: ad.AnnData) -> None:
        table = getattr(adata, slot)
        table[name] = value(len(table))

    return put


def entry(slot: str, name: Any, value: Callable[[ad.AnnData], Any]) -> Callable[[ad.AnnData], None]:
    return lambda adata: getattr(adata, slot).__setitem__(name, value(adata))


def raw_with_index(adata: ad.AnnData) -> None:
    adata.raw = adata.copy()
    adata.raw.var["_index"] = adata.raw.var_names


def integer_names(adata: ad.AnnData) -> None:
    adata.obs.index = range(adata.n_obs)


def some_of(*values: Any) -> Callable[[int], Any]:
    return lambda n: [values[i % len(values)] for i in range(n)]


CASES: dict[str, tuple[str, Callable[[ad.AnnData], None]]] = {  # the element that is named, none where it can be written
    "numbers and texts": ("adata.obs['x']", column("obs", "x", some_of(1, "two"))),
    "numbers and texts of genes": ("adata.var['x']", column("var", "x", some_of(1, "two"))),
    "categories of two kinds": ("adata.obs['x']", column("obs", "x", lambda n: pd.Categorical(some_of(1, "b")(n)))),
    "truth values and none": ("adata.obs['x']", column("obs", "x", some_of(True, None))),
    "lists": ("adata.obs['x']", column("obs", "x", lambda n: [["g1", "g2"]] * n)),
    "times": ("adata.obs['x']", column("obs", "x", lambda n: pd.Timestamp("2024-01-01"))),
    "durations": ("adata.obs['x']", column("obs", "x", lambda n: pd.Timedelta("1h"))),
    "intervals": ("adata.obs['x']", column("obs", "x", lambda n: pd.cut(np.arange(n), 3))),
    "a reserved name": ("adata.obs['_index']", column("obs", "_index", lambda n: "x")),
    "a reserved name in raw": ("adata.raw.var['_index']", raw_with_index),
    "a number as a name": ("adata.obs[7]", column("obs", 7, lambda n: 1)),
    "numbers as keys": ("adata.uns['x']", entry("uns", "x", lambda a: {0: "red", 1: "blue"})),
    "numbers as keys within": ("adata.uns['x']['y']", entry("uns", "x", lambda a: {"y": {0: "red"}, "z": 1})),
    "a set": ("adata.uns['x']", entry("uns", "x", lambda a: {"a", "b"})),
    "an object within": ("adata.uns['x']['y']['z']", entry("uns", "x", lambda a: {"y": {"z": object(), "u": 1}})),
    "a mixed list": ("adata.uns['x']", entry("uns", "x", lambda a: [1, "a", None])),
    "a mixed table of cells": (
        "adata.obsm['x']['y']",
        entry("obsm", "x", lambda a: pd.DataFrame({"y": some_of(1, "a")(a.n_obs)}, index=a.obs_names)),
    ),
    "a matrix of objects": ("adata.obsm['x']", entry("obsm", "x", lambda a: np.array([[1, "a"]] * a.n_obs, dtype=object))),
    "texts and none": ("", column("obs", "x", some_of("x", None))),
    "texts and NaN": ("", column("obs", "x", some_of("x", np.nan))),
    "nullable texts": ("", column("obs", "x", lambda n: pd.array(some_of("x", pd.NA)(n), dtype="string"))),
    "nullable numbers": ("", column("obs", "x", lambda n: pd.array(some_of(1, None)(n), dtype="Int64"))),
    "names that are numbers": ("", integer_names),
    "none": ("", entry("uns", "x", lambda a: None)),
    "matrices": ("", entry("obsm", "x", lambda a: np.zeros((a.n_obs, 3)))),
    "a sparse graph": ("", entry("obsp", "x", lambda a: sp.eye(a.n_obs, format="csr"))),
    "records": ("", entry("uns", "x", lambda a: np.rec.fromarrays([np.arange(3), np.arange(3.0)], names=["a", "b"]))),
}  # fmt: skip


@pytest.fixture
def adata() -> ad.AnnData:
    return small_screen()


@pytest.mark.parametrize(("where", "change"), CASES.values(), ids=CASES)
def test_refused_is_what_anndata_cannot_write(
    adata: ad.AnnData, tmp_path: Path, where: str, change: Callable[[ad.AnnData], None]
) -> None:
    def written() -> bool:
        try:
            with ad.settings.override(allow_write_nullable_strings=True):
                adata.copy().write_h5ad(tmp_path / "x.h5ad")
        except Exception:  # of any kind
            return False
        return True

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(adata)
        assert written() == (not where)
        if not where:
            refuse_unwritable(adata)
            return
        stages: list[str] = []
        with pytest.raises(InputError) as caught:
            crlseq.fit(adata, tmp_path / "RUN", progress=Progress(stage=stages.append), **FAST)
        assert stages == []
        assert caught.value.message.startswith(f"anndata cannot write {where} (")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.h5ad"] * (tmp_path / "x.h5ad").exists()
        code = re.split(r", or remove it: |: ", caught.value.hint, maxsplit=1)[1].split(", or remove it")[0]
        exec(code, {"adata": adata})  # what the hint says
        assert written()
        refuse_unwritable(adata)


def test_all_that_is_wrong_is_named(adata: ad.AnnData) -> None:
    adata.obs["a"], adata.obs["b"] = some_of(1, "x")(adata.n_obs), pd.Timestamp("2024-01-01")
    adata.uns["c"] = {1, 2}
    with pytest.raises(InputError, match=re.escape("adata.obs['a'] (int, str)")) as caught:
        refuse_unwritable(adata)
    assert "(and adata.obs['b'], adata.uns['c'])" in caught.value.message


def test_a_run_in_memory_is_not_written(adata: ad.AnnData) -> None:
    adata.uns["x"] = {1, 2}
    assert crlseq.fit(adata, **FAST).path is None


def test_what_is_left_of_the_screen_is_untouched(adata: ad.AnnData) -> None:
    adata.obs["text"] = some_of("a", "b")(adata.n_obs)
    before = adata.copy()
    refuse_unwritable(adata)
    assert adata.obs.equals(before.obs) and adata.obs["text"].dtype == before.obs["text"].dtype
