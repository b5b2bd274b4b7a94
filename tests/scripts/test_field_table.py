"""The tables that a page has of the suite."""

from __future__ import annotations

import pandas as pd

from crlseq.experiments.scenarios import SCENARIOS
from scripts import field_table as script
from scripts.field_table import BEGIN, END

SCORES = {"mcc": 0.987, "target_accuracy": 1.0, "ancestor_f1": 0.5, "shd": 2.0, "seconds": 3.25}
TABLE = pd.DataFrame([
    {"scenario": "squires", "method": "default", "runs": 3, "refused": 0, "claims": 2, "claims_right": 1,
     "verdict": "identified 2, not identified 1", **SCORES},
    {"scenario": "squires", "method": "squires", "runs": 3, "refused": 3, "claims": 0, "claims_right": 0},
    {"scenario": "squires", "method": "empty", "runs": 3, "refused": 0, "claims": 0, "claims_right": 0, "shd": 5.0},
    {"scenario": "toy", "method": "default", "runs": 3, "refused": 0, "claims": 3, "claims_right": 3,
     "verdict": "ancestry only 3", **SCORES, "mcc": 0.5},
])  # fmt: skip


def test_rows_by_hand() -> None:
    squires, toy = script.by_scenario(TABLE)[2:]
    assert "MCC ≥ 0.997" in squires and "`squires`: refuses" in squires
    assert "SHD 2, MCC 0.99; identified 2, not identified 1 | SHD 5 |" in squires
    assert toy.endswith("| `paper`: – | SHD 2, MCC 0.50; ancestry only 3 | – |")
    default, refusing, empty = script.by_method(TABLE)[2:]
    assert default == "| `default` | 4 of 5 | 6 | 0 | 0.74 | 1.00 | 0.50 | 2 | 3.2 |"
    assert refusing == "| `squires` | 0 of 0 | 3 | 3 | – | – | – | – | – |"
    assert empty == "| `empty` | 0 of 0 | 3 | 0 | – | – | – | 5 | – |"


def test_what_stands_around_stays() -> None:
    page = f"Before.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n"
    new = script.renewed(page, TABLE)
    assert new.startswith(
        f"Before.\n\n{BEGIN}\nMedians of 9 fits, 3 at most of a method on a setting:\n\n| setting"
    ) and new.endswith(f"|\n{END}\n\nAfter.\n")
    assert "old" not in new and script.renewed(new, TABLE) == new


def test_the_page_has_the_marks_and_names_are_those_of_scenarios() -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == 1 and text.index(BEGIN) < text.index(END)
    assert {*script.OWN, *script.REPORTED} <= set(SCENARIOS)
