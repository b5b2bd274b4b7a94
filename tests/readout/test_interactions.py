"""Interactions of measured combinations: terms with honest errors, classes, and perturbations that act otherwise together."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crlseq.model.combination_law import CombinationLaw
from crlseq.readout.interactions import _class, _perturbations, _recurs
from crlseq.training.combinations import FittedLaw, Measured


def row(**given: object) -> dict[str, object]:
    return {"scope": "combination", "fdr": 0.001, "term": -0.4, "masking": 0.8, "similarity": 0.0, **given}


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"fdr": 0.2}, "additive"),
        ({"fdr": float("nan")}, "additive"),
        ({"term": 0.3}, "synergistic"),
        ({"masking": 0.2}, "epistatic"),
        ({"similarity": 0.7}, "redundant"),
        ({"similarity": 0.7, "masking": 0.2}, "redundant"),
        ({}, "buffering"),
        ({"scope": "perturbation"}, ""),
    ],
)
def test_classes(given: dict[str, object], answer: str) -> None:
    assert _class(row(**given)) == answer


def test_what_recurs_is_the_mean_product_over_the_mean_square() -> None:
    same = np.full((3, 3), 2.0)
    assert _recurs(same, np.arange(3)) == 1.0
    assert _recurs(np.eye(3), np.arange(3)) == 0.0
    # Products 1, 0, 0 (each twice), squares 2, 2, 2: (1/3) / 2.
    gram = np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    assert _recurs(gram, np.arange(3)) == pytest.approx(1 / 6)


def recurring(error: float, term: float, seed: int) -> list[float]:
    """p-values of eight perturbations, of 28 doubles whose single effects have errors of this size in every gene."""
    rng = np.random.default_rng(seed)
    parts = list(itertools.combinations(range(8), 2))
    effects = rng.normal(size=(8, 300))
    estimated = effects + error * rng.normal(size=effects.shape)
    terms = term * rng.normal(size=effects.shape)
    law = CombinationLaw.prior(torch.zeros(300).double(), torch.zeros(300), torch.zeros((0, 2), dtype=torch.int64))
    single = [estimated[list(pair)] for pair in parts]
    predicted = np.stack(
        [law.effect([(a,), (b,)], torch.from_numpy(own)) for (a, b), own in zip(parts, single, strict=True)]
    )
    true = np.stack([law.effect([(a,), (b,)], torch.from_numpy(effects[[a, b]])) for a, b in parts])
    effect = true + np.stack([terms[a] + terms[b] for a, b in parts]) + 0.2 * rng.normal(size=true.shape)
    unsure = [np.full(2, 300 * error**2)] * len(parts)
    measured = Measured(parts, single, unsure, effect, np.full(effect.shape, 0.01))
    data = SimpleNamespace(perturbation_names=tuple("ABCDEFGH"))
    return [row[-1] for row in _perturbations(data, FittedLaw(law, measured, effect - predicted), rng)]


def test_errors_of_single_effects_are_no_interaction() -> None:
    found = np.concatenate([recurring(error=0.5, term=0.0, seed=seed) for seed in range(5)])
    assert (found < 0.05).mean() < 0.15
    assert np.mean(recurring(error=0.5, term=0.5, seed=9)) < 0.02
