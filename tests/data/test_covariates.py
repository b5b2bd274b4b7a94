"""Columns of cells beside the labels: what their names say, what the cells say, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crlseq.config import DataConfig
from crlseq.data.covariates import (
    BATCH,
    CONTEXT,
    OUTCOME,
    UNKNOWN,
    Covariate,
    _explained,
    _explained_by_number,
    covariates,
    in_words,
    role_of,
)
from crlseq.data.dataset import read_data
from crlseq.data.inspection import describe
from crlseq.data.matrix import open_screen
from crlseq.data.perturbations import read_perturbations
from crlseq.data.values import kind_of_values, scan
from crlseq.errors import InputError
from tests.support import invoke


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (
            "batch Batch gem_group gemgroup replicate bio_rep rep1 lane lane.id 10x_lane orig.ident channel donor_id sample "
            "sampleID plate dataset experiment library_id pool HTO_maxID batch_var batchID run well seq_run Library mouse_id",
            BATCH,
        ),
        ("cell_line cell_type CellType stimulation Stim time_point hours dose treatment Sex tissue", CONTEXT),
        (
            "leiden louvain seurat_clusters Phase phase predicted_celltype RNA_snn_res.0.8 mixscape_class cell_cycle "
            "S_score G2M.Score S.Score pct_counts_mt percent.mt percent_mito",
            OUTCOME,
        ),
        ("report representative planet explained libel x condition disease", UNKNOWN),
    ],
)
def test_roles_by_name(names: str, role: str) -> None:
    assert [name for name in names.split() if role_of(name) != role] == []


def screen(effect: float = 1.0, n: int = 800, seed: int = 0) -> ad.AnnData:
    """Two batches that differ in a fifth of the genes, three perturbations, an outcome of one of them, and noise."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["control", "control", "A", "B", "C"], n)
    batch, noise = rng.integers(0, 2, n), rng.integers(0, 3, n)
    state = np.where(labels == "A", rng.random(n) < 0.9, rng.random(n) < 0.3)
    rate = rng.gamma(1.0, 2.0, (1, 100)) * np.ones((n, 1))
    rate[:, :20] *= np.exp(effect * 0.5 * batch[:, None])
    rate[:, 20:40] *= np.exp(0.8 * state[:, None])
    obs = pd.DataFrame({
        "perturbation": labels, "when": np.array(["mon", "tue"])[batch], "lane": noise, "state_of": state,
        "group": np.where(state, "x", "y"), "guide": [f"{label}_{i % 3}" for i, label in enumerate(labels)],
        "is_A": labels == "A", "size": rng.normal(size=n), "one": "same", "id": np.arange(n),
    }, index=[f"c{i}" for i in range(n)])  # fmt: skip
    return ad.AnnData(rng.poisson(rate).astype(np.float32), obs=obs)


def found(adata: ad.AnnData) -> dict[str, Covariate]:
    with open_screen(adata) as opened:
        scanned = scan(opened)
        labels = read_perturbations(opened.obs, "perturbation")
        return {c.column: c for c in covariates(opened, labels, kind_of_values(opened, scanned), scanned.totals)}


def test_what_cells_say_of_columns() -> None:
    got = found(screen())
    # Labels, what is a function of them or they of it, and names are no covariates.
    assert set(got) == {"when", "lane", "state_of", "group", "size", "id", "log-depth"}
    assert got["size"].levels == 0 and not got["size"].matters and not got["size"].looks_like_batch
    assert "(numbers; " in got["size"].in_words()
    assert got["when"].role == UNKNOWN and got["when"].matters and got["when"].looks_like_batch
    assert got["when"].explained > 3 * got["when"].by_chance and got["when"].levels == 2
    assert got["lane"].looks_like_batch and not got["lane"].matters
    assert got["group"].matters and got["group"].p_labels < 1e-6 and not got["group"].looks_like_batch
    assert got["state_of"].role == OUTCOME


def test_chance_is_chance() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 5)) * np.array([9.0, 5.0, 2.0, 1.0, 1.0])
    got = np.array([_explained(scores, rng.integers(-1, 4, 200)) for _ in range(400)])
    assert 0.95 < np.mean(got[:, 0] / got[:, 1]) < 1.05
    assert (got[:, 2] < 0.05).mean() < 0.07 and (got[:, 2] < 1e-3).sum() <= 2


def test_levels_by_hand() -> None:
    """0, 2, 1 and 5, 7, 6: means 1 and 6, between them 6 * 2.5^2 = 37.5, within 2 + 2; F = 37.5 / (4 / 4)."""
    scores, codes = np.array([[0.0], [2.0], [1.0], [5.0], [7.0], [6.0], [99.0]]), np.array([0, 0, 0, 1, 1, 1, -1])
    share, chance, p = _explained(scores, codes)
    assert share == pytest.approx(37.5 / 41.5) and chance == 1 / 5
    assert p == pytest.approx(stats.f.sf(37.5, 1, 4))


def test_a_number_by_hand() -> None:
    """y = 1, 2, 3, 6 on z = 0, 1, 2, 3: slope 1.6, explained 5 * 1.6^2 = 12.8 of 14; F = 12.8 / (1.2 / 2)."""
    share, chance, p = _explained_by_number(np.array([[1.0], [2.0], [3.0], [6.0]]), np.arange(4.0))
    assert share == pytest.approx(12.8 / 14) and chance == 1 / 3
    assert p == pytest.approx(stats.f.sf(12.8 / 0.6, 1, 2))


def test_numbers_that_go_with_the_labels_are_told_unless_they_are_taken_off() -> None:
    adata = screen(effect=0.0)
    rng = np.random.default_rng(3)
    age = rng.normal(size=len(adata)) + adata.obs["perturbation"].eq("B")
    adata.X[:, 50:70] = rng.poisson(np.asarray(adata.X[:, 50:70]) * np.exp(0.5 * age.to_numpy()[:, None]))
    adata.obs = adata.obs[["perturbation"]].assign(age=age)
    told = "Cells of different perturbations differ in "
    note = next(note for note in read_data(adata, DataConfig(), 0).notes if note.startswith(told))
    assert "age (numbers; " in note and note.endswith("unless it is taken off: --covariates age.")
    assert not any("age (" in note for note in read_data(adata, DataConfig(covariates=("age",)), 0).notes)
    assert note in describe(adata, DataConfig())["notes"]


def test_a_fit_says_what_it_leaves_alone() -> None:
    adata = screen()
    adata.obs["cell_line"] = np.where(adata.obs["when"] == "mon", "K562", "RPE1")
    notes = " ".join(read_data(adata, DataConfig(), 0).notes)
    assert "No --batch-key was given. Columns that may be batches: when (2 levels; " in notes
    assert "Cells of different contexts are fitted together: cell_line (2 levels; " in notes
    with_key = " ".join(read_data(adata, DataConfig(batch_key="when"), 0).notes)
    assert "No --batch-key" not in with_key and in_words([], None) == []


def test_check_makes_the_checks_of_a_fit() -> None:
    adata = screen()
    mixed = adata.obs["perturbation"].eq("control") | adata.obs["when"].eq("mon")
    adata.obs["lonely"] = np.where(mixed, "p0", "p1")
    adata.obs["apart"] = adata.obs["perturbation"].eq("control")
    adata.obs["holes"] = adata.obs["when"].where(np.arange(800) > 2)
    for key in ("absent", "holes", "apart"):
        with pytest.raises(InputError) as refusal:
            read_data(adata, DataConfig(batch_key=key), 0)
        assert describe(adata, DataConfig(batch_key=key))["problems"] == [str(refusal.value)]
    for config in (
        DataConfig(),
        DataConfig(batch_key="lonely"),
        DataConfig(batch_key="when", min_cells=1 + int(adata.obs["perturbation"].value_counts().min())),
    ):
        said, done = describe(adata, config), read_data(adata, config, 0)
        assert set(said["notes"]) <= {*done.notes} and len(said["notes"]) >= 1
    assert "--batch-key when" in describe(screen(), DataConfig())["command"]


def test_check_tells_what_was_not_seen_from_what_could_not_be_seen(tmp_path: Path) -> None:
    adata = screen()
    adata = adata[:, :].copy()
    control = adata.obs["perturbation"].eq("control")
    adata.obs = adata.obs[["perturbation"]].assign(
        noise=np.random.default_rng(1).choice(["x", "y"], len(adata)),
        rare=np.where(control, "x", np.random.default_rng(2).choice(["x", "y"], len(adata))),
    )
    adata.write_h5ad(tmp_path / "screen.h5ad")
    said = invoke("check", tmp_path / "screen.h5ad").out
    assert "control cells show no difference (p below 0.001) between levels of noise" in said
    assert "control cells are too few to test rare" in said
