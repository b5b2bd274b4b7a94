"""Tables of programs, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crlseq.data.names import GeneNames
from crlseq.run.tables import program_labels, program_table


def test_program_table_by_hand() -> None:
    loading = np.array([[0.1, -3.0, 2.0], [1.0, 1.0, 0.0]])
    table = program_table(GeneNames(("a", "b", "c"), {}), loading, loading * 2)
    assert table["gene"].tolist() == ["b", "c", "a", "a", "b", "c"]
    assert table["rank"].tolist() == [1, 2, 3, 1, 2, 3]
    assert table["total_effect"].tolist() == [-6.0, 4.0, 0.2, 2.0, 2.0, 0.0]


def test_program_labels_by_hand() -> None:
    table = pd.DataFrame({
        "perturbation": ["a", "b", "c", "d", "e", "f"],
        "program": ["P0", "P0", "P0", "P0", "P1", "P0"],
        "shift": [1.0, -3.0, 2.0, 0.5, 9.0, 8.0],
        "fdr": [0.01, 0.05, 0.02, 0.001, 0.06, np.nan],
    })  # fmt: skip
    assert program_labels(table, 3) == ["b, c, a +1", "no driver", "no driver"]
