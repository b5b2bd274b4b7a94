"""Screens that the likelihood can hardly be fitted to: a regularised answer or one sentence, never NaN, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tests.support import dense, invoke, small_screen


def few_cells() -> ad.AnnData:
    """Five cells a perturbation, fewer than there are components."""
    return small_screen(cells_per_perturbation=5, n_control=60)


def one_cell() -> ad.AnnData:
    """One perturbation with a single cell."""
    adata = small_screen()
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    return adata[np.r_[np.flatnonzero(labels != "g0"), np.flatnonzero(labels == "g0")[:1]]].copy()


def copies() -> ad.AnnData:
    """All cells of one perturbation are the same cell: no variance within its environment."""
    adata = small_screen()
    x, own = dense(adata), adata.obs["perturbation"].to_numpy() == "g1"
    x[own] = x[np.flatnonzero(own)[0]]
    return ad.AnnData(x.astype(np.float32), obs=adata.obs, var=adata.var)


def twins() -> ad.AnnData:
    """Two perturbations with the same cells: their shifts are collinear."""
    adata = small_screen()
    x, labels = dense(adata), adata.obs["perturbation"].to_numpy()
    x[labels == "g1"] = x[labels == "g0"]
    return ad.AnnData(x.astype(np.float32), obs=adata.obs, var=adata.var)


def constant_genes() -> ad.AnnData:
    """All genes but two are the same in every cell."""
    adata = small_screen()
    x = dense(adata)
    x[:, 2:] = 3
    return ad.AnnData(x.astype(np.float32), obs=adata.obs, var=adata.var)


def two_genes() -> ad.AnnData:
    """Two genes: fewer components than programs."""
    adata = small_screen(n_genes=2)
    return adata[dense(adata).sum(1) > 0].copy()


SCREENS = [few_cells, one_cell, copies, twins, constant_genes, two_genes]


@pytest.mark.parametrize("make", SCREENS, ids=lambda make: str(make.__name__))
@pytest.mark.parametrize("options", [(), ("--n-latents", 5), ("--intervention", "soft")], ids=str)
def test_a_sound_answer_or_one_sentence(
    tmp_path: Path, write: Callable[[ad.AnnData], Path], make: Callable[[], ad.AnnData], options: tuple[object, ...]
) -> None:
    run = tmp_path / "RUN"
    common = ("--method", "linear", "--bootstrap", 2, "--min-cells", 2)
    answer = invoke("fit", write(make()), "--output", run, *common, *options)
    assert answer.code in (0, 3) and "Traceback" not in answer.err
    if answer.code == 3:
        assert not run.exists() and len(answer.err.strip().splitlines()[-1]) > 20
        return
    programs, table = pd.read_csv(run / "programs.csv"), pd.read_csv(run / "interventions.csv")
    assert np.isfinite(programs[["loading", "total_effect"]].to_numpy(float)).all()  # none without any effect
    claimed = table[table["program"].notna()]
    assert np.isfinite(claimed[["weight", "shift", "retention"]].to_numpy()).all()
    text = (run / "dag.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and json.loads(text)


def test_every_screen_is_answered_or_refused_for_its_own_reason(
    write: Callable[[ad.AnnData], Path], tmp_path: Path
) -> None:
    """More programs than perturbations is the one thing here that no regularisation mends."""
    answer = invoke("fit", write(twins()), "--output", tmp_path / "RUN", "--n-latents", 50)
    assert answer.code == 3 and "50 programs were asked for" in answer.err
