"""A screen in two halves that share no guide, or no batch, each fitted as the run was: what is found twice replicates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from crlseq.data.perturbations import Perturbations, read_perturbations
from crlseq.errors import InputError, UsageError, few, suggestion
from crlseq.experiments.crossvalidation import fitted_key, fold_config, read_screen
from crlseq.pipeline.fit import fit
from crlseq.pipeline.fitted import FittedRun
from crlseq.run.run import Run

HALVES = ("guides", "batches")
MIN_CELLS = 5  # of a guide or batch that counts


def fit_halves(
    run: Run,
    by: str,
    column: str | None = None,
    folder: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[FittedRun, FittedRun]:
    """Fit both halves of a run's screen with its configuration, into ``folder``/half-1 and half-2, or in memory.

    ``by`` guides, the cells of each perturbation are divided by their guides, so that no guide is in both halves; a perturbation
    with one guide is in neither. By batches, whole batches are divided. ``column`` of obs has the guides or batches; by default
    the run's own, or the one column each of whose values lies within one perturbation. Control cells without several guides
    are divided at random.

    UsageError for another ``by``; InputError if there is no such column, or too little in it to divide.
    """
    if by not in HALVES:
        raise UsageError(f"There is no split {by!r}.", suggestion(by, HALVES, "There are"))
    screen, labels = read_screen(run)
    if run.facts.contexts is not None:  # a guide is in one half in all contexts
        labels = read_perturbations(screen.obs, fitted_key(run), run.facts.controls, labels.separator or "")
    known = run.config.data.guide_key if by == "guides" else run.config.data.batch_key
    key = column or known or (_guide_column(screen.obs, labels) if by == "guides" else None)
    if key is None or key not in screen.obs:
        wanted = "no column of guides was found" if key is None and by == "guides" else "there is no batch column"
        wanted = wanted if key is None else f"there is no column {key!r}"
        raise InputError(f"{run.folder}: {wanted}.", f"Name the column of {by} with --split-key.")
    groups = screen.obs[key].astype(str).to_numpy()
    half = by_guides(groups, labels, run.facts.seed) if by == "guides" else _by_batches(groups, labels)
    config = fold_config(run, labels)
    config = config.model_copy(update={"data": config.data.model_copy(update={"min_cells": run.config.data.min_cells})})
    fits = []
    for number in (0, 1):
        own = np.flatnonzero(half == number)
        note(f"half {number + 1} of 2: {len(own)} cells, {by} by {key!r}")
        output = None if folder is None else folder / f"half-{number + 1}"
        fits.append(fit(screen[own].copy(), output, config=config))
    return fits[0], fits[1]


def by_guides(groups: np.ndarray, labels: Perturbations, seed: int) -> np.ndarray:
    """(cells,) half of each cell, -1 in none; ``groups`` (cells,) its guide."""
    half = np.full(len(groups), -1)
    rng = np.random.default_rng([seed, 17])
    for c in range(len(labels.conditions)):
        own = np.flatnonzero(labels.condition == c)
        names, counts = np.unique(groups[own], return_counts=True)
        names, counts = names[counts >= MIN_CELLS], counts[counts >= MIN_CELLS]
        if len(names) > 1:
            sides = dict(zip(names, divided(counts), strict=True))
            half[own] = [sides.get(name, -1) for name in groups[own]]
        elif c == 0:
            half[own] = rng.permutation(len(own)) % 2
    told = [c for c, parts in enumerate(labels.conditions) if parts and (half[labels.condition == c] >= 0).any()]
    if len(told) < 2:
        raise InputError(
            f"{len(told)} perturbations have two guides with {MIN_CELLS} cells or more each.",
            "At least two are needed.",
        )
    return half


def _by_batches(groups: np.ndarray, labels: Perturbations) -> np.ndarray:
    """The same of whole batches."""
    used = labels.condition >= 0
    names, counts = np.unique(groups[used], return_counts=True)
    if len(names) < 2:
        raise InputError(
            f"All cells are of the batch {few([*map(str, names)], 1)}.", "At least two batches are needed."
        )
    sides = dict(zip(names, divided(counts), strict=True))
    half = np.array([sides.get(name, -1) for name in groups])
    half[~used] = -1
    if min((half[labels.condition == 0] == number).sum() for number in (0, 1)) < MIN_CELLS:
        raise InputError("One half of the batches has no control cells.", "Divide the screen by guides.")
    return half


def divided(counts: np.ndarray) -> np.ndarray:
    """A side 0 or 1 for each group, largest first to the side with fewer cells."""
    side, load = np.zeros(len(counts), dtype=np.int64), [0, 0]
    for k in np.argsort(-counts, kind="stable"):
        side[k] = int(load[1] < load[0])
        load[side[k]] += int(counts[k])
    return side


def _guide_column(obs: pd.DataFrame, labels: Perturbations) -> str | None:
    """The column whose values each lie within one condition, with several for most of them; None without one."""
    used = labels.condition >= 0
    found = []
    for name in obs:
        values = obs[name][used]
        if pd.api.types.is_numeric_dtype(values) or values.isna().any() or values.nunique() > used.sum() / MIN_CELLS:
            continue
        pairs = pd.DataFrame({"value": values.astype(str), "condition": labels.condition[used]}).drop_duplicates()
        if pairs["value"].is_unique and (pairs["condition"].value_counts() > 1).mean() > 1 / 2:
            found.append(str(name))
    return found[0] if len(found) == 1 else None
