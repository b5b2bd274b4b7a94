"""Halves of a screen: no guide or batch in both, by hand; and the command on a screen of guides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import crlseq
from crlseq.data.perturbations import read_perturbations
from crlseq.errors import InputError, UsageError
from crlseq.experiments.halves import by_guides, divided, fit_halves
from crlseq.run.run import Run
from tests.support import check_refusal, invoke, succeeds


def test_largest_first_to_the_smaller_side() -> None:
    # 50 | 30, then 20 beside 30, then 10 to a tie's first side.
    assert divided(np.array([30, 10, 50, 20])).tolist() == [1, 0, 0, 1]


def test_no_guide_is_in_both_halves() -> None:
    """A with guides of 6, 6 and 3 cells, of which the last is too small; B with one guide; C with two; 11 controls."""
    obs = pd.DataFrame({
        "perturbation": ["control"] * 11 + ["A"] * 15 + ["B"] * 12 + ["C"] * 10,
        "guide": ["NT"] * 11 + ["A1"] * 6 + ["A2"] * 6 + ["A3"] * 3 + ["B1"] * 12 + ["C1"] * 5 + ["C2"] * 5,
    })  # fmt: skip
    labels = read_perturbations(obs, "perturbation", None, None)
    half = by_guides(obs["guide"].to_numpy(), labels, seed=0)
    table = pd.crosstab(obs["guide"], half)
    assert sorted(table.loc["NT"]) == [0, 5, 6]
    assert {*table.loc[["A1", "A2"], [0, 1]].to_numpy().ravel()} == {0, 6}
    assert {*table.loc[["C1", "C2"], [0, 1]].to_numpy().ravel()} == {0, 5}
    assert table.loc["A3", -1] == 3
    assert table.loc["B1", -1] == 12
    with pytest.raises(InputError, match="0 perturbations have two guides"):
        by_guides(obs["perturbation"].to_numpy(), labels, seed=0)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a screen with two guides a perturbation, and two batches."""
    screen = crlseq.simulate(
        n_latents=3, perturbations_per_latent=3, n_genes=100, cells_per_perturbation=160, n_control=700, guides=2,
        n_batches=2, seed=5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("halves") / "RUN"
    return crlseq.fit(screen, folder, method="linear", bootstrap=0, n_latents=3)


def test_guides_replicate(guided: Run, tmp_path: Path) -> None:
    output = tmp_path / "compared"
    answer = succeeds("compare", guided.folder, "--split", "guides", "--output", output, "--json")
    assert "half 2 of 2" in answer.err
    told = json.loads(answer.out)
    assert told["matched"] == 3
    assert told["ari"] == 1
    assert told["perturbations"] == 9
    names = {"programs.csv", "perturbations.csv", "pairs.csv", "cosines.csv", "comparison.json", "comparison.html"}
    assert {file.name for file in output.iterdir()} == names
    page = (output / "comparison.html").read_text()
    assert told["sentences"][0] in page
    assert "<script" not in page
    check_refusal(*invoke("compare", guided.folder, guided.folder, "--output", output), 3, "exists", "--force")


def test_batches(guided: Run) -> None:
    told: list[str] = []
    first, second = fit_halves(guided, "batches", "batch", note=told.append)
    n = [run.facts.input.n_cells for run in (first, second)]
    screen = crlseq.load(guided.folder).screen()
    with screen as own:
        assert sorted(n) == sorted(own.obs["batch"].value_counts())
    assert f"{n[0]} cells" in told[0]


def test_refusals(guided: Run) -> None:
    with pytest.raises(UsageError, match="no split 'lanes'"):
        fit_halves(guided, "lanes")
    with pytest.raises(InputError, match="there is no batch column"):
        fit_halves(guided, "batches")
    with pytest.raises(InputError, match="no column 'lane'"):
        fit_halves(guided, "batches", "lane")
    check_refusal(*invoke("compare", guided.folder), 2, "another one", "--split guides")
    check_refusal(*invoke("compare", guided.folder, guided.folder, "--split", "guides"), 2, "another one")
    check_refusal(*invoke("compare", guided.folder, guided.folder, "--split-key", "lane"), 2, "belongs to --split")
