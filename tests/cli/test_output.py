"""Tables on a terminal and into a pipe: digits, columns that say nothing, rows that a screen does not hold."""

from __future__ import annotations

import math
import sys

import pandas as pd
import pytest
from rich.text import Text

from crlseq.cli.output import show_table


def shown(
    table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: int = 24
) -> str:
    """The table on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", str(rows))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show_table(table, "")
    return Text.from_ansi(capsys.readouterr().out).plain


def test_values_end_at_the_second_digit_of_their_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.DataFrame({
        "shift": [-12.2862, 0.735, -9.61586, 0.5, 1234.5678, math.nan],
        "shift_se": [0.6399, 0.03355, 1.118, math.nan, 250.0, 0.1],
        "change": [0.08412, 2.0, 0.1, 0.1, 0.1, 0.1],
        "se": [0.00951, 0.0, 0.1, 1e-9, 0.1, 0.1],
        "share": [0.123456] * 6,
    })  # fmt: skip
    words = [line.split() for line in shown(table, monkeypatch, capsys).splitlines()[-6:]]
    assert words == [
        ["-12.29", "0.64", "0.0841", "0.0095", "0.123"],
        ["0.735", "0.034", "2.000", "0.000", "0.123"],
        ["-9.6", "1.1", "0.10", "0.10", "0.123"],
        ["0.500", "–", "0.100000", "0.000000", "0.123"],
        ["1235", "250", "0.10", "0.10", "0.123"],
        ["–", "0.100", "0.10", "0.10", "0.123"],
    ]


def test_a_pipe_gets_six_digits_of_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.DataFrame({
        "gene": ["a", "b"], "weight": [1.0, 1.0], "shift": [-12.286242345, math.nan], "p": [1.23456789e-9, 0.004],
        "n": [1234567, 2],
    })  # fmt: skip
    show_table(table, "")
    assert capsys.readouterr().out == (
        "gene\tweight\tshift\tp\tn\na\t1\t-12.2862\t1.23457e-09\t1234567\nb\t1\t\t0.004\t2\n"
    )
    show_table(table, "", form=lambda value: f"<{value:.1f}>")
    assert capsys.readouterr().out.splitlines()[1] == "a\t<1.0>\t<-12.3>\t<0.0>\t1234567"


def test_columns_of_ones_are_left_out_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.DataFrame({"weight": [1.0, 1.0], "retention": [1.0, 0.5], "support": [1.0, 1.0]})
    heading = shown(table, monkeypatch, capsys).splitlines()[0].split()
    assert heading == ["retention", "support"]


@pytest.mark.parametrize(
    ("n", "rows", "left_out"), [(20, 24, 0), (21, 24, 2), (100, 24, 81), (100, 56, 51), (50, 56, 0)]
)
def test_a_table_that_is_longer_than_the_screen_is_cut_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], n: int, rows: int, left_out: int
) -> None:
    """Of 100 rows on 56 lines, 50 are left for the table: 46, a row of dots, and the last 3."""
    text = shown(pd.DataFrame({"epoch": range(n)}), monkeypatch, capsys, rows).splitlines()
    numbers = [int(word) for line in text if (word := line.strip()).isdigit()]
    first = n - left_out - 3 if left_out else n
    assert numbers == [*range(first), *range(n - 3, n)] if left_out else numbers == [*range(n)]
    assert ("⋮" in "".join(text)) == bool(left_out)
    said = f"{left_out} of {n} rows are left out. To see all, add --json or a pipe: | less."
    assert (text[-1] == said) == bool(left_out)
