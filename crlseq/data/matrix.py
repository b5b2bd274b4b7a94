"""Screens on disk or in memory, read in blocks of cells: bounded memory, one path for every format."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from crlseq.data.hdf5 import refuse_claims, refuse_traps, refuse_values_for_groups
from crlseq.data.store import StoredMatrix, read_manifest
from crlseq.errors import CrlseqError, InputError, few
from crlseq.storage.files import refuse_links_outside

NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and what stands for bytes that are no UTF-8
# Modalities of a MuData file that are the screen, the first that is there.
EXPRESSION = (
    "rna",
    "gene",
    "genes",
    "gex",
    "expression",
    "gene_expression",
    "gene expression",
    "mrna",
    "scrna",
    "transcriptome",
)
BLOCK_VALUES = 20_000_000  # dense values in a block: 160 MB in float64


@dataclass(frozen=True)
class Screen:
    """Labels of cells and genes, and the expression matrix, which may still lie on disk."""

    obs: pd.DataFrame
    var: pd.DataFrame
    genes: pd.Index
    matrix: Any  # ndarray, CSR, h5py or zarr array, backed sparse data set or StoredMatrix: sliced by rows
    layers: tuple[str, ...]
    source: str

    @property
    def n_cells(self) -> int:
        """Rows of the matrix."""
        return int(self.matrix.shape[0])

    @property
    def n_genes(self) -> int:
        """Columns of the matrix."""
        return int(self.matrix.shape[1])

    def blocks(self, first: int = 0) -> Iterator[tuple[slice, sp.csr_matrix]]:
        """Consecutive rows, from the `first`, as canonical float64 CSR blocks, with the rows they hold."""
        step = max(1, BLOCK_VALUES // max(self.n_genes, 1))
        for start in range(first, self.n_cells, step):
            rows = slice(start, min(start + step, self.n_cells))
            yield rows, self._read(rows)

    def rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Cells by ascending index as float64 CSR, read as few contiguous runs."""
        if isinstance(self.matrix, StoredMatrix):
            return self._read(index)
        runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
        parts = [self._read(slice(int(run[0]), int(run[-1]) + 1)) for run in runs if len(run)]
        return sp.csr_matrix(sp.vstack(parts, format="csr"))

    def _read(self, rows: slice | np.ndarray) -> sp.csr_matrix:
        with readable(self.source, "the matrix"):
            return as_csr(self.matrix[rows])


def as_csr(block: Any) -> sp.csr_matrix:
    """Any block of cells as canonical CSR in native float64; masked values become NaN."""
    if isinstance(block, np.ma.MaskedArray):
        block = np.ma.filled(block.astype(np.float64), np.nan)
    if not sp.issparse(block):
        block = np.asarray(block, dtype=np.float64)
    csr: sp.csr_matrix = sp.csr_matrix(block, dtype=np.float64, copy=True)
    within(csr).sum_duplicates()
    csr.eliminate_zeros()
    return csr


@contextmanager
def readable(source: str, what: str) -> Iterator[None]:
    """Turns whatever a reader throws at a damaged file into one `InputError`."""
    try:
        yield
    except (CrlseqError, MemoryError):
        raise
    except Exception as error:  # h5py, zarr and anndata raise almost every type for damaged files
        detail = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")[:200]
        hint = "The file may be cut short or damaged; check that `anndata.read_h5ad` opens it."
        raise InputError(f"{source}: {what} cannot be read ({detail}).", hint) from error


@contextmanager
def open_screen(source: str | Path | ad.AnnData, layer: str | None = None) -> Iterator[Screen]:
    """Open a screen without reading its matrix, ``X`` or the given layer.

    It is a ``.h5ad`` file, a ``.h5mu`` file with a modality ``rna`` or ``gene``, a ``.zarr`` folder or zip, or an AnnData.
    InputError if the file is missing, not an AnnData file or damaged, the layer is not there, or names of cells or
    genes are not unique.
    """
    if isinstance(source, ad.AnnData):
        name = "the AnnData"
        with readable(name, "the matrix"):  # which may be backed by a file
            layers = tuple(key for key in source.layers if key is not None)  # X, from anndata 0.13 on
            _refuse_absent(layer, layers, layer is not None or source.X is not None, name)
            matrix = _row_sliceable(source.X if layer is None else source.layers[layer], name)
        yield _checked(source.obs, source.var, matrix, layers, name)
        return
    path = Path(source)
    name = str(path)
    with open_store(path) as store:
        with readable(name, "the table of cells or genes"):
            for part in ("obs", "var"):
                refuse_claims(store[part], path)
            obs, var = ad.io.read_elem(store["obs"]), ad.io.read_elem(store["var"])
        with readable(name, "the list of layers"):
            layers = tuple(sorted(store["layers"])) if "layers" in store else ()
        with readable(name, "the matrix"):
            if layer is None and read_manifest(path) is not None:
                matrix = StoredMatrix(path)
            else:
                _refuse_absent(layer, layers, "X" in store, name)
                element = store["X"] if layer is None else store["layers"][layer]
                refuse_claims(element, path)
                matrix = _row_sliceable(element, name)
        yield _checked(obs, var, matrix, layers, name)


@contextmanager
def open_store(path: Path) -> Iterator[Any]:
    """An h5ad file, the modality of an h5mu file with the expression, or a zarr store, as a mapping for `anndata.io.read_elem`."""
    hint = "crlseq reads .h5ad files and .zarr stores as anndata writes them, and .h5mu files as mudata does."
    try:
        is_folder = path.is_dir()
        if not is_folder:
            path.open("rb").close()
    except FileNotFoundError:
        raise InputError(f"There is no file {path}.", "Check the path.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from None
    if is_folder or zipfile.is_zipfile(path):
        with readable(str(path), "the zarr store"):
            store = zarr.open_group(str(path), mode="r")
        if "obs" not in store or "var" not in store:
            raise InputError(f"{path} is not an AnnData zarr store: it has no obs and var.", hint)
        if is_folder:
            refuse_links_outside(path)  # likewise
        yield store
        return
    try:
        if not h5py.is_hdf5(path):
            raise InputError(f"{path} is not an h5ad file.", hint)
        handle = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error}.", "It may be cut short; copy it again.") from None
    with handle:
        with readable(str(path), "the file"):
            if "obs" not in handle or "var" not in handle:
                raise InputError(f"{path} is an HDF5 file but not an h5ad: it has no obs and var.", hint)
            refuse_traps(handle, path)  # what damage or a stranger put there, and readers would follow
            screen = _expression_modality(handle, path) if handle.attrs.get("encoding-type") == "MuData" else handle
            refuse_values_for_groups(screen, path)
        yield screen


def _expression_modality(handle: h5py.File, path: Path) -> Any:
    return handle["mod"][expression_modality(handle, str(path))]


def expression_modality(handle: h5py.File, source: str) -> str:
    """Name of the modality with the expression: a known one, or the only one whose features are genes; InputError if none."""
    modalities = handle.get("mod", {})
    there = {str(name).casefold(): str(name) for name in modalities if {"obs", "var"} <= modalities[name].keys()}
    named = [there[name] for name in EXPRESSION if name in there]
    of_genes = [name for name in there.values() if _is_of_genes(modalities[name]["var"])]
    if not named and len(of_genes) != 1:
        raise InputError(
            f"{source} has no modality 'rna' or 'gene' with cells and genes.",
            f"Rename the modality with the expression to 'rna'; there are: {few([*map(repr, modalities)]) or 'none'}.",
        )
    return (named or of_genes)[0]


def _is_of_genes(var: Any) -> bool:
    if "feature_types" not in var:
        return False
    kinds = ad.io.read_elem(var["feature_types"])
    return len(kinds) > 0 and set(map(str, kinds)) == {"Gene Expression"}


def _refuse_absent(layer: str | None, layers: tuple[str, ...], has_x: bool, source: str) -> None:
    there = ", ".join(map(repr, sorted(layers))) or "none"
    if layer is None and not has_x:
        raise InputError(f"{source} has no matrix X.", f"Name a layer with --layer; layers: {there}.")
    if layer is not None and layer not in layers:
        raise InputError(f"{source} has no layer {layer!r}.", f"Layers: {there}.")


def _row_sliceable(element: Any, source: str) -> Any:
    if isinstance(element, (h5py.Group, zarr.Group)):
        element = ad.io.sparse_dataset(element)
    if not hasattr(element, "format"):
        element = element if isinstance(element, (h5py.Dataset, zarr.Array, np.ndarray)) else np.asarray(element)
    elif element.format == "csr":
        within(element)
    else:  # rows of a CSC matrix cannot be sliced from disk at a bearable speed
        element = within(element.to_memory() if hasattr(element, "to_memory") else element).tocsr()
    if len(element.shape) != 2:
        raise InputError(f"{source}: the matrix has {len(element.shape)} dimensions, not 2.", "Expected cells x genes.")
    return element


def within(matrix: Any) -> Any:
    """The matrix; ValueError if its indices or row pointers lead out of it: scipy's compiled code would follow them."""
    if hasattr(matrix, "check_format"):
        matrix.check_format(full_check=True)
    return matrix


def _checked(obs: Any, var: Any, matrix: Any, layers: tuple[str, ...], source: str) -> Screen:
    if not isinstance(obs, pd.DataFrame) or not isinstance(var, pd.DataFrame):
        raise InputError(f"{source}: obs or var is not a table.", "Write the file again with a current anndata.")
    genes = pd.Index(np.asarray(var.index).astype(str))
    if matrix.shape != (len(obs), len(genes)):
        raise InputError(
            f"{source}: the matrix is {matrix.shape[0]} x {matrix.shape[1]}, but there are {len(obs)} cells and {len(genes)} genes.",
            "The file is inconsistent; write it again.",
        )
    if not len(obs) or not len(genes):
        raise InputError(f"{source} is empty: {len(obs)} cells and {len(genes)} genes.", "Check how it was written.")
    for index, kind, call in ((obs.index, "cell", "obs"), (genes, "gene", "var")):
        if not index.is_unique:
            first = str(index[index.duplicated()][0])
            what = f"{source}: the {kind} name {first!r} occurs more than once."
            raise InputError(what, f"Use `{call}_names_make_unique`.")
        odd = next((name for name in map(str, index) if NO_TEXT.search(name)), None)
        if odd is not None:
            raise InputError(f"{source}: the {kind} name {odd!r} is not valid text.", "Rename it in UTF-8 without NUL.")
    return Screen(obs, var, genes, matrix, layers, source)


@dataclass
class Scan:
    """What passing over values found."""

    totals: np.ndarray  # (cells,) sums
    detected: np.ndarray  # (genes,) cells with a value other than 0
    n_nonzero: int = 0
    n_negative: int = 0
    n_fractional: int = 0
    minimum: float = 0.0  # zeros that are stored nowhere count as well
    maximum: float = 0.0

    @classmethod
    def of(cls, screen: Screen) -> Scan:
        """Of nothing yet."""
        return cls(np.zeros(screen.n_cells), np.zeros(screen.n_genes, dtype=np.int64))

    def add(self, screen: Screen, rows: slice, block: sp.csr_matrix) -> None:
        """Take in the cells `rows`; InputError at the first NaN or infinite value, with its cell and gene."""
        values = block.data
        finite = np.isfinite(values)
        if not finite.all():
            at = int(np.flatnonzero(~finite)[0])
            cell = rows.start + int(np.searchsorted(block.indptr, at, side="right")) - 1
            gene = screen.genes[block.indices[at]]
            raise InputError(
                f"{screen.source}: the value of gene {gene!r} in cell {str(screen.obs.index[cell])!r} is {values[at]}.",
                "Remove or replace NaN and infinite values first.",
            )
        self.totals[rows] = np.asarray(block.sum(1)).ravel()
        self.detected += np.bincount(block.indices, minlength=screen.n_genes)
        self.n_nonzero += len(values)
        self.n_negative += int((values < 0).sum())
        self.n_fractional += int((values != np.rint(values)).sum())
        if len(values):
            self.minimum = min(self.minimum, float(values.min()))
            self.maximum = max(self.maximum, float(values.max()))


def scan(screen: Screen) -> Scan:
    """One pass over the matrix in blocks; InputError at the first NaN or infinite value, with its cell and gene."""
    found = Scan.of(screen)
    for rows, block in screen.blocks():
        found.add(screen, rows, block)
    return found
