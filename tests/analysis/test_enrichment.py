"""Enrichment of programs: p-values worked out by hand, and what a gene-set file may not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from crlseq.analysis.enrichment import enrich
from crlseq.errors import InputError, UsageError
from crlseq.run import Run
from tests.synthetic import synthetic_run

pytest.importorskip("gseapy")
GENES = [f"A{i}" for i in range(20)]


@pytest.fixture(scope="module")
def run() -> Run:
    """One program of 20 genes with loadings 20, 19, ..., 1, of which every second is negative; six perturbations."""
    made = synthetic_run(1, 6)
    loading = np.arange(20.0, 0, -1) * np.where(np.arange(20) % 2, -1, 1)
    programs = pd.DataFrame(
        {"program": "P0", "gene": GENES, "loading": loading, "total_effect": loading, "rank": range(1, 21)}
    )
    interventions = made.interventions.assign(
        perturbation=[f"K{i}" for i in range(6)], program=["P0"] * 3 + [""] * 3, shift=[1.0, -3.0, 2.0, 0.0, 0.0, 0.0]
    )
    return replace(made, programs=programs, interventions=interventions)


def test_hypergeometric_by_hand(run: Run) -> None:
    # The top 4 upwards are A0, A2, A4, A6; the set has 5 of 20 genes and 3 of those 4:
    # P(X >= 3) = (C(5, 3) C(15, 1) + C(5, 4)) / C(20, 4) = (150 + 5) / 4845
    sets = {
        "three of four": ["A0", "A2", "A4", "A1", "A3", "never measured"],
        "other": ["A15", "A16", "A17", "A18", "A19"],
    }
    found = enrich(run, sets, n_top=4)
    row = found[(found["test"] == "over-representation") & (found["gene_set"] == "three of four")]
    up = row[row["direction"] == "up"].iloc[0]
    assert up["p_value"] == pytest.approx(155 / 4845)
    assert (up["size"], up["overlap"], up["genes"]) == (5, 3, "A0, A2, A4")
    assert up["score"] == pytest.approx(3 / (5 * 4 / 20))
    # Four tests: one program, two sets, two directions; the smallest p-value times four, or less where others tie.
    assert up["fdr"] <= 4 * 155 / 4845 + 1e-12


def test_drivers_by_hand(run: Run) -> None:
    # Three of six perturbations drive the program, and all three are in a set of three: 1 / C(6, 3).
    found = enrich(run, {"drivers": ["K0", "K1", "K2", *GENES[:5]]})
    row = found[found["test"] == "drivers"].iloc[0]
    assert row["p_value"] == pytest.approx(1 / 20)
    assert row["genes"] == "K1, K2, K0"  # the strongest first


def test_ranking_finds_what_rises_and_what_falls(run: Run) -> None:
    sets = {"rises": GENES[0:10:2], "falls": GENES[1:10:2], "neither": GENES[15:]}
    found = enrich(run, sets, seed=3).query("test == 'rank'").set_index("gene_set")
    assert found.loc["rises", "direction"] == "up"
    assert found.loc["falls", "direction"] == "down"
    assert found.loc["rises", "p_value"] < 0.01 < found.loc["neither", "p_value"]
    pd.testing.assert_frame_equal(enrich(run, sets, seed=3), enrich(run, sets, seed=3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "There is no gene set"),
        ("A\tabout\tA0\tA1\nB only\n", "Line 2"),
        ("A\tabout\tA0\nA\tabout\tA1\n", "repeats the name"),
        ("A\tabout\tENSG00000115415\tENSG00000096968\n", "Ensembl identifiers"),
        ("A\tabout\tA0\tA1\n", "holds 5 to 500"),
    ],
)
def test_bad_files(run: Run, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "sets.gmt"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        enrich(run, path)


def test_a_missing_library_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crlseq.analysis.enrichment.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="gseapy"):
        enrich(run, {"A": GENES})
