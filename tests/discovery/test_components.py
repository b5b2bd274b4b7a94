"""Whitened components: straight lines of the truth from counts of their own model, and what must not matter."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.simulate import simulate
from crlseq.discovery import components
from crlseq.discovery.components import count_components, dispersion, whitened_components
from crlseq.discovery.factor_model import SPARE
from tests.support import small_screen

N, GENES, FACTORS = 600, 80, 3


def negative_binomial(rng: np.random.Generator, mean: np.ndarray, alpha: float) -> np.ndarray:
    return rng.poisson(rng.gamma(1 / alpha, mean * alpha)).astype(float)


def factor_model(
    seed: int = 0, depth_scale: float = 0.5, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (N, genes) of the factor model itself, its components (N, 3) and log sizes (N,), all independent."""
    rng = np.random.default_rng(seed)
    v = spread * rng.standard_normal((N, FACTORS))
    loadings = 0.5 * rng.standard_normal((FACTORS, GENES))
    size = depth_scale * rng.standard_normal(N)
    eta = size[:, None] + 1.0 + 0.7 * rng.standard_normal(GENES) + v @ loadings
    return negative_binomial(rng, np.exp(eta), 0.1), v, size


def fitted(counts: np.ndarray, q: int = FACTORS) -> np.ndarray:
    rows = sp.csr_matrix(counts)
    cells = np.arange(len(counts))
    return count_components(lambda index: rows[index], cells, cells, q, q)


def components_of(data: PerturbSeqData, q: int, seed: int) -> np.ndarray:
    """So many components, noise or not."""
    return whitened_components(data, q, q, seed)[0]


def explained(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """R2 of each column of y, linear in x."""
    x = np.column_stack([x, np.ones(len(x))])
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return np.asarray(1 - left.var(0) / y.var(0))


def test_components_are_linear_in_the_components_that_made_the_counts() -> None:
    counts, v, _ = factor_model()
    scores = fitted(counts)
    assert scores.shape == (N, FACTORS)
    assert explained(v, scores).min() > 0.93
    # and not bent: squares of the truth explain nothing of what is left
    x = np.column_stack([v, np.ones(N)])
    left = scores - x @ np.linalg.lstsq(x, scores, rcond=None)[0]
    assert explained(left, v**2).max() < 0.03


def test_they_are_straighter_than_principal_components_of_log_normalised_counts() -> None:
    counts, v, _ = factor_model(spread=1.5)
    logs = np.log1p(counts / counts.sum(1, keepdims=True) * np.median(counts.sum(1)))
    logs -= logs.mean(0)
    principal = logs @ np.linalg.svd(logs, full_matrices=False)[2][:FACTORS].T
    assert 1 - explained(v, fitted(counts)).mean() < 0.7 * (1 - explained(v, principal).mean())


def test_depth_has_no_say() -> None:
    counts, v, size = factor_model(depth_scale=0.8)
    scores = fitted(counts)
    x = np.column_stack([v, np.ones(N)])
    left = scores - x @ np.linalg.lstsq(x, scores, rcond=None)[0]
    assert explained(left, size[:, None]).max() < 0.02


def test_measurement_noise_is_about_one_in_every_direction() -> None:
    counts, v, _ = factor_model(depth_scale=0.0, spread=0.4)
    scores = fitted(counts)
    x = np.column_stack([v, np.ones(N)])
    left = scores - x @ np.linalg.lstsq(x, scores, rcond=None)[0]
    noise = np.linalg.eigvalsh(np.cov(left.T))
    assert noise.min() > 0.85 and noise.max() < 1.25
    # principal axes: uncorrelated, the largest first
    covariance = np.cov(scores.T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-7 * covariance.max()
    assert (np.diff(np.diag(covariance)) < 0).all()


def test_common_dispersion_of_negative_binomial_counts() -> None:
    rng = np.random.default_rng(0)
    mean = np.exp(rng.normal(1.5, 0.5, 200)) * np.exp(0.3 * rng.standard_normal((3000, 1)))
    assert dispersion(negative_binomial(rng, mean, 0.3)) == pytest.approx(0.3, rel=0.2)
    assert dispersion(rng.poisson(mean).astype(float)) < 0.02
    assert dispersion(np.full((5, 3), 0.01)) == 0.1  # too few counts to tell


def read(adata: ad.AnnData, **options: object) -> PerturbSeqData:
    return read_data(adata, make_config(n_top_genes=None, **options).data, 0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data() -> PerturbSeqData:
    """Counts with two batches, whose first two genes are targets of perturbations."""
    adata = small_screen(n_batches=2, batch_scale=1.0, seed=2)
    adata.var_names = ["g0", "g3", *adata.var_names[2:]]
    return read(adata, batch_key="batch")


def test_a_simulated_screen_keeps_its_latents() -> None:
    adata = simulate(
        n_latents=3, perturbations_per_latent=2, n_genes=120, cells_per_perturbation=60, n_control=300, seed=1
    )  # fmt: skip
    scores = components_of(read(adata), 8, 0)
    assert scores.shape == (660, 8)
    assert explained(adata.obsm["true_latents"], scores).min() > 0.85


def test_the_perturbed_genes_are_left_out(data: PerturbSeqData) -> None:
    assert data.genes[:2] == ("g0", "g3")
    x = sp.lil_matrix(data.x)
    x[::3, 0] = 5.0
    x[:, 1] = 0.0
    changed = replace(data, x=sp.csr_matrix(x))
    assert np.array_equal(components_of(changed, 5, 0), components_of(data, 5, 0))
    x[::3, 2] = 5.0  # any other gene counts
    changed = replace(data, x=sp.csr_matrix(x))
    assert not np.array_equal(components_of(changed, 5, 0), components_of(data, 5, 0))


def test_if_every_gene_is_perturbed_all_are_used(data: PerturbSeqData) -> None:
    named = replace(data, perturbation_names=data.genes)
    scores = components_of(named, 5, 0)
    assert scores.shape == (len(data.split), 5) and scores.any()


def test_batches_are_centred_on_their_own_controls(data: PerturbSeqData) -> None:
    scores = components_of(data, 5, 0)
    for b in (0, 1):
        controls = data.cells(0, splits.TRAIN)
        own = controls[data.batch[controls] == b]
        assert len(own) >= components.ENOUGH_CONTROLS
        assert np.abs(scores[own].mean(0, dtype=float)).max() < 1e-7


def test_a_batch_with_few_controls_is_centred_on_all(data: PerturbSeqData) -> None:
    few = data.batch.copy()
    controls = data.cells(0, splits.TRAIN)
    few[controls[: components.ENOUGH_CONTROLS - 1]] = 2
    some = np.flatnonzero(data.condition == 1)
    few[some] = 2
    batched = replace(data, batch=few)
    alone = components_of(replace(data, batch=np.zeros_like(few)), 5, 0)
    scores = components_of(batched, 5, 0)
    train = data.split == splits.TRAIN
    # up to the overall scale, which all cells share
    ratio = scores[some] / alone[some]
    assert np.allclose(ratio, ratio[0, 0])
    assert not np.allclose(scores[train] / alone[train], ratio[0, 0])


def test_overall_deviation_is_one_and_cells_without_a_part_are_zero(data: PerturbSeqData) -> None:
    split = data.split.copy()
    split[:7] = splits.UNUSED
    scores = components_of(replace(data, split=split), 5, 0)
    train = split == splits.TRAIN
    assert (scores[train] - scores[train].mean(0)).std() == pytest.approx(1)
    assert not scores[:7].any()
    assert scores[7:].any(1).all()


def test_components_are_estimated_on_training_cells_alone(data: PerturbSeqData) -> None:
    validation = np.flatnonzero(data.split == splits.VALIDATION)
    assert len(validation) > 10
    x = sp.lil_matrix(data.x)
    x[validation[0]] = x[validation[1]]
    changed = components_of(replace(data, x=sp.csr_matrix(x), totals=_copied(data, validation)), 5, 0)
    same = components_of(data, 5, 0)
    train = data.split == splits.TRAIN
    # whitening by the mean information of all cells may turn a little; the span and the training cells stay
    assert explained(changed[train], same[train]).min() > 0.999


def _copied(data: PerturbSeqData, cells: np.ndarray) -> np.ndarray:
    assert data.totals is not None
    totals = data.totals.copy()
    totals[cells[0]] = totals[cells[1]]
    return totals


def test_one_result(data: PerturbSeqData) -> None:
    assert np.array_equal(components_of(data, 5, 0), components_of(data, 5, 0))


def test_a_subset_of_cells_for_the_loadings_is_drawn_by_the_seed(
    data: PerturbSeqData, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = components_of(data, 5, 0)
    monkeypatch.setattr(components, "MAX_LOADING_CELLS", 150)
    one, again, other = (components_of(data, 5, seed) for seed in (3, 3, 4))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert explained(whole[:, :2], one).min() > 0.8


def silenced(data: PerturbSeqData) -> tuple[PerturbSeqData, list[int]]:
    """Two training cells and one validation cell without counts in any but the perturbed genes."""
    trained = np.flatnonzero(data.split == splits.TRAIN)
    silent = [int(trained[0]), int(trained[-1]), int(np.flatnonzero(data.split == splits.VALIDATION)[0])]
    x = sp.lil_matrix(data.x)
    x[silent, 2:] = 0
    return replace(data, x=sp.csr_matrix(x)), silent


def test_cells_without_counts_in_these_genes_change_nothing_for_the_others(data: PerturbSeqData) -> None:
    quiet, silent = silenced(data)
    scores = components_of(quiet, 5, 0)
    assert np.isfinite(scores).all()
    without = data.split.copy()
    without[silent] = splits.UNUSED
    others = np.setdiff1d(np.arange(len(data.split)), silent)
    assert explained(scores[others], components_of(replace(data, split=without), 5, 0)[others]).min() > 0.99


def test_cells_without_counts_in_the_most_variable_genes_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((N, 1))
    rare = rng.poisson(np.exp(1.2 * v * [1, -1, 1] - 0.5))
    counts = np.hstack([rare, rng.poisson(20, (N, 10))]).astype(float)
    silent = rare.sum(1) == 0
    assert 5 < silent.sum() < N / 3
    monkeypatch.setattr(components, "MAX_GENES", 3)
    scores = fitted(counts, 2)
    assert np.isfinite(scores).all()
    assert explained(v, scores).min() > 0.3


def test_chunks_of_cells_change_nothing(data: PerturbSeqData, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = components_of(data, 4, 0)
    monkeypatch.setattr(components, "CHUNK", 50)
    pieces = components_of(data, 4, 0)
    # a chunk stops scoring when its own cells have settled
    assert np.abs(pieces - whole).max() < 0.02


def test_values_that_are_no_counts_give_principal_components() -> None:
    adata = small_screen(noise="gaussian", seed=3)
    data = read(adata)
    assert data.totals is None
    scores = components_of(data, 4, 0)
    x = data.dense(np.arange(len(data.split))).astype(float)
    train = data.split == splits.TRAIN
    centred = x[train] - x[train].mean(0)
    expected = (x - x[train].mean(0)) @ np.linalg.svd(centred, full_matrices=False)[2][:4].T
    expected -= expected[data.cells(0, splits.TRAIN)].mean(0)
    expected /= (expected[train] - expected[train].mean(0)).std()
    sign = np.sign((scores * expected).sum(0))
    assert np.allclose(scores, sign * expected, atol=1e-6)


def test_what_is_noise_is_dropped_and_the_noise_is_told() -> None:
    data = read(small_screen(n_genes=60, depth=3000.0, seed=6))
    scores, noise = whitened_components(data, 15, 1, 0)
    assert scores.shape[1] == len(small_screen().uns["truth"]["adjacency"]) + SPARE
    train = data.split == splits.TRAIN
    assert noise is not None and (scores[train] - scores[train].mean(0)).std() == pytest.approx(1)
    # with more components than there are, those of noise have its variance: a little more, being fitted to these cells
    more, noise = whitened_components(data, 15, 15, 0)
    assert noise is not None and 1 < more[train].var(0)[-5:].mean() / noise < 2.5


def test_rounding_errors_are_no_components() -> None:
    rng = np.random.default_rng(0)
    adata = small_screen(noise="gaussian", seed=3)
    flat = rng.standard_normal((adata.n_obs, 4)) @ rng.standard_normal((4, adata.n_vars))
    data = replace(read(adata), x=flat.astype(np.float32))
    scores, noise = whitened_components(data, 8, 1, 0)
    assert scores.shape[1] == 4
    train = data.split == splits.TRAIN
    assert noise == pytest.approx(components.NULL * scores[train].var(0).max(), rel=1e-3)
    assert whitened_components(data, 8, 6, 0)[0].shape[1] == 6
    assert whitened_components(read(adata), 8, 1, 0)[1] is None  # noise that nobody knows


@pytest.mark.parametrize("noise", ["counts", "gaussian"])
def test_no_more_components_than_the_genes_allow(noise: str) -> None:
    adata = small_screen(noise=noise, n_genes=5, depth=200.0, seed=4)
    scores = components_of(read(adata), 40, 0)
    assert scores.shape[1] == (4 if noise == "counts" else 5)  # counts lose one to the size of a cell
    assert np.isfinite(scores).all()


def test_constant_values_give_zeros_and_no_nan() -> None:
    adata = small_screen(noise="gaussian", seed=3)
    flat = ad.AnnData(np.ones_like(adata.X), obs=adata.obs, var=pd.DataFrame(index=adata.var_names))
    data = read(adata)
    scores = components_of(replace(data, x=np.asarray(flat.X)), 3, 0)
    assert np.isfinite(scores).all()
