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
import pytest
from scipy import sparse

from crlseq.data import simulate as module
from crlseq.data.simulate import simulate

SMALL: dict[str, Any] = {
    "n_latents": 3,
    "perturbations_per_latent": 2,
    "n_genes": 20,
    "cells_per_perturbation": 15,
    "n_control": 40,
}


def dense(data: anndata.AnnData) -> np.ndarray[Any, np.dtype[np.float32]]:
    return data.X.toarray() if sparse.issparse(data.X) else np.asarray(data.X)


def topological_order(adjacency: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    """Latents after their parents; shorter than p if there is a cycle."""
    order: list[int] = []
    while free := [
        k for k in range(len(adjacency)) if k not in order and all(j in order for j in np.flatnonzero(adjacency[:, k]))
    ]:
        order += free
    return order


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


def test_graphs_are_acyclic_in_a_random_order_with_the_density_asked_for() -> None:
    graphs = [module._draw_graph(10, 1.5, np.random.default_rng(seed))[0] for seed in range(200)]
    assert all(len(topological_order(graph)) == 10 for graph in graphs)
    edges = np.array([np.count_nonzero(graph) for graph in graphs])
    assert abs(edges.mean() - 15) < 4 * np.sqrt(45 * (1 / 3) * (2 / 3) / 200)  # 45 pairs, each with probability 1/3
    against_index = sum(np.count_nonzero(np.tril(graph)) for graph in graphs) / edges.sum()
    assert 0.45 < against_index < 0.55
    weights = np.abs(np.concatenate([graph[graph != 0] for graph in graphs]))
    assert weights.min() >= 0.6 and weights.max() <= 1.4
    assert np.count_nonzero(module._draw_graph(4, 1.5, np.random.default_rng(0))[0]) == 6  # the complete DAG
    assert np.count_nonzero(module._draw_graph(1, 0.0, np.random.default_rng(0))[0]) == 0


class NoNoise:
    """A generator whose standard normals are all 1, so that the equations can be worked out by hand."""

    def standard_normal(self, shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.ones(shape)


@pytest.mark.parametrize(
    ("members", "equations", "expected"),
    [
        # chain 2 -> 0 -> 1 with G[2, 0] = 2 and G[0, 1] = -1, all z = 1
        ((), "linear", [3, -2, 1]),
        ((), "relu", [3, -2, 1]),
        ((0,), "linear", [4.5, -3.5, 1]),  # on 0: half of the parent's 2, twice z, plus 1.5
        ((1,), "linear", [-5, 6, -3]),  # on 2: shift -4, retention 1
        ((1,), "relu", [1, 0, -3]),  # ReLU hides the negative parent
        ((0, 2), "linear", [2.5, -1.5, 1]),  # both on 0: retentions 0.5 * 0, scales 2 * 1, shifts 1.5 - 1
        ((0, 1), "linear", [0.5, 0.5, -3]),
    ],
)
def test_structural_equations_by_hand(members: tuple[int, ...], equations: Any, expected: list[float]) -> None:
    adjacency = np.zeros((3, 3))
    adjacency[2, 0], adjacency[0, 1] = 2, -1
    effects = module._Effects(
        target=np.array([0, 2, 0]),
        shift=np.array([1.5, -4, -1]),
        log_scale=np.log([2.0, 1, 1]),
        retention=np.array([0.5, 1, 0]),
    )
    latents = module._draw_latents(2, adjacency, np.array([2, 0, 1]), effects, members, equations, NoNoise())  # type: ignore[arg-type]
    assert np.allclose(latents, [expected, expected])


@pytest.mark.parametrize(("intervention", "scale"), [("hard", 0.7), ("soft", 0.7), ("shift", 1.0)])
def test_kinds_of_intervention(intervention: Any, scale: float) -> None:
    effects = module._draw_effects(4, 12, intervention, np.random.default_rng(0))
    assert set(effects.target[:4]) == {0, 1, 2, 3}
    assert np.allclose(np.exp(effects.log_scale), scale)
    assert ((np.abs(effects.shift) >= 1) & (np.abs(effects.shift) <= 3)).all()
    low, high = {"hard": (0, 0), "soft": (0.2, 0.6), "shift": (1, 1)}[intervention]
    assert (effects.retention >= low).all() and (effects.retention <= high).all()


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


def test_depth_and_overdispersion_of_counts() -> None:
    data = simulate(n_latents=3, perturbations_per_latent=1, n_genes=400, n_control=3000, depth=2000.0, seed=3)
    assert abs(np.median(np.asarray(data.X.sum(1))) / 2000 - 1) < 0.05
    flat = module._counts(np.zeros((4000, 50)), 5000.0, np.random.default_rng(0)).toarray()
    share = flat / flat.sum(1, keepdims=True) * 5000
    mean, variance = share.mean(0), share.var(0)
    expressed = mean > 20
    dispersion = (variance[expressed] - mean[expressed]) / mean[expressed] ** 2
    assert 0.12 < np.median(dispersion) < 0.26


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
    ],
)
def test_bad_arguments(argument: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        simulate(**{**SMALL, argument: value})


@pytest.mark.parametrize("mixing", ["linear", "network"])
def test_latents_move_the_genes_that_are_loaded_on_them_and_no_others(mixing: Any) -> None:
    rng = np.random.default_rng(0)
    loaded, latents = rng.random((4, 200)) < 0.3, rng.standard_normal((50, 4))

    def signal(values: np.ndarray) -> np.ndarray:
        return module._mixed(values, 200, mixing, loaded, np.random.default_rng(1))

    for k in range(4):
        moved = latents.copy()
        moved[:, k] += 1
        assert ((signal(moved) != signal(latents)).any(0) == loaded[k]).all()


def test_sparse_loadings_are_part_of_the_truth() -> None:
    data = simulate(**{**SMALL, "n_genes": 400}, loading_density=0.25, noise="gaussian")
    loaded = data.uns["truth"]["loaded"]
    assert loaded.shape == (3, 400)
    assert loaded.mean() == pytest.approx(0.25, abs=0.04)
    # Genes that nothing is loaded on have measurement noise alone.
    assert data.X[:, ~loaded.any(0)].std() == pytest.approx(module.GAUSSIAN_NOISE, rel=0.05)
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
