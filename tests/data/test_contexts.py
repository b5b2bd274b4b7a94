"""Perturbations by context: names, strata, what is left out and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from crlseq.config import DataConfig
from crlseq.data.contexts import by_context, gene_and_context, in_contexts
from crlseq.data.dataset import read_data
from crlseq.data.design import select_conditions
from crlseq.data.label_rules import Perturbations
from crlseq.data.perturbations import read_perturbations
from crlseq.errors import CrlseqError, InputError, UsageError

CONTROLS = 24


def table(**changes: Any) -> pd.DataFrame:
    """Controls, A, B and A+B in rest and stim, CONTROLS and 4 cells each."""
    rows = [
        (label, context)
        for context in ("stim", "rest")
        for label, n in {"control": CONTROLS, "A": 4, "B": 4, "A+B": 4}.items()
        for _ in range(n)
    ]
    found = pd.DataFrame(rows, columns=["perturbation", "state"])
    return found.assign(**changes)


def crossed(obs: pd.DataFrame, **options: Any) -> Perturbations:
    config = DataConfig(**{"context_key": "state", "min_cells": 2, **options})
    return in_contexts(read_perturbations(obs), obs, config)


def test_a_perturbation_in_another_context_is_another_one_of_the_same_gene() -> None:
    found = crossed(table())
    assert found.names == ("A@rest", "A@stim", "B@rest", "B@stim")
    assert found.targets == ("A", "A", "B", "B")
    assert found.condition_names == (
        "control", "A@rest", "A@stim", "B@rest", "B@stim", "A@rest+B@rest", "A@stim+B@stim",
    )  # fmt: skip
    assert np.bincount(found.condition).tolist() == [2 * CONTROLS, 4, 4, 4, 4, 4, 4]
    assert found.contexts is not None and found.contexts.names == ("rest", "stim")
    assert gene_and_context("A@x@stim") == ("A@x", "stim")


def test_written_labels_are_read_as_the_same_conditions() -> None:
    found = crossed(table())
    again = read_perturbations(pd.DataFrame({found.key: found.written()}), found.key, found.control_label)
    assert again.condition_names == found.condition_names
    np.testing.assert_array_equal(again.condition, found.condition)


def test_categories_keep_their_order_and_numbers_are_sorted_by_size() -> None:
    order = pd.Categorical(table()["state"], categories=["stim", "rest", "never"])
    assert crossed(table(state=order)).contexts.names == ("stim", "rest")
    hours = table()["state"].map({"rest": 2.0, "stim": 10.0})
    assert crossed(table(state=hours)).contexts.names == ("2", "10")


def test_cells_are_compared_within_their_context_and_small_batches_of_one_count_as_one() -> None:
    obs = table()
    found = crossed(obs)
    batch = np.zeros(len(obs), dtype=np.int64)
    labels, own, names = by_context(found, batch, ("all",))
    assert names == ("rest", "stim") and labels.condition is not found.condition
    assert (own == (obs["state"] == "stim")).all()
    batch = np.arange(len(obs)) % 2  # 12 controls a context and batch: fewer than 23
    labels, own, names = by_context(found, batch, ("b0", "b1"))
    assert names == ("small batches, rest", "small batches, stim")
    batch = np.where((obs["perturbation"] == "A") & (obs["state"] == "rest"), 1, 0)  # without any control
    labels, own, names = by_context(found, batch, ("b0", "b1"))
    assert (labels.condition[batch == 1] == -1).all() and (
        labels.condition[batch == 0] == found.condition[batch == 0]
    ).all()
    assert "b1, rest" in labels.contexts.notes[0]


def test_a_context_with_too_few_controls_is_named_and_left_out() -> None:
    state = table()["state"].to_numpy(dtype=object)
    state[[0, 1, CONTROLS]] = "drug"  # two controls and a cell of A
    obs = pd.concat([table(state=state), table().iloc[:2]], ignore_index=True)
    found = crossed(obs)
    assert found.contexts.names == ("rest", "stim")
    assert found.contexts.notes == (
        "Contexts with fewer than 23 control cells are left out: drug (2 control and 1 perturbed cells).",
    )
    assert (found.condition[[0, 1, CONTROLS]] == -1).all()


@pytest.mark.parametrize(
    ("changes", "options", "error", "says"),
    [
        ({}, {"context_key": "elsewhere"}, InputError, "no column 'elsewhere' for --context-key"),
        ({}, {"context_key": "perturbation"}, UsageError, "holds the perturbations"),
        ({}, {"batch_key": "state"}, UsageError, "for batches and for contexts"),
        ({"state": ["x"] * 72}, {}, InputError, "has one level, 'x'"),
        ({"state": [f"w{i}" for i in range(72)]}, {}, InputError, "has 72 levels"),
        ({"state": [None, *table()["state"][1:]]}, {}, InputError, "without a value in the context column 'state': 1"),
        ({"state": table()["perturbation"]}, {}, InputError, "tells nothing beside the labels"),
        ({"lane": table()["state"].map({"rest": "l1", "stim": "l2"})}, {"batch_key": "lane"}, InputError, "same groups"),
        ({"state": table()["state"] + "@1"}, {}, InputError, "'rest@1' contains '@'"),
        ({"state": table()["state"].replace("stim", "CD3+CD28")}, {}, InputError, "contains '+'"),
        ({}, {"hold_out_cells": 0.5}, InputError, "Fewer than two contexts"),
    ],
)  # fmt: skip
def test_what_is_no_context_is_refused(
    changes: dict[str, Any], options: dict[str, Any], error: type[CrlseqError], says: str
) -> None:
    with pytest.raises(error, match=says.replace("+", r"\+")) as found:
        crossed(table(**changes), **options)
    assert found.value.hint and found.value.message.count(". ") == 0


def test_a_condition_is_held_out_in_one_context_or_in_all() -> None:
    found = crossed(table())

    def held_out(*names: str) -> set[str]:
        selection = select_conditions(found, DataConfig(context_key="state", min_cells=2, hold_out=names))
        return {found.condition_names[c] for c in np.flatnonzero(selection.held_out)}

    assert held_out("A@rest") == {"A@rest"}
    assert held_out("A") == {"A@rest", "A@stim"}
    assert held_out("B+A") == {"A@rest+B@rest", "A@stim+B@stim"}
    assert held_out("A@stim+B@stim") == {"A@stim+B@stim"}
    with pytest.raises(InputError, match="'C' is not a perturbation"):
        held_out("C")


def test_a_screen_with_contexts_has_strata_genes_and_labels_of_its_own() -> None:
    obs = pd.concat([table()] * 3, ignore_index=True)
    x = np.random.default_rng(0).poisson(3.0, (len(obs), 20)).astype(np.float32)
    data = read_data(ad.AnnData(x, obs.set_axis(obs.index.astype(str))), DataConfig(context_key="state"), 0)
    assert data.context_names == ("rest", "stim")
    assert data.gene.tolist() == [0, 0, 1, 1]
    assert (data.batch == data.context).all()
    assert data.own_labels is not None and set(data.own_labels.categories) == set(data.condition_names)


def test_a_store_is_sorted_by_perturbation_and_context(tmp_path: Path) -> None:
    from crlseq.data.prepare import prepare

    obs = pd.concat([table()] * 3, ignore_index=True)
    x = np.random.default_rng(0).poisson(3.0, (len(obs), 20)).astype(np.float32)
    ad.AnnData(x, obs.set_axis(obs.index.astype(str))).write_h5ad(tmp_path / "screen.h5ad")
    options = DataConfig(context_key="state")
    assert prepare([tmp_path / "screen.h5ad"], tmp_path / "STORE", options).context_key == "state"
    data = read_data(tmp_path / "STORE", DataConfig(), 0)  # read as it was prepared
    assert data.context_names == ("rest", "stim") and data.shuffled
    assert len(data.perturbation_names) == 4
