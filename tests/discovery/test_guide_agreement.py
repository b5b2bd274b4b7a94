"""Weak guides: probabilities by hand, planted dead guides, screens without any, and a fit that leaves them out."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import crlseq
from crlseq.config import DataConfig
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.projection import principal_components
from crlseq.discovery.guide_agreement import (
    _in_all_contexts,
    guide_agreement,
    guides_in_words,
    probabilities,
    weak_guides,
    without_guides,
)
from crlseq.run.columns import GUIDE_COLUMNS
from tests.support import invoke

SCREEN = {"n_latents": 4, "n_genes": 200, "cells_per_perturbation": 200, "n_control": 1000}


def planted(seed: int, guides: int, every: int) -> tuple[ad.AnnData, set[str]]:
    """A screen of which the first guide of every so many genes does nothing: its cells are those of a screen without hits."""
    screen = crlseq.simulate(guides=guides, penetrance=(0.5, 0.95), seed=seed, **SCREEN)
    idle = crlseq.simulate(guides=guides, penetrance=(0.0, 0.0), seed=seed, **SCREEN)
    genes = [name for name in screen.obs["perturbation"].unique() if name != "control"]
    dead = {f"{gene}_0" for gene in genes[::every]} if every else set()
    own = screen.obs["guide"].isin(dead).to_numpy()
    x = screen.X.tolil()
    x[own] = idle.X[own]
    screen.X = sp.csr_matrix(x)
    return screen, dead


def read(screen: ad.AnnData) -> tuple[PerturbSeqData, pd.DataFrame]:
    data = read_data(screen, DataConfig(guide_key="guide"), 0)
    return data, guide_agreement(data, principal_components(data, 50, 0).scores)


def test_probabilities_by_hand() -> None:
    """Guides at 2, 2 and 0 with errors of 0.1 and 0.3, and two guides that say nothing."""
    dead, effect = probabilities([(np.array([2.0, 2.0, 0.0]), np.full(3, 0.01)), (np.zeros(2), np.full(2, 0.09))])
    assert dead[2] > 0.999
    assert (dead[:2] < 1e-6).all()
    assert effect[0] == pytest.approx(2, abs=0.15)
    # Where the effect of the gene may be 0, a guide is dead no more surely than guides are on average: here one or two of five,
    # and one of twenty that are counted besides.
    assert dead[3] == dead[4]
    assert 0.05 < dead[3] < 0.5


def test_dead_guides_are_found() -> None:
    """Of guides without an effect most are found, of those with one at most a twentieth of what is named."""
    right = wrong = n = 0
    for seed, guides in ((1, 2), (2, 3), (3, 4)):
        screen, dead = planted(seed, guides, every=2)
        _, table = read(screen)
        named = set(table["guide"][table["weak"]])
        right, wrong, n = right + len(named & dead), wrong + len(named - dead), n + len(dead)
        strength = table.set_index("guide")["strength"]
        assert strength[strength.index.isin(dead)].median() == pytest.approx(0, abs=0.2)
        assert strength[~strength.index.isin(dead)].median() == pytest.approx(1, abs=0.15)
    assert right >= 0.75 * n
    assert wrong <= 1


def test_none_is_named_where_all_work() -> None:
    for seed in (4, 5, 6):
        _, table = read(planted(seed, 3, every=0)[0])
        assert len(table) == 48
        assert table["weak"].sum() <= 1


def test_a_guide_alone_is_not_compared() -> None:
    screen, _ = planted(7, 2, every=0)
    one = screen[screen.obs["guide"] != "g0_1"].copy()
    _, table = read(one)
    assert "g0" not in set(table["perturbation"])
    assert len(table) == 30
    assert guide_agreement(
        read_data(screen, DataConfig(perturbation_key="perturbation"), 0), np.zeros((screen.n_obs, 2))
    ).empty


def test_cells_of_a_guide_take_no_part() -> None:
    screen, _ = planted(8, 2, every=0)
    data, _ = read(screen)
    kept = without_guides(data, ["g1_0"])
    own = (screen.obs["guide"] == "g1_0").to_numpy()
    assert (kept.condition[own] == -1).all()
    assert (kept.split[own] == 0).all()
    np.testing.assert_array_equal(kept.condition[~own], data.condition[~own])


def test_fit(tmp_path: Path) -> None:
    """Weak guides are in the table and the report, and out of the fit where asked for."""
    screen, dead = planted(9, 3, every=4)
    path = tmp_path / "screen.h5ad"
    screen.write_h5ad(path)
    words = ("fit", path, "--guide-key", "guide", "--method", "linear", "--bootstrap", 0, "--n-latents", 4)
    for name, more in (("RUN", ()), ("DROPPED", ("--drop-outlier-guides",))):
        answer = invoke(*words, "--output", tmp_path / name, *more)
        assert answer.code == 0, answer.err
    runs = [crlseq.load(tmp_path / name) for name in ("RUN", "DROPPED")]
    table = runs[0].guides
    assert table is not None
    assert list(table) == list(GUIDE_COLUMNS)
    weak = set(table["guide"][table["weak"]])
    assert len(weak & dead) >= 3
    assert weak == set(json.loads((tmp_path / "RUN" / "run.json").read_text())["guides"]["weak"])
    pd.testing.assert_frame_equal(table.drop(columns="penetrance"), runs[1].guides.drop(columns="penetrance"))
    n = screen.obs["guide"].isin(weak).sum()
    assert runs[1].facts.cells.unused == n
    assert runs[0].facts.cells.unused == 0
    # Penetrance of dead guides is that of escaped cells, and of the others that of the screen.
    penetrance = table.set_index("guide")["penetrance"]
    assert penetrance[list(weak & dead)].mean() < penetrance[~penetrance.index.isin(dead)].mean() - 0.2
    for guide in weak:
        assert guide in (tmp_path / "RUN" / "report.html").read_text()


def test_what_contexts_say_of_a_guide_is_multiplied() -> None:
    # (20 x 0.05 + 1) / 22 = 1 / 11 of all rows are dead; each says 10 times these odds, 1 to 10: together 10 to 1.
    assert _in_all_contexts(np.array([0.5, 0.5]), np.array([0, 0])) == pytest.approx([10 / 11])


def test_a_guide_is_dead_in_all_contexts_or_in_none_and_named_once() -> None:
    screen = crlseq.simulate(
        n_latents=3, n_genes=100, cells_per_perturbation=240, n_control=800, guides=3, contexts=2, seed=2
    )
    idle = np.flatnonzero((screen.obs["guide"] == "g1_0").to_numpy())
    for name in ("context0", "context1"):  # its cells are control cells of their context
        own = idle[(screen.obs["context"].iloc[idle] == name).to_numpy()]
        controls = np.flatnonzero(
            ((screen.obs["perturbation"] == "control") & (screen.obs["context"] == name)).to_numpy()
        )
        screen.X[own] = screen.X[controls[: len(own)]]
    data = read_data(screen, DataConfig(guide_key="guide", context_key="context"), 0)
    table = guide_agreement(data, principal_components(data, 20, 0).adjusted)
    assert (table.groupby("guide")["weak"].nunique() == 1).all() and (table["guide"].value_counts() == 2).all()
    assert weak_guides(table) == ["g1_0"]
    assert guides_in_words(table, True).startswith("1 of 36 guides do nothing")
    left = without_guides(data, ["g1_0"])
    assert not (left.condition[idle] > 0).any()
