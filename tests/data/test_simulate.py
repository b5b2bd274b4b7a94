"""Simulated screens: what their docstring promises, by hand-worked numbers and by construction."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from crlseq.data.simulate import GAUSSIAN_NOISE, simulate

SMALL: dict[str, Any] = {
    "n_latents": 3,
    "perturbations_per_latent": 2,
    "n_genes": 20,
    "cells_per_perturbation": 15,
    "n_control": 40,
}


def dense(data: anndata.AnnData) -> np.ndarray[Any, np.dtype[np.float32]]:
    return data.X.toarray() if sparse.issparse(data.X) else np.asarray(data.X)


def test_layout() -> None:
    data = simulate(**SMALL, n_doubles=4, n_batches=2)
    assert data.shape == (40 + 10 * 15, 20)
    assert sparse.issparse(data.X) and data.X.format == "csr" and data.X.dtype == np.float32
    assert np.array_equal(data.X.data, np.round(data.X.data)) and data.X.data.min() > 0
    sizes = data.obs["perturbation"].value_counts()
    singles = [f"g{i}" for i in range(6)]
    doubles = [name for name in sizes.index if "+" in name]
    assert sizes["control"] == 40 and (sizes.drop("control") == 15).all()
    assert set(sizes.index) == {"control", *singles, *doubles} and len(doubles) == 4
    assert all(int(a[1:]) < int(b[1:]) for a, b in (name.split("+") for name in doubles))
    truth = data.uns["truth"]
    assert truth["adjacency"].shape == (3, 3) and list(truth["target"].index) == singles
    assert set(truth["target"]["latent"]) == {0, 1, 2}
    assert data.obsm["true_latents"].shape == (len(data), 3)
    assert list(data.obs["batch"].cat.categories) == ["b0", "b1"]
    assert "batch" not in simulate(**SMALL).obs


def test_gaussian_values_are_dense_and_the_file_round_trips(tmp_path: Path) -> None:
    data = simulate(**SMALL, noise="gaussian", n_doubles=2, n_batches=2, batch_scale=0.5)
    assert isinstance(data.X, np.ndarray) and data.X.dtype == np.float32
    data.write_h5ad(tmp_path / "screen.h5ad")
    again = anndata.read_h5ad(tmp_path / "screen.h5ad")
    assert np.array_equal(again.X, data.X) and (again.obs["perturbation"] == data.obs["perturbation"]).all()
    assert np.array_equal(again.uns["truth"]["adjacency"], data.uns["truth"]["adjacency"])
    assert again.uns["truth"]["target"].equals(data.uns["truth"]["target"])
    assert again.uns["truth"]["note"] == data.uns["truth"]["note"]


def test_screens_of_earlier_versions_stay_the_same() -> None:
    """What options add is drawn elsewhere: the cells of the arguments of version 0.1 keep their counts."""
    screens = [
        simulate(**SMALL, n_doubles=3, n_batches=2, batch_scale=0.3, equations="relu", intervention="soft", seed=5),
        simulate(**SMALL, mixing="network", intervention="shift", loading_density=0.4, expected_parents=0.5, seed=6),
    ]
    digests = [hashlib.sha256(dense(screen).tobytes()).hexdigest()[:16] for screen in screens]
    assert digests == ["b9aff718aa4dc37a", "226fbbf5641f2765"]


def test_equal_arguments_give_equal_cells_whatever_the_hash_seed() -> None:
    program = (
        "import hashlib; from crlseq.data.simulate import simulate; d = simulate(n_latents=3, perturbations_per_latent=2,"
        "n_genes=20, cells_per_perturbation=15, n_control=40, n_doubles=3, n_batches=2, batch_scale=.1, seed=5);"
        "print(hashlib.sha256(d.X.toarray().tobytes() + ''.join(d.obs['perturbation']).encode()).hexdigest())"
    )
    here = simulate(**SMALL, n_doubles=3, n_batches=2, batch_scale=0.1, seed=5)
    expected = hashlib.sha256(dense(here).tobytes() + "".join(here.obs["perturbation"]).encode()).hexdigest()
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
    assert not np.array_equal(dense(here), dense(simulate(**SMALL, n_doubles=3, n_batches=2, batch_scale=0.1, seed=6)))


def test_cells_follow_the_truth_that_is_returned() -> None:
    data = simulate(n_latents=4, n_genes=30, n_control=4000, cells_per_perturbation=600, noise="gaussian", seed=2)
    truth, latents, label = data.uns["truth"], data.obsm["true_latents"], data.obs["perturbation"].to_numpy()
    control = latents[label == "control"]
    noise = control - control @ truth["adjacency"]
    assert np.allclose(np.cov(noise.T), np.eye(4), atol=0.1)
    for name, target in truth["target"]["latent"].items():
        cells = latents[label == name]
        residual = cells - cells @ truth["adjacency"]
        others = np.arange(4) != target
        assert np.abs(residual[:, others].mean(0)).max() < 0.2  # only the target's equation changed
        assert abs(cells[:, target].std() - 0.7) < 0.08  # hard: parents cut, noise scaled
        assert 0.85 < abs(cells[:, target].mean()) < 3.15


def test_linear_mixing_is_linear_and_network_mixing_is_not() -> None:
    residual = {}
    for mixing in ("linear", "network"):
        data = simulate(n_latents=4, n_genes=30, noise="gaussian", mixing=mixing, seed=1)
        design = np.column_stack([data.obsm["true_latents"], np.ones(len(data))])
        values = np.asarray(data.X, dtype=float)
        residual[mixing] = (values - design @ np.linalg.lstsq(design, values, rcond=None)[0]).std()
    assert abs(residual["linear"] - 0.3) < 0.01
    assert residual["network"] > 0.36


def test_depth_of_counts() -> None:
    data = simulate(n_latents=3, perturbations_per_latent=1, n_genes=400, n_control=3000, depth=2000.0, seed=3)
    assert abs(np.median(np.asarray(data.X.sum(1))) / 2000 - 1) < 0.05


def test_batches_shift_genes() -> None:
    plain = simulate(**SMALL, noise="gaussian", n_batches=2, seed=4)
    moved = simulate(**SMALL, noise="gaussian", n_batches=2, batch_scale=2.0, seed=4)
    difference = dense(moved) - dense(plain)
    assert np.array_equal(moved.obs["batch"], plain.obs["batch"])
    for batch in ("b0", "b1"):
        rows = difference[(moved.obs["batch"] == batch).to_numpy()]
        assert np.allclose(rows, rows[0], atol=1e-5)
    assert difference.std() > 1


@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        ("n_latents", 0, "n_latents must be a whole number of at least 1"),
        ("n_genes", 2.5, "n_genes must be a whole number"),
        ("n_control", -1, "n_control must be"),
        ("expected_parents", 1.5, "more edges than a DAG of 3 latents"),
        ("expected_parents", float("nan"), "expected_parents must be a finite number"),
        ("depth", 0.0, "depth must be a positive number"),
        ("batch_scale", -0.1, "batch_scale must be"),
        ("loading_density", 0.0, "loading_density must be above 0"),
        ("loading_density", 1.5, "loading_density must be above 0"),
        ("n_doubles", 16, "exceeds the number of pairs of 6 perturbations"),
        ("seed", -1, "seed must be"),
        ("mixing", "cubic", "mixing must be one of linear, network"),
        ("noise", "poisson", "noise must be one of counts, gaussian"),
        ("intervention", "none", "intervention must be one of"),
        ("equations", "tanh", "equations must be one of"),
        ("guides", 0, "guides must be a whole number of at least 1"),
        ("background", 1.5, "background must be a whole number"),
        ("hidden", -1, "hidden must be a finite number of at least 0"),
        ("second_targets", 1.2, "second_targets is a share"),
        ("log_rate_scale", 0.0, "log_rate_scale must be a positive number"),
        ("penetrance", (0.3, 1.1), "penetrance must be two numbers with 0 <= LOW <= HIGH <= 1, not 0.3,1.1"),
        ("penetrance", (0.9, 0.3), "penetrance must be two numbers"),
        ("penetrance", (0.9,), "penetrance must be two numbers"),
        ("retention", (-0.1, 0.3), "retention must be two numbers"),
        ("shift_size", (1.0, float("inf")), "shift_size must be two numbers with 0 <= LOW <= HIGH, not 1,inf"),
        ("edge_size", (0.0, 1.0), "edge_size must be above 0"),
    ],
)
def test_bad_arguments(argument: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        simulate(**{**SMALL, argument: value})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_latents": 2, "expected_parents": 0.5, "hidden": 1}, "hidden needs at least 3 latents, not 2"),
        ({"n_latents": 1, "expected_parents": 0.0, "cycle": True}, "cycle needs at least 2 latents, not 1"),
        ({"n_latents": 1, "expected_parents": 0.0, "second_targets": 0.5}, "second_targets needs at least 2 latents"),
        ({"noise": "gaussian", "depth_by_condition": 0.1}, "depth_by_condition needs counts, not gaussian noise"),
        ({"noise": "gaussian", "genewise_dispersion": True}, "genewise_dispersion needs counts"),
    ],
)
def test_options_that_do_not_fit_each_other(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        simulate(**{**SMALL, **changes})


REAL: dict[str, Any] = {
    "penetrance": (0.5, 0.9), "guides": 3, "background": 2, "cell_cycle": True, "second_targets": 0.5, "hidden": 2,
    "cycle": True, "genewise_dispersion": True, "depth_by_condition": 0.2,
}  # fmt: skip


def test_layout_of_what_real_screens_have(tmp_path: Path) -> None:
    data = simulate(**SMALL, **REAL, n_doubles=4)
    data.write_h5ad(tmp_path / "screen.h5ad")
    data = anndata.read_h5ad(tmp_path / "screen.h5ad")
    truth, obs = data.uns["truth"], data.obs
    shapes = {name: truth[name].shape for name in ("hidden", "background", "dispersion")}
    assert shapes == {"hidden": (2, 3), "background": (4, 20), "dispersion": (20,)}
    assert data.obsm["true_background"].shape == (len(data), 4)
    assert list(truth["log_depth"].index) == list(dict.fromkeys(obs["perturbation"])) and truth["log_depth"].shape == (
        11,
        1,
    )
    assert list(truth["target"].columns) == [
        "latent", "shift", "retention", "penetrance", "second_latent", "second_shift",
    ]  # fmt: skip
    assert (truth["target"]["second_latent"] >= 0).sum() == 3
    control = (obs["perturbation"] == "control").to_numpy()
    assert set(obs["guide"][control]) == {"control_0", "control_1", "control_2"} and not obs["hit"][control].any()
    for label, guide in zip(obs["perturbation"], obs["guide"], strict=True):
        assert [part.rpartition("_")[0] for part in guide.split("|")] == label.split("+")
    plain = simulate(**SMALL)
    assert set(plain.obs) == {"perturbation"} and set(plain.obsm) == {"true_latents"}
    assert set(plain.uns["truth"]) == {"adjacency", "target", "orientation", "note"}
    assert (plain.uns["truth"]["target"]["penetrance"] == 1).all()


@pytest.mark.parametrize("option", ["background", "cell_cycle", "genewise_dispersion", "depth_by_condition"])
def test_what_is_not_of_the_latents_leaves_them_as_they_were(option: str) -> None:
    plain, changed = simulate(**SMALL), simulate(**SMALL, **{option: REAL[option]})
    np.testing.assert_array_equal(plain.obsm["true_latents"], changed.obsm["true_latents"])
    assert (dense(plain) != dense(changed)).any()


def test_cells_that_are_not_hit_are_those_of_a_screen_without_effects() -> None:
    wanted: dict[str, Any] = {**SMALL, "cells_per_perturbation": 400, "guides": 2, "seed": 7}
    all_hit, none, some = (simulate(**wanted, penetrance=share) for share in ((1.0, 1.0), (0.0, 0.0), (0.6, 0.6)))
    hit = some.obs["hit"].to_numpy()
    np.testing.assert_array_equal(some.obsm["true_latents"][hit], all_hit.obsm["true_latents"][hit])
    np.testing.assert_array_equal(some.obsm["true_latents"][~hit], none.obsm["true_latents"][~hit])
    assert not none.obs["hit"].any() and "hit" not in all_hit.obs
    share = some.obs.groupby("perturbation", observed=True)["hit"].mean().drop("control")
    assert (share == some.uns["truth"]["target"]["penetrance"]).all()
    assert share.to_numpy() == pytest.approx(0.6, abs=4 * np.sqrt(0.24 / 400))
    assert set(none.uns["truth"]["target"]["penetrance"]) == {0.0}


def test_parts_of_a_double_hit_for_themselves() -> None:
    data = simulate(**{**SMALL, "cells_per_perturbation": 400}, n_doubles=6, penetrance=(0.5, 0.5))
    doubles = data.obs["perturbation"].str.contains("+", regex=False)
    assert data.obs["hit"][doubles].mean() == pytest.approx(0.75, abs=4 * np.sqrt(0.1875 / 2400))


def test_background_is_as_strong_as_a_program() -> None:
    """Values without measurement noise: background has the variance of a program on the genes that both load."""
    wanted: dict[str, Any] = {"n_genes": 2000, "noise": "gaussian", "loading_density": 0.5, "seed": 1}
    plain, more = simulate(**wanted), simulate(**wanted, background=1, cell_cycle=True)
    added = dense(more).astype(float) - dense(plain)
    factors, loadings = more.obsm["true_background"], more.uns["truth"]["background"]
    np.testing.assert_allclose(added, factors @ loadings, atol=1e-5)
    control = (plain.obs["perturbation"] == "control").to_numpy()
    signal_variance = dense(plain)[control].var(0).mean() - GAUSSIAN_NOISE**2
    of_a_program = signal_variance / (10 * 0.5)  # ten programs, each on half of the genes
    for row in loadings:
        assert (row[row != 0] ** 2).mean() == pytest.approx(of_a_program, rel=0.2)


def test_depth_by_condition() -> None:
    data = simulate(n_latents=3, n_genes=200, depth_by_condition=0.5, seed=2)
    totals = pd.Series(np.log(np.asarray(data.X.sum(1)).ravel())).groupby(data.obs["perturbation"].to_numpy()).median()
    expected = np.log(5000) + data.uns["truth"]["log_depth"]["log_depth"]
    assert (totals - expected).abs().max() < 0.15 and expected.std() > 0.25


def test_sparse_loadings_are_part_of_the_truth() -> None:
    data = simulate(**{**SMALL, "n_genes": 400}, loading_density=0.25, noise="gaussian")
    loaded = data.uns["truth"]["loaded"]
    assert loaded.shape == (3, 400)
    assert loaded.mean() == pytest.approx(0.25, abs=0.04)
    # Genes that nothing is loaded on have measurement noise alone.
    assert data.X[:, ~loaded.any(0)].std() == pytest.approx(GAUSSIAN_NOISE, rel=0.05)
    assert "loaded" not in simulate(**SMALL).uns["truth"]


def test_one_latent_one_cell() -> None:
    data = simulate(
        n_latents=1,
        perturbations_per_latent=1,
        n_genes=1,
        cells_per_perturbation=1,
        n_control=1,
        expected_parents=0.0,
        noise="gaussian",
    )
    assert data.shape == (2, 1) and np.isfinite(data.X).all()
