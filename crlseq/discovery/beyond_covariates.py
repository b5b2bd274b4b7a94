"""Tests of effects where perturbations change covariates: is there an effect beyond what those explain?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from crlseq.data.dataset import PerturbSeqData
from crlseq.data.projection import Projection
from crlseq.discovery.effects import effect_tests


def effects_and_beyond(data: PerturbSeqData, projection: Projection, seed: int) -> dict[str, np.ndarray]:
    """`effect_tests` of adjusted scores, and under ``beyond`` (K,) the false discovery rates of the effects of those perturbations
    that change a covariate once all that covariates explain is taken off; NaN of the others.
    """
    tests = effect_tests(data, projection.adjusted, seed)
    beyond = np.full(len(data.perturbation_names), np.nan)
    changing = [] if data.adjustment is None else np.flatnonzero(data.adjustment.kept.any(1)).tolist()
    if any(len(data.conditions[c]) == 1 for c in changing):
        condition = np.where(np.isin(data.condition, [0, *changing]), data.condition, -1)
        strict = replace(data, condition=condition, without_covariate_effects=True)
        assert strict.adjustment is not None
        beyond = effect_tests(strict, strict.adjustment.for_tests(projection.scores), seed)["fdr"]
    return tests | {"beyond": beyond}
