"""Which cells, conditions and batches take part in a fit, and why others do not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from crlseq.config import DataConfig
from crlseq.data import splits
from crlseq.data.combinations import cut_label
from crlseq.data.contexts import gene_and_context
from crlseq.data.controls import is_control_name, is_named
from crlseq.data.label_rules import Perturbations
from crlseq.data.matrix import Screen
from crlseq.data.perturbations import refuse_missing_column
from crlseq.data.values import Scan, Values
from crlseq.errors import InputError, few

FEW_CONTROLS = 100  # with fewer, their mean is known to a tenth of a cell's standard deviation, and no better
WITHOUT_COUNTS = "without counts"  # cells that are dropped for it


def without_silent_cells(labels: Perturbations, scanned: Scan, values: Values) -> Perturbations:
    """Labels without cells that have no count, which cannot be normalised: empty droplets or damaged rows."""
    silent = (scanned.totals == 0) & (labels.condition >= 0)
    if values.kind == "continuous" or not silent.any():
        return labels
    condition = np.where(silent, -1, labels.condition)
    return replace(labels, condition=condition, dropped=labels.dropped | {WITHOUT_COUNTS: int(silent.sum())})


@dataclass(frozen=True)
class Selection:
    """Which conditions are fitted and which held out."""

    fitted: np.ndarray  # (conditions,) bool
    held_out: np.ndarray
    notes: list[str]  # why others are neither


def select_conditions(labels: Perturbations, config: DataConfig) -> Selection:
    """Conditions to fit and to hold out.

    InputError if a condition to hold out is not there, or too few controls or perturbations are left.
    """
    counts = np.bincount(labels.condition[labels.condition >= 0], minlength=len(labels.conditions))
    held_out = np.zeros(len(labels.conditions), dtype=bool)

    def is_control(part: str) -> bool:
        return part not in labels.names and (is_named(part, labels.control_labels) or is_control_name(part))

    lookup: dict[frozenset[str], list[int]] = {}
    for c, parts in enumerate(labels.conditions[1:], 1):
        own = {labels.names[i] for i in parts}
        lookup[frozenset(own)] = [c]
        if labels.contexts is not None:  # without its context, in all of them
            lookup.setdefault(frozenset(gene_and_context(name)[0] for name in own), []).append(c)
    by_name = {name: [c] for c, name in enumerate(labels.condition_names) if c}
    known = {name for own in lookup for name in own}
    for label in config.hold_out:
        # "A+ctrl" is "A", as in the column.
        targets = cut_label(label, labels.separator, known, is_control) if labels.separator else [label]
        found = by_name.get(label, lookup.get(frozenset(targets)))
        if found is None:
            hint = f"Labels there are written like {labels.condition_names[-1]!r}."
            raise InputError(f"--hold-out {label!r} is not a perturbation in {labels.key!r}.", hint)
        held_out[found] = True
    if not config.combinations:
        held_out |= np.array([len(parts) > 1 for parts in labels.conditions])
    silent = labels.dropped.get(WITHOUT_COUNTS, 0)
    notes = [] if labels.contexts is None else [*labels.contexts.notes]
    notes += [f"Cells {WITHOUT_COUNTS} are excluded ({silent})."] if silent else []
    dropped = sorted(item for item in labels.dropped.items() if item[0] != WITHOUT_COUNTS)
    notes += [f"Cells labelled {label!r} are excluded ({n})." for label, n in dropped]
    if len(labels.control_labels) > 1:
        notes.append(f"Control cells of several kinds are one group: {few([*map(repr, labels.control_labels)])}.")
    small = (counts < config.min_cells) & ~held_out
    small[0] = False
    if small.any():
        names = [labels.condition_names[c] for c in np.flatnonzero(small)]
        what = f"Perturbations with fewer than {config.min_cells} cells are excluded"
        notes.append(f"{what} ({len(names)}): {few(names)}.")
    fitted = ~held_out & ~small
    if 2 <= counts[0] < FEW_CONTROLS:
        notes.append(
            f"There are only {counts[0]} control cells, and every effect is a difference from their mean: effects are "
            f"uncertain. {FEW_CONTROLS} or more are better."
        )
    crowd = _crowd(labels, counts, small)
    notes += [crowd] if crowd else []
    if counts[0] < 2:
        raise InputError(f"Too few control cells: {counts[0]}.", "At least two are needed, better several hundred.")
    if fitted[1:].sum() < 2:
        what = f"Too few perturbations to fit: {fitted[1:].sum()}; the largest has {counts[1:].max(initial=0)} cells."
        hint = "At least two are needed; see --min-cells, --hold-out and --combinations."
        if crowd:
            what = f"{what} {crowd}"
            hint = (
                f"Two perturbations with {config.min_cells} cells that carry nothing else are needed; see --min-cells."
            )
        raise InputError(what, hint)
    return Selection(fitted, held_out & (counts > 0), notes)


def _crowd(labels: Perturbations, counts: np.ndarray, small: np.ndarray) -> str:
    """A sentence on a screen whose cells carry so many perturbations that most are alone with theirs; else empty."""
    size = np.array(list(map(len, labels.conditions)))
    n_cells, several = counts[1:].sum(), (size > 1) & small
    if 2 * counts[several].sum() <= n_cells:
        return ""
    median = np.median(np.repeat(size[1:], counts[1:]))
    return (
        f"The multiplicity of infection is high: cells carry a median of {median:g} perturbations, and "
        f"{counts[size == 1].sum()} of {n_cells} cells carry one beside control guides."
    )


def read_batches(screen: Screen, key: str | None, labels: Perturbations) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number of each cell's batch (cells,), and names.

    InputError if there is no such column, a labelled cell has no value in it, or no batch has perturbed and control cells.
    """
    if key is None:
        return np.zeros(screen.n_cells, dtype=np.int64), ("all",)
    refuse_missing_column(screen.obs, key, "--batch-key")
    column = screen.obs[key]
    missing = int((column.isna().to_numpy() & (labels.condition >= 0)).sum())
    if missing:
        what = f"Cells without a value in the batch column {key!r}: {missing}."
        raise InputError(what, "Fill them in or drop the cells.")
    codes, names = pd.factorize(column.astype(str), sort=True)
    if not np.isin(codes[labels.condition > 0], codes[labels.condition == 0]).any():
        what = f"No batch of column {key!r} has both control and perturbed cells, so that no effect can be told."
        raise InputError(what, "Choose another --batch-key, or leave it out.")
    return codes.astype(np.int64), tuple(map(str, names))


def lonely_batches(batch: np.ndarray, names: tuple[str, ...], labels: Perturbations, split: np.ndarray) -> list[str]:
    """A sentence on batches without control cells to train on, if there are any."""
    train = split == splits.TRAIN
    controls = np.unique(batch[train & (labels.condition == 0)])
    perturbed = train & (labels.condition > 0)
    lonely = np.setdiff1d(batch[perturbed], controls)
    if not len(lonely):
        return []
    alone = np.setdiff1d(labels.condition[perturbed], labels.condition[perturbed & np.isin(batch, controls)])
    without = [labels.condition_names[c] for c in alone]
    return [
        f"Batches without control cells: {few([names[b] for b in lonely])}. Batch and perturbation effects cannot be"
        " separated there, so their cells are excluded from finding targets and graph"
        + (f"; perturbations found only there get no target: {few(without)}." if without else ".")
    ]
