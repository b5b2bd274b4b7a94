"""Calibration and ablation of pairs: the true change is that of the simulation, and what was taken away comes back."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from crlseq.discovery import changes, direct_edges, pairs
from scripts import benchmark_pairs as script


def test_true_changes_are_those_that_are_found() -> None:
    table = script.calibrate(2)
    assert len(table) == 2 * 8 * 7
    z = (table["e"] - table["true"]) / table["error"]
    assert (z.abs() < 4).all() and 0.6 < z.std() < 1.4
    assert np.corrcoef(table["e"], table["true"])[0, 1] > 0.9
    assert (
        script.draw(table)
        .axes[0]
        .get_title()
        .endswith(f"SD of z {(table['e'] / table['error'])[table['true'] == 0].std(ddof=0):.2f}")
    )


def test_what_is_taken_away_costs_pairs_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = changes.hit_cells, changes.LOST, changes._turned, pairs.modulated, direct_edges.PRICE_BESIDE
    monkeypatch.setattr(script, "KINDS", {"hard": {}})
    table: pd.DataFrame = script.ablate(1).set_index("variant")
    assert list(table.index) == list(script.VARIANTS)
    assert table.loc["all cells", "upstream_right"] < table.loc["all of it", "upstream_right"]
    assert table["upstream_true"].nunique() == 1
    assert kept == (changes.hit_cells, changes.LOST, changes._turned, pairs.modulated, direct_edges.PRICE_BESIDE)
