"""Enrichment of programs: p-values worked out by hand, and what a gene-set file may not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from crlseq.errors import InputError, UsageError
from crlseq.readout.enrichment import discrete_fdr, enrich
from crlseq.run.run import Run
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
    # Two sets in two directions, 4 top genes each, and each test has this p-value with the chance of 155 / 4845.
    assert up["fdr"] == pytest.approx(4 * (155 / 4845) / (1 - 155 / 4845))


def test_drivers_by_hand(run: Run) -> None:
    # Three of six perturbations drive the program, and all three are in a set of three: 1 / C(6, 3).
    found = enrich(run, {"drivers": ["K0", "K1", "K2", *GENES[:5]]})
    row = found[found["test"] == "drivers"].iloc[0]
    assert row["p_value"] == pytest.approx(1 / 20)
    assert row["genes"] == "K1, K2, K0"  # the strongest first
    assert row["fdr"] == pytest.approx((1 / 20) / (19 / 20))


def test_discrete_fdr_by_hand() -> None:
    """3 of 6 chosen. The first test, all 3 of 3, has p = 1 / 20, the second, 2 of 2, p = 4 / 20: it is never at 1 / 20."""
    found = discrete_fdr(np.array([1 / 20, 4 / 20]), 6, np.array([3, 2]), np.array([3, 3]))
    assert found[0] == pytest.approx((1 / 20) / (19 / 20))
    # at 4 / 20 the first has no more than 1 / 20, as its next p-value, 2 of 3, is 10 / 20
    assert found[1] == pytest.approx(((1 / 20) / (19 / 20) + (4 / 20) / (16 / 20)) / 2)
    # one more of the second kind, which found nothing
    more = discrete_fdr(np.array([1 / 20, 1.0]), 6, np.array([3, 2]), np.array([3, 3]))
    assert more == pytest.approx([1 / 19, 1.0])


def test_discrete_fdr_holds_without_any_enrichment() -> None:
    """Twelve sets of a screen's 25 perturbations, drawn at random: one of them is told below 0.2 in a fifth at most."""
    rng, sizes, chosen = np.random.default_rng(0), np.repeat([3, 4, 6, 10], 3), np.full(12, 4)
    overlap = rng.hypergeometric(sizes, 25 - sizes, 4, (300, 12))
    p_value = stats.hypergeom.sf(overlap - 1, 25, sizes, 4)
    lowest = np.array([discrete_fdr(row, 25, sizes, chosen).min() for row in p_value])
    plain = np.array([stats.false_discovery_control(row).min() for row in p_value])
    assert (plain <= 0.2).mean() <= (lowest <= 0.2).mean() <= 0.2 + 3 * (0.16 / 300) ** 0.5


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1)), min_size=1, max_size=30))
def test_discrete_fdr_is_between_the_p_value_and_one_and_in_its_order(tests: list[tuple[int, int, float]]) -> None:
    size, chosen, quantile = (np.array(column) for column in zip(*tests, strict=True))
    p_value = stats.hypergeom.sf(stats.hypergeom.ppf(quantile, 30, size, chosen) - 1, 30, size, chosen).clip(0, 1)
    found = discrete_fdr(p_value, 30, size, chosen)
    if len(tests) == 1:  # of one test, the chance of a p-value as small
        assert found[0] == pytest.approx(min(1.0, p_value[0] / (1 - p_value[0])) if p_value[0] < 1 else 1.0)
    assert (found <= 1).all() and (found >= 0).all()
    order = np.argsort(p_value, kind="stable")
    assert (np.diff(found[order]) >= -1e-12).all()


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
    monkeypatch.setattr("crlseq.readout.enrichment.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="gseapy"):
        enrich(run, {"A": GENES})


def ranked(run: Run, loading: np.ndarray, genes: list[str] | None = None) -> Run:
    """The run with these loadings."""
    genes = genes or [f"A{i}" for i in range(len(loading))]
    rows = {
        "program": "P0",
        "gene": genes,
        "loading": loading,
        "total_effect": loading,
        "rank": range(1, 1 + len(genes)),
    }
    return replace(run, programs=pd.DataFrame(rows))


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan])
def test_loadings_that_are_all_the_same_tell_nothing(run: Run, value: float) -> None:
    found = enrich(ranked(run, np.full(20, value)), {"first": GENES[:6], "last": GENES[10:]})
    assert set(found["test"]) == {"over-representation"}
    assert (found["p_value"] == 1).all() and (found["fdr"] == 1).all()


def test_ties_at_the_cut_are_all_in_or_all_out(run: Run) -> None:
    """The third largest of four groups of five: all five of the first group count as top, whatever their order."""
    found = enrich(ranked(run, np.repeat([2.0, 1.0, -1.0, -3.0], 5)), {"s": GENES[:5], "t": GENES[3:8]}, n_top=3)
    up = found.query("test == 'over-representation' and direction == 'up'").set_index("gene_set")
    assert up["overlap"].to_dict() == {"s": 5, "t": 2}
    assert up.loc["s", "p_value"] == pytest.approx(1 / 15504)  # C(20, 5)
    again = enrich(ranked(run, np.repeat([2.0, 1.0, -1.0, -3.0], 5)[::-1]), {"s": GENES[:5], "t": GENES[3:8]}, n_top=3)
    down = again.query("test == 'over-representation' and direction == 'down'").set_index("gene_set")
    assert down["overlap"].to_dict() == {"s": 5, "t": 2}


def test_a_missing_loading_is_none(run: Run) -> None:
    loading = np.arange(20.0) - 9.5
    gaps = np.where(np.arange(20) % 3, loading, np.nan)
    none = np.where(np.arange(20) % 3, loading, 0.0)
    sets = {"s": GENES[:6], "t": GENES[9:]}
    pd.testing.assert_frame_equal(enrich(ranked(run, gaps), sets), enrich(ranked(run, none), sets))


def test_a_set_of_all_genes_is_no_finding(run: Run) -> None:
    loading = np.arange(20.0) - 9.5
    found = enrich(ranked(run, loading), {"all": GENES})
    assert found["test"].tolist() == ["over-representation"] * 2 and (found["p_value"] == 1).all()
    both = enrich(ranked(run, loading), {"all": GENES, "s": GENES[:6]})
    assert both.query("test == 'rank'")["gene_set"].tolist() == ["s"]
    assert (both["size"].dtype, both["overlap"].dtype) == (int, int)


def test_one_gene(run: Run) -> None:
    found = enrich(ranked(run, np.ones(1)), {"s": ["A0"]}, min_size=1)
    assert found["p_value"].tolist() == [1.0, 1.0] and found["overlap"].tolist() == [1, 0]
    with pytest.raises(InputError, match="holds 5 to 500 of the 1 fitted genes"):
        enrich(ranked(run, np.ones(1)), {"s": ["A0"]})


def test_names_are_names_whatever_they_hold(run: Run) -> None:
    evil = ["<img src=x onerror=alert(1)>", "a;b", "\x1b[31m", "=1", "S0", "g1", "G1", *GENES[7:]]
    sets = {"<b>": evil[:7], "\x1b[0m": evil[7:14], "nan": evil[3:9]}
    found = enrich(ranked(run, 9.5 - np.arange(20.0), evil), sets)
    assert set(found["gene_set"]) == set(sets)
    best = found.query("test == 'rank'").iloc[0]
    assert (best["gene_set"], best["direction"], best["overlap"]) == ("<b>", "up", 7)
    assert best["genes"] == ", ".join(evil[:7])


def test_many_genes_that_do_not_move(run: Run) -> None:
    """gseapy ends in a fault where sets that it samples hold such genes alone."""
    rng = np.random.default_rng(0)
    loading = np.where(rng.random(250) < 0.4, 0.0, rng.normal(size=250))
    genes = [f"A{i}" for i in np.argsort(-loading)]
    sets = {"best": genes[:8], **{f"S{i}": list(rng.choice(genes, 5, replace=False)) for i in range(40)}}
    found = enrich(ranked(run, loading), sets).query("test == 'rank'").set_index("gene_set")
    assert len(found) == 41 and found["p_value"].between(0, 1).all()
    assert found.loc["best", "p_value"] == found["p_value"].min() < 1e-4
