"""A suite: which claims are right, its table, its page, going on."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import crlseq.experiments.fits as module
from crlseq.errors import ConvergenceError, UsageError
from crlseq.experiments import external, suite
from crlseq.experiments.benchmark import COLUMNS
from crlseq.experiments.fits import known_targets, scenario_screen
from crlseq.experiments.scenarios import EXTERNAL, METHODS, QUICK, SCENARIOS, SUITES, Suite
from crlseq.experiments.suite import right, run_suite, summarised
from tests.support import check_refusal, invoke, succeeds

ROW: dict[str, Any] = {
    "verdict": "identified", "edges_true": 3, "edges_right": 2, "edges_wrong": 0, "ancestor_precision": 1.0,
    "upstream_wrong": 0,
}  # fmt: skip
SMALL = Suite(
    {"First": ("squires",), "<b>Second</b>": ("gene-network",)},
    ("squires", "linear", "cnmf"),
    (0, 1),
    {},
    {"cells": 60},
)


@pytest.mark.parametrize("several", [SUITES, QUICK])
def test_suites_are_of_what_there_is(several: dict[str, Suite]) -> None:
    assert set(several) == set(SUITES)
    for each in several.values():
        assert {name for group in each.scenarios.values() for name in group} <= set(SCENARIOS)
        assert set(each.methods) <= {*METHODS, *EXTERNAL} and set(each.of_methods) <= set(each.methods)
    # diffusion has the programs of icm-flow, sparse targets and graph of default
    assert set(SUITES["field"].methods) == {*METHODS, *EXTERNAL} - {"diffusion", "sparse"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1), ({"edges_wrong": 1}, 0), ({"ancestor_precision": 0.5}, 1), ({"verdict": "not identified"}, None),
        ({"verdict": None}, None), ({"verdict": float("nan")}, None),
        ({"verdict": "ancestry only", "edges_wrong": 1}, 1),
        ({"verdict": "ancestry only", "ancestor_precision": 0.9}, 0),
        ({"verdict": "ancestry only", "edges_true": 0, "edges_wrong": 1}, 0),
        ({"verdict": "partly identified"}, 1), ({"verdict": "partly identified", "upstream_wrong": 1}, 0),
        ({"verdict": "partly identified", "upstream_wrong": float("nan"), "edges_wrong": 1}, 0),
    ],
)  # fmt: skip
def test_which_claims_are_right(changes: dict[str, Any], expected: int | None) -> None:
    found = right(ROW | changes)
    assert np.isnan(found) if expected is None else found == expected


def test_table_by_hand() -> None:
    base = {"scenario": "squires", "method": "linear"}
    rows = [
        {**base, **ROW, "seed": 0, "mcc": 0.5, "shd": 1.0, "seconds": 2.0},
        {**base, **ROW, "seed": 1, "mcc": 0.9, "shd": 4.0, "seconds": 4.0, "edges_wrong": 2},
        {**base, "seed": 2, "error": "No."},
        {"scenario": "squires", "method": "empty", "seed": 0, "shd": 3.0},
        {"scenario": "toy", "method": "linear", "seed": 0, "shd": 3.0},  # not of this suite
    ]
    table = summarised(pd.DataFrame(rows, columns=list(COLUMNS)), SMALL)
    assert table[["scenario", "method"]].to_numpy().tolist() == [["squires", "linear"], ["squires", "empty"]]
    linear, empty = table.to_dict("records")
    assert (linear["runs"], linear["refused"], linear["claims"], linear["claims_right"]) == (3, 1, 2, 1)
    assert (linear["mcc"], linear["shd"], linear["seconds"]) == (0.7, 2.5, 3.0)
    assert (linear["verdict"], linear["reason"]) == ("identified 2", "No.")
    assert (empty["runs"], empty["claims"], empty["shd"]) == (1, 0, 3.0) and np.isnan(empty["mcc"])


def test_page_and_table_of_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the second fit, then finished: the page tells how far it is, and has no script."""
    calls: list[int] = []

    def fitting(source: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        raise ConvergenceError("The <loss> is not finite.")

    monkeypatch.setitem(suite.SUITES, "field", SMALL)
    monkeypatch.setattr(module, "fit", fitting)
    with pytest.raises(KeyboardInterrupt):
        run_suite(tmp_path / "S", threads=1)
    page = (tmp_path / "S" / "suite.html").read_text()
    assert "1 of 12 fits: not finished" in page and "gene-network" not in page
    table = run_suite(tmp_path / "S", threads=1)
    assert len(calls) == 2 + 7  # what was there is not fitted again
    page = (tmp_path / "S" / "suite.html").read_text()
    assert "12 of 12 fits" in page and "not finished" not in page
    assert "<script" not in page and "&lt;b&gt;Second" in page and "<b>Second" not in page
    assert html.escape("The <loss> is not finite.") in page
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)  # nothing is loaded
    written = pd.read_csv(tmp_path / "S" / "suite.csv")
    assert len(written) == len(table) == 2 * 5
    assert written.set_index(["scenario", "method"]).loc[("squires", "linear"), "refused"] == 2


def test_a_package_that_is_absent_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external.importlib.util, "find_spec", lambda name: None)
    screen = scenario_screen("gene-network", 0, cells=20, n_control=50)
    with pytest.raises(UsageError, match="cnmf is not installed"):
        external.fit_external("cnmf", screen, 0)


def test_programs_of_another_package_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The true latents in another order have MCC 1 and all targets, and there is no graph."""
    screen = scenario_screen("heavy-tails", 0, cells=100)
    order = np.random.default_rng(0).permutation(10)
    monkeypatch.setattr(external.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(external.ADAPTERS, "cnmf", lambda screen, p, seed: screen.obsm["true_latents"][:, order])
    scores = external.fit_external("cnmf", screen, 0)
    assert scores["mcc"] == pytest.approx(1) and scores["target_accuracy"] == 1
    assert (scores["n_edges"], scores["verdict"]) == (0, "not identified")


def test_cnmf_refuses_values_that_are_no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match="needs counts"):
        external.fit_external("cnmf", scenario_screen("squires", 0, cells=20), 0)


def test_cnmf_where_it_is_installed() -> None:
    pytest.importorskip("cnmf")
    scores = external.fit_external("cnmf", scenario_screen("gene-network", 0, cells=60, n_control=200), 0)
    assert scores["n_latents"] == 8 and 0.2 < scores["mcc"] <= 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--quick"], "--suite field"), (["--suite", "fields"], "field"),
        (["--suite", "field", "--seeds", "3"], "--seeds"), (["--suite", "field", "--method", "linear"], "--method"),
        (["--suite", "field", "--n-latents", "auto"], "--n-latents"),
    ],
)  # fmt: skip
def test_options_that_contradict_a_suite(tmp_path: Path, options: list[str], says: str) -> None:
    check_refusal(*invoke("benchmark", "--output", tmp_path / "S", *options), 2, says)
    assert not (tmp_path / "S").exists()


def test_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(source: Any, **options: Any) -> Any:
        raise ConvergenceError("No.")

    monkeypatch.setitem(suite.QUICK, "field", SMALL)
    monkeypatch.setattr(module, "fit", failing)
    answer = succeeds("benchmark", "--output", tmp_path / "S", "--suite", "field", "--quick", "--threads", 1)
    header, *rows = (line.split("\t") for line in answer.out.splitlines())
    assert header[:4] == ["scenario", "method", "runs", "refused"] and len(rows) == 10
    assert "suite.html" in answer.err


def test_known_targets_come_upstream_first() -> None:
    """u2 -> u0 -> u1: the perturbations of u2 come first; in a circle, by their numbers."""
    adjacency = np.zeros((3, 3))
    adjacency[2, 0] = adjacency[0, 1] = 0.7
    target = pd.DataFrame({"latent": [0, 1, 2, 2]}, index=["a", "b", "c", "d"])
    table = known_targets({"adjacency": adjacency, "target": target})
    assert table == "perturbation,program\nc,u2\nd,u2\na,u0\nb,u1\n"
    adjacency[1, 2] = 1.0
    circle = known_targets({"adjacency": adjacency, "target": target})
    assert circle.split()[1:] == ["a,u0", "b,u1", "c,u2", "d,u2"]
