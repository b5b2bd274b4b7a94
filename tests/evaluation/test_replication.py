"""Two runs side by side: matches by hand, one truth twice, unrelated truths, and what becomes of claims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import crlseq
from crlseq.errors import InputError
from crlseq.evaluation.replication import Comparison, compare_runs, shared_genes
from crlseq.run.run import Run
from tests.synthetic import synthetic_run

GENES = [f"GENE{i}" for i in range(60)]


def with_loadings(run: Run, loading: np.ndarray, genes: list[str] = GENES) -> Run:
    """The run with other loadings (p, genes)."""
    programs = pd.DataFrame({
        "program": np.repeat(run.program_names, len(genes)), "gene": np.tile(genes, len(loading)),
        "loading": loading.ravel(), "total_effect": loading.ravel(), "rank": 1,
    })  # fmt: skip
    return replace(run, programs=programs)


def test_cosines_and_matches_by_hand() -> None:
    """B has A's programs in another order, one with the other sign, and one of its own."""
    a = synthetic_run(2, 4)
    b = synthetic_run(3, 6)
    rng = np.random.default_rng(3)
    loading = rng.normal(size=(2, 60))
    own = rng.normal(size=60)
    found = compare_runs(with_loadings(a, loading), with_loadings(b, np.stack([own, -loading[1], loading[0]])))
    table = found.programs.set_index("program_b")
    assert table.loc["P1", "program_a"] == "P1"
    assert table.loc["P1", "cosine"] == pytest.approx(-1)
    assert table.loc["P2", "program_a"] == "P0"
    assert table.loc["P2", "cosine"] == pytest.approx(1)
    assert table.loc[["P1", "P2"], "match"].all()
    assert table.loc["P0", "program_a"] == ""
    assert not table.loc["P0", "match"]
    expected = loading[0] @ own / np.linalg.norm(loading[0]) / np.linalg.norm(own)
    assert found.cosines.loc["P0", "P0"] == pytest.approx(expected)
    # Of 999 exchanges none comes near: 1 / 1000.
    assert table.loc["P1", "p_value"] == pytest.approx(0.001)
    # Perturbation k acts on program k mod p: 0, 1, 0, 1 in A, and 0, 1, 2, 0 in B, which are none, 1, 0, none of A.
    rows = found.perturbations.set_index("perturbation")
    assert rows["same_program"].to_dict() == {"PERT0": False, "PERT1": True, "PERT2": True, "PERT3": False}
    shift = b.interventions.set_index("perturbation")["shift"]
    assert rows.loc["PERT1", "shift_b"] == -shift["PERT1"]
    assert rows.loc["PERT2", "shift_b"] == shift["PERT2"]


def test_random_loadings_match_seldom() -> None:
    """Of 60 comparisons of 4 unrelated programs, whose genes differ in size as in screens, 5 % have a match at most."""
    a, b, wrong = synthetic_run(4, 4), synthetic_run(4, 4), 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        size = rng.lognormal(0, 1, 60)
        pair = (with_loadings(run, rng.normal(size=(4, 60)) * size) for run in (a, b))
        wrong += compare_runs(*pair).summary["matched"] > 0
    assert wrong <= 7  # 3 are expected; 8 or more have a probability of 1 %


def fitted(screen: ad.AnnData, **options: Any) -> Run:
    return crlseq.fit(screen, method="linear", bootstrap=0, **options)


@pytest.fixture(scope="module")
def screens() -> list[Run]:
    """Runs of two halves of a screen, and of a screen of another truth with the same genes and labels."""
    one, other = (
        crlseq.simulate(n_latents=5, perturbations_per_latent=3, n_genes=200, cells_per_perturbation=300, seed=seed)
        for seed in (31, 32)
    )
    first = np.random.default_rng(0).random(one.n_obs) < 0.5
    return [fitted(one[first].copy()), fitted(one[~first].copy()), fitted(other)]


def test_one_truth_replicates(screens: list[Run]) -> None:
    found = compare_runs(*screens[:2])
    assert found.summary["matched"] == 5
    assert found.summary["median_cosine"] > 0.8
    assert found.summary["ari"] == 1
    # The correlation is what the errors let it be.
    assert found.summary["effect_correlation"] == pytest.approx(found.summary["ceiling"], abs=0.05)
    assert found.summary["pairs"]["reversed"] == 0
    assert found.summary["pairs"]["found again"] >= 1


def test_unrelated_truths_do_not(screens: list[Run]) -> None:
    found = compare_runs(screens[0], screens[2])
    assert found.summary["matched"] == 0
    assert abs(found.summary["effect_correlation"]) < 0.15
    assert found.summary["ceiling"] > 0.7
    assert found.pairs.empty


PAIRS = ["source", "target", "status", "change", "detectable"]


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        (("upstream", 0.8, 0.2), ("upstream", 0.6, 0.2), "found again"),
        (("likely", 0.8, 0.2), ("excluded", 0.0, 0.2), "not found"),
        (("upstream", 0.8, 0.2), ("undecided", 0.1, 0.5), "not found"),
        (("upstream", 0.8, 0.2), ("undecided", 0.1, 0.9), "could not be seen"),
        (("undecided", 0.1, 0.2), ("undecided", 0.1, 0.9), ""),
    ],
)
def test_outcomes_of_claims(first: tuple[Any, ...], second: tuple[Any, ...], outcome: str) -> None:
    rows = [
        pd.DataFrame([("P0", "P1", *own), ("P1", "P0", "excluded", 0.0, 0.1)], columns=PAIRS) for own in (first, second)
    ]
    table = _compared(*rows)
    assert table.pairs.iloc[0]["outcome"] == outcome
    assert table.pairs.iloc[1]["outcome"] == ""


def test_a_reversed_claim_is_told() -> None:
    forth = pd.DataFrame([("P0", "P1", "upstream", 0.8, 0.1), ("P1", "P0", "excluded", 0, 0.1)], columns=PAIRS)
    back = pd.DataFrame([("P0", "P1", "excluded", 0, 0.1), ("P1", "P0", "upstream", 0.7, 0.1)], columns=PAIRS)
    assert _compared(forth, back).pairs["outcome"].tolist() == ["reversed", "reversed"]


def test_partitions_of_targets_that_both_runs_are_sure_of() -> None:
    """PERT3 moves from P1 to P0, of which run B is not sure: of all four it spoils the partition, of the sure three not."""
    loading = np.random.default_rng(5).normal(size=(2, 60))
    a, b = (with_loadings(synthetic_run(2, 4), loading) for _ in range(2))
    table = a.interventions.sort_values("perturbation").assign(fdr=0.001, support=[1.0, 0.8, 0.9, 0.95])
    moved = table.assign(program=["P0", "P1", "P0", "P0"], support=[0.9, 0.8, 1.0, 0.7])
    summary = compare_runs(replace(a, interventions=table), replace(b, interventions=moved)).summary
    assert (summary["with_effect_in_both"], summary["same_program"]) == (4, 3)
    assert summary["ari"] == 0  # {0 2 | 1 3} and {0 2 3 | 1}: 1 pair shared, and by chance 2 * 3 / 6 = 1
    assert (summary["sure_in_both"], summary["sure_same_program"], summary["sure_ari"]) == (3, 3, 1)
    unknown = table.assign(support=np.nan)
    assert compare_runs(replace(a, interventions=unknown), b).summary["sure_ari"] is None


def _compared(first: pd.DataFrame, second: pd.DataFrame) -> Comparison:
    loading = np.random.default_rng(5).normal(size=(2, 60))
    a, b = (
        with_loadings(replace(synthetic_run(2, 4, verdict="not identified"), pairs=own), loading)
        for own in (first, second)
    )
    return compare_runs(a, b)


def test_genes_under_other_names_and_too_few() -> None:
    a, b = synthetic_run(2, 4, genes=GENES), synthetic_run(2, 4, genes=[f"X{i}" for i in range(50)] + GENES[:10])
    with pytest.raises(InputError, match="share 10 genes: A fitted GENE0"):
        shared_genes(a, b)
    c = synthetic_run(2, 4, genes=[*reversed(GENES[:30]), *(f"X{i}" for i in range(10))])
    genes, (mine, theirs) = shared_genes(a, c)
    assert genes == GENES[:30]
    assert mine.tolist() == list(range(30))
    assert theirs.tolist() == list(range(29, -1, -1))
