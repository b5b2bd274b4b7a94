"""Warnings: each on a screen that breaks its assumption, none on sound ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crlseq.discovery.ordering import order_programs
from tests.component_screens import component_screen


def warnings(seed: int, **options: Any) -> str:
    screen = component_screen(seed, **options)
    return " ".join(order_programs(screen.y, screen.environment, screen.targets, 8).warnings)


@pytest.mark.parametrize(
    ("sentence", "options"),
    [
        ("Conditions differ in ways that no program explains", {"batches": 0.1}),
        ("they have second targets", {"own": 0.3}),
        ("second targets that all perturbations of a program share", {"shared": 0.3}),
        ("a hidden common cause", {"hidden": 1}),
        ("a cycle", {"feedback": True}),
        ("Some changes grow with the size of the shift", {"modulated": 0.4}),
        ("cells that are hit because of their state", {"chosen": True}),
    ],
)
def test_a_broken_assumption_is_named(sentence: str, options: dict[str, Any]) -> None:
    assert sum(sentence in warnings(seed, **options) for seed in range(3)) >= 2


def test_sound_screens_have_no_warning() -> None:
    for options in ({}, {"kept": 0.5}, {"kept": 1.0}, {"n": 100, "n_control": 1000}):
        assert not any(warnings(seed, **options) for seed in range(2))


def test_a_program_in_two_parts_is_named() -> None:
    screen = component_screen(0)
    targets = screen.targets.copy()
    targets[np.flatnonzero(targets == 0)[::2]] = 8
    found = order_programs(screen.y, screen.environment, targets, 9)
    assert "1 pair of programs moves nearly the same genes" in " ".join(found.warnings)
    assert not found.declared[[0, 8]].any() and not found.declared[:, [0, 8]].any()
