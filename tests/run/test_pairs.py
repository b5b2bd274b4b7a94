"""Pairs of programs in words: every status and guard has some, and the sentences have the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crlseq.discovery import pairs as judged
from crlseq.run.pairs import (
    OTHERWISE,
    SEEN,
    STATUSES,
    by_status,
    counts,
    legend,
    mark,
    matrix,
    sentence,
    told,
    why_no_pairs,
)
from crlseq.run.run import Run
from tests.synthetic import found_by_bootstrap, synthetic_run, with_pairs

ALL = ", ".join(judged.GUARDS)
UPSTREAM = {"status": "upstream", "change": 0.634, "se": 0.052, "z": 12.2, "guards": ALL}


def a_pair(**known: Any) -> dict[str, Any]:
    row = with_pairs(synthetic_run(6, 12), {}).pairs
    assert row is not None
    return {str(k): v for k, v in row.iloc[0].to_dict().items()} | {"source": "P2", "target": "P5"} | known


def test_there_are_words_for_every_status_and_guard() -> None:
    """`crlseq.run` reads tables without torch, so that it has the names again."""
    assert tuple(STATUSES) == judged.STATUSES
    assert tuple(OTHERWISE) == judged.GUARDS and SEEN in judged.GUARDS
    marks = [about.mark for about in STATUSES.values()]
    assert len(set(marks)) == len(marks)


def test_upstream_and_likely() -> None:
    assert sentence(a_pair(**UPSTREAM), 0.3) == (
        "P2 is upstream of P5 and raises it: where P5 is perturbed, it loses +0.63 ± 0.05 SD of what P2 gave it."
    )
    lowers = sentence(a_pair(**UPSTREAM | {"change": -0.634}), 0.3)
    assert "lowers it" in lowers and "−0.63 ± 0.05 SD" in lowers
    some = ", ".join(name for name in judged.GUARDS if name not in ("controls", "dose"))
    likely = sentence(a_pair(**UPSTREAM | {"status": "likely", "guards": some}), 0.3)
    assert likely.startswith("P2 is likely upstream of P5") and "0.63 ± 0.05" in likely
    assert "(guard controls)" in likely and "(guard dose)" in likely and likely.count("(guard") == 2
    assert "perturbations of P5 whose strength depends on P2" in likely
    again = "It is seen again with other components, and without any one perturbation."
    assert sentence(a_pair(**UPSTREAM, robust=True), 0.3).endswith(again) and again not in likely


def test_both_ways_and_excluded() -> None:
    both = sentence(a_pair(status="both ways", change=0.4, se=0.05, z=8.0, z_reversed=-6.24, guards="change"), 0.3)
    assert "P5: +0.40 ± 0.05 SD; P2: z −6.2" in both
    assert all(word in both for word in ("hidden common cause", "cycle", "nonlinear", "order is not told"))
    assert sentence(a_pair(change=-0.001, detectable=0.168), 0.3) == (
        "No effect of P2 on P5 is seen (+0.00 ± 0.05 SD). A change above 0.17 SD would have been seen."
    )


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"detectable": 0.6}, "above 0.60 SD would have been seen. 4.0 times as many cells of perturbations of P5"),
        ({"detectable": 1.5}, "25 times as many cells"),
        ({"se": np.nan, "change": np.nan, "detectable": np.nan}, "no perturbation of P5 is strong enough in enough cells"),
        ({"guards": "change, one way, beside, escaped, dose", "change": 0.5}, "covariance changes where P5 is perturbed (+0.50 ± 0.05 SD). Not ruled out: what"),
        ({"detectable": 0.2, "change": 0.15}, "+0.15 ± 0.05 SD, near the smallest change that would be seen, 0.20 SD"),
    ],
)  # fmt: skip
def test_undecided_says_what_would_settle_it(known: dict[str, Any], words: str) -> None:
    """The cells that show `size` are (detectable / size)^2 times those there: errors fall with their root."""
    found = sentence(a_pair(status="undecided", **known), 0.3)
    assert words in found and "nan" not in found


@pytest.fixture
def run() -> Run:
    return with_pairs(
        synthetic_run(3, 9),
        {
            (0, 1): UPSTREAM, (0, 2): UPSTREAM | {"status": "likely", "change": -0.2, "z": -4.0},
            (1, 2): {"status": "both ways", "z": 5.0}, (2, 1): {"status": "both ways", "z": -9.0},
            (2, 0): {"status": "undecided", "se": np.nan, "z": np.nan},
        },
    )  # fmt: skip


def test_matrix_counts_and_order(run: Run) -> None:
    assert run.pairs is not None
    assert matrix(run.pairs, run.program_names).to_numpy().tolist() == [["", "+", "−?"], ["0", "", "⇄"], ["·", "⇄", ""]]
    assert counts(run.pairs) == (
        "6 ordered pairs: 1 upstream, 1 likely, 2 both ways (1 seen from either side), 1 excluded, 1 undecided"
    )
    groups = by_status(run.pairs)
    assert list(groups) == list(judged.STATUSES)
    assert groups["both ways"]["z"].tolist() == [-9.0, 5.0]
    assert [name for _, name, _ in legend(run.pairs[run.pairs["status"] != "likely"])] == [
        "upstream", "both ways", "excluded", "undecided",
    ]  # fmt: skip
    assert mark(a_pair(status="of a later version")) == "?"


def test_sentences_stand_beside_the_rows(run: Run) -> None:
    assert run.pairs is not None
    table = told(run.pairs, run.facts)
    assert table.drop(columns="sentence").equals(run.pairs)
    assert all(
        row["source"] in row["sentence"] and row["target"] in row["sentence"] for row in table.to_dict("records")
    )


def test_one_program_makes_no_pair() -> None:
    run = with_pairs(synthetic_run(1, 3), {})
    assert run.pairs is not None
    assert counts(run.pairs) == "one program, so no pair" and told(run.pairs, run.facts).empty
    assert matrix(run.pairs, run.program_names).to_numpy().tolist() == [[""]]


def test_why_a_run_has_no_pairs() -> None:
    run = synthetic_run(2, 4)
    assert "before" in why_no_pairs(run.facts)  # format 1
    assert "by likelihood" in why_no_pairs(Run({**run.info, "format": 2}, *run.tables().values()).facts)
    for number, word in ((1, "before"), (2, "nonlinear")):
        info = {**run.info, "format": number, "discovery": found_by_bootstrap(2)}
        assert word in why_no_pairs(Run(info, *run.tables().values()).facts)
