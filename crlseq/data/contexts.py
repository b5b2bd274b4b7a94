"""Contexts: cells of one screen that were handled otherwise (stimulation, drug, time, cell line), told by a column.

A perturbation in a context is a perturbation of its own, ``STAT1@stim``, of the same gene; a cell is compared with controls
of its own context. Programs and decoder are shared by all contexts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from crlseq.config import DataConfig
from crlseq.data.label_rules import GUIDE_LABELS, JOINED, Contexts, Ints, Perturbations
from crlseq.data.perturbations import refuse_missing_column
from crlseq.errors import InputError, UsageError, few

MARK = "@"  # between a perturbation and its context
ENOUGH_CONTROLS = 20  # to train on: as many as centre a batch on its own (`crlseq.discovery.components`)
MOST = 20  # contexts
ANOTHER = "Name another column with --context-key, or leave it out."


def in_contexts(labels: Perturbations, obs: pd.DataFrame, config: DataConfig) -> Perturbations:
    """Perturbations by context; the labels as they are where no column of contexts is named.

    A context with fewer than `ENOUGH_CONTROLS` control cells to train on is left out. UsageError if the column is that of
    perturbations or of batches; InputError if it is not there, lacks values, has one level or more than `MOST`, is a
    function of the labels or the batches over again, or fewer than two contexts are left.
    """
    key = config.context_key
    if key is None:
        return labels
    if key in (labels.key, config.guide_key):
        raise UsageError(f"The context column {key!r} holds the perturbations.", ANOTHER)
    if key == config.batch_key:
        hint = "Batches are removed and contexts compared: name it with one of the two options."
        raise UsageError(f"The column {key!r} was given for batches and for contexts.", hint)
    refuse_missing_column(obs, key, "--context-key")
    names, code = levels_of(obs[key])
    code = np.where(labels.condition >= 0, code, -1)
    if missing := int(((code < 0) & (labels.condition >= 0)).sum()):
        what = f"Cells without a value in the context column {key!r}: {missing}."
        raise InputError(what, "Fill them in or drop the cells.")
    names, code = _used(names, code)
    _refuse_no_context(key, names, code, labels)
    if config.batch_key is not None and config.batch_key in obs:
        batches = pd.factorize(obs[config.batch_key].astype(str))[0][code >= 0]
        if len({*zip(batches, code[code >= 0], strict=True)}) == len(names) == len({*batches}):
            what = f"The context column {key!r} has the same groups of cells as the batch column {config.batch_key!r}."
            raise InputError(what, "Leave out --batch-key: each context has controls of its own.")
    mark = config.separator or JOINED
    for torn, texts in ((MARK, names), (mark, [*names, *labels.names])):
        if name := next((text for text in texts if torn in text), None):
            what = f"The name {name!r} contains {torn!r}, which separates perturbations and contexts."
            raise InputError(what, "Rename it.")
    trained = max(1 - config.validation_cells - config.hold_out_cells, 0.05)
    least = math.ceil(ENOUGH_CONTROLS / trained)
    return _crossed(labels, key, names, code, mark, least)


def gene_and_context(name: str) -> tuple[str, str]:
    """``STAT1@stim`` -> ``STAT1``, ``stim``."""
    gene, _, context = name.rpartition(MARK)
    return gene, context


def by_context(
    labels: Perturbations, batch: Ints, names: tuple[str, ...]
) -> tuple[Perturbations, Ints, tuple[str, ...]]:
    """Labels, batches (cells,) within contexts, and their names; as they are without contexts.

    Batches with too few controls in a context count as one there. Where these are too few together, their cells take no part:
    controls of another context are no comparison.
    """
    contexts = labels.contexts
    if contexts is None:
        return labels, batch, names
    n = len(names)
    stratum = np.where(contexts.number >= 0, contexts.number * n + batch, -1)
    controls = np.bincount(stratum[labels.condition == 0], minlength=len(contexts.names) * n).reshape(-1, n)
    place = np.arange(controls.size).reshape(controls.shape)
    titles = [f"{name}, {context}" if n > 1 else context for context in contexts.names for name in names]
    lost = []
    for c, context in enumerate(contexts.names):
        thin = np.flatnonzero(controls[c] < contexts.least)
        if controls[c, thin].sum() >= contexts.least:
            place[c, thin] = place[c, thin[0]]
            titles[place[c, thin[0]]] = f"small batches, {context}" if len(thin) > 1 else titles[place[c, thin[0]]]
        elif len(thin):
            lost += [titles[i] for i in place[c, thin] if (stratum[labels.condition > 0] == i).any()]
            place[c, thin] = -1
    found = np.append(place.ravel(), -1)[stratum]
    kept, number = np.unique(found, return_inverse=True)
    notes = contexts.notes
    if lost:
        notes = (*notes, f"Batches with fewer than {contexts.least} control cells in a context are left out there: {few(lost)}.")  # fmt: skip
    condition = np.where(found < 0, np.where(labels.condition < 0, labels.condition, -1), labels.condition)
    labels = replace(labels, condition=condition, contexts=replace(contexts, notes=notes))
    return labels, number.astype(np.int64), tuple("none" if i < 0 else titles[i] for i in kept)


def levels_of(column: pd.Series) -> tuple[list[str], Ints]:
    """Levels as text, categories in their order, numbers by size and others sorted; each cell's level, -1 missing."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        levels, code = list(column.cat.categories), column.cat.codes.to_numpy()
    else:
        code, found = pd.factorize(column, sort=pd.api.types.is_numeric_dtype(column.dtype))
        levels = list(found)
    texts = [f"{value:g}" if isinstance(value, float | np.floating) else str(value).strip() for value in levels]
    order = texts if isinstance(column.dtype, pd.CategoricalDtype) or pd.api.types.is_numeric_dtype(column.dtype) else sorted(texts)  # fmt: skip
    names = list(dict.fromkeys(order))
    number = np.array([*(names.index(text) for text in texts), -1], dtype=np.int64)
    return names, number[code]


def _used(names: list[str], code: Ints) -> tuple[list[str], Ints]:
    """The levels that cells have."""
    kept, number = np.unique(code[code >= 0], return_inverse=True)
    renumbered = code.copy()
    renumbered[code >= 0] = number
    return [names[i] for i in kept], renumbered


def _refuse_no_context(key: str, names: list[str], code: Ints, labels: Perturbations) -> None:
    """Refuse levels that are no contexts of these perturbations."""
    if len(names) < 2:
        raise InputError(f"The context column {key!r} has one level, {names[0]!r}.", ANOTHER)
    if len(names) > MOST:
        what = f"The context column {key!r} has {len(names)} levels; at most {MOST} are compared."
        raise InputError(what, ANOTHER)
    pairs = np.unique(np.stack([labels.condition, code])[:, labels.condition > 0], axis=1)
    if len(np.unique(pairs[0])) == pairs.shape[1]:
        what = f"The context column {key!r} tells nothing beside the labels: each perturbation is in one context alone."
        raise InputError(what, ANOTHER)


def _crossed(labels: Perturbations, key: str, names: list[str], code: Ints, mark: str, least: int) -> Perturbations:
    """Labels of perturbations by context, of contexts with at least so many control cells."""
    controls = np.bincount(code[labels.condition == 0], minlength=len(names))
    perturbed = np.bincount(code[labels.condition > 0], minlength=len(names))
    thin = [f"{name} ({controls[c]} control and {perturbed[c]} perturbed cells)" for c, name in enumerate(names) if controls[c] < least]  # fmt: skip
    if len(names) - len(thin) < 2:
        what = f"Fewer than two contexts of column {key!r} have the {least} control cells that are needed: {few(thin)} have fewer."
        raise InputError(what, "A perturbation is compared with controls of its own context: choose another column.")
    names, code = _used(names, np.where(np.append(controls >= least, False)[code], code, -1))
    condition = np.where(code < 0, -1, labels.condition)
    pairs, place = np.unique(np.stack([condition, code])[:, condition > 0], axis=1, return_inverse=True)
    own = [tuple(f"{labels.names[i]}{MARK}{names[c]}" for i in labels.conditions[k]) for k, c in pairs.T]
    gene = {f"{labels.names[i]}{MARK}{names[c]}": labels.targets[i] for k, c in pairs.T for i in labels.conditions[k]}
    singles = sorted(gene)
    number = {name: i for i, name in enumerate(singles)}
    members = [tuple(sorted(number[part] for part in parts)) for parts in own]
    conditions = [(), *sorted(members, key=lambda parts: (len(parts), parts))]
    rank = {parts: c for c, parts in enumerate(conditions)}
    crossed = condition.copy()
    crossed[condition > 0] = np.array([rank[parts] for parts in members])[place.ravel()]
    control = labels.control_label
    titles = (control, *(mark.join(singles[i] for i in parts) for parts in conditions[1:]))
    each = [f"'{name}' ({n} control cells)" for name, n in zip(names, controls[controls >= least], strict=True)]
    told = f"{', '.join(each[:-1])} and {each[-1]}"
    notes = (f"Contexts with fewer than {least} control cells are left out: {few(thin)}.",) if thin else ()
    return replace(
        labels, key=GUIDE_LABELS, separator=mark if any(len(parts) > 1 for parts in conditions) else None,
        reason=f"{labels.reason} Column '{key}' holds the contexts {told}; A{MARK}{names[0]} is the perturbation A in {names[0]}.",
        names=tuple(singles), targets=tuple(gene[name] for name in singles), conditions=tuple(conditions),
        condition_names=titles, condition=crossed, contexts=Contexts(key, tuple(names), code, least, notes),
    )  # fmt: skip
