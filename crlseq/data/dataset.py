"""PerturbSeqData: one observational set and one interventional set per condition, ready to fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from crlseq.config import DataConfig
from crlseq.data import splits
from crlseq.data.adjustment import Adjustment
from crlseq.data.cluster import mapped, on_one_machine
from crlseq.data.contexts import by_context, gene_and_context
from crlseq.data.covariate_columns import Column, read_columns
from crlseq.data.covariates import covariates, in_words
from crlseq.data.design import Selection, lonely_batches, read_batches, select_conditions, without_silent_cells
from crlseq.data.guides import Guides, read_conditions
from crlseq.data.matrix import Screen, open_screen
from crlseq.data.names import GeneNames, targets_in_words
from crlseq.data.perturbations import Perturbations
from crlseq.data.positions import Positions, read_positions
from crlseq.data.preprocess import Preprocessing, load, plan_preprocessing
from crlseq.data.store import Manifest, StoredMatrix, read_manifest
from crlseq.data.streamed import StreamedExpression
from crlseq.data.values import Scan, scan, values_of
from crlseq.errors import few

ROWS = 4096  # cells taken at once where all are gone through
CONTROL_POOL = 16_384  # which stay in memory: at 500 values a cell, 65 MB
KNOWN_MOMENTS = 32 << 20  # bytes of moments that are kept: stages ask for those of the same cells, up to seven times
IN_MEMORY = 0.25  # share of the machine's memory up to which a store is loaded whole

Expression = sp.csr_matrix | np.ndarray | StreamedExpression
Cells = tuple[np.ndarray, np.ndarray]  # indices, and totals of their counts


@dataclass(frozen=True)
class PerturbSeqData:
    """A screen in numbers. Row i of everything is cell i of the file; condition 0 is the control."""

    x: Expression  # (cells, genes) float32, normalised; streamed: from a store
    cell_names: pd.Index  # unique
    condition: np.ndarray  # (cells,) int64 index into `conditions`; -1 of cells that take no part
    conditions: tuple[tuple[int, ...], ...]  # ascending indices of single perturbations; () of the control
    condition_names: tuple[str, ...]
    perturbation_names: tuple[str, ...]  # of perturbations in fitted conditions and no others
    batch: np.ndarray  # (cells,) int64, the number of a cell's batch, within its context; one batch without either
    split: np.ndarray  # (cells,) int8 code of `splits.SPLITS`
    totals: np.ndarray | None  # (cells,) counts over all genes of the file; None for values that are no counts
    preprocessing: Preprocessing
    labels: Perturbations
    measured: GeneNames  # all genes of the file, fitted or not
    notes: tuple[str, ...]  # sentences about what was left out and why
    guides: Guides | None = None
    positions: Positions | None = None  # of genes on chromosomes, where they are known
    covariates: tuple[Column, ...] = ()
    without_covariate_effects: bool = False  # what perturbations do to covariates is taken off, too
    shuffled: bool = False  # cells of each condition lie together in random order, as in a prepared store

    @property
    def n_genes(self) -> int:
        """Fitted genes."""
        return int(self.x.shape[1])

    @property
    def genes(self) -> tuple[str, ...]:
        """Names of the fitted genes, the columns of ``x``."""
        return self.preprocessing.genes

    @cached_property
    def own_genes(self) -> tuple[tuple[int, ...], ...]:
        """Of each perturbation, the fitted genes that it targets, under whatever name; none if they are not fitted."""
        target = dict(zip(self.labels.names, self.labels.targets, strict=True))
        return tuple(self.preprocessing.gene_names.find(target.get(name, name)) for name in self.perturbation_names)

    @property
    def context(self) -> np.ndarray:
        """(cells,) int64 context of each cell; 0 of all without contexts, -1 of cells that take no part."""
        contexts = self.labels.contexts
        return np.zeros(len(self.condition), dtype=np.int64) if contexts is None else contexts.number

    @property
    def context_names(self) -> tuple[str, ...]:
        """Of the contexts; none without."""
        return () if self.labels.contexts is None else self.labels.contexts.names

    @cached_property
    def gene(self) -> np.ndarray:
        """(perturbations,) int64, the same for a perturbation in all its contexts."""
        names = self.perturbation_names
        return np.unique(
            [gene_and_context(name)[0] if self.context_names else name for name in names], return_inverse=True
        )[1]

    @property
    def own_labels(self) -> pd.Categorical | None:
        """(cells,) labels that the file does not have: genes of guides, and perturbations by context; else None."""
        if self.labels.contexts is not None:
            return self.labels.written()
        return None if self.guides is None else self.guides.labels

    @cached_property
    def adjustment(self) -> Adjustment | None:
        """What covariates do to cells; None without any."""
        if not self.covariates:
            return None
        return Adjustment.of(
            self.covariates,
            self.without_covariate_effects,
            self.condition,
            len(self.conditions),
            self.split,
            self.batch,
        )

    @cached_property
    def covariate_slopes(self) -> np.ndarray:
        """(d, G) of expression on covariates, by training controls."""
        assert self.adjustment is not None
        cells = self.control_pool(splits.TRAIN)
        return self.adjustment.slopes(cells, self.blocks(cells))

    @cached_property
    def comparison(self) -> np.ndarray:
        """(cells,) groups within which cells are compared: batches, divided by what covariates do to expression."""
        if self.adjustment is None or not self.adjustment.wholly.any():
            return self.batch
        return self.adjustment.groups(self.covariate_slopes)

    def cells(self, condition: int, *codes: int) -> np.ndarray:
        """Ascending indices of a condition's cells in the given splits."""
        return np.flatnonzero((self.condition == condition) & np.isin(self.split, codes))

    def comparable(self) -> np.ndarray:
        """(cells,) bool: whether controls to train on share a cell's batch, so that its effect can be told."""
        return np.isin(self.batch, self.batch[self.cells(0, splits.TRAIN)])

    def cells_by_condition(self, *codes: int) -> list[np.ndarray]:
        """`cells` of every condition in one pass."""
        chosen = np.flatnonzero(np.isin(self.split, codes) & (self.condition >= 0))
        chosen = chosen[np.argsort(self.condition[chosen], kind="stable")]
        return np.split(chosen, np.searchsorted(self.condition[chosen], np.arange(1, len(self.conditions))))

    def control_pool(self, *codes: int) -> np.ndarray:
        """Controls of these splits to draw from again and again: of a shuffled screen `CONTROL_POOL` a split at most."""
        if not self.shuffled:
            return self.cells(0, *codes)
        return np.sort(np.concatenate([self.cells(0, code)[:CONTROL_POOL] for code in codes]))

    def blocks(self, index: np.ndarray) -> Iterator[tuple[slice, sp.csr_matrix | np.ndarray]]:
        """Rows of `index`, some at a time, with their places in it."""
        for start in range(0, len(index), ROWS):
            rows = slice(start, min(start + ROWS, len(index)))
            yield rows, self.x[index[rows]]

    def pieces(self, index: np.ndarray) -> list[np.ndarray]:
        """`index` in pieces of as many cells as a block of `blocks`."""
        return [index[start : start + ROWS] for start in range(0, len(index), ROWS)]

    def moments(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and mean square (genes,) of cells, in float64."""
        known, cells = self._known_moments, blake2b(index.tobytes(), digest_size=16).digest()
        sums = known.get(cells)
        if sums is None:
            sums = np.zeros((2, self.n_genes))
            for own in mapped(partial(_sums, self.x), self.pieces(index)):
                sums += own
            sums /= max(len(index), 1)
            if (len(known) + 1) * sums.nbytes <= KNOWN_MOMENTS:
                known[cells] = sums
        mean, square = sums.copy()
        return mean, square

    @cached_property
    def _known_moments(self) -> dict[bytes, np.ndarray]:
        """`moments` (2, genes) of cells, by a digest of their indices."""
        return {}

    def dense(self, index: np.ndarray) -> np.ndarray:
        """(len(index), genes) float32 rows."""
        return dense_of(self.x, index)

    def counts(self, index: np.ndarray) -> sp.csr_matrix:
        """(len(index), genes) counts, got back from normalised values (exact below 10^5, float32's precision)."""
        if self.totals is None or self.preprocessing.target_sum is None:
            raise ValueError("these values are not counts.")
        return counts_of(self.x, self.preprocessing, self.with_totals(index))

    def with_totals(self, index: np.ndarray) -> Cells:
        """Cells and what `counts_of` needs of them."""
        assert self.totals is not None
        return index, self.totals[index]

    def perturbation_table(self) -> np.ndarray:
        """(conditions, M) int64 perturbations of each condition, filled up with -1."""
        table = np.full((len(self.conditions), max(1, *map(len, self.conditions))), -1, dtype=np.int64)
        for row, parts in zip(table, self.conditions, strict=True):
            row[: len(parts)] = parts
        return table


def counts_of(x: Expression, record: Preprocessing, cells: Cells) -> sp.csr_matrix:
    """(cells, genes) counts from normalised values ``x``, of cells with their totals."""
    assert record.target_sum is not None
    index, totals = cells
    counts = sp.csr_matrix(x[index]).astype(np.float64)
    values = np.expm1(counts.data, out=counts.data)
    values *= np.repeat(totals / record.target_sum, np.diff(counts.indptr))
    if not record.fractional:
        np.rint(values, out=values)
    return counts


def dense_of(x: Expression, index: np.ndarray) -> np.ndarray:
    """(len(index), genes) float32 rows."""
    rows = x[index]
    return np.asarray(rows) if isinstance(rows, np.ndarray) else rows.toarray()


def _sums(x: Expression, index: np.ndarray) -> np.ndarray:
    """Sums of values and of their squares (2, genes) over cells, in float64."""
    rows = x[index]
    if isinstance(rows, np.ndarray):
        return np.stack([(rows.astype(np.float64) ** power).sum(0) for power in (1, 2)])
    values = rows.data.astype(np.float64)
    return np.stack([sums_by_gene(rows, values), sums_by_gene(rows, values**2)])


def sums_by_gene(rows: sp.csr_matrix, values: np.ndarray) -> np.ndarray:
    """(genes,) sums over rows of `values` in place of their own."""
    own = sp.csr_matrix((values, rows.indices, rows.indptr), shape=rows.shape)
    return np.asarray(own.T @ np.ones(rows.shape[0]))


def read_data(
    source: str | Path | ad.AnnData,
    config: DataConfig,
    seed: int,
    shared: Callable[[Callable[[], Scan]], Scan] = lambda make: make(),
) -> PerturbSeqData:
    """Read, check, normalise and split a screen; InputError for anything in it that cannot be used.

    ``shared`` gives the pass over all values, which it makes itself or has from another process.
    """
    manifest = read_manifest(source) if config.layer is None else None
    if manifest is not None:
        config = _as_prepared(config, manifest)
    with open_screen(source, config.layer) as screen:
        labels, guides = read_conditions(screen, source, config)
        positions = read_positions(screen.var, config.gene_positions)
        shuffled = manifest is not None and _is_sorted(labels.condition)
        scanned = shared(lambda: scan(screen))
        values = values_of(source, screen, scanned, config)
        labels = without_silent_cells(labels, scanned, values)
        labels, batch, batch_names = by_context(labels, *read_batches(screen, config.batch_key, labels))
        selection = select_conditions(labels, config)
        split = splits.split_cells(
            labels.condition, selection.fitted, selection.held_out,
            config.validation_cells, config.hold_out_cells, np.random.default_rng([seed, 0]), shuffled,
        )  # fmt: skip
        # Genes are chosen on training cells alone, so that test cells have no say in the model.
        record = plan_preprocessing(screen, scanned, values, split == splits.TRAIN, config, seed)
        n_values = int(scanned.detected[record.columns(screen)].sum())
        streamed = shuffled and _is_streamed(config, n_values)
        stored = _stream(screen, record, n_values, labels, split) if streamed else load(screen, record, n_values)
        measured = GeneNames.of(screen.var)
        asked = read_columns(screen, config, labels, record, scanned.totals)
        told = in_words(covariates(screen, labels, values, scanned.totals), config.batch_key, {c.name for c in asked})
        of_design = [targets_in_words(measured, labels.targets), *told]
    condition, known, number, unpredictable = _renumbered(labels, selection)
    return PerturbSeqData(
        x=stored,
        cell_names=screen.obs.index.astype(str),
        condition=condition,
        conditions=tuple(tuple(number[part] for part in labels.conditions[c]) for c in known),
        condition_names=tuple(labels.condition_names[c] for c in known),
        perturbation_names=tuple(labels.names[part] for part in number),
        batch=batch,
        split=split,
        totals=scanned.totals if record.values == "counts" else None,
        preprocessing=record,
        labels=labels,
        measured=measured,
        notes=(
            *filter(None, [*screen.notes, values.doubt]),
            *([] if guides is None else [guides.reason]),
            *selection.notes,
            *_silent(record),
            *lonely_batches(batch, batch_names, labels, split),
            *unpredictable,
            *of_design,
        ),
        guides=guides,
        positions=positions,
        covariates=asked,
        without_covariate_effects=config.remove_covariate_effects,
        shuffled=shuffled,
    )


def _silent(record: Preprocessing) -> list[str]:
    """A sentence on genes that are left out because no cell has them, if there are any."""
    text = f"{record.n_silent_genes} of {record.n_genes_in_file} genes are zero in every cell and are excluded."
    return [text] if record.n_silent_genes else []


def _as_prepared(config: DataConfig, manifest: Manifest) -> DataConfig:
    """Labels are read as when the store was prepared, unless something else is asked for."""
    asked = (config.perturbation_key, config.guide_key, config.guide_counts, config.control_label, config.separator)
    if any(value is not None for value in asked):
        return config
    labels: dict[str, Any] = {"control_label": manifest.control_labels or (manifest.control_label,)}
    labels |= {"context_key": config.context_key or manifest.context_key}
    names = ("perturbation_key", "separator")
    return config.model_copy(update=labels | {name: getattr(manifest, name) for name in names})


def _is_sorted(condition: np.ndarray) -> bool:
    """Whether every condition's cells lie together, those of none behind the others."""
    known = condition[condition >= 0]
    return bool((np.diff(known) >= 0).all() and (condition[len(known) :] < 0).all())


def _is_streamed(config: DataConfig, n_values: int) -> bool:
    if not on_one_machine():
        return True
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 * n_values > IN_MEMORY * memory if config.streamed is None else config.streamed


def _stream(
    screen: Screen, record: Preprocessing, n_values: int, labels: Perturbations, split: np.ndarray
) -> StreamedExpression:
    """Rows of a store, read when asked for; of the controls of each split, `CONTROL_POOL` stay in memory."""
    assert isinstance(screen.matrix, StoredMatrix)
    controls = labels.condition == 0
    pools = [np.flatnonzero(controls & (split == code))[:CONTROL_POOL] for code in range(1, len(splits.SPLITS))]
    nnz, place = n_values if record.is_sparse(n_values, screen.n_cells) else None, record.places(screen.genes)
    return StreamedExpression(screen.matrix, record, place, nnz, np.sort(np.concatenate(pools)))


def _renumbered(labels: Perturbations, selection: Selection) -> tuple[np.ndarray, list[int], dict[int, int], list[str]]:
    """Conditions that are fitted, or held out and made of fitted perturbations, counted from 0.

    The condition of each cell (cells,) or -1; these conditions by their numbers in the labels; the number of each fitted
    perturbation by that in the labels; and a note on the conditions that are left out here.
    """
    fitted = {part for c in np.flatnonzero(selection.fitted) for part in labels.conditions[c]}
    number = {part: i for i, part in enumerate(sorted(fitted))}
    known, names = list[int](), list[str]()
    for c in np.flatnonzero(selection.fitted | selection.held_out).tolist():
        if fitted.issuperset(labels.conditions[c]):
            known.append(c)
        else:
            names.append(labels.condition_names[c])
    position = np.full(len(labels.conditions) + 1, -1)  # the last entry serves condition -1
    position[known] = np.arange(len(known))
    note = f"Held out but not predicted, because not all of their perturbations were fitted: {few(names)}."
    return position[labels.condition], known, number, [note] if names else []
