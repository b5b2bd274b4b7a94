"""Tables as CSV: numbers to the last digit, and names that no spreadsheet takes for a formula and no terminal obeys.

A text that begins with one of ``= + - @``, a tab or a line break would be run by spreadsheets as a formula, so it is
written with an apostrophe before it. To be told from the first, a text that begins with apostrophes and then one of
these gets one more. `read_csv` takes it off again; with pandas alone::

    names.str.replace(r"^'(?='*[=+@\t\r\n-])", "", regex=True)

Control characters and those that turn the direction of writing are written as in JSON, ``\\u001b``; backslashes before
that, or before what looks like that, are doubled. `read_csv` undoes this too.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crlseq.storage.files import written_whole
from crlseq.storage.text import reversibly_escaped, unescaped

ROWS = 10_000  # written at once
FORMULA = r"^(?='*[=+@\t\r\n-])"
DEFUSED = r"^'(?='*[=+@\t\r\n-])"
# From pandas 3.1 on numbers are read to the last digit without being asked for.
_NEW = tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1)
EXACT: dict[str, Any] = {} if _NEW else {"float_precision": "round_trip"}


def to_csv(table: pd.DataFrame) -> bytes:
    """The table as UTF-8 with a header and without the index; missing numbers are empty fields."""
    return b"".join(_pieces(table))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write what `to_csv` gives, whole or not at all."""
    with written_whole(path) as beside:
        write_rows(beside, table)


def write_rows(path: Path, table: pd.DataFrame) -> None:
    """`write_csv` into a folder that is moved into place as a whole; some rows at a time: as text a table takes several times
    its room.
    """
    with path.open("wb") as file:
        file.writelines(_pieces(table))


def _pieces(table: pd.DataFrame) -> Iterator[bytes]:
    # `pandas.DataFrame.to_csv` gives the same bytes, a little more slowly.
    text = table.select_dtypes(exclude="number").columns
    columns = [_defused(table[name]) if name in text else table[name] for name in table]
    for start in range(0, max(len(table), 1), ROWS):
        lines = io.StringIO(newline="")
        writer = csv.writer(lines, lineterminator="\n")
        if not start:
            writer.writerow(table.columns)
        writer.writerows(zip(*(_fields(column.iloc[start : start + ROWS]) for column in columns), strict=True))
        yield lines.getvalue().encode()


def _fields(column: pd.Series) -> list[Any]:
    """Values, those that are missing empty; `str` of a float32 tells it from others of its type."""
    fields = [*map(str, column.array)] if column.dtype == np.float32 else column.to_list()
    for i in np.flatnonzero(column.isna()):
        fields[i] = ""
    return fields


def _defused(column: pd.Series) -> pd.Series:
    codes, names = pd.factorize(column)  # each name once, however often it is there
    safe = pd.Series(map(reversibly_escaped, map(str, names)), dtype=str).str.replace(FORMULA, "'", regex=True)
    return pd.Series(safe.reindex(codes).to_numpy(), column.index, dtype=object)


def read_csv(path: Path, columns: Mapping[str, type], later: Mapping[str, type] | None = None) -> pd.DataFrame:
    """A table that `to_csv` wrote, with at least these columns; it may have the later ones.

    OSError or ValueError if it cannot be read, a column is missing, or a value is of another kind.
    """
    # A gene may be called NA: only empty fields are missing values, and only in columns of numbers.
    kinds = {**columns, **(later or {})}
    empty = {name: [""] for name, kind in kinds.items() if kind is float}
    # Absolute: pandas takes a folder that is called ~ for the home.
    table: pd.DataFrame = pd.read_csv(path.absolute(), dtype=kinds, keep_default_na=False, na_values=empty, **EXACT)
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{path.name} has no column {missing[0]!r}")
    for name in table.select_dtypes(exclude=["number", "bool"]):
        table[name] = table[name].str.replace(DEFUSED, "", regex=True)
        if table[name].str.contains("\\u", regex=False).any():
            table[name] = table[name].map(unescaped, na_action="ignore")
    return table
