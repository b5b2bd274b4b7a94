"""What is found where there is nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.projection import principal_components
from crlseq.data.simulate import simulate
from crlseq.discovery import negative_controls as module
from crlseq.discovery.negative_controls import MIN_CELLS, SIZES, Found, ordered_shifts, sensitivity, undone_effects
from crlseq.discovery.ordering import order_programs
from tests.component_screens import component_screen


def small(**changes: int) -> tuple[PerturbSeqData, np.ndarray]:
    sizes: dict[str, Any] = {
        "n_latents": 2,
        "perturbations_per_latent": 3,
        "n_genes": 30,
        "cells_per_perturbation": 40,
        "n_control": 400,
        "expected_parents": 0.5,
    }
    data = read_data(simulate(**{**sizes, **changes}, noise="gaussian", seed=1), make_config().data, 0)
    return data, principal_components(data, 10, 0).scores


def test_groups_of_control_cells_have_an_effect_by_chance_alone() -> None:
    data, scores = small()
    found = undone_effects(data, scores, 0)
    assert found.of >= 40 and found.found <= 4
    assert found == undone_effects(data, scores, 0)


def test_every_group_is_compared_with_the_controls_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups as large as the median perturbation, as many as leave half of the controls, and no perturbed cell."""
    data, scores = small()
    seen: list[PerturbSeqData] = []

    def test(pseudo: PerturbSeqData, scores: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        seen.append(pseudo)
        return {"fdr": np.array([0.01, *[1.0] * (len(pseudo.perturbation_names) - 1)])}

    monkeypatch.setattr(module, "effect_tests", test)
    found = undone_effects(data, scores, 0)
    fitted = data.cells_by_condition(splits.TRAIN, splits.VALIDATION)
    size = int(np.median([len(own) for own in fitted[1:]]))
    groups = min(6, len(fitted[0]) // 2 // size)
    assert found == Found(len(seen), groups * len(seen)) and found.of >= 40
    for pseudo in seen:
        counts = np.bincount(pseudo.condition[pseudo.condition >= 0])
        assert counts[1:].tolist() == [size] * groups
        assert counts.sum() == (data.condition == 0).sum()


def test_too_few_controls_are_not_split() -> None:
    data, scores = small(n_control=2 * MIN_CELLS - 10)
    assert undone_effects(data, scores, 0) == Found(0, 0)


def test_more_cells_show_smaller_shifts() -> None:
    found = [sensitivity(*small(cells_per_perturbation=n, n_control=4 * n), 0) for n in (30, 240)]
    assert [(one.n_cells, one.n_control) for one in found] == [(30, 120), (240, 960)]
    few, many = (one.shift for one in found)
    # The error of a difference of means is eight times smaller in squares, so that shifts are sqrt(8) times smaller.
    assert few is not None and many is not None and 2 <= few / many <= 4
    assert SIZES[0] < many < few < SIZES[-1]


def test_a_shift_is_detected_as_often_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """By p-values that fall below 0.05 from a shift of one standard deviation on, along the first component."""
    data, scores = small()
    controls, lengths = data.cells(0, splits.TRAIN, splits.VALIDATION), []

    def test(pseudo: PerturbSeqData, moved: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        change = (moved - scores) / scores[controls].std(0)
        carried = np.flatnonzero(pseudo.condition == 1)
        assert set(np.flatnonzero(change.any(1))) == set(carried) <= set(controls) and len(carried) == 40
        lengths.append(np.linalg.norm(change[carried], axis=1))
        return {"p_value": np.array([0.05 if lengths[-1].min() > 0.99 else 0.06])}

    monkeypatch.setattr(module, "effect_tests", test)
    assert sensitivity(data, scores, 0).shift == 1.0
    assert all(np.ptp(own) < 1e-3 for own in lengths)
    monkeypatch.setattr(module, "effect_tests", lambda *arguments: {"p_value": np.array([1.0])})
    assert sensitivity(data, scores, 0).shift is None


def test_too_few_cells_are_not_tried() -> None:
    data, scores = small(cells_per_perturbation=MIN_CELLS - 1)
    assert sensitivity(data, scores, 0).shift is None


def test_mere_shifts_of_controls_order_nothing_where_hard_interventions_order_pairs() -> None:
    screen = component_screen(2)
    ordering = order_programs(screen.y, screen.environment, screen.targets, 8)
    assert ordering.pairs.have("upstream").sum() >= 3
    found = ordered_shifts(screen.y, screen.environment, screen.targets, 8, ordering, 0)
    assert found.of == 5 * 56 and found.found <= 1


def test_too_few_controls_are_not_shifted() -> None:
    screen = component_screen(2, n_control=2500)
    ordering = order_programs(screen.y, screen.environment, screen.targets, 8)
    few = np.flatnonzero(screen.environment > 0)
    some = np.concatenate([np.flatnonzero(screen.environment == 0)[:200], few])
    assert ordered_shifts(screen.y[some], screen.environment[some], screen.targets, 8, ordering, 0) == Found(0, 0)
