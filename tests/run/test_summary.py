"""Programs in words and numbers, and the answers to three questions, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from crlseq.run.run import Run
from crlseq.run.summary import Answer, answer_of, answers, assignment, short, strongest
from tests.synthetic import found_by_bootstrap, synthetic_run, with_info, with_pairs


@pytest.fixture
def run() -> Run:
    return synthetic_run(4, 12, [(0, 1), (1, 3)], names=[f"PERT{i}" for i in range(12)])


def test_programs(run: Run) -> None:
    told = run.described["P1"]
    assert (told.upstream, told.downstream) == (("P0",), ("P3",))
    assert (told.parents, told.children) == ({"P0": -0.7}, {"P3": 0.5})
    assert run.described["P3"].upstream == ("P0", "P1") and run.described["P3"].parents == {"P1": 0.5}
    assert (run.described["P2"].upstream, run.described["P2"].downstream) == ((), ())
    # PERT9 targets P1 by its number, but has no detectable effect and no claim.
    assert sorted(told.drivers["perturbation"]) == ["PERT1", "PERT5"]
    assert told.drivers["shift"].abs().is_monotonic_decreasing
    assert (told.up["loading"] > 0).all() and told.up["loading"].is_monotonic_decreasing
    assert (told.down["loading"] < 0).all() and told.down["loading"].is_monotonic_increasing
    assert len(told.up) + len(told.down) == 60
    strongest_gene = run.programs.query("program == 'P1' and rank == 1")["gene"].item()
    assert told.title.startswith(f"{told.label}: {strongest_gene}, ")
    assert told.stability == 0.9


def test_a_pair_that_is_upstream_is_declared(run: Run) -> None:
    upstream = {"status": "upstream", "change": -0.4, "z": -8.0}
    told = with_pairs(run, {(2, 3): upstream, (2, 0): upstream | {"status": "likely"}}).described
    assert (told["P3"].upstream, told["P2"].downstream) == (("P0", "P1", "P2"), ("P3",))
    assert told["P3"].parents == {"P1": 0.5}  # no edge is declared


def test_a_title_names_no_driver_twice() -> None:
    run = synthetic_run(2, 4, genes=["PERT0", "A", "PERT2", "B", "C"], names=[f"PERT{i}" for i in range(4)])
    assert all(gene not in run.described["P0"].title.split(": ")[1] for gene in ("PERT0", "PERT2"))


def test_summary_has_a_row_a_program(run: Run) -> None:
    table = run.summary
    assert table["program"].tolist() == ["P0", "P1", "P2", "P3"]
    assert table["downstream"].tolist() == ["P1, P3", "P3", "", ""]
    assert table["n_drivers"].sum() == 11
    assert table["effect_explained"].tolist() == [row["effect_explained"] for row in run.info["programs"]]


def test_drivers_with_a_detectable_effect_come_first(run: Run) -> None:
    table = run.interventions.copy()
    table.loc[table["perturbation"] == "PERT1", ["fdr", "shift"]] = [0.2, 99.0]
    assert replace(run, interventions=table).described["P1"].drivers["perturbation"].tolist() == ["PERT5", "PERT1"]


def test_strongest(run: Run) -> None:
    rows, left_out = strongest(run.interventions, 5)
    assert (len(rows), left_out) == (5, 6)
    assert rows["shift"].abs().min() >= np.sort(run.interventions["shift"].abs().dropna())[-5]
    assert rows["program"].tolist() == sorted(rows["program"])
    assert assignment(run.facts.bootstrap, rows) is None
    found = found_by_bootstrap(4, {"PERT1": [0.25, 0.75, 0, 0]})
    facts = with_info(run, discovery=found).facts
    known = assignment(facts.bootstrap, strongest(run.interventions, 20)[0])
    assert known is not None
    at = strongest(run.interventions, 20)[0]["perturbation"].tolist().index("PERT1")
    assert known[at].tolist() == [0.25, 0.75, 0, 0] and np.isnan(np.delete(known, at, 0)).all()


def test_short() -> None:
    assert short("a\tb\n c") == "a b c"
    assert short("x" * 30, 10) == "x" * 9 + "…"
    assert short("a\x1b[1m") == "a [1m"


# --- answers


def answers_of(run: Run) -> list[Answer]:
    return answers(run.facts, run.evaluation, run.history)


def measured(**columns: Any) -> pd.DataFrame:
    n = len(columns["l2"])
    others = dict.fromkeys(("pearson_delta", "pearson_delta_training", "pearson_delta_mean"), np.nan)
    return pd.DataFrame({"condition": [f"c{i}" for i in range(n)], "split": "test", "n_cells": 9, **others, **columns})


@pytest.mark.parametrize(("verdict", "grade"), [("identified", "good"), ("ancestry only", "fair"), ("partly identified", "fair"), ("not identified", "poor")])  # fmt: skip
def test_identified(verdict: str, grade: str) -> None:
    told = answers_of(synthetic_run(2, 4, verdict=verdict))[0]
    assert (told.answer, told.grade, told.reason) == (verdict, grade, "Because it is.")


def test_better_than_baselines(run: Run) -> None:
    base = {"l2_no_change": [2.0, 2.2, 2.1], "l2_training": [1.0, 1.1, 1.2], "l2_mean": [1.5, 1.6, 1.7]}
    better = replace(run, evaluation=measured(l2=[0.5, 0.6, 0.7], **base))
    told = answers_of(better)[1]
    assert (told.answer, told.grade) == ("better", "good")
    assert "0.6 against 1.1 (training effects), better on 3 of 3 conditions" in told.reason
    worse = answers_of(replace(run, evaluation=measured(l2=[1.5, 1.6, 1.7], **base)))[1]
    assert (worse.answer, worse.grade) == ("worse", "poor")  # than the best, though better than no change
    even = answers_of(replace(run, evaluation=measured(l2=[0.5, 2.0, 1.1], **base)))[1]
    assert (even.answer, even.grade) == ("no clear difference", "fair")
    one = answers_of(
        replace(run, evaluation=measured(l2=[0.5], **{name: values[:1] for name, values in base.items()}))
    )[1]
    assert one.answer == "no clear difference"  # a single condition has no error to hold it against
    none = answers_of(replace(run, evaluation=run.evaluation.iloc[:0]))[1]
    assert (none.answer, none.grade) == ("not evaluated", "open")
    chosen = answers_of(replace(run, evaluation=measured(l2=[0.5, 0.6, 0.7], **base).assign(split="validation")))[1]
    assert "chose the epoch" in chosen.reason


def test_answers_of_several_metrics() -> None:
    assert answer_of({"L2": 1.0, "r": 1.0}) == ("better", "good")
    assert answer_of({"L2": 1.0, "r": 0.0}) == ("better by L2, no clear difference by r", "fair")
    assert answer_of({"L2": -1.0, "r": 1.0}) == ("better by r, worse by L2", "fair")
    assert answer_of({"L2": -1.0, "r": -1.0}) == ("worse", "poor")


@pytest.mark.parametrize(
    ("losses", "stopped", "grade", "word"),
    [
        ([5, 4, 3, 2, 1, 1.001, 1.0, 1.0, 1.0, 1.0], False, "good", "settled"),
        ([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], False, "fair", "22% of the fall"),
        ([5, 4, 3, 2, 1], True, "good", "stopped falling"),
        ([5, 4], False, "open", "too few"),
        ([], False, "good", "No network was trained"),
    ],
)
def test_converged(run: Run, losses: list[float], stopped: bool, grade: str, word: str) -> None:
    history = pd.DataFrame({"epoch": range(len(losses)), "total": losses, "validation_total": losses})
    training = {"epochs_run": len(losses), "best_epoch": len(losses) - 1, "stopped_early": stopped}
    told = answers_of(with_info(replace(run, history=history), training=training))[2]
    assert told.grade == grade
    assert word in told.reason


def test_a_network_that_is_best_untrained_did_not_converge(run: Run) -> None:
    run = with_info(run, training={"epochs_run": 9, "best_epoch": 0, "stopped_early": True})
    told = answers_of(run)[2]
    assert (told.grade, told.answer) == ("poor", "no") and "first of 9" in told.reason
    assert (
        answers_of(with_info(run, discovery=found_by_bootstrap(4)))[2].grade == "good"
    )  # it starts where the likelihood ended
