"""The columns that ``--covariates`` asks for: read, computed where they are no columns, and refused where they tell nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from crlseq.config import DataConfig
from crlseq.data.cell_cycle import cell_cycle_scores, phases
from crlseq.data.covariates import BATCH, CONTEXT, DEPTH, MAX_NUMBERS, OUTCOME, SMALLEST_LEVEL, role_of, same
from crlseq.data.matrix import Screen
from crlseq.data.perturbations import Perturbations, refuse_missing_column
from crlseq.data.preprocess import Preprocessing
from crlseq.errors import InputError, UsageError, few

CELL_CYCLE = "cell-cycle"  # which is computed, as `DEPTH` is, unless it is a column
CONTROLS_PER_SLOPE = 10  # fewer tell no slope (Peduzzi et al. 1996, J Clin Epidemiol 49)
DROP = "Leave it out of --covariates."


@dataclass(frozen=True)
class Column:
    """A covariate: ``values`` (cells,) are numbers, or numbers of `levels`; NaN or -1 in cells without a label."""

    name: str
    levels: tuple[str, ...]  # none of numbers
    values: np.ndarray
    outcome: bool  # a perturbation can change it


def read_columns(
    screen: Screen, config: DataConfig, labels: Perturbations, record: Preprocessing, totals: np.ndarray
) -> tuple[Column, ...]:
    """The columns that are asked for; ``totals`` (cells,) of all values. InputError for one that cannot be used."""
    asked = [*_names(screen.obs, config.covariates)]
    if not asked and config.remove_covariate_effects:
        raise UsageError("--remove-covariate-effects needs covariates.", "Name them: --covariates A,B.")
    used = np.flatnonzero(labels.condition >= 0)
    columns: list[Column] = []
    for name in asked:
        if name in screen.obs:
            columns.append(_of_column(screen.obs[name], name, used))
        elif name == DEPTH:
            if record.values != "counts":
                what = f"{DEPTH} is that of counts, and the values here are {record.values}."
                raise InputError(what, "Name a column of obs with the cells' totals instead.")
            columns.append(Column(name, (), np.log(np.maximum(totals, 1.0)), False))
        elif name == CELL_CYCLE:
            scores = cell_cycle_scores(screen, record, used, labels.targets)
            columns += [Column(phase, (), values, True) for phase, values in scores.items()]
            phase = pd.Series(phases(*scores.values()))
            if (phase[labels.condition == 0].value_counts() >= SMALLEST_LEVEL).sum() == phase.iloc[used].nunique() > 1:
                columns.append(_of_column(phase, "phase", used))
        else:
            refuse_missing_column(screen.obs, name, f"--covariates (which also takes {CELL_CYCLE} and {DEPTH})")
    for name in (column.name for column in columns):
        if sum(column.name == name for column in columns) > 1:
            raise UsageError(f"--covariates names {name!r} twice.", "Name it once.")
    for column in columns:
        _refuse(column, screen, config, labels, used)
    n, n_controls = sum(max(len(column.levels) - 1, 1) for column in columns), int((labels.condition == 0).sum())
    if n * CONTROLS_PER_SLOPE > n_controls:
        what = f"The covariates have {n} numbers and levels to compare, too many for {n_controls} control cells."
        raise InputError(what, f"Name fewer, or join levels: each needs {CONTROLS_PER_SLOPE} control cells.")
    for column in columns:
        _refuse_without_controls(column, labels, used)
    return tuple(columns)


def _names(obs: pd.DataFrame, given: tuple[str, ...]) -> Iterator[str]:
    """Each that is no column as it stands is a list with commas."""
    for text in given:
        yield from [text] if text in obs else filter(None, map(str.strip, text.split(",")))


def _of_column(column: pd.Series, name: str, used: np.ndarray) -> Column:
    """Numbers, unless they are few whole ones and by the column's name count batches, clusters or contexts."""
    part, role = column.iloc[used], role_of(name)
    missing = int(part.isna().sum())
    if missing:
        what = f"Cells without a value in the covariate {name!r}: {missing}."
        raise InputError(what, "Fill them in, drop the cells, or leave it out of --covariates.")
    numeric = pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype)
    if numeric:
        numbers = part.to_numpy(float)
        if not np.isfinite(numbers).all():
            what = f"Cells whose covariate {name!r} is infinite: {int((~np.isfinite(numbers)).sum())}."
            raise InputError(what, "Replace these values or drop the cells.")
        whole = np.array_equal(numbers, np.rint(numbers)) and len(np.unique(numbers)) <= MAX_NUMBERS
        if not (whole and role in (BATCH, CONTEXT, OUTCOME)):
            values = np.full(len(column), np.nan)
            values[used] = numbers
            return Column(name, (), values, role == OUTCOME)
    codes, levels = pd.factorize(part.astype(str), sort=True)
    values = np.full(len(column), -1)
    values[used] = codes
    return Column(name, tuple(map(str, levels)), values, role == OUTCOME)


def _refuse(column: Column, screen: Screen, config: DataConfig, labels: Perturbations, used: np.ndarray) -> None:
    """InputError for a covariate that is constant, or that batches or labels say all of."""
    name, own, condition = column.name, column.values[used], labels.condition[used]
    if np.ptp(own) == 0:
        raise InputError(f"The covariate {name!r} is the same in every cell.", DROP)
    if name == labels.key:
        raise InputError(f"The covariate {name!r} is the column of perturbations.", DROP)
    for option, key in (("--batch-key", config.batch_key), ("--context-key", config.context_key)):
        if key is not None and key in screen.obs and _follows(own, screen.obs[key].astype(str).to_numpy()[used]):
            what = f"The covariate {name!r} is the same in all cells of one {key!r}, whose cells are compared apart."
            raise InputError(what, f"{DROP} {option} {key} takes it off.")
    told = f"The covariate {name!r} and the perturbation tell each other: no effect can be told from it."
    if _follows(own, condition) or (column.levels and same(own, condition)):
        raise InputError(told, DROP)


def _refuse_without_controls(column: Column, labels: Perturbations, used: np.ndarray) -> None:
    """InputError for a covariate whose effect control cells do not tell."""
    name, own, condition = column.name, column.values[used], labels.condition[used]
    controls = own[condition == 0]
    if column.levels:
        counts = np.bincount(controls, minlength=len(column.levels))
        few_controls = [level for level, n in zip(column.levels, counts, strict=True) if n < SMALLEST_LEVEL]
        if few_controls:
            what = (
                f"Levels of the covariate {name!r} with fewer than {SMALLEST_LEVEL} control cells: {few(few_controls)}."
            )
            raise InputError(
                what, f"What they do cannot be told from perturbations: join levels or drop the cells. {DROP}"
            )
    elif np.ptp(controls) == 0:
        raise InputError(f"The covariate {name!r} is the same in every control cell.", DROP)
    elif own[condition > 0].min() > controls.max() or own[condition > 0].max() < controls.min():
        what = f"The covariate {name!r} tells control cells from all others: their ranges do not meet."
        raise InputError(what, f"No effect can be told from it. {DROP}")


def _follows(values: np.ndarray, groups: np.ndarray) -> bool:
    """Whether the values are a function of the groups."""
    return bool((pd.Series(values).groupby(groups).nunique() == 1).all())
