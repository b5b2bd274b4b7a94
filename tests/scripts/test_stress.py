"""What the benchmark of screens that went wrong does to them, and how it counts edges."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import crlseq
from scripts import benchmark_stress as script
from tests.support import dense

SIZES: dict[str, Any] = {"n_latents": 3, "perturbations_per_latent": 2, "n_genes": 5, "cells_per_perturbation": 40}


@pytest.fixture
def screen() -> ad.AnnData:
    """Six perturbations of 40 cells and 60 controls, in two batches."""
    return crlseq.simulate(**SIZES, n_control=60, n_batches=2, batch_scale=1.0)


def sizes(screen: ad.AnnData) -> dict[str, int]:
    return {str(name): int(n) for name, n in screen.obs["perturbation"].value_counts().items() if n}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_mislabelled(screen: ad.AnnData) -> None:
    before = screen.obs["perturbation"].astype(str).to_numpy()
    found = script.mislabelled(screen, 0.3, rng())
    after = found.obs["perturbation"].astype(str).to_numpy()
    assert (before != after).sum() == 72  # 0.3 x 240: each wrong label is another one
    assert ((before == "control") == (after == "control")).all()
    assert set(after) == set(before)
    np.testing.assert_array_equal(dense(found), dense(screen))
    assert (screen.obs["perturbation"].astype(str) == before).all()  # what came in is left alone
    assert sizes(script.mislabelled(screen, 0.0, rng())) == sizes(screen)


def test_uneven(screen: ad.AnnData) -> None:
    found = sizes(script.uneven(screen, 10, rng()))
    assert found.pop("control") == 60
    # 40 x 10^-1, 10^-0.8, ... 10^0
    assert sorted(found.values()) == [4, 6, 10, 16, 25, 40]


def test_without_effect() -> None:
    screen = crlseq.simulate(**SIZES, n_control=300)
    found = script.without_effect(screen, 0.8, rng(), n_cells=10)
    counts = sizes(found)
    nothing = [name for name in counts if name.startswith("none")]
    assert len(nothing) == 24  # of 30
    assert {counts[name] for name in nothing} == {10} and counts["control"] == 60
    changed = found.obs["perturbation"].astype(str) != screen.obs["perturbation"].astype(str)
    assert set(screen.obs["perturbation"][changed.to_numpy()]) == {"control"}
    np.testing.assert_array_equal(dense(found), dense(screen))


def test_doublets(screen: ad.AnnData) -> None:
    found = script.doublets(screen, 0.1, rng())
    added = dense(found) - dense(screen)
    double = np.flatnonzero(added.any(1))
    assert len(double) == 30  # of 300
    cells = {tuple(row) for row in dense(screen)}
    assert all(tuple(added[i]) in cells for i in double)
    assert found.obs.equals(screen.obs)


@pytest.mark.parametrize("controls", [True, False])
def test_confounded(screen: ad.AnnData, controls: bool) -> None:
    found = script.confounded(screen, controls, rng())
    there = pd.crosstab(found.obs["perturbation"].astype(str), found.obs["batch"].astype(str)) > 0
    assert there.loc["control"].tolist() == [True, controls]
    perturbed = there.drop(index="control")
    assert (perturbed.sum(axis=1) == 1).all()
    assert perturbed["b1"].sum() == 3
    assert set(found.obs_names) <= set(screen.obs_names)


def test_sure_edges_are_counted_against_the_truth() -> None:
    """Latents 2 -> 0 -> 1; programs P0, P1, P2 are latents 2, 0, 1."""
    adjacency = np.zeros((3, 3))
    adjacency[2, 0] = adjacency[0, 1] = 1.0
    truth = {"adjacency": adjacency, "target": pd.DataFrame({"latent": [2, 0, 1]}, index=["a", "b", "c"])}
    support = np.array([[0.0, 1.0, 0.9], [0.0, 0.0, 0.8], [0.0, 0.95, 0.0]])
    run = SimpleNamespace(
        interventions=pd.DataFrame({"perturbation": ["a", "b", "c", "none0"], "program": ["P0", "P1", "P2", "P2"]}),
        edges=pd.DataFrame({"source": ["P0", "P0", "P1", "P2"], "target": ["P1", "P2", "P2", "P1"]}),
        facts=SimpleNamespace(
            discovery=SimpleNamespace(
                bootstrap=SimpleNamespace(edge=support.tolist()), dispersion=1.02, straightened=False
            ),
            identification=SimpleNamespace(verdict="identified"),
        ),
    )
    row = script.row_of(run, truth)
    # P0 -> P1 is there; P0 -> P2 only by way of P1; P2 -> P1 is the wrong way round; P1 -> P2 is not sure.
    assert (row["sure"], row["sure_false"], row["sure_unrelated"]) == (3, 2, 1)
    assert (row["n_edges"], row["claims_of_none"], row["target_accuracy"], row["shd"]) == (4, 1, 1.0, 2.0)


def test_the_benchmark_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {
        "n_latents": 2,
        "expected_parents": 0.5,
        "perturbations_per_latent": 2,
        "n_genes": 30,
        "cells_per_perturbation": 40,
        "n_control": 200,
    }
    stresses = {name: (levels[:1], make, told) for name, (levels, make, told) in script.STRESSES.items() if name in ("none", "doublets")}  # fmt: skip
    words = ["--output", str(tmp_path), "--seeds", "1", "--method", "linear", "--bootstrap", "2", "--threads", "1"]
    with mock.patch.dict(script.SCREEN, small), mock.patch.dict(script.STRESSES, stresses, clear=True):
        script.main([*words, "--stress", "none"])
        first = pd.read_csv(tmp_path / "stress.csv")
        script.main(words)
    table = pd.read_csv(tmp_path / "stress.csv")
    pd.testing.assert_frame_equal(table[:1], first, check_dtype=False)
    assert list(zip(table["stress"], table["level"], strict=True)) == [("none", 0), ("doublets", 0.05)]
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert summary["fits"].tolist() == [1, 1]
    assert summary["target_accuracy"].tolist() == table["target_accuracy"].tolist()
    assert "doublets" in capsys.readouterr().out
