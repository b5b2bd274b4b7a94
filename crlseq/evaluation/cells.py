"""Cells that judge a run: training cells, controls and measured cells, read once and kept apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from crlseq.data.alignment import Alignment, align
from crlseq.data.inspection import SYMBOL_COLUMNS
from crlseq.data.matrix import Screen, open_screen, readable
from crlseq.data.perturbations import STRATEGY_KEY, Perturbations, read_perturbations
from crlseq.data.preprocess import Preprocessing
from crlseq.errors import InputError
from crlseq.evaluation.baselines import Parts
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.run.run import Run
from crlseq.run.schema import RunInfo


@dataclass(frozen=True)
class Cells:
    """Normalised expression (cells, fitted genes), and condition and batch (cells,) of each; condition -1: none."""

    x: sp.csr_matrix | np.ndarray
    condition: np.ndarray
    batch: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Cells:
        return Cells(self.x[chosen], self.condition[chosen], self.batch[chosen])

    def of_genes(self, genes: np.ndarray) -> Cells:
        """The same cells with some of their genes."""
        return replace(self, x=self.x[:, genes])


@dataclass(frozen=True)
class Judged:
    """What an evaluation works on.

    Attributes
    ----------
    train, control, measured
        Three sets of cells: what was fitted, control cells, and perturbed cells that were not fitted. Controls have all
        fitted genes, since the model starts from them; the others those that are ``compared``.
    compared
        Indices of the fitted genes that the judging cells have.
    conditions, condition_names, names
        Ascending indices into ``names`` per condition, () for the control; labels; single perturbations.
    known
        Index of a single perturbation in ``names`` -> its rows in ``model``; several for one that is extrapolated.
    seen
        Indices in ``names`` of those that were fitted.
    model
        The run's, with perturbations never seen where it can extrapolate to them.
    fitted
        (conditions,) bool.
    gene_places
        Name or symbol of a gene -> columns among the compared ones.
    kind
        What measured cells of fitted conditions are called.
    """

    train: Cells
    control: Cells
    measured: Cells
    compared: np.ndarray
    conditions: tuple[Parts, ...]
    condition_names: tuple[str, ...]
    names: tuple[str, ...]
    known: dict[int, tuple[int, ...]]
    seen: frozenset[int]
    model: DiscrepancyVAE
    fitted: np.ndarray
    gene_places: Mapping[str, list[int]]
    kind: str
    notes: tuple[str, ...]

    def group(self, condition: int) -> str:
        """Kind of a condition: held-out cells of a fitted one, or how many of its parts were seen."""
        if self.fitted[condition]:
            return self.kind
        parts = self.conditions[condition]
        seen = sum(part in self.seen for part in parts)
        return "unseen perturbations" if len(parts) == 1 else f"combinations, {seen} of {len(parts)} parts seen"


def read_cells(run: Run, data: str | Path | ad.AnnData | None, held_out_controls: bool = False) -> Judged:
    """The run's own cells by their split, or other cells against the run's training cells.

    Raises
    ------
    InputError
        If there are no cells to judge by or no controls, or genes, labels or values are others than the fit's.
    """
    if run.path is None:
        raise InputError("This run was never written to a folder.", "Give crlseq.fit an output.")
    facts, record = run.facts, run.preprocessing
    notes: list[str] = []
    with open_screen(run.path / "crlseq.h5ad", record.layer) as screen:
        if "crlseq_split" not in screen.obs or screen.n_cells != facts.input.n_cells:
            raise InputError(f"{screen.source} is not what the fit wrote.", "Restore it, or fit again.")
        split = screen.obs["crlseq_split"].astype(str).to_numpy()
        alignment, _ = align(record, screen)
        tables, x = [screen.obs], _expression(screen, record, alignment)
        gene_places = _gene_places(screen, record.genes)
    compared = np.arange(len(record.genes))
    if data is not None:
        with open_screen(data, record.layer) as screen:
            if facts.perturbation_key not in screen.obs:
                raise InputError(
                    f"{screen.source} has no column {facts.perturbation_key!r}, which holds the perturbations of the fit.",
                    "Give cells with the same labels.",
                )
            alignment, said = align(record, screen)
            other, source = _expression(screen, record, alignment), screen.source
            tables.append(screen.obs)
            notes += said
            compared = alignment.present
            marks = _fingerprints(screen, alignment.columns)
            if len(compared) < alignment.n_fitted:
                notes.append(f"{len(compared)} of {alignment.n_fitted} fitted genes are compared.")
    labels = _labels(tables, facts)
    batch = _batches(tables, facts.config.data.batch_key)
    n = len(split)
    fitted_cells = Cells(x, labels.condition[:n], batch[:n])
    train = fitted_cells[(split == "train") & (fitted_cells.condition >= 0)]
    if data is None:
        control = train[train.condition == 0]
        if held_out_controls:
            control = fitted_cells[(split == "test") & (fitted_cells.condition == 0)]
            if len(control.condition) < 2:
                raise InputError(
                    f"{len(control.condition)} control cells were held out, and two are needed.",
                    "Fit with --hold-out-cells, or give --data.",
                )
        kind = "test" if ((split == "test") & (fitted_cells.condition > 0)).any() else "validation"
        measured = fitted_cells[(split == kind) & (fitted_cells.condition > 0)]
        if kind == "validation":
            notes.append(
                "There are no test cells: validation cells are used, which chose when the fit stopped. "
                "Fit with --hold-out-cells or --no-combinations, or give --data, for a fair judgement."
            )
    else:
        given = Cells(other, labels.condition[n:], batch[n:])
        control, measured, kind = given[given.condition == 0], given[given.condition > 0], "test"
        with open_screen(run.path / "crlseq.h5ad", record.layer) as screen:
            took_part = np.isin(split, ("train", "validation")) & (labels.condition[:n] > 0)
            seen_before = set(_fingerprints(screen, record.columns(screen.genes, screen.source)[compared], took_part))
        if len(compared) < alignment.n_fitted:
            own = train[train.condition == 0].x.mean(0)
            control = replace(control, x=alignment.filled(_dense(control.x), np.asarray(own).ravel()))
            train = train.of_genes(compared)
        if len(control.condition) < 2:
            raise InputError(
                f"{source} has {len(control.condition)} cells labelled {labels.control_label!r}, and two are needed.",
                "Give a file with control cells: every change is taken against them.",
            )
        new = np.array([mark not in seen_before for mark in marks], dtype=bool)[given.condition > 0]
        measured, dropped = measured[new], int((~new).sum())
        if dropped:
            notes.append(f"{dropped} cells of {source} took part in the fit and are left out.")
    if not len(measured.condition):
        raise InputError("There are no cells to judge by.", "Give --data, or fit with --hold-out-cells.")
    fitted = np.bincount(train.condition, minlength=len(labels.conditions)) > 0
    number = {name: i for i, name in enumerate(run.interventions["perturbation"])}
    known: dict[int, tuple[int, ...]] = {i: (number[name],) for i, name in enumerate(labels.names) if name in number}
    seen = frozenset(known)
    unseen = sorted(
        {labels.names[p] for c in np.unique(measured.condition) for p in labels.conditions[c]} - set(number)
    )
    vectors = set() if run.extrapolation is None else {*run.extrapolation.table.names}
    model, rows = run.with_unseen([name for name in unseen if name in vectors])
    known |= {i: rows[name] for i, name in enumerate(labels.names) if name in rows}
    if rows:
        notes.append(f"Never fitted, and extrapolated from embeddings by the model alone: {_few([*rows])}.")
    if strangers := [name for name in unseen if name not in rows]:
        notes.append(f"Never fitted, and so without effect in any prediction: {_few(strangers)}.")
    column = {int(gene): i for i, gene in enumerate(compared)}
    places = {name: [column[g] for g in found if g in column] for name, found in gene_places.items()}
    return Judged(
        train, control, measured, compared, labels.conditions, labels.condition_names, labels.names, known, seen, model, fitted,
        places,
        "held-out cells" if kind == "test" else "validation cells", tuple(notes),
    )  # fmt: skip


def _few(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _dense(x: sp.csr_matrix | np.ndarray) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.toarray()


def _expression(screen: Screen, record: Preprocessing, alignment: Alignment) -> sp.csr_matrix | np.ndarray:
    """Normalised expression (cells, fitted genes that are there) as the fit had it."""
    parts = []
    with readable(screen.source, "the matrix"):
        for _, block in screen.blocks():
            record.check(block, screen.source)
            parts.append(alignment.take(record.apply(block)).astype(np.float32))
    x = sp.csr_matrix(sp.vstack(parts, format="csr"))
    x.sort_indices()
    return x if x.nnz < 0.5 * x.shape[0] * x.shape[1] else x.toarray()


def _gene_places(screen: Screen, genes: tuple[str, ...]) -> dict[str, list[int]]:
    """Columns of the fitted genes by name, and by symbol where the file has symbols beside identifiers."""
    var = screen.var.set_axis(screen.genes, axis=0).loc[list(genes)]
    places: dict[str, list[int]] = {gene: [i] for i, gene in enumerate(genes)}
    for key in var.columns:
        if key in SYMBOL_COLUMNS:
            for i, symbol in enumerate(var[key].astype(str)):
                if i not in places.setdefault(symbol, []):
                    places[symbol].append(i)
    return places


def _labels(tables: list[pd.DataFrame], facts: RunInfo) -> Perturbations:
    """Conditions of all cells in one vocabulary, read as at the fit."""
    key, control, separator = facts.perturbation_key, facts.control_label, facts.config.data.separator
    keys = [name for name in (key, STRATEGY_KEY) if all(name in table for table in tables)]
    columns = {name: np.concatenate([table[name].astype(object).to_numpy() for table in tables]) for name in keys}
    first = read_perturbations(tables[0][keys], key, control, separator)
    if len(tables) == 1:
        return first
    # A fit on single perturbations alone has seen no separator: it was asked for, or is found in the other cells.
    separator = separator if first.separator is None else first.separator
    return read_perturbations(pd.DataFrame(columns), key, control, separator)


def _batches(tables: list[pd.DataFrame], key: str | None) -> np.ndarray:
    """(cells,) batch of every cell of all tables; a table without the column is one batch of its own."""
    values = [
        table[key].astype(str).to_numpy(dtype=object) if key in table else np.full(len(table), f"table {i}", object)
        for i, table in enumerate(tables)
    ]
    return np.asarray(pd.factorize(np.concatenate(values), sort=True)[0], dtype=np.int64)


def _fingerprints(screen: Screen, columns: np.ndarray, chosen: np.ndarray | None = None) -> list[bytes]:
    """The values of cells in some genes, as the file has them: equal for equal cells, whatever their names and totals."""
    found = []
    with readable(screen.source, "the matrix"):
        for rows, block in screen.blocks():
            own = sp.csr_matrix(block[:, columns] if chosen is None else block[chosen[rows]][:, columns])
            own.sort_indices()
            for a, b in pairwise(own.indptr):
                cell = own.indices[a:b].astype(np.int64).tobytes() + own.data[a:b].astype(np.float32).tobytes()
                found.append(hashlib.blake2b(cell, digest_size=16).digest())
    return found
