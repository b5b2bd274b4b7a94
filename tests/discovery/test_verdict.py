"""The verdict: what each piece of evidence makes of a graph, and the reason that is given."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import crlseq
from crlseq.discovery import verdict as module
from crlseq.discovery.misfit import Misfit
from crlseq.discovery.verdict import Answer, Evidence, PairCounts, judge

GOOD = Evidence(
    kind="hard", asked_without_graph=None, n_edges=3, gain=55.0, error=20.0, misfit=Misfit(1.02, 0.01), support=0.9
)
NO_PAIRS = PairCounts(upstream=0, likely=0, both_ways=0, excluded=0, undecided=6, detectable=float("inf"))


@pytest.mark.parametrize(("kind", "answer"), [("hard", "identified"), ("soft", "ancestry only")])
@pytest.mark.parametrize("unknown", [{}, {"misfit": None}, {"support": None}])
def test_without_an_objection_the_kind_decides(kind: Any, answer: Answer, unknown: dict[str, None]) -> None:
    verdict = judge(replace(GOOD, kind=kind, **unknown))
    assert verdict.answer == answer and verdict.grants_graph
    assert "55 ± 20" in verdict.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_edges": 0}, ["No edge"]),
        ({"n_gone": 4}, ["4 of 7 edges", "under intervention"]),
        ({"n_edges": 0, "n_gone": 1}, ["1 of 1 edge "]),
        ({"n_edges": 0, "n_turned": 1}, ["The only edge fits as well when reversed."]),
        ({"n_edges": 0, "n_turned": 2}, ["All 2 edges fit as well when reversed."]),
        ({"n_edges": 0, "n_turned": 1, "n_gone": 2}, ["2 of 3 edges", "under intervention"]),
        ({"gain": 40.0}, ["held-out cells", "+40 ± 20", "2 standard errors"]),
        ({"gain": -3.0}, ["held-out cells", "-3 ± 20"]),
        ({"gain": float("nan")}, ["held-out cells"]),
        ({"asked_without_graph": "shift"}, ["Shifts were asked for"]),
        ({"misfit": Misfit(1.51, 0.01)}, ["misfit 1.51", "+55 ± 20"]),
        ({"pairs": replace(NO_PAIRS, modulated=2)}, ["2 programs set how strongly perturbations shift another one"]),
        ({"support": 0.45}, ["bootstrap removed the last edge", "0.45"]),
    ],
)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_one_objection_is_enough(kind: Any, change: dict[str, Any], words: list[str]) -> None:
    verdict = judge(replace(GOOD, kind=kind, **change))
    assert verdict.answer == "not identified" and not verdict.grants_graph
    for word in words:
        assert word in verdict.reason


def test_one_perturbation_of_a_program_between_others_does_not_tell_hard_from_soft() -> None:
    verdict = judge(replace(GOOD, n_open=2))
    assert verdict.answer == "ancestry only" and verdict.by_likelihood
    assert (
        "2 programs between others have one perturbation alone" in verdict.reason
        and "--intervention hard" in verdict.reason
    )
    assert judge(replace(GOOD, kind="soft", n_open=2)).reason == judge(replace(GOOD, kind="soft")).reason
    assert judge(replace(GOOD, n_open=1, n_edges=0)).answer == "not identified"


def test_edges_that_soft_interventions_may_stand_for_leave_ancestry() -> None:
    verdict = judge(replace(GOOD, n_around=2))
    assert verdict.answer == "ancestry only" and verdict.by_likelihood
    assert (
        "But 2 edges go around a program, and soft interventions on that program would look the same" in verdict.reason
    )
    assert judge(replace(GOOD, kind="soft", n_around=2)).reason == judge(replace(GOOD, kind="soft")).reason
    assert judge(replace(GOOD, n_around=1, gain=-3.0)).answer == "not identified"


def test_a_graph_stays_that_loses_fewer_edges_than_it_keeps() -> None:
    assert judge(replace(GOOD, n_gone=3)).grants_graph


def test_an_edge_in_half_of_the_replicates_is_enough() -> None:
    assert judge(replace(GOOD, support=0.5)).grants_graph


def test_verdicts_come_into_being_in_one_file() -> None:
    package = Path(crlseq.__file__).parent
    for path in {*package.glob("discovery/**/*.py"), *package.glob("readout/*.py")} - {Path(module.__file__)}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Verdict")), path


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_edges_that_may_be_reversed_are_said(kind: Any) -> None:
    one, two = (judge(replace(GOOD, kind=kind, n_turned=n)) for n in (1, 2))
    assert one.answer == two.answer == judge(replace(GOOD, kind=kind)).answer
    assert one.reason.endswith("1 more edge fits as well when reversed and is not declared.")
    assert two.reason.endswith("2 more edges fit as well when reversed and are not declared.")
