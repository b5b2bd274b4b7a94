"""The benchmark of doubles that are not additive, on one small screen."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import matplotlib.image
import pandas as pd

from scripts import benchmark_nonadditive as script

SMALL = {
    "n_latents": 4, "perturbations_per_latent": 3, "n_doubles": 66, "n_genes": 100, "n_control": 800,
    "expected_parents": 0.75,
}  # fmt: skip


def test_the_graph_predicts_what_the_sum_cannot(tmp_path: Path) -> None:
    with mock.patch.dict(script.SCREEN, SMALL):
        script.main(
            ["--output", str(tmp_path), "--seeds", "1", "--mixing", "linear", "--epochs", "1", "--threads", "1"]
        )
    table, summary = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("pairs", "summary"))
    assert len(table) == 66 and summary["doubles"].sum() == 66
    means = summary.set_index("relation")
    related = means.loc["upstream and downstream"]
    assert related["interaction"] > means.loc["unrelated", "interaction"]
    assert related["model_l2"] < 0.8 * related["additive_l2"] and related["model_better"] > 0.8
    assert related["interaction_pearson"] > 0.5 > means.loc["unrelated", "interaction_pearson"] + 0.3
    rows = table[table["relation"] == "upstream and downstream"]
    assert abs(rows["model_l2"].mean() - related["model_l2"]) < 1e-12
    assert matplotlib.image.imread(tmp_path / "nonadditive.png").std() > 0.02  # something is drawn
