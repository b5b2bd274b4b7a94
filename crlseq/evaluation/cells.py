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

from crlseq.data.guides import with_guide_labels
from crlseq.data.label_rules import STRATEGY_KEY, Perturbations
from crlseq.data.matrix import Screen, open_screen
from crlseq.data.perturbations import read_perturbations
from crlseq.data.preprocess import Alignment, Preprocessing, align
from crlseq.errors import InputError, few
from crlseq.evaluation.baselines import Expression, Indices
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.run.run import Run
from crlseq.run.schema import RunInfo


@dataclass(frozen=True)
class Cells:
    """Normalised expression (cells, fitted genes), and condition and batch (cells,) of each; condition -1: none."""

    x: Expression
    condition: np.ndarray
    batch: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Cells:
        return Cells(self.x[chosen], self.condition[chosen], self.batch[chosen])


@dataclass(frozen=True)
class CellSets:
    """What an evaluation works on: what was fitted, control cells, and perturbed cells that were not fitted.

    Controls have all fitted genes, since the model starts from them; the others those that are compared.
    """

    train: Cells
    control: Cells
    measured: Cells
    compared: np.ndarray  # indices of the fitted genes that the judging cells have
    conditions: tuple[Indices, ...]  # ascending indices into `names`, () for the control
    condition_names: tuple[str, ...]
    names: tuple[str, ...]  # single perturbations
    known: dict[int, tuple[int, ...]]  # place in `names` -> rows in `model`; several for one that is extrapolated
    seen: frozenset[int]  # places in `names` of those that were fitted
    model: DiscrepancyVAE  # the run's, with perturbations never seen where it can extrapolate to them
    fitted: np.ndarray  # (conditions,) bool
    gene_places: Mapping[
        str, list[int]
    ]  # by perturbation columns, among the compared ones, of the gene that it targets
    kind: str  # what measured cells of fitted conditions are called
    notes: tuple[str, ...]

    def group(self, condition: int) -> str:
        """Kind of a condition: held-out cells of a fitted one, or how many of its parts were seen."""
        if self.fitted[condition]:
            return self.kind
        parts = self.conditions[condition]
        seen = sum(part in self.seen for part in parts)
        return "unseen perturbations" if len(parts) == 1 else f"combinations, {seen} of {len(parts)} parts seen"


@dataclass(frozen=True)
class _Table:
    """A file's cells, before their labels are read: ``obs``, expression and how its genes lie in the fit's."""

    source: str
    obs: pd.DataFrame
    x: Expression
    alignment: Alignment
    marks: list[bytes]  # of other files alone


def read_cells(run: Run, data: str | Path | ad.AnnData | None, held_out_controls: bool = False) -> CellSets:
    """The run's own cells by their split, or other cells against the run's training cells.

    InputError if there are none to judge by or no controls, or genes, labels or values are others than the fit's.
    """
    own, places = _read_own(run), run.preprocessing.gene_names
    notes: list[str] = []
    other = None if data is None else _read_other(run, data, notes)
    tables = [own.obs] if other is None else [own.obs, other.obs]
    labels, batch = _labels(tables, run.facts), _batches(tables, run.facts)
    split, n = own.obs["crlseq_split"].astype(str).to_numpy(), len(own.obs)
    cells = Cells(own.x, labels.condition[:n], batch[:n])
    train = cells[(split == "train") & (cells.condition >= 0)]
    compared = own.alignment.present
    if other is None:
        control, measured, kind = _held_out(cells, split, train, held_out_controls, notes)
    else:
        given, kind = Cells(other.x, labels.condition[n:], batch[n:]), "held-out cells"
        compared, control = other.alignment.present, given[given.condition == 0]
        if len(compared) < other.alignment.n_fitted:
            mean = train[train.condition == 0].x.mean(0)
            x = control.x if isinstance(control.x, np.ndarray) else control.x.toarray()
            control = replace(control, x=other.alignment.filled(x, np.asarray(mean).ravel()))
            train = replace(train, x=train.x[:, compared])
        if len(control.condition) < 2:
            raise InputError(
                f"{other.source} has {len(control.condition)} cells labelled {labels.control_label!r}; at least two are needed.",
                "Give a file with control cells: all changes are relative to them.",
            )
        took_part = np.isin(split, ("train", "validation")) & (cells.condition > 0)
        measured = given[_new(run, other, took_part, given.condition > 0, notes)]
    if not len(measured.condition):
        raise InputError("There are no cells to evaluate on.", "Give --data, or fit with --hold-out-cells.")
    known, seen, model = _known(run, labels, measured, notes)
    column = {int(gene): i for i, gene in enumerate(compared)}
    return CellSets(
        train=train, control=control, measured=measured, compared=compared, conditions=labels.conditions,
        condition_names=labels.condition_names, names=labels.names, known=known, seen=seen, model=model,
        fitted=np.bincount(train.condition, minlength=len(labels.conditions)) > 0,
        gene_places={
            name: [column[g] for g in places.find(target) if g in column]
            for name, target in zip(labels.names, labels.targets, strict=True)
        },
        kind=kind, notes=tuple(notes),
    )  # fmt: skip


def _read_own(run: Run) -> _Table:
    """The cells of the fit."""
    record = run.preprocessing
    with run.screen() as screen:
        obs = screen.obs
        if run.path is None and run.cells is not None and len(run.cells) == len(obs):
            obs = obs.assign(**{str(name): own.to_numpy() for name, own in run.cells.items()})
        if "crlseq_split" not in obs or screen.n_cells != run.facts.input.n_cells:
            raise InputError(f"{screen.source} is not the screen that was fitted.", "Restore it, or fit again.")
        alignment, _ = align(record, screen)
        return _Table(screen.source, obs, _expression(screen, record, alignment), alignment, [])


def _read_other(run: Run, data: str | Path | ad.AnnData, notes: list[str]) -> _Table:
    record, key = run.preprocessing, run.facts.perturbation_key
    with open_screen(data, record.layer) as screen:
        config = run.config.data
        obs = with_guide_labels(screen, data, config, key, run.facts.control_label)
        if key not in obs:
            raise InputError(
                f"{screen.source} has no column {key!r}, which holds the perturbations of the fit.",
                "Give cells with the same labels.",
            )
        with run.screen() as fitted:
            alignment, about = align(record, screen, fitted)
        notes += about
        x, marks = _expression(screen, record, alignment), _fingerprints(screen, alignment.columns)
        if len(alignment.present) < alignment.n_fitted:
            notes.append(f"{len(alignment.present)} of {alignment.n_fitted} fitted genes are compared.")
        return _Table(screen.source, obs, x, alignment, marks)


def _held_out(
    cells: Cells, split: np.ndarray, train: Cells, held_out_controls: bool, notes: list[str]
) -> tuple[Cells, Cells, str]:
    """Controls, the cells of the fit's screen that judge it, and what these are called."""
    control = train[train.condition == 0]
    if held_out_controls:
        control = cells[(split == "test") & (cells.condition == 0)]
        if len(control.condition) < 2:
            raise InputError(
                f"{len(control.condition)} control cells were held out; at least two are needed.",
                "Fit with --hold-out-cells, or give --data.",
            )
    tested = cells[(split == "test") & (cells.condition > 0)]
    if len(tested.condition):
        return control, tested, "held-out cells"
    notes.append(
        "There are no test cells, so validation cells are used, which also decided when the fit stopped. For an "
        "unbiased evaluation, fit with --hold-out-cells or --no-combinations, or give --data."
    )
    return control, cells[(split == "validation") & (cells.condition > 0)], "validation cells"


def _new(run: Run, other: _Table, took_part: np.ndarray, perturbed: np.ndarray, notes: list[str]) -> np.ndarray:
    """Which perturbed cells of another file are none of those (fitted cells,) that took part in the fit."""
    record = run.preprocessing
    with run.screen() as screen:
        columns = record.columns(screen)[other.alignment.present]
        seen_before = set(_fingerprints(screen, columns, took_part))
    new = perturbed & np.array([mark not in seen_before for mark in other.marks], dtype=bool)
    if dropped := int((perturbed & ~new).sum()):
        notes.append(f"{dropped} cells of {other.source} took part in the fit and are left out.")
    return np.asarray(new)


def _known(
    run: Run, labels: Perturbations, measured: Cells, notes: list[str]
) -> tuple[dict[int, tuple[int, ...]], frozenset[int], DiscrepancyVAE]:
    """Rows of the model by perturbation, the perturbations that were fitted, and the model: see `CellSets`."""
    number = {name: i for i, name in enumerate(run.interventions["perturbation"])}
    known: dict[int, tuple[int, ...]] = {i: (number[name],) for i, name in enumerate(labels.names) if name in number}
    seen = frozenset(known)
    parts = {labels.names[p] for c in np.unique(measured.condition) for p in labels.conditions[c]}
    unseen = sorted(parts - set(number))
    vectors = set() if run.extrapolation is None else {*run.extrapolation.table.names}
    model, rows = run.with_unseen([name for name in unseen if name in vectors])
    known |= {i: rows[name] for i, name in enumerate(labels.names) if name in rows}
    if rows:
        notes.append(f"Not fitted, and extrapolated from embeddings by the model only: {few([*rows])}.")
    if strangers := [name for name in unseen if name not in rows]:
        notes.append(f"Not fitted, so no method predicts an effect: {few(strangers)}.")
    return known, seen, model


def _expression(screen: Screen, record: Preprocessing, alignment: Alignment) -> Expression:
    """Normalised expression (cells, fitted genes that are there) as the fit had it."""
    parts = []
    for _, block in screen.blocks():
        record.check(block, screen.source)
        parts.append(alignment.expression(record, block))
    x = sp.csr_matrix(sp.vstack(parts, format="csr"))
    x.sort_indices()
    return x if x.nnz < 0.5 * x.shape[0] * x.shape[1] else x.toarray()


def _labels(tables: list[pd.DataFrame], facts: RunInfo) -> Perturbations:
    """Conditions of all cells in one vocabulary, read as at the fit."""
    key, control, separator = facts.perturbation_key, facts.controls, facts.config.data.separator
    keys = [name for name in (key, STRATEGY_KEY) if all(name in table for table in tables)]
    columns = {name: np.concatenate([table[name].astype(object).to_numpy() for table in tables]) for name in keys}
    first = read_perturbations(tables[0][keys], key, control, separator)
    if len(tables) == 1:
        return first
    # A fit on single perturbations alone has seen no separator: it was asked for, or is found in the other cells.
    separator = separator if first.separator is None else first.separator
    return read_perturbations(pd.DataFrame(columns), key, control, separator)


def _batches(tables: list[pd.DataFrame], facts: RunInfo) -> np.ndarray:
    """(cells,) batch, within its context, of every cell of all tables; a table without a column has one value of its own."""
    keys = [facts.config.data.batch_key, None if facts.contexts is None else facts.contexts.key]
    values = pd.DataFrame({
        str(key): np.concatenate([
            table[key].astype(str).to_numpy(dtype=object) if key in table else np.full(len(table), f"table {i}", object)
            for i, table in enumerate(tables)
        ])
        for key in (keys[:1] if keys[1] is None else keys)
    })  # fmt: skip
    return np.asarray(values.groupby(list(values.columns), sort=True).ngroup(), dtype=np.int64)


def _fingerprints(screen: Screen, columns: np.ndarray, chosen: np.ndarray | None = None) -> list[bytes]:
    """The values of cells in some genes, as the file has them: equal for equal cells, whatever their names and totals."""
    found = []
    for rows, block in screen.blocks():
        own = sp.csr_matrix(block[:, columns] if chosen is None else block[chosen[rows]][:, columns])
        own.sort_indices()
        for a, b in pairwise(own.indptr):
            cell = own.indices[a:b].astype(np.int64).tobytes() + own.data[a:b].astype(np.float32).tobytes()
            found.append(hashlib.blake2b(cell, digest_size=16).digest())
    return found
