"""How well latents stand for the true ones: disentanglement, completeness, informativeness, interventional robustness.

None of these knows a graph or a target; beside the MCC they say whether a latent mixes several true ones, whether a true
one is spread over several, whether it can be read off at all, and whether a latent moves when others change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import entropy
from sklearn.linear_model import LassoCV

Floats = NDArray[np.floating[Any]]

MAX_CELLS = 4000  # that are drawn of more: a few per mille of precision for a minute of time
N_BINS = 20
QUANTILE = 0.99  # of deviations that counts as the largest: of Suter et al.'s own code


def representation_scores(latents: Floats, true_latents: Floats, seed: int = 0) -> dict[str, float]:
    """``dci_disentanglement, dci_completeness, dci_informativeness, irs`` of latents (cells, q) for true ones (cells, p)."""
    rng = np.random.default_rng([seed, 12])
    some = rng.permutation(len(latents))[:MAX_CELLS]
    codes, factors = standardised(latents[some]), standardised(true_latents[some])
    importance, informativeness = _importance(codes, factors)
    disentanglement, completeness = dci(importance)
    return {
        "dci_disentanglement": disentanglement,
        "dci_completeness": completeness,
        "dci_informativeness": informativeness,
        "irs": interventional_robustness(codes, factors),
    }


def dci(importance: Floats) -> tuple[float, float]:
    """Disentanglement and completeness of importances R (q, p) >= 0 of latents for true latents.

    Eastwood and Williams 2018, "A framework for the quantitative evaluation of disentangled representations", ICLR:
    disentanglement is the mean over latents of 1 - H(R_i. / sum R_i.), entropy to base p, weighted by sum R_i.;
    completeness that over true latents of 1 - H(R_.j / sum R_.j), to base q. 1 for a permutation, 0 where all are
    alike or nothing is of importance. What there is but one of cannot be mixed or spread: 1.
    """
    total = importance.sum()
    if not total > 0:
        return 0.0, 0.0

    def concentration(rows: Floats) -> Floats:
        used = rows[rows.sum(1) > 0]
        if rows.shape[1] == 1:
            return np.ones(len(used))
        return np.asarray(1 - entropy(used, base=rows.shape[1], axis=1))

    by_code = importance.sum(1)
    disentanglement = by_code[by_code > 0] @ concentration(importance) / total
    return float(disentanglement), float(concentration(importance.T).sum() / importance.shape[1])


def _importance(codes: Floats, factors: Floats) -> tuple[Floats, float]:
    """|weights| (q, p) of lasso regressions of the true latents, and their mean R^2 on the half they were not fitted to."""
    half = len(codes) // 2
    importance, explained = np.zeros((codes.shape[1], factors.shape[1])), []
    for j in range(factors.shape[1]):
        found = LassoCV(alphas=30, eps=1e-2, cv=5, max_iter=20000, tol=1e-3).fit(codes[:half], factors[:half, j])
        importance[:, j] = np.abs(found.coef_)
        left = ((factors[half:, j] - found.predict(codes[half:])) ** 2).sum()
        spread = ((factors[half:, j] - factors[half:, j].mean()) ** 2).sum()
        explained.append(max(0.0, 1 - float(left / spread)) if spread > 0 else 0.0)
    return importance, float(np.mean(explained))


def interventional_robustness(codes: Floats, factors: Floats, bins: int = N_BINS) -> float:
    """IRS: how little a latent moves under changes of all true latents but the one that it stands for.

    Suter, Miladinovic, Schoelkopf, Bauer 2019, "Robustly disentangled causal mechanisms", ICML: for latent l and true
    latent j, held at a value, the largest deviation of l from its mean there (0.99 quantile), averaged over the values
    of j, over the largest deviation at all; 1 minus that, for the best j; mean over latents, weighted by their largest
    deviations. A true latent with more than `bins` values is held within one of as many quantile bins; the width of
    these keeps the truth itself at about 0.9 for normal latents.
    """
    largest = np.quantile(np.abs(codes - codes.mean(0)), QUANTILE, axis=0)
    moving = largest > 0
    if not moving.any():
        return 0.0
    codes, largest = codes[:, moving], largest[moving]
    robustness = np.zeros((factors.shape[1], codes.shape[1]))
    for j, factor in enumerate(factors.T):
        values = _bins(factor, bins)
        deviations = []
        for value in np.unique(values):
            there = codes[values == value]
            deviations.append(np.quantile(np.abs(there - there.mean(0)), QUANTILE, axis=0))
        robustness[j] = 1 - np.mean(deviations, axis=0) / largest
    return float(np.average(robustness.max(0).clip(0.0), weights=largest))


def _bins(values: Floats, bins: int) -> NDArray[np.int64]:
    """Codes of the distinct values, or of quantile bins where these are more."""
    distinct, codes = np.unique(values, return_inverse=True)
    if len(distinct) <= bins:
        return np.asarray(codes, dtype=np.int64)
    return np.asarray(np.argsort(np.argsort(values, kind="stable")) * bins // len(values), dtype=np.int64)


def standardised(values: Floats) -> Floats:
    """Columns with mean 0 and variance 1; those that do not vary become 0."""
    centred = np.asarray(values, dtype=np.float64) - np.mean(values, axis=0, dtype=np.float64)
    scale = centred.std(0)
    flat = scale <= 1e-9 * np.abs(values).max(0, initial=0.0)
    return np.asarray(np.where(flat, 0.0, centred / np.where(flat, 1.0, scale)))
