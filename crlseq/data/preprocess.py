"""Normalise, choose genes, and record what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from crlseq.config import DataConfig
from crlseq.data.matrix import Screen
from crlseq.data.names import GeneNames
from crlseq.data.values import MAX_LOG, Scan, Values
from crlseq.errors import InputError, nearest
from crlseq.threads import counted, in_parallel

MIN_COMMON = 0.5  # share of the fitted genes below which a file is another measurement
ROWS = 4096  # cells normalised at once
N_CELLS_FOR_SHARE = 2000  # to tell the share of counts of some genes
N_CELLS_FOR_GENES = 50_000  # highly variable genes are chosen on at most so many cells
N_VALUES_FOR_GENES = 25_000_000  # that hold about so many values: scanpy takes them twice, 400 MB


@dataclass(frozen=True)
class Preprocessing:
    """What was done to the values: recorded in ``run.json``, enough to do it again to other cells."""

    values: str  # "counts", "log" or "continuous"
    reason: str
    layer: str | None
    target_sum: float | None  # the total that counts were scaled to; None for the others
    genes: tuple[str, ...]  # the fitted ones, in the file's order
    gene_choice: str
    n_genes_in_file: int
    n_silent_genes: int
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of the fitted genes, by column of var
    fractional: bool = False  # counts are not whole
    log_factor: float = 1.0  # by which logarithms become natural ones

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The record as ``run.json`` holds it."""
        names = {key: tuple(own) for key, own in values.get("names", {}).items()}
        return cls(**{**values, "genes": tuple(values["genes"]), "names": names})

    @cached_property
    def gene_names(self) -> GeneNames:
        """The fitted genes under all their names."""
        return GeneNames(self.genes, self.names)

    def columns(self, screen: Screen) -> np.ndarray:
        """Places (fitted genes,) of the fitted genes in a screen; InputError if one is missing."""
        columns, source = screen.places_of(self.gene_names), screen.source
        if (columns < 0).any():
            missing = self.genes[int(np.flatnonzero(columns < 0)[0])]
            what = f"{source}: {(columns < 0).sum()} of the {len(columns)} fitted genes are missing, first {missing!r}."
            raise InputError(what, "Give cells with the same genes.")
        return columns

    def check(self, block: sp.csr_matrix, source: str) -> None:
        """Refuse cells that are plainly not of the fitted kind, or have a value that is NaN or infinite."""
        if not np.isfinite(block.data).all():
            raise InputError(f"{source} has NaN or infinite values.", "Remove or replace them first.")
        odd = block.data < 0 if self.fractional else (block.data < 0) | (block.data != np.rint(block.data))
        if self.values == "counts" and odd.any():
            what = f"{source} has values that are not counts, but the fit used counts."
            raise InputError(what, "Give raw counts in the same layer.")
        if self.values == "log" and block.nnz and block.data.max() > MAX_LOG:
            what = f"{source} has values up to {block.data.max():g}, but the fit used log-normalised values."
            raise InputError(what, "Give values normalised in the same way as the fit's.")

    def apply(self, cells: sp.csr_matrix) -> sp.csr_matrix:
        """Normalised float64 cells (n, all genes)."""
        values = self._normalised(cells, cells.data, cells.indptr)
        return sp.csr_matrix((values, cells.indices, cells.indptr), shape=cells.shape)

    def expression(self, cells: sp.csr_matrix, place: np.ndarray) -> sp.csr_matrix:
        """Normalised float32 cells (n, fitted genes) of canonical ones (n, all genes); for `place` see `places`."""
        column, values = place[cells.indices], cells.data
        start: np.ndarray = cells.indptr
        if len(self.genes) < len(place):
            kept = np.flatnonzero(column >= 0)
            column, values, start = column[kept], values[kept], np.searchsorted(kept, start)
        values = self._normalised(cells, values, start).astype(np.float32)
        return sp.csr_matrix((values, column, start), shape=(cells.shape[0], len(self.genes)))

    def _normalised(self, cells: sp.csr_matrix, values: np.ndarray, start: np.ndarray) -> np.ndarray:
        """log1p(count / total of the cell * target_sum) of counts, others unchanged; cells begin at `start` in `values`."""
        if self.target_sum is None:
            return values if self.log_factor == 1.0 else values * self.log_factor
        ends = np.append(cells.data, 0)  # where the last cells are empty
        totals = np.add.reduceat(ends, cells.indptr[:-1], dtype=np.float64) if cells.shape[0] else np.zeros(0)
        totals[np.diff(cells.indptr) == 0] = 0.0
        scaled = np.repeat(self.target_sum / np.maximum(totals, 1e-300), np.diff(start))
        np.log1p(np.multiply(scaled, values, out=scaled), out=scaled)
        return scaled

    def places(self, genes: pd.Index) -> np.ndarray:
        """(all genes,) int32 column of each fitted gene, in the file's order; -1 of the others."""
        return np.asarray(pd.Index(self.genes).get_indexer(genes), dtype=np.int32)

    def is_sparse(self, n_values: int, n_cells: int) -> bool:
        """Whether expression with so many values is held by those that are not 0."""
        return n_values < 0.5 * n_cells * len(self.genes)


@dataclass(frozen=True)
class Alignment:
    """``present`` indices of fitted genes that a file has, and their ``columns`` there; ``n_fitted`` of all.

    ``shared`` columns there of all genes of the fitted file, which had a ``share`` of the counts of its cells; None where the
    two files have the same genes.
    """

    present: np.ndarray
    columns: np.ndarray
    n_fitted: int
    shared: np.ndarray | None = None
    share: float = 1.0

    def expression(self, record: Preprocessing, block: sp.csr_matrix) -> sp.csr_matrix:
        """(cells, present) float32 normalised values of cells (cells, genes of the file).

        Counts are scaled by the totals over the genes that both files have, to the share of the counts that these had in the
        fitted file: what one file alone measures changes nothing.
        """
        if self.shared is None or record.target_sum is None:
            return record.apply(block)[:, self.columns].astype(np.float32)
        alike = replace(record, target_sum=record.target_sum * self.share)
        return alike.apply(block[:, self.shared])[:, np.searchsorted(self.shared, self.columns)].astype(np.float32)

    def filled(self, values: np.ndarray, fill: np.ndarray) -> np.ndarray:
        """(cells, fitted genes): `values` (cells, present), and `fill` (fitted genes,) where genes are missing."""
        whole = np.tile(np.asarray(fill, dtype=values.dtype), (len(values), 1))
        whole[:, self.present] = values
        return whole


def align(record: Preprocessing, screen: Screen, fitted: Screen | None = None) -> tuple[Alignment, list[str]]:
    """Find the fitted genes in a screen by name; sentences on what is missing there and what is dropped.

    ``fitted`` is the screen of the fit, by which counts are scaled where a file has other genes. InputError if fewer than half
    of the fitted genes are there.
    """
    places = screen.places_of(record.gene_names)
    present, source = np.flatnonzero(places >= 0), screen.source
    n, missing = len(places), np.flatnonzero(places < 0)
    first = "".join(repr(record.genes[j]) for j in missing[:1])
    lacking = f"{source}: {len(missing)} of the {n} fitted genes are missing, first {first}."
    if len(present) < MIN_COMMON * n:
        raise InputError(lacking, "Give cells with the same genes under the same names.")
    notes = [f"{lacking} They get their mean over the fit's control cells."] if first else []
    dropped = screen.n_genes - len(present)
    if screen.n_genes > record.n_genes_in_file or (len(missing) and dropped):
        notes.append(f"{source}: {dropped} of its {screen.n_genes} genes were not fitted and are ignored.")
    found = Alignment(present, places[present], n)
    if record.values == "counts" and fitted is not None:
        found = _shared(record, screen, fitted, found)
        if found.shared is not None:
            notes.append(
                f"{source} has {len(found.shared)} of the {fitted.n_genes} genes of the fitted file, with {found.share:.0%} of its "
                "counts: cells are scaled by their totals over these."
            )
    return found, notes


def _shared(record: Preprocessing, screen: Screen, fitted: Screen, found: Alignment) -> Alignment:
    """The alignment with the genes that both files have, if these differ."""
    if screen.n_genes == fitted.n_genes and (screen.genes == fitted.genes).all():
        return found
    places = screen.places_of(GeneNames.of(fitted.var))
    if (places >= 0).all() and len(places) == screen.n_genes:
        return found
    cells = fitted.sample(np.arange(fitted.n_cells), N_CELLS_FOR_SHARE)[1]
    by_gene = np.asarray(cells.sum(0)).ravel()
    columns = np.unique(np.append(places[places >= 0], found.columns))
    return replace(found, shared=columns, share=float(by_gene[places >= 0].sum() / by_gene.sum()))


def plan_preprocessing(
    screen: Screen, scanned: Scan, values: Values, used: np.ndarray, config: DataConfig, seed: int = 0
) -> Preprocessing:
    """Decide target sum and genes, by at most `N_CELLS_FOR_GENES` of the `used` cells.

    Genes are those listed, or the most variable (scanpy's "seurat" flavour on normalised cells), or all. InputError if
    a gene asked for is missing or has no count, or fewer than two genes are left.
    """
    target_sum = float(np.median(scanned.totals[used])) if values.kind == "counts" else None
    silent, names = scanned.detected == 0, GeneNames.of(screen.var)
    record = Preprocessing(
        values.kind, values.reason, config.layer, target_sum, (), "", screen.n_genes, int(silent.sum()),
        fractional=values.fractional, log_factor=float(np.log(values.base)) if values.kind == "log" else 1.0,
    )  # fmt: skip
    expressed = np.flatnonzero(~silent)
    if config.genes is not None:
        chosen, choice = _asked_genes(screen, silent, config.genes, names), f"{len(config.genes)} genes as listed"
    elif config.n_top_genes == "all" or len(expressed) <= int(config.n_top_genes):
        chosen, choice = expressed, f"all {len(expressed)} genes with a non-zero value"
    else:
        most = min(N_CELLS_FOR_GENES, N_VALUES_FOR_GENES * screen.n_cells // scanned.n_nonzero)
        cells, n_top = np.flatnonzero(used), int(config.n_top_genes)
        chosen = expressed[_highly_variable(screen, record, cells, most, expressed, n_top, seed)]
        choice = f"{len(chosen)} most variable of {len(expressed)} genes"
    if len(chosen) < 2:
        raise InputError(f"{screen.source}: too few genes to fit: {len(chosen)}.", "At least two are needed.")
    others = {key: tuple(own[j] for j in chosen) for key, own in names.columns.items()}
    return replace(record, genes=tuple(screen.genes[chosen]), gene_choice=choice, names=others)


def _asked_genes(screen: Screen, silent: np.ndarray, genes: tuple[str, ...], names: GeneNames) -> np.ndarray:
    """Places of the listed genes; of several that a name means, of those that have a value."""
    found = {gene: names.find(gene) for gene in genes}
    missing = [gene for gene in genes if not found[gene]]
    if missing:
        known = sorted({*screen.genes, *names.symbols})
        close = nearest(missing[0], known, 1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Genes there are named like {screen.genes[0]!r}."
        raise InputError(f"{screen.source}: listed genes are missing ({len(missing)}), first {missing[0]!r}.", hint)
    expressed = {gene: [place for place in places if not silent[place]] for gene, places in found.items()}
    first = next((gene for gene, places in expressed.items() if not places), None)
    if first is not None:
        raise InputError(f"{screen.source}: the listed gene {first!r} is zero in every cell.", "Remove it.")
    return np.unique([place for places in expressed.values() for place in places])


def _highly_variable(
    screen: Screen, record: Preprocessing, cells: np.ndarray, most: int, columns: np.ndarray, n_top: int, seed: int
) -> np.ndarray:
    """Ascending places (n_top,) in `columns` of the most variable genes, by at most so many of the cells."""
    import scanpy as sc  # late: seconds to import

    if len(cells) > most:
        cells = np.sort(np.random.default_rng(seed).choice(cells, most, replace=False))
    blocks = (screen.rows(cells[i : i + ROWS]) for i in range(0, len(cells), ROWS))
    parts = [record.apply(block)[:, columns].astype(np.float32) for block in blocks]
    sample = ad.AnnData(sp.csr_matrix(sp.vstack(parts, format="csr")))
    del parts
    if record.values == "continuous":  # no mean-variance trend to take out
        variance = np.asarray(sample.X.power(2).mean(0) - np.square(sample.X.mean(0))).ravel()
        return np.sort(np.argsort(-variance, kind="stable")[:n_top])
    sc.pp.highly_variable_genes(sample, n_top_genes=n_top, flavor="seurat")
    return np.flatnonzero(sample.var["highly_variable"].to_numpy())


def load(screen: Screen, record: Preprocessing, n_values: int) -> sp.csr_matrix | np.ndarray:
    """Normalised float32 expression (cells, fitted genes) of the whole screen, read in blocks.

    CSR when most values are zero, else a dense array. `n_values` of the fitted genes are not 0: each is put in its
    place at once, and nothing is held twice.
    """
    place, shape = record.places(screen.genes), (screen.n_cells, len(record.genes))
    sparse = record.is_sparse(n_values, screen.n_cells)
    dense = np.empty((0, 0) if sparse else shape, dtype=np.float32)
    data = np.empty(n_values if sparse else 0, dtype=np.float32)
    indices = np.empty(len(data), dtype=np.int32)
    start = np.zeros(screen.n_cells + 1, dtype=np.int64)
    reader, stretches = screen.reader, screen.stretches()
    parts = in_parallel(lambda rows: record.expression(reader[rows], place), stretches, torch.get_num_threads())
    for rows, part in zip(counted(stretches, len(stretches)), parts, strict=True):
        if not sparse:
            dense[rows] = part.toarray()
            continue
        start[rows.start + 1 : rows.stop + 1] = start[rows.start] + part.indptr[1:]
        entries = slice(start[rows.start], start[rows.stop])
        data[entries], indices[entries] = part.data, part.indices
    return sp.csr_matrix((data, indices, start), shape=shape) if sparse else dense
