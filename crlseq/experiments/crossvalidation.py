"""Five-fold evaluation: a run's configuration is fitted again without the fifth that it must predict, five times.

The fit of a fold is given training cells alone: genes, normalisation, programs, targets, graph and baselines cannot have
seen a cell or condition that is judged. What is held out: of ``cells`` a fifth of every condition that the fold fits; of
``combinations`` a fifth (those that the run itself holds out are in no fold's fit); of ``singles`` a fifth, with every
combination that contains one, which then has 0 or 1 of 2 parts seen and can be judged in several folds. Control cells are
in every fold's fit: predictions start from them, and every change is taken against them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import numpy as np
import pandas as pd

from crlseq.config import Config
from crlseq.data.contexts import gene_and_context
from crlseq.data.design import select_conditions
from crlseq.data.embeddings import COEXPRESSION
from crlseq.data.files import open_store
from crlseq.data.label_rules import JOINED
from crlseq.data.matrix import within
from crlseq.data.perturbations import Perturbations, read_perturbations
from crlseq.errors import InputError, UsageError, suggestion
from crlseq.evaluation.compare import AXIOMS, METRICS, compare, in_words, summarise
from crlseq.evaluation.evaluate import Evaluation, evaluate
from crlseq.pipeline.fit import fit
from crlseq.run.run import Run
from crlseq.storage.runfolder import EMBEDDINGS, GENE_SETS

FOLDS = 5
SPLITS = ("cells", "combinations", "singles")
WITHOUT_CONTEXTS = "crlseq_perturbation_of_any_context"  # column of obs
MIN_HELD_OUT = 2  # cells of a condition that say anything of its mean


class Fold(NamedTuple):
    """Indices of cells: what is fitted, and what is judged; control cells are in ``train`` alone."""

    train: np.ndarray
    judged: np.ndarray


def cross_validate(
    run: Run,
    folds: int = FOLDS,
    splits: Sequence[str] | None = None,
    legacy: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Fit a run's configuration on each fold's training cells and judge it by the others.

    Parameters
    ----------
    splits
        Of `SPLITS`. None takes those that the screen has something to say of: cells; combinations, if there are any;
        and singles, if there are combinations (whose parts are then unseen) or the run has embeddings.
    note
        Called with a line about each fold.

    Returns
    -------
    As from `evaluate`, with a column ``fold`` in ``conditions``. Summary, comparisons and sentences are of the means of
    each condition over its folds. ``predicted`` is empty.

    Raises
    ------
    UsageError
        For an unknown split or fewer than two folds.
    InputError
        If the run has no folder or its screen cannot be read, or nothing is left to hold out.
    """
    if folds < 2:
        raise UsageError(f"{folds} folds were asked for.", "At least two are needed.")
    for name in splits or ():
        if name not in SPLITS:
            raise UsageError(f"There is no split {name!r}.", suggestion(name, SPLITS, "There are"))
    screen, labels = read_screen(run)
    config, controls = fold_config(run, labels), np.flatnonzero(labels.condition == 0)
    chosen = splits or default_splits(run, labels)
    tables, notes = [], [f"{folds} folds; held out: {', '.join(chosen)}."]
    for number, fold in enumerate(make_folds(labels, run, folds, chosen)):
        if not len(fold.judged):
            continue
        with tempfile.TemporaryDirectory(prefix="crlseq-fold-") as folder:
            note(f"fold {number + 1} of {folds}: {len(fold.train)} cells to fit, {len(fold.judged)} to evaluate on")
            refit = fit(screen[fold.train].copy(), Path(folder) / "RUN", config=config)
            found = evaluate(refit, screen[np.union1d(controls, fold.judged)].copy(), legacy)
        tables.append(found.conditions.assign(fold=number))
        notes += [text for text in found.notes if text not in notes and not text.startswith("Never fitted")]
        note(f"  {refit.facts.n_latents} programs; {'; '.join(found.verdict[:1])}")
    if not tables:
        raise InputError("There is nothing to hold out.", "Choose other --splits.")
    table: pd.DataFrame = pd.concat(tables, ignore_index=True)
    means, seed = over_folds(table), run.facts.seed
    comparisons = compare(means, seed)
    return Evaluation(table, summarise(means, seed), comparisons, in_words(comparisons), tuple(notes), {})


def over_folds(table: pd.DataFrame) -> pd.DataFrame:
    """Means of each condition over the folds that judge it; a row a group, condition and predictor."""
    keys = ["condition", "group", "predictor"]
    grouped = table.groupby(keys, sort=False, observed=True)
    means = grouped[[metric for metric in (*METRICS, *AXIOMS) if metric in table]].mean()
    return pd.concat([grouped["n_cells"].sum(), means], axis=1).reset_index()


def make_folds(labels: Perturbations, run: Run, folds: int, splits: Sequence[str]) -> list[Fold]:
    """Which cells each fold fits and judges: none does both, and all cells of a condition held out whole are judged."""
    rng = np.random.default_rng([run.facts.seed, 11])
    selection = select_conditions(labels, run.config.data)
    order = np.array([len(parts) for parts in labels.conditions])
    never = selection.held_out & (order > 0)  # by the run itself
    usable = (selection.fitted & (order > 0)) | never
    singles = np.flatnonzero(usable & (order == 1) & ~never) if "singles" in splits else np.zeros(0, np.int64)
    of_part = {labels.conditions[c][0]: i % folds for i, c in enumerate(rng.permutation(singles))}
    whole_ones = usable & ((order > 1) | never) if "combinations" in splits else never
    of_condition = np.full(len(order), -1)
    load = np.zeros(folds, dtype=np.int64)
    for c in rng.permutation(np.flatnonzero(whole_ones)):
        # In a fold that sees its parts, if there is one: where they are lost it is judged as well, without them.
        lost_in = {of_part.get(part, -1) for part in labels.conditions[c]}
        free = [f for f in range(folds) if f not in lost_in] or list(range(folds))
        of_condition[c] = min(free, key=lambda f: load[f])
        load[of_condition[c]] += 1
    cell_fold = np.full(len(labels.condition), -1)
    for c in np.flatnonzero(usable & ~never) if "cells" in splits else ():
        own = rng.permutation(np.flatnonzero(labels.condition == c))
        cell_fold[own] = (np.arange(len(own)) + rng.integers(folds)) % folds
    plan = []
    for f in range(folds):
        lost = np.array([any(of_part.get(part) == f for part in parts) for parts in labels.conditions])
        whole = usable & ((of_condition == f) | lost)
        fitted = usable & ~whole & ~never
        here = labels.condition >= 0
        condition = np.where(here, labels.condition, 0)
        out = here & whole[condition]
        tested = here & fitted[condition] & (cell_fold == f)
        train = here & (fitted[condition] | (labels.condition == 0)) & ~tested
        plan.append(Fold(np.flatnonzero(train), np.flatnonzero(out | tested)))
    return plan


def default_splits(run: Run, labels: Perturbations) -> tuple[str, ...]:
    """See `cross_validate`."""
    if any(len(parts) > 1 for parts in labels.conditions):
        return SPLITS
    return ("cells", "singles") if run.facts.embeddings is not None else ("cells",)


def fold_config(run: Run, labels: Perturbations) -> Config:
    """The run's configuration for cells that are all to be fitted, with the labels read as they were."""
    config = run.config
    data = config.data.model_copy(update={
        "perturbation_key": fitted_key(run), "guide_key": None, "guide_counts": None, "guide_map": None,
        "gene_positions": None,
        "control_label": run.facts.controls,
        "separator": labels.separator or "", "min_cells": MIN_HELD_OUT, "hold_out": (), "hold_out_cells": 0.0,
        "combinations": True,
        "embeddings": config.data.embeddings  # of co-expression each fold makes its own
        if config.data.embeddings in (None, COEXPRESSION)
        else str(run.folder / EMBEDDINGS),
        "gene_sets": None if config.data.gene_sets is None else str(run.folder / GENE_SETS),
    })  # fmt: skip
    return config.model_copy(update={"data": data})


def fitted_key(run: Run) -> str:
    """The column of labels that a fold is fitted by: without contexts, which the fit adds."""
    return run.facts.perturbation_key if run.facts.contexts is None else WITHOUT_CONTEXTS


def read_screen(run: Run) -> tuple[ad.AnnData, Perturbations]:
    """The screen that a run folder holds, without what the fit added, and its labels. Where these are by context, a column
    `WITHOUT_CONTEXTS` has them without.
    """
    path = run.folder / "crlseq.h5ad"
    try:
        with open_store(path):  # which refuses what reading would never end in
            screen = ad.read_h5ad(path)
        # Folds are cut from all of these by compiled code.
        for matrix in (screen.X, screen.raw and screen.raw.X, *screen.layers.values(), *screen.obsm.values()):
            within(matrix)
    except Exception as error:  # h5py and anndata raise almost every type for damaged files
        why = (error.message if isinstance(error, InputError) else str(error)).rstrip(".")
        raise InputError(f"{path} cannot be read: {why}.", "Restore it, or fit again.") from error
    for slot, name in (("obs", "crlseq_split"), ("obsm", "X_crlseq"), ("varm", "crlseq_programs"), ("uns", "crlseq")):
        if name in getattr(screen, slot):
            del getattr(screen, slot)[name]
    key, control = run.facts.perturbation_key, run.facts.controls
    labels = read_perturbations(screen.obs, key, control, run.facts.config.data.separator)
    if run.facts.contexts is not None:
        mark = labels.separator or JOINED
        of_gene = {
            text: mark.join(gene_and_context(part)[0] or part for part in text.split(mark))
            for text in screen.obs[key].astype(str).unique()
        }
        screen.obs[WITHOUT_CONTEXTS] = screen.obs[key].astype(str).map(of_gene).where(screen.obs[key].notna())
    return screen, labels
