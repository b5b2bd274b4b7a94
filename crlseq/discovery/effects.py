"""Does a perturbation do anything? Permutation tests against control, FDR over perturbations: by energy distance, which
sees any change but mostly that of means, and by second moments, which sees perturbations that change variances alone.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from crlseq.data import splits
from crlseq.data.cluster import mapped
from crlseq.data.dataset import PerturbSeqData
from crlseq.threads import counted

# Scores (n, q) of two sets of cells, which of them are perturbed (n,), their strata (n,), and what draws permutations.
Compared = tuple[np.ndarray, np.ndarray, np.ndarray, np.random.Generator]

MAX_CELLS = 500  # a side, by energy; more cells sharpen the test less than they cost
CONTROLS_PER_CELL = 4  # by moments; more controls than that hardly lower the error of a difference
MOMENT_COMPONENTS = 20
MAX_DEVIATION = 4.0  # standard deviations: outlying cells would be all that second moments show
MIN_VARIANCE = 1e-6  # of the leading component's; below are rounding errors
STAGES = (99, 900, 1000)  # permutations; a later stage for perturbations that those before do not rule out
ENOUGH = 10
# Standard deviations of the first stage beyond which more permutations reach nothing: both statistics are weighted sums
# of chi-squares (Székely and Rizzo 2013), of which one alone has the heaviest tail, 1e-7 at 20 of its deviations.
BEYOND = 20.0
FEW = 10  # a sum of less than one row in so many is quicker by adding them up than as a product


def energy_test(
    scores: np.ndarray, is_perturbed: np.ndarray, strata: np.ndarray, stages: tuple[int, ...], rng: np.random.Generator
) -> tuple[float, float]:
    """Energy distance 2 E|x-y| - E|x-x'| - E|y-y'| (a U-statistic, can be negative) and its permutation p-value
    (Székely and Rizzo 2013).

    ``scores`` (n, q) are cells of both sets, of which ``is_perturbed`` (n,) and the others need two or more; labels are
    permuted within ``strata`` (n,), experimental batches, in ``stages`` (`permutation_p`).
    """
    distances = _distances(scores)
    row_means = distances.mean(1)
    mean = float(row_means.mean())
    row_sums = len(scores) * row_means
    centred = distances  # in place: to fetch the memory of a copy takes longer than to fill it
    centred -= row_means[:, None]
    centred -= row_means
    centred += mean
    n, m = int(is_perturbed.sum()), int((~is_perturbed).sum())

    def energy(chosen: np.ndarray) -> np.ndarray:
        # Sums within and between sets from those of the rows of n perturbed cells alone.
        touching = row_sums[chosen].sum(1)
        own = np.take_along_axis(_row_sums(centred, chosen), chosen, 1).sum(1, dtype=np.float64)
        within_perturbed = own + 2 * n * touching / len(scores) - n**2 * mean
        between = touching - within_perturbed
        within_control = len(scores) ** 2 * mean - 2 * touching + within_perturbed
        found: np.ndarray = 2 * between / (n * m) - within_perturbed / (n * (n - 1)) - within_control / (m * (m - 1))
        return found

    observed = float(energy(np.flatnonzero(is_perturbed)[None])[0])
    # Permutations in float32, with the observed labels among them; of what is left after centring it keeps six digits.
    centred = centred.astype(np.float32)
    unit = float(np.abs(centred).mean()) / min(n, m)
    return observed, permutation_p(energy, is_perturbed, strata, stages, rng, unit)


def moment_test(
    scores: np.ndarray, is_perturbed: np.ndarray, strata: np.ndarray, stages: tuple[int, ...], rng: np.random.Generator
) -> float:
    """Permutation p-value of the distance of first and second moments between the two sets of cells,

        T = |m|^2 / sqrt(q) + |M|_F^2 / q,    m = E x - E y,    M = E xx' - E yy',

    in the first `MOMENT_COMPONENTS` components, whitened, centred by stratum and cut off at `MAX_DEVIATION`. It is the
    score statistic of a Gaussian for mean and covariance, the two with weights of equal variance under the null
    hypothesis. Arguments as of `energy_test`.
    """
    z = scores[:, :MOMENT_COMPONENTS].astype(np.float64)
    for stratum in np.unique(strata):
        z[strata == stratum] -= z[strata == stratum].mean(0)
    value, vector = np.linalg.eigh(z.T @ z / len(z))
    kept = value > max(MIN_VARIANCE * float(value[-1]), 1e-300)
    if not kept.any():
        return 1.0
    z = np.clip(z @ (vector[:, kept] / np.sqrt(value[kept])), -MAX_DEVIATION, MAX_DEVIATION)
    q, n = z.shape[1], int(is_perturbed.sum())
    row, column = np.triu_indices(q)
    scale = np.where(row == column, 1.0, 2.0) ** 0.5 / q**0.5  # an entry off the diagonal counts twice in the norm
    features = np.concatenate([z / q**0.25, z[:, row] * z[:, column] * scale], 1)
    centred = (features - features.mean(0)).astype(np.float32)

    def distance(chosen: np.ndarray) -> np.ndarray:
        sums = _row_sums(centred, chosen)  # of the others: its negative
        found: np.ndarray = ((sums * (1 / n + 1 / (len(z) - n))) ** 2).sum(1)
        return found

    return permutation_p(distance, is_perturbed, strata, stages, rng, 1 / n)


def permutation_p(
    statistic: Callable[[np.ndarray], np.ndarray],
    is_perturbed: np.ndarray,
    strata: np.ndarray,
    stages: tuple[int, ...],
    rng: np.random.Generator,
    unit: float,
) -> float:
    """p = (1 + #{permuted >= observed}) / (1 + #permuted) of a statistic of which cells are perturbed (., n perturbed).

    ``stages`` are numbers of permutations: a stage is drawn only if fewer than `ENOUGH` of those before it reached the
    observed value (Besag and Clifford 1991, Biometrika 78), so that a perturbation without effect is done after the
    first. Nor is it drawn where the observed value is `BEYOND` all that it could reach; it then counts as drawn. Values
    that differ by 1e-6 of the statistic's ``unit`` are equal.
    """
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    reached = float(statistic(np.flatnonzero(is_perturbed)[None])[0])
    reached -= 1e-6 * (abs(reached) + unit)
    at_least = drawn = 0
    for size in stages:
        permuted = statistic(
            np.concatenate([_drawn(own, int(is_perturbed[own].sum()), size, rng) for own in members], 1)
        )
        at_least += int((permuted >= reached).sum())
        drawn += size
        if at_least >= ENOUGH:
            break
        if at_least == 0 and reached > permuted.mean() + BEYOND * permuted.std():
            drawn = sum(stages)
            break
    return (1 + at_least) / (1 + drawn)


def _drawn(cells: np.ndarray, n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """``size`` times ``n`` of the cells, (size, n): the first steps of a shuffle, all draws at once."""
    shuffled = np.repeat(cells[:, None], size, axis=1)
    fewer = min(n, len(cells) - n)
    for i in range(fewer):
        other = rng.integers(i, len(cells), size), np.arange(size)
        shuffled[other], shuffled[i] = shuffled[i], shuffled[other]
    return np.ascontiguousarray((shuffled[:n] if n == fewer else shuffled[fewer:]).T)


def _row_sums(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Sums (., q) of the rows of ``values`` (cells, q) that are chosen (., n)."""
    # torch, whose threads are as many as each of several tests at a time may have; BLAS has its own number
    rows, of = torch.from_numpy(chosen), torch.from_numpy(values)
    if chosen.shape[1] * FEW <= len(values):
        return embedding_bag(rows, of, mode="sum").numpy()
    return (torch.zeros(len(rows), len(of), dtype=of.dtype).scatter_(1, rows, 1) @ of).numpy()


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
    ratio = p_values[order] * (len(order) / np.arange(1, len(order) + 1))  # by 1 at least: rounding lowers none
    adjusted[order] = np.minimum.accumulate(ratio[::-1])[::-1].clip(max=1)
    return adjusted


def effect_tests(data: PerturbSeqData, scores: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Tests of every single perturbation on training and validation cells, by principal component scores (cells, q).

    Each (perturbations,); NaN where one only occurs in combinations, or in batches without controls. ``p_value`` is that
    of the smaller one of both tests' p-values, 1 - (1 - p)^2 (Šidák 1967, JASA 62).
    """
    cells = data.cells_by_condition(splits.TRAIN, splits.VALIDATION)
    comparable, threads = data.comparable(), torch.get_num_threads()
    index = {parts[0]: c for c, parts in enumerate(data.conditions) if len(parts) == 1}
    n = len(data.perturbation_names)
    energy, p_value, n_cells = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, dtype=np.int64)
    sets: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for k in sorted(index):
        n_cells[k] = len(cells[index[k]])
        own = cells[index[k]][comparable[cells[index[k]]]]
        # Controls of batches that the perturbation never saw say nothing about it.
        control = cells[0][np.isin(data.batch[cells[0]], data.batch[own])]
        if min(int((data.split[some] == splits.TRAIN).sum()) for some in (own, control)) >= 2:
            sets[k] = own, control

    def of_energy(k: int) -> Compared:
        rng = np.random.default_rng([seed, 5, k])
        own, control = (_at_most(some, MAX_CELLS, rng) for some in sets[k])
        return _labelled(data, scores, own, control, rng)

    def of_moments(k: int) -> Compared:
        own, control = sets[k]
        enough = _at_most(control, max(MAX_CELLS, CONTROLS_PER_CELL * len(own)), generators[k])
        return _labelled(data, scores[:, :MOMENT_COMPONENTS], own, enough, generators[k])

    generators: dict[int, np.random.Generator] = {}
    results = mapped(_energy_of, map(of_energy, sets), threads)
    for k, found in zip(counted(sets, 2 * len(sets)), results, strict=True):
        energy[k], p_value[k], generators[k] = found
    # The other test is for those to which it can give a smaller p-value.
    open_ones = [k for k in sets if p_value[k] > 1 / (1 + sum(STAGES))]
    others = mapped(_moments_of, map(of_moments, open_ones), threads)
    for k, p in zip(counted(open_ones, 2 * len(sets), 2 * len(sets) - len(open_ones)), others, strict=True):
        p_value[k] = min(p_value[k], p)
    p_value = 1 - (1 - p_value) ** 2
    return {"energy": energy, "p_value": p_value, "fdr": benjamini_hochberg(p_value), "n_cells": n_cells}


def _energy_of(compared: Compared) -> tuple[float, float, np.random.Generator]:
    """Energy distance, its p-value, and the generator as it then is."""
    return *energy_test(*compared[:3], STAGES, compared[3]), compared[3]


def _moments_of(compared: Compared) -> float:
    return moment_test(*compared[:3], STAGES, compared[3])


def _at_most(cells: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(cells, most, replace=False)) if len(cells) > most else cells


def _labelled(
    data: PerturbSeqData, scores: np.ndarray, perturbed: np.ndarray, control: np.ndarray, rng: np.random.Generator
) -> Compared:
    """Both sets of cells as tests take them."""
    both = np.concatenate([perturbed, control])
    is_perturbed = np.arange(len(both)) < len(perturbed)
    strata = data.batch[both] if data.adjustment is None else data.adjustment.strata(both, is_perturbed)
    return scores[both], is_perturbed, strata, rng
