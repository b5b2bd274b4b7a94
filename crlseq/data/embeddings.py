"""Vectors of genes, from a table that a user brings: CSV, TSV or h5ad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from crlseq.data.files import open_store, readable
from crlseq.data.matrix import within
from crlseq.data.names import GeneNames
from crlseq.errors import InputError

COEXPRESSION = "screen"  # in place of a file: co-expression in the screen's control cells
HINT = "Give a CSV with one gene per line, its name first and then its numbers, or an h5ad with genes as observations."


@dataclass(frozen=True)
class Embeddings:
    """``names`` of N genes and their ``vectors`` (N, d) float64, finite; no column is the same for all genes."""

    names: tuple[str, ...]
    vectors: np.ndarray


def named_as_labels(table: Embeddings, names: GeneNames, labels: Mapping[str, str]) -> Embeddings:
    """The table with its genes called as the perturbations that target them are; `labels` are targets by perturbation."""
    own, renamed = GeneNames(table.names, {}), list(table.names)
    for label, target in labels.items():
        also = [target, *(name for j in names.find(target) for name in names.all_of(j))]
        found = next((places[0] for name in also if (places := own.find(name))), None)
        if label not in table.names and found is not None and renamed[found] not in labels:
            renamed[found] = label
    return Embeddings(tuple(renamed), table.vectors)


def read_embeddings(path: str | Path) -> Embeddings:
    """Read and check a table of gene vectors.

    InputError if it is missing, no table, empty or constant, names a gene twice, or has a value that is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no embeddings file {path}.", "Check the path.")
    source = f"The embeddings {path}"
    names, values = _from_h5ad(path) if h5py.is_hdf5(path) else _from_text(path)
    if not len(names) or values.shape[1] == 0:
        raise InputError(f"{source} have {len(names)} genes and {values.shape[1]} numbers per gene.", HINT)
    repeated = names[names.duplicated()]
    if len(repeated):
        raise InputError(f"{source} name {str(repeated[0])!r} more than once.", "Keep one vector for each gene.")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        what = f"{source} have no finite number for {str(names[row])!r} in column {column + 1}."
        raise InputError(what, "Remove or fill it first.")
    varies = np.ptp(values, axis=0) > 1e-12 * np.abs(values).max(axis=0)
    if not varies.any():
        raise InputError(f"{source} are the same for all genes.", HINT)
    # As run folders keep them, so that a loaded run says what the fitted one said.
    return Embeddings(tuple(map(str, names)), values[:, varies].astype(np.float32).astype(float))


def _from_h5ad(path: Path) -> tuple[pd.Index, np.ndarray]:
    with open_store(path), readable(str(path), "the embeddings"):
        table = ad.read_h5ad(path)
        x = table.X
        if x is None and len(table.obsm) == 1:
            x = next(iter(table.obsm.values()))
        if x is None:
            raise InputError(f"The embeddings {path} have no X.", HINT)
        values = np.asarray(within(x).toarray() if hasattr(x, "toarray") else x, dtype=float)
    return pd.Index(table.obs_names.astype(str).str.strip()), values


def _from_text(path: Path) -> tuple[pd.Index, np.ndarray]:
    separator = "\t" if path.suffix.lower() in (".tsv", ".txt") else ","
    try:
        with path.open(encoding="utf-8") as handle:
            first = handle.readline().rstrip("\r\n").split(separator)
        # pandas numbers columns that have no name, and leaves the corner above the names empty.
        numbered = first[1:] in ([str(i + start) for i in range(len(first) - 1)] for start in (0, 1))
        bare = len(first) > 1 and all(map(_is_number, first[1:])) and first[0].strip(' "') and not numbered
        header = None if bare else 0
        # A gene may be called NA.
        kinds: dict[Any, type] = {0: str, first[0]: str}
        table = pd.read_csv(path.absolute(), sep=separator, header=header, keep_default_na=False, dtype=kinds)
    except (OSError, UnicodeDecodeError, ValueError, pd.errors.ParserError) as error:
        detail = str(error).splitlines()[0][:200].rstrip(".")
        raise InputError(f"The embeddings {path} cannot be read: {detail}.", HINT) from None
    names, body = pd.Index(table.iloc[:, 0].astype(str).str.strip()), table.iloc[:, 1:]
    for place, column in enumerate(body.columns):
        if not pd.api.types.is_numeric_dtype(body[column].dtype):
            numbers = pd.to_numeric(body[column], errors="coerce")
            row = int(np.flatnonzero(numbers.isna())[0])
            text = str(body[column].iloc[row])[:40]
            raise InputError(
                f"The embeddings {path} have {text!r} for {str(names[row])!r} in column {place + 1}, which is not a number.",
                HINT,
            )
    return names, body.to_numpy(dtype=float)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
