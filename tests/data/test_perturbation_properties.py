"""Label reading: properties that hold for any screen, its independence of the hash seed, and how often it looks at a label."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.data import perturbations
from crlseq.data.combinations import could_be_name
from crlseq.data.controls import is_control_name, is_never
from crlseq.data.perturbations import Perturbations, read_perturbations
from tests.support import ROOT, table

# HDF5 has no text with NUL in it, and pandas hashes text up to the first NUL.
NAME = st.text(st.characters(codec="utf-8", exclude_characters="+\0"), min_size=1, max_size=6).filter(
    lambda s: s == s.strip() and could_be_name(s) and not is_control_name(s) and not is_never(s)
)


@st.composite
def screens(draw: st.DrawFn) -> list[str | None]:
    names = draw(st.lists(NAME, min_size=2, max_size=5, unique=True))
    label = st.lists(st.sampled_from([*names, "ctrl"]), min_size=1, max_size=4).map("+".join)
    other = st.sampled_from(["nan", "Multiple", "", None, names[0] + "+unassigned"])
    return ["ctrl", names[0], names[1], *draw(st.lists(label | other, max_size=20))]


def read(cells: Any) -> Perturbations:
    return read_perturbations(table(x=list(cells)), "x", "ctrl", "+")


@settings(max_examples=60, deadline=None)
@given(cells=screens(), data=st.data())
def test_permuting_cells_permutes_conditions(cells: list[str | None], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(cells))))
    a, b = read(cells), read(cells[i] for i in order)
    assert (a.names, a.conditions, a.condition_names) == (b.names, b.conditions, b.condition_names)
    assert a.dropped == b.dropped
    assert np.array_equal(a.condition[list(order)], b.condition)


@settings(max_examples=60, deadline=None)
@given(cells=screens(), random=st.randoms(use_true_random=False))
def test_order_of_parts_does_not_matter(cells: list[str | None], random: Any) -> None:
    def shuffled(label: str | None) -> str | None:
        parts = label.split("+") if label is not None else []
        return "+".join(random.sample(parts, len(parts))) if label is not None else None

    a, b = read(cells), read(map(shuffled, cells))
    assert (a.names, a.condition_names) == (b.names, b.condition_names)
    assert np.array_equal(a.condition, b.condition)


@settings(max_examples=60, deadline=None)
@given(cells=screens())
def test_every_cell_is_read_as_its_parts_or_counted_as_dropped(cells: list[str | None]) -> None:
    p = read(cells)
    assert np.bincount(p.condition + 1)[1:].sum() + sum(p.dropped.values()) == len(cells)
    assert len(set(p.condition_names)) == len(p.conditions)
    assert p.conditions[0] == ()
    assert list(p.names) == sorted(set(p.names))
    assert all(list(c) == sorted(set(c)) for c in p.conditions)
    for label, condition in zip(cells, p.condition, strict=True):
        parts = set((label or "").split("+")) - {"ctrl"}
        if condition >= 0:
            assert {p.names[i] for i in p.conditions[condition]} == parts
        else:
            assert parts & {"nan", "Multiple", "", "unassigned"}


@settings(max_examples=60, deadline=None)
@given(cells=screens())
def test_canonical_names_read_back(cells: list[str | None]) -> None:
    a = read(cells)
    b = read(a.condition_names[c] for c in a.condition if c >= 0)
    assert (a.names, a.conditions, a.condition_names) == (b.names, b.conditions, b.condition_names)
    assert np.array_equal(a.condition[a.condition >= 0], b.condition)


def test_the_hash_seed_does_not_matter() -> None:
    program = (
        "import pandas as pd; from crlseq.data.perturbations import *\n"
        "obs = pd.DataFrame({'x': ['control', 'NT', 'b_a', 'a_c', 'c_b', 'z+y', 'nan', 'doublet'] * 2})\n"
        "p = read_perturbations(obs, control_label='NT', separator='_'); print(p, candidates(obs))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(runs) == 1


def test_labels_of_large_screens_are_read_once_and_not_once_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    singles = [f"GENE{i}" for i in range(6000)]
    conditions = ["control", *singles, *map("+".join, pairwise(singles[:4001]))]
    codes = np.random.default_rng(0).integers(len(conditions), size=2_000_000)
    obs = pd.DataFrame({"perturbation": pd.Categorical.from_codes(codes, pd.Index(conditions))})
    obs["gene"] = obs["perturbation"].astype(object)
    read = Mock(wraps=perturbations._text)
    monkeypatch.setattr(perturbations, "_text", read)
    p = read_perturbations(obs)
    assert read.call_count == 2 * len(conditions)  # two columns
    assert (len(p.names), len(p.conditions)) == (6000, 10_001)
