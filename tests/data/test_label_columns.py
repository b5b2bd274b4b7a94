"""Columns of labels in every style that screens have: what is read is what a generator knows, or it is refused."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.config import DataConfig
from crlseq.data.guides import labels_of
from crlseq.data.perturbations import read_perturbations
from crlseq.errors import InputError

GENES = (
    "STAT1 IRF1 JAK2 MYC TP53 GATA1 KLF1 CEBPA RUNX1 SPI1 HLA-A HLA-DRA NKX2-1 NKX2-5 MT-CO1 H2AC6 HLA_B NTN1 NT5E SAFB "
    "NEGR1 CTRB1 C1orf43 Atg5 Rag1 MARCH8 ENSG00000115415"
)
LOCI = "chr1.10050_top_two chr11.1801_top_two chr12.1832_second_two chr8.445_top_two chr2.181_second_two chr3:500-900"
CHEMICALS = ("(+)-JQ1", "2,4-D", "1,2-diol", "17-(dimethylamino)X", "D-(+)-glucose", "Na+/K+ blocker", "AZD-1775")
ODD = "Perturb_0 Perturb_1 Perturb_2 Drug_1 Drug_10 chr1_1000 chr1_2000 g1 g12 t3 CD4+ x:y 7SK"
CONTROLS = "control ctrl NT non-targeting Non_Targeting NTC safe-targeting unperturbed neg_ctrl"
NUMBERED = "NT-{} non-targeting_{:05d} safe-targeting_{} NegCtrl{:02d} sgNT-{} NTg{} NTC_{} ctrl{}"
SEPARATORS = ("+", "|", " || ", ";", ",", "_", " and ", " + ", "/")
GUIDES = "{}_g{} {}g{} sg{}-{} sg{}_{} {}_sg{} {}_+_19187{}990.23-P1P2 {}_-_19187{}990-P1P2 {}_19187{}990.23"
UNKNOWN = (None, "", "nan", "*", "unassigned", "multiple", "doublet", "Negative")


@dataclass
class Column:
    """Labels with what is true of each: its perturbations, none for a control, None where nothing is known."""

    labels: list[str | None]
    truth: list[frozenset[str] | None]


def column(rng: random.Random) -> Column:
    """A screen as somebody may have it."""
    pool = rng.choice([GENES.split(), GENES.split(), LOCI.split(), list(CHEMICALS), ODD.split()])
    names = rng.sample(pool, rng.randint(3, min(9, len(pool))))
    controls = rng.sample(CONTROLS.split(), rng.choice([1, 1, 2]))
    if rng.random() < 0.4:
        style = rng.choice(NUMBERED.split())
        controls = [style.format(i + 1) for i in range(rng.randint(2, 14))] + rng.choice([[], controls])
    guides = rng.choice(GUIDES.split()) if rng.random() < 0.4 and pool[0] == "STAT1" else None
    written = {name: [guide.format(name, i + 1) for i in range(2)] if (guide := guides) else [name] for name in names}
    mark = rng.choice(SEPARATORS) if rng.random() < 0.6 else None
    cells: list[tuple[str | None, frozenset[str] | None]] = [(label, frozenset()) for label in controls]
    singles = names if rng.random() < 0.7 else names[: max(2, len(names) - 2)]
    cells += [(label, frozenset([name])) for name in singles for label in written[name]]
    for _ in range(rng.randint(1, 12) if mark else 0):
        parts = rng.sample(names, rng.choice([2, 2, 2, min(3, len(names))]))
        # Nothing tells a combination of two strangers from a name with "_" in it.
        parts = [rng.choice(singles), *parts] if set(parts).isdisjoint(singles) else parts
        texts = [rng.choice(written[name]) for name in parts]
        if rng.random() < 0.3:
            parts, texts = parts[:1], [texts[0], rng.choice(controls)]
        rng.shuffle(texts)
        cells.append(((mark or "").join(texts), frozenset(parts)))
    cells += [(label, None) for label in rng.sample(UNKNOWN, rng.randint(0, 3))]
    cells = [cell for cell in cells for _ in range(rng.randint(1, 2))]
    rng.shuffle(cells)
    return Column([label for label, _ in cells], [truth for _, truth in cells])


def read(made: Column, key: str, **options: object) -> list[frozenset[str] | None]:
    """What each cell is taken for."""
    found, _ = labels_of(pd.DataFrame({key: pd.Series(made.labels, dtype=object)}), DataConfig(**options))
    assert len(found.targets) == len(found.names)
    carried = [frozenset(found.names[i] for i in condition) for condition in found.conditions]
    return [carried[c] if c >= 0 else None for c in found.condition]


def outcome(seed: int) -> str:
    """``read`` where the reading is the truth, ``refused``; fails otherwise."""
    rng = random.Random(seed)
    made = column(rng)
    try:
        found = read(made, rng.choice(["perturbation", "gene", "condition", "guide", "target"]))
    except InputError:
        return "refused"
    wrong = [(label, want, got) for label, want, got in zip(made.labels, made.truth, found, strict=True) if want != got]
    assert not wrong, f"seed {seed}: {wrong[:3]} in {sorted(set(map(str, made.labels)))}"
    return "read"


def test_the_reading_is_the_truth_or_it_is_refused() -> None:
    found = Counter(map(outcome, range(600)))
    assert found["read"] > 500


def test_what_was_found_is_found_again_where_it_is_given() -> None:
    """As in the command that `check` prints, and in a run's own cells."""
    for seed in range(300):
        obs = pd.DataFrame({"target": pd.Series(column(random.Random(seed)).labels, dtype=object)})
        try:
            found = read_perturbations(obs)
        except InputError:
            continue
        again = read_perturbations(obs, "target", found.control_labels, found.separator or "")
        assert again.condition_names == found.condition_names, seed
        assert again.condition.tolist() == found.condition.tolist(), seed
        assert (again.dropped, again.control_labels) == (found.dropped, found.control_labels), seed


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_the_order_of_cells_does_not_matter(seed: int, data: st.DataObject) -> None:
    made = column(random.Random(seed))
    order = data.draw(st.permutations(range(len(made.labels))))
    obs = pd.DataFrame({"target": pd.Series(made.labels, dtype=object)})
    try:
        found, _ = labels_of(obs, DataConfig())
    except InputError as error:
        with pytest.raises(InputError, match=re.escape(error.message)):
            labels_of(obs.iloc[list(order)], DataConfig())
        return
    again, _ = labels_of(obs.iloc[list(order)], DataConfig())
    assert again.condition_names == found.condition_names
    assert np.array_equal(again.condition, found.condition[list(order)])
