"""Screens on disk or in memory, read in blocks of cells: bounded memory, one path for every format."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from crlseq.data.files import is_cell_ranger, open_store, read_cell_ranger, readable
from crlseq.data.hdf5 import refuse_claims
from crlseq.data.names import GeneNames
from crlseq.data.store import SAME_PATH, StoredMatrix, read_manifest
from crlseq.errors import InputError
from crlseq.threads import counted

NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and what stands for bytes that are no UTF-8
MAX_NAME = 1000  # characters
BLOCK_VALUES = 20_000_000  # dense values in a block: 160 MB in float64
N_STRETCHES, MAX_STRETCH = 40, 2000  # of a sample, and cells of one
RAW = "raw"  # as a layer: ``.raw``, values before genes were chosen and scaled
GUIDES = re.compile(r"guide|crispr|grna|gdo", re.IGNORECASE)  # in the name of a type of feature
# What a column of ``var`` calls genes, where it says what each column of the matrix is.
FEATURE_COLUMNS = frozenset({"feature_types", "feature_type", "modality", "featuretype"})
GENE_EXPRESSION = frozenset({"gene expression", "gene", "genes", "rna", "gex", "expression", "mrna", "transcript"})


@dataclass(frozen=True)
class Screen:
    """Labels of cells and genes, and the expression matrix, which may still lie on disk."""

    obs: pd.DataFrame
    var: pd.DataFrame  # of the genes
    genes: pd.Index
    matrix: Any  # ndarray, CSR, h5py or zarr array, backed sparse data set or StoredMatrix: sliced by rows
    layers: tuple[str, ...]  # with "raw", where there is one
    source: str
    var_names: pd.Index  # of all variables of the AnnData, unique: genes and what else is measured
    features: dict[str, pd.Series]  # by type of feature, columns of the matrix by name; empty if there are genes alone
    log_base: float | None = None  # of the logarithm, as ``uns`` records it
    layer: str | None = None  # that the matrix is; None of X
    notes: tuple[str, ...] = ()  # what a user should know of how the file was read

    @property
    def n_cells(self) -> int:
        """Rows of the matrix."""
        return int(self.matrix.shape[0])

    @property
    def n_genes(self) -> int:
        """Genes: columns of the matrix, unless it has guides or antibodies as well."""
        return len(self.genes)

    def of_type(self, name: str) -> tuple[sp.csr_matrix, list[str]] | None:
        """Values (cells, features) and names of another type of feature; None if there is none of this name."""
        name = next((known for known in self.features if known.casefold() == name.casefold()), "")
        if name not in self.other_types:
            return None
        own = self.features[name]
        step = max(1, BLOCK_VALUES // max(self.matrix.shape[1], 1))
        with readable(self.source, "the matrix"):
            blocks = [as_csr(self.matrix[i : i + step])[:, own.to_numpy()] for i in range(0, self.n_cells, step)]
        return sp.csr_matrix(sp.vstack(blocks, format="csr")), [*map(str, own.index)]

    @property
    def other_types(self) -> list[str]:
        """Types of feature that genes are not."""
        return [name for name in self.features if name != self.expression]

    @property
    def expression(self) -> str | None:
        """The type of feature that genes are."""
        return next((name for name in self.features if name.casefold() in GENE_EXPRESSION), None)

    @property
    def reader(self) -> Rows:
        """What reads the cells' genes."""
        columns = None if self.expression is None else self.features[self.expression].to_numpy()
        return Rows(self.matrix, columns, self.source, self.layer)

    def places_of(self, genes: GeneNames) -> np.ndarray:
        """(genes,) places of genes by name in the index, or by another name that means one gene here; -1 if missing."""
        places = np.array(self.genes.get_indexer(pd.Index(genes.index)))
        missing = np.flatnonzero(places < 0)
        own, taken = GeneNames.of(self.var) if len(missing) else genes, set(places.tolist())
        for j in missing.tolist():
            found = (own.find(name) for name in genes.all_of(j))
            places[j] = next((each[0] for each in found if len(each) == 1 and each[0] not in taken), -1)
            taken.add(int(places[j]))
        return places

    def stretches(self, first: int = 0) -> list[slice]:
        """Consecutive rows, from the `first`, of which a block holds about `BLOCK_VALUES` dense values."""
        step = max(1, BLOCK_VALUES // max(self.n_genes, 1))
        return [slice(start, min(start + step, self.n_cells)) for start in range(first, self.n_cells, step)]

    def blocks(self, first: int = 0) -> Iterator[tuple[slice, sp.csr_matrix]]:
        """The stretches as canonical float64 CSR blocks, with the rows they hold."""
        reader, stretches = self.reader, self.stretches(first)
        for rows in counted(stretches, len(stretches)):
            yield rows, reader[rows]

    def rows(self, index: np.ndarray) -> sp.csr_matrix:
        """Cells by ascending index as float64 CSR, read as few contiguous runs."""
        if isinstance(self.matrix, StoredMatrix):
            return self.reader[index]
        runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
        reader = self.reader
        parts = [reader[slice(int(run[0]), int(run[-1]) + 1)] for run in runs if len(run)]
        return sp.csr_matrix(sp.vstack(parts, format="csr"))

    def sample(self, cells: np.ndarray, most: int) -> tuple[np.ndarray, sp.csr_matrix]:
        """At most so many of these ascending cells and their rows, from a few stretches: single rows are slow to read."""
        n = 1 if len(cells) <= most and cells[-1] - cells[0] < MAX_STRETCH else N_STRETCHES
        width, chosen, rows = -(-most // n), list[np.ndarray](), list[sp.csr_matrix]()
        for start in np.unique(np.linspace(0, max(len(cells) - width, 0), n).astype(int)):
            own = cells[start : start + width]
            own = own[(own < own[0] + MAX_STRETCH) & (own > (chosen[-1][-1] if chosen else -1))]
            if len(own):
                chosen.append(own)
                rows.append(self.rows(np.arange(own[0], own[-1] + 1))[own - own[0]])
        return np.concatenate(chosen), sp.csr_matrix(sp.vstack(rows, format="csr"))


@dataclass(frozen=True)
class Rows:
    """Cells of a matrix as canonical float64 CSR; in another process the file is opened again."""

    matrix: Any
    columns: np.ndarray | None  # those that are genes; None of all
    source: str
    layer: str | None

    def __getitem__(self, rows: slice | np.ndarray) -> sp.csr_matrix:
        with readable(self.source, "the matrix"):
            block = as_csr(self.matrix[rows])
        return block if self.columns is None else sp.csr_matrix(block[:, self.columns])

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.matrix, StoredMatrix | np.ndarray) or sp.issparse(self.matrix):
            return Rows, (self.matrix, self.columns, self.source, self.layer)
        path = Path(self.source).resolve()
        return _opened, (path, self.layer, _stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change, by which a file is the same one in another process."""
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", SAME_PATH) from None
    return (0, 0) if path.is_dir() else (state.st_size, state.st_mtime_ns)


def _opened(path: Path, layer: str | None, stamp: tuple[int, int]) -> Rows:
    """A file that another process has open."""
    return _kept_open(path, layer, stamp)[0]


@lru_cache(maxsize=4)
def _kept_open(path: Path, layer: str | None, stamp: tuple[int, int]) -> tuple[Rows, ExitStack]:
    if _stamp(path) != stamp:
        raise InputError(f"{path} is another file on a worker.", SAME_PATH)
    opened = ExitStack()
    return opened.enter_context(open_screen(path, layer)).reader, opened  # which closes the file when it is forgotten


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
def open_screen(source: str | Path | ad.AnnData, layer: str | None = None) -> Iterator[Screen]:
    """Open a screen without reading its matrix: ``X``, a layer, or ``raw``.

    It is a ``.h5ad`` file, a ``.h5mu`` file, a ``.zarr`` folder or zip, what Cell Ranger wrote, or an AnnData. Of a
    matrix that holds guides or antibodies too, the genes are the screen. Repeated names of cells or genes are numbered.
    InputError if the file is missing, of another kind or damaged, or the layer is not there.
    """
    name = "the AnnData" if isinstance(source, ad.AnnData) else str(source)
    if not isinstance(source, ad.AnnData) and is_cell_ranger(Path(source)):
        with readable(name, "the matrix"):
            source = read_cell_ranger(Path(source))
    if isinstance(source, ad.AnnData):
        with readable(name, "the matrix"):  # which may be backed by a file
            layers = tuple(key for key in source.layers if key is not None)  # X, from anndata 0.13 on
            layers += (RAW,) if source.raw is not None and RAW not in layers else ()
            _refuse_absent(layer, layers, layer is not None or source.X is not None, name)
            of_raw = layer == RAW and RAW not in source.layers
            var = source.raw.var if of_raw else source.var
            matrix = source.raw.X if of_raw else source.X if layer is None else source.layers[layer]
            matrix = _row_sliceable(matrix, name)
        yield _checked(source.obs, var, matrix, layers, name, source.var.index, _log_base(source.uns), layer)
        return
    path = Path(source)
    with open_store(path) as store:
        with readable(name, "the table of cells or genes"):
            for part in ("obs", "var"):
                refuse_claims(store[part], path)
            obs, all_var = ad.io.read_elem(store["obs"]), ad.io.read_elem(store["var"])
        with readable(name, "the list of layers"):
            layers = tuple(sorted(store["layers"].keys())) if "layers" in store else ()  # an array has none
            of_raw = layer == RAW and RAW not in layers
            layers += (RAW,) if "raw/X" in store and RAW not in layers else ()
        with readable(name, "the matrix"):
            var = all_var
            if layer is None and read_manifest(path) is not None:
                matrix = StoredMatrix(path)
            else:
                _refuse_absent(layer, layers, "X" in store, name)
                element = store["raw"]["X"] if of_raw else store["X"] if layer is None else store["layers"][layer]
                if of_raw:
                    refuse_claims(store["raw"]["var"], path)
                    var = ad.io.read_elem(store["raw"]["var"])
                refuse_claims(element, path)
                matrix = _row_sliceable(element, name)
        with readable(name, "uns"):
            base = _log_base({"log1p": ad.io.read_elem(store["uns/log1p"])}) if "uns/log1p" in store else None
        yield _checked(obs, var, matrix, layers, name, getattr(all_var, "index", pd.Index([])), base, layer)


def _log_base(uns: Any) -> float | None:
    """Of the logarithm that scanpy took, as it recorded it."""
    record = uns.get("log1p")
    base = record.get("base") if hasattr(record, "get") else None
    return float(base) if isinstance(base, (int, float, np.number)) and base > 0 and base != 1 else None


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


def _checked(
    obs: Any,
    var: Any,
    matrix: Any,
    layers: tuple[str, ...],
    source: str,
    var_names: pd.Index,
    log_base: float | None,
    layer: str | None,
) -> Screen:
    if not isinstance(obs, pd.DataFrame) or not isinstance(var, pd.DataFrame):
        raise InputError(f"{source}: obs or var is not a table.", "Write the file again with a current anndata.")
    if matrix.shape != (len(obs), len(var)):
        raise InputError(
            f"{source}: the matrix is {matrix.shape[0]} x {matrix.shape[1]}, but there are {len(obs)} cells and {len(var)} genes.",
            "The file is inconsistent; write it again.",
        )
    if not len(obs) or not len(var):
        raise InputError(f"{source} is empty: {len(obs)} cells and {len(var)} genes.", "Check how it was written.")
    cells, cell_note = unique_names(obs.index, "cell")
    genes, gene_note = unique_names(var.index, "gene")
    for names, kind in ((cells, "cell"), (genes, "gene")):
        refuse_long(list(names), f"{source}: a {kind}")
        odd = next((name for name in map(str, names) if NO_TEXT.search(name)), None)
        if odd is not None:
            raise InputError(f"{source}: the {kind} name {odd!r} is not valid text.", "Rename it in UTF-8 without NUL.")
    features = _features(var, genes)
    screen = Screen(
        obs.set_axis(cells, axis=0), var.set_axis(genes, axis=0), genes, matrix, layers, source,
        unique_names(var_names, "gene")[0], features, log_base, layer,
        tuple(filter(None, [cell_note, gene_note])),
    )  # fmt: skip
    if screen.expression is None:
        return screen
    own = features[screen.expression]
    others = [f"{len(features[name])} of type {name!r}" for name in screen.other_types]
    note = f"{len(own)} variables are genes and are fitted; {' and '.join(others)} are not genes and are left out."
    guides = next((name for name in screen.other_types if GUIDES.search(name)), None)
    note += "" if guides is None else f" --guide-counts {shlex.quote(guides)} assigns cells by these guides."
    return replace(screen, var=screen.var.loc[own.index], genes=own.index, notes=(*screen.notes, note))


def refuse_long(names: Sequence[str], what: str) -> None:
    """Refuse, by `InputError`, names so long that tables of them would not fit in memory."""
    if (longest := max(names, key=len, default="")) and len(longest) > MAX_NAME:
        message = f"{what} name has {len(longest)} characters: {longest[:20]!r} and so on."
        raise InputError(message, f"Use names of at most {MAX_NAME} characters.")


def unique_names(index: pd.Index, kind: str) -> tuple[pd.Index, str]:
    """The names as texts, repeated ones numbered as anndata does, and a sentence on that; empty if there are none."""
    names = pd.Index([str(name) for name in index], dtype=object)  # numpy's strings take the room of the longest
    if names.is_unique:
        return names, ""
    repeated = names[names.duplicated()]
    note = f"Repeated {kind} names get a number ({len(repeated)}, first {str(repeated[0])!r})."
    return pd.Index(ad.utils.make_index_unique(names)), note


def _features(var: pd.DataFrame, names: pd.Index) -> dict[str, pd.Series]:
    """Columns of the matrix by type of feature, if a column of ``var`` tells genes from other features."""
    for key in var.columns:
        if str(key).casefold() in FEATURE_COLUMNS:
            types = var[key].astype(str).str.strip().to_numpy()
            columns = pd.Series(np.arange(len(names)), index=names)
            found = {str(name): columns[types == name] for name in sorted(set(types))}
            if len(found) > 1 and any(name.casefold() in GENE_EXPRESSION for name in found):
                return found
    return {}
