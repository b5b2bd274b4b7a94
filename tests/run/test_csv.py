"""Tables as CSV: digits, missing values, quotes and names that would be something else to who reads them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from crlseq.storage.csv import read_csv, to_csv, write_csv


def test_bytes_by_hand() -> None:
    table = pd.DataFrame({
        "name": ["a,b", 'say "x"', "=1+1", "", None],
        "value": [0.1, 1e-5, 1e16, np.nan, -np.inf],
        "single": np.array([0.1, 1, 2, 3, np.nan], dtype=np.float32),
        "count": [3, -1, 0, 2**60, 5],
        "kept": [True, False, True, True, False],
    })  # fmt: skip
    assert to_csv(table).decode().split("\n") == [
        "name,value,single,count,kept",
        '"a,b",0.1,0.1,3,True',
        '"say ""x""",1e-05,1.0,-1,False',
        "'=1+1,1e+16,2.0,0,True",
        ",,3.0,1152921504606846976,True",
        ",-inf,,5,False",
        "",
    ]


def test_no_row_is_lost_where_it_is_empty() -> None:
    assert to_csv(pd.DataFrame({"value": [np.nan, 1.0]})) == b'value\n""\n1.0\n'


@pytest.mark.parametrize("n", [0, 1, 25_000])
def test_what_is_read_is_what_was_written(tmp_path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    names = np.array(['a,"b"', "@x", "'=y", "-", "é\u202e", "NA"], dtype=object)
    table = pd.DataFrame({
        "gene": names[rng.integers(0, len(names), n)], "change": rng.normal(size=n) * 10.0 ** rng.integers(-300, 300, n)
    })  # fmt: skip
    table.loc[table.index % 7 == 3, "change"] = np.nan
    write_csv(tmp_path / "t.csv", table)
    again = read_csv(tmp_path / "t.csv", {"gene": str, "change": float})
    assert list(again["gene"]) == list(table["gene"])
    assert np.array_equal(again["change"], table["change"], equal_nan=True)
