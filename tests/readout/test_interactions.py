"""Interactions of measured combinations: terms with honest errors, classes, and perturbations that act otherwise together."""

from __future__ import annotations

import numpy as np
import pytest

from crlseq.readout.interactions import _class, _recurs


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
