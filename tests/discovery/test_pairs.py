"""Statuses of pairs: each guard by hand and on screens that are wrong without it, nothing under shifts, hidden causes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from crlseq.discovery.changes import Changes, Perturbed
from crlseq.discovery.hits import Hit
from crlseq.discovery.pairs import GUARDS, STATUSES, Pairs, doses, judge_pairs, left_by_controls, modulated
from tests.component_screens import component_screen

HIT = Hit(share=0.6, error=0.01, mean=3.0, width=1.0, variance=1.0)
SHIFTS = (3.0, -2.0, 4.0, -3.0)


def perturbed(target: int, shift: float, value: np.ndarray) -> Perturbed:
    none, own = np.zeros(len(value)), np.eye(len(value))[target]
    return Perturbed(target, 0, shift * own, HIT, none, 1.0, value, none + 0.01, none, 40.0)


def changes(e: np.ndarray, error: float = 0.05, **other: Any) -> Changes:
    """These changes, the same at all doses, without anything that speaks against a cut."""
    p = len(e)
    by_target = [[perturbed(i, shift, e[:, i]) for shift in SHIFTS] for i in range(p)]
    none = Changes(e, np.full((p, p), error), np.full(p, -0.5), np.zeros((p, p)), np.zeros((p, p, p)), 0.0, by_target)
    return replace(none, **other)


def one_edge(p: int = 3) -> np.ndarray:
    """Program 0 is upstream of program 1."""
    e = np.zeros((p, p))
    e[0, 1] = -0.6
    return e


def passed(pairs: Pairs, k: int = 0, i: int = 1) -> set[str]:
    return {name for name, on in zip(GUARDS, pairs.guards[:, k, i], strict=True) if on}


def status(pairs: Pairs, k: int = 0, i: int = 1) -> str:
    return STATUSES[pairs.status[k, i]]


def test_a_pair_that_passes_every_guard_is_upstream() -> None:
    pairs = judge_pairs(changes(one_edge()))
    assert passed(pairs) == set(GUARDS)
    assert status(pairs) == "upstream"
    assert pairs.change[0, 1] == 0.6
    assert {status(pairs, k, i) for k, i in [(0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]} == {"excluded"}


def test_change_that_is_not_seen() -> None:
    pairs = judge_pairs(changes(one_edge(), error=0.25))
    assert "change" not in passed(pairs)
    assert status(pairs) == "undecided"


def test_reverse_that_is_not_seen_to_be_small() -> None:
    e = one_edge()
    e[1, 0] = 0.25
    pairs = judge_pairs(changes(e))
    assert set(GUARDS) - passed(pairs) == {"one way"}
    assert status(pairs) != "upstream"


def test_controls_that_correlate_as_a_hidden_cause_makes_them() -> None:
    correlation = np.zeros((3, 3))
    correlation[0, 1] = correlation[1, 0] = 0.55
    pairs = judge_pairs(changes(one_edge(), correlation=correlation))
    assert set(GUARDS) - passed(pairs) == {"controls"}
    assert status(pairs) == "undecided"


def test_hidden_cause_of_a_program_and_an_ancestor() -> None:
    e = one_edge()
    e[2, 1] = -0.6  # 2 causes 1; 0 and 2 share a cause
    correlation = np.zeros((3, 3))
    correlation[0, 2] = correlation[2, 0] = 0.9
    found = changes(e, correlation=correlation)
    np.testing.assert_allclose(left_by_controls(found)[[0, 2], 1], 0.6 - 1.3 * 0.9 * 0.6)
    assert "controls" not in passed(judge_pairs(found))


def test_left_by_controls_by_hand() -> None:
    correlation = np.zeros((3, 3))
    correlation[0, 1] = correlation[1, 0] = 0.2
    left = left_by_controls(changes(one_edge(), correlation=correlation))
    np.testing.assert_allclose(left[0, 1], 0.6 - 1.3 * 0.2)  # E = -Omega
    left = left_by_controls(changes(-one_edge(), correlation=correlation, cut=np.full(3, 1.5)))
    np.testing.assert_allclose(left[0, 1], 0.6 - 1.3 * 0.3)  # a turned axis, where Var(x_1) grows by 1.5
    left = left_by_controls(changes(-one_edge(), correlation=correlation))
    np.testing.assert_allclose(left[0, 1], 0.6)  # where it shrinks, a turn gives the other sign


def test_covariances_beside_that_change() -> None:
    beside = np.zeros((3, 3, 3))
    beside[1, 0, 0] = -6.0
    pairs = judge_pairs(changes(one_edge(), beside=beside))
    assert set(GUARDS) - passed(pairs) == {"beside"}
    beside = np.zeros((3, 3, 3))
    beside[1, 0, 2] = beside[1, 2, 0] = 6.0
    assert status(judge_pairs(changes(one_edge(), beside=beside))) == "upstream"  # 1 does not lose 2


def test_cells_that_are_chosen_by_a_program() -> None:
    for away, passes in ((-0.5, False), (0.5, True), (-0.2, True)):  # escaped cells, where hit ones are at +0.6
        found = changes(one_edge())
        own = np.eye(3)[0]
        group = [replace(one, shift=one.shift + 0.6 * own, escaped=away * own) for one in found.by_target[1]]
        found = replace(found, by_target=[found.by_target[0], group, found.by_target[2]])
        assert ("escaped" in passed(judge_pairs(found))) is passes


def test_change_in_proportion_to_the_dose() -> None:
    found = changes(one_edge())
    same = found.by_target
    dose = [[perturbed(i, shift, -0.2 * shift * np.eye(3)[0]) for shift in SHIFTS] for i in range(3)]
    seen = found.e != 0
    assert modulated(doses(found)[0], seen)[0][0, 1] < 1e-3
    assert not judge_pairs(found).modulated.any()
    found = replace(found, by_target=[same[0], dose[1], same[2]])
    assert modulated(doses(found)[0], seen)[0][0, 1] > 0.999
    pairs = judge_pairs(found)
    assert set(GUARDS) - passed(pairs) == {"dose"}
    assert status(pairs) == "undecided"
    assert np.argwhere(pairs.modulated).tolist() == [[0, 1]]


def test_z_of_a_change_in_proportion_to_the_dose_by_hand() -> None:
    group = [
        perturbed(1, shift, value * np.eye(2)[0])
        for shift, value in ((3.0, 0.6), (-2.0, -0.4), (4.0, 0.8), (-3.0, -0.6))
    ]
    ratio, z = doses(changes(np.zeros((2, 2)), by_target=[[], group]))
    # 0.2 times the shift of errors 0.1: sum of shift^2 / 0.01 is 3800; about their mean 0.1 chi-square is 148
    np.testing.assert_allclose(z[0, 1], 0.2 * np.sqrt(3800))
    np.testing.assert_allclose(ratio[0, 1], -50)
    assert judge_pairs(changes(np.zeros((2, 2)), by_target=[[], group])).modulated[0, 1]


def test_one_perturbation_cannot_be_tested_against_dose() -> None:
    found = changes(one_edge())
    pairs = judge_pairs(replace(found, by_target=[group[:1] for group in found.by_target]))
    assert set(GUARDS) - passed(pairs) == {"dose"}
    assert status(pairs) == "likely"


def test_many_pairs_ask_for_more() -> None:
    z = 3.8
    for p, upstream in ((3, True), (40, False)):
        pairs = judge_pairs(changes(one_edge(p) / 0.6 * 0.05 * z))
        assert ("change" in passed(pairs)) is upstream


def test_excluded_and_undecided_by_power() -> None:
    nothing = np.zeros((2, 2))
    strong, weak = (judge_pairs(changes(nothing, error=error)) for error in (0.05, 0.1))
    np.testing.assert_allclose(strong.detectable[0, 1], (3.5 + 0.84) * 0.05)
    assert status(strong) == "excluded"
    assert status(weak) == "undecided"
    e = nothing.copy()
    e[0, 1] = 0.15  # three standard errors: neither seen nor excluded
    assert status(judge_pairs(changes(e, error=0.05))) in {"likely", "undecided"}


def test_unknown_pairs_are_undecided() -> None:
    error = np.full((2, 2), np.inf)
    pairs = judge_pairs(replace(changes(np.zeros((2, 2))), e_error=error, by_target=[[], []]))
    assert status(pairs) == "undecided"
    assert not np.isnan(pairs.fdr).any()


@pytest.mark.parametrize(("correlation", "hidden"), [(0.6, True), (0.0, False)])
def test_seen_both_ways_by_a_hidden_cause_or_a_cycle(correlation: float, hidden: bool) -> None:
    e = one_edge()
    e[1, 0] = -0.6
    c = np.zeros((3, 3))
    c[0, 1] = c[1, 0] = correlation
    pairs = judge_pairs(changes(e, correlation=c))
    assert status(pairs) == status(pairs, 1, 0) == "both ways"
    assert pairs.hidden[0, 1] == pairs.hidden[1, 0] == hidden


def test_reordered() -> None:
    order = np.array([2, 0, 1])
    pairs = judge_pairs(changes(one_edge()))
    moved = pairs.reordered(order)
    assert status(moved, 1, 2) == "upstream"
    assert passed(moved, 1, 2) == set(GUARDS)


def judged(seeds: range, **options: Any) -> list[tuple[Pairs, np.ndarray]]:
    screens = [component_screen(seed, **options) for seed in seeds]
    return [(judge_pairs(screen.changes()), screen.upstream) for screen in screens]


@pytest.mark.parametrize(
    ("guards", "seeds", "options"),
    [
        ("controls", range(3), {"hidden": 1}),
        ("controls", range(1, 4), {"shared": 0.3}),
        ("dose", range(3), {"modulated": 0.4}),
        ("beside escaped", range(1, 2), {"chosen": True}),
        ("one way", range(1), {"shared": 0.3}),
    ],
)
def test_without_a_guard_a_broken_screen_has_wrong_pairs(guards: str, seeds: range, options: dict[str, Any]) -> None:
    without, wrong = np.array([name not in guards for name in GUARDS]), 0
    for pairs, upstream in judged(seeds, **options):
        assert not (pairs.have("upstream") & ~upstream).any()
        wrong += int((pairs.guards[without].all(0) & ~upstream).sum())
    assert wrong > 0


def test_sound_screens_keep_their_pairs() -> None:
    right = total = 0
    for pairs, upstream in judged(range(40, 44)):
        assert not (pairs.have("upstream", "likely") & ~upstream).any()
        assert not pairs.have("both ways").any()
        right, total = right + int(pairs.have("upstream").sum()), total + int(upstream.sum())
    assert right >= 0.65 * total


def test_mere_shifts_order_nothing() -> None:
    for pairs, _ in judged(range(50, 53), kept=1.0):
        assert not pairs.have("upstream", "likely", "both ways").any()


def test_hidden_causes_and_cycles_are_told_apart() -> None:
    for options, hidden in (({"hidden": 1}, True), ({"feedback": True}, False)):
        told = 0
        for pairs, _ in judged(range(60, 64), **options):
            both = pairs.have("both ways")
            told += bool(both.any()) and bool((both & pairs.hidden).any()) is hidden
        assert told >= 3
