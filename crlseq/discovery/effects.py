"""Does a perturbation do anything? Energy-distance permutation test against control, FDR over perturbations."""

import numpy as np
import torch

from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.threads import in_parallel

MAX_CELLS = 500  # a side; more cells sharpen the test less than they cost
STAGES = (99, 900)  # permutations; the second stage for perturbations that the first does not rule out
ENOUGH = 10
# Standard deviations of the first stage beyond which more permutations reach nothing: their energies are a weighted sum of
# chi-squares (Székely and Rizzo 2013), of which one alone has the heaviest tail, 1e-7 at 20 of its deviations.
BEYOND = 20.0


def energy_test(
    scores: np.ndarray, is_perturbed: np.ndarray, strata: np.ndarray, stages: tuple[int, ...], rng: np.random.Generator
) -> tuple[float, float]:
    """Energy distance 2 E|x-y| - E|x-x'| - E|y-y'| (a U-statistic, can be negative) and its permutation p-value
    p = (1 + #{permuted >= observed}) / (1 + #permuted) (Székely and Rizzo 2013).

    ``scores`` (n, q) are cells of both sets, of which ``is_perturbed`` (n,) and the others need two or more; labels are
    permuted within ``strata`` (n,), experimental batches. ``stages`` are numbers of permutations: a stage is drawn only
    if fewer than `ENOUGH` of those before it reached the observed distance (Besag and Clifford 1991, Biometrika 78), so
    that a perturbation without effect is done after the first. Nor is it drawn where the observed distance is `BEYOND`
    all that it could reach; it then counts as drawn.
    """
    distances = _distances(scores)
    row_means = distances.mean(1)
    mean = float(row_means.mean())
    row_sums = len(scores) * row_means
    centred = distances - row_means[:, None] - row_means + mean
    n, m = int(is_perturbed.sum()), int((~is_perturbed).sum())
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]

    def energy(labels: np.ndarray) -> np.ndarray:
        # Rows are indicators z (., cells) of n perturbed cells: sums within and between sets from D z alone.
        touching = labels @ row_sums
        # torch, whose threads are as many as each of several tests at a time may have; BLAS has its own number
        product = (torch.from_numpy(labels) @ torch.from_numpy(centred)).numpy()
        own = np.einsum("ij,ij->i", product, labels, dtype=np.float64)
        within_perturbed = own + 2 * n * touching / len(scores) - n**2 * mean
        between = touching - within_perturbed
        within_control = len(scores) ** 2 * mean - 2 * touching + within_perturbed
        found: np.ndarray = 2 * between / (n * m) - within_perturbed / (n * (n - 1)) - within_control / (m * (m - 1))
        return found

    observed = float(energy(is_perturbed[None].astype(np.float64))[0])
    # Permutations in float32, with the observed labels among them; of what is left after centring it keeps six digits.
    centred = centred.astype(np.float32)
    reached = energy(is_perturbed[None].astype(np.float32))[0]
    reached -= 1e-6 * (abs(reached) + float(np.abs(centred).mean()) / min(n, m))
    at_least = drawn = 0
    for size in stages:
        labels = np.empty((size, len(scores)), dtype=np.float32)
        for rows in members:
            labels[:, rows] = rng.permuted(np.broadcast_to(is_perturbed[rows], (size, len(rows))), axis=1)
        permuted = energy(labels)
        at_least += int((permuted >= reached).sum())
        drawn += size
        if at_least >= ENOUGH:
            break
        if at_least == 0 and reached > permuted.mean() + BEYOND * permuted.std():
            drawn = sum(stages)
            break
    return observed, (1 + at_least) / (1 + drawn)


def _distances(scores: np.ndarray) -> np.ndarray:
    """Euclidean distances (n, n) in float64 by inner products, centred, which is several times as fast as by pairs."""
    x = scores.astype(np.float64) - scores.mean(0, dtype=np.float64)
    squares = (x**2).sum(1)
    t = torch.from_numpy(x)
    distances = (t @ t.T).mul_(-2).numpy()
    distances += squares[:, None]
    distances += squares
    np.fill_diagonal(distances, 0)
    np.maximum(distances, 0, out=distances)
    return np.asarray(np.sqrt(distances, out=distances))


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Adjusted p-values (Benjamini and Hochberg 1995); NaN stays NaN and does not count."""
    adjusted = np.full(len(p_values), np.nan)
    there = np.flatnonzero(~np.isnan(p_values))
    order = there[np.argsort(p_values[there], kind="stable")]
    ratio = p_values[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted[order] = np.minimum.accumulate(ratio[::-1])[::-1].clip(max=1)
    return adjusted


def effect_tests(data: PerturbSeqData, scores: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Test of every single perturbation on training and validation cells, by principal component scores (cells, q).

    Each (perturbations,); NaN where one only occurs in combinations, or in batches without controls.
    """
    cells = data.cells_by_condition(splits.TRAIN, splits.VALIDATION)
    comparable = data.comparable()
    index = {parts[0]: c for c, parts in enumerate(data.conditions) if len(parts) == 1}
    n = len(data.perturbation_names)
    energy, p_value, n_cells = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, dtype=np.int64)

    def test(k: int) -> tuple[float, float]:
        rng = np.random.default_rng([seed, 5, k])
        own = cells[index[k]]
        perturbed = _at_most(own[comparable[own]], rng)
        # Controls of batches that the perturbation never saw say nothing about it.
        control = _at_most(cells[0][np.isin(data.batch[cells[0]], data.batch[perturbed])], rng)
        both = np.concatenate([perturbed, control])
        if min(int((data.split[some] == splits.TRAIN).sum()) for some in (perturbed, control)) < 2:
            return np.nan, np.nan
        return energy_test(scores[both], np.arange(len(both)) < len(perturbed), data.batch[both], STAGES, rng)

    known = sorted(index)
    for k, found in zip(known, in_parallel(test, known, torch.get_num_threads()), strict=True):
        energy[k], p_value[k] = found
        n_cells[k] = len(cells[index[k]])
    return {"energy": energy, "p_value": p_value, "fdr": benjamini_hochberg(p_value), "n_cells": n_cells}


def _at_most(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(cells, MAX_CELLS, replace=False)) if len(cells) > MAX_CELLS else cells
