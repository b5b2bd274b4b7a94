"""What is in a file: for ``crlseq check``, before anything is fitted."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from crlseq.config import DataConfig
from crlseq.data import splits
from crlseq.data.contexts import by_context
from crlseq.data.covariates import covariates, in_words
from crlseq.data.design import Selection, lonely_batches, read_batches, select_conditions, without_silent_cells
from crlseq.data.guide_names import recognised
from crlseq.data.guides import GUIDE_LABELS, read_conditions
from crlseq.data.matrix import Screen, open_screen
from crlseq.data.names import GeneNames, targets_in_words
from crlseq.data.perturbations import Perturbations, candidates
from crlseq.data.positions import read_positions
from crlseq.data.store import read_manifest, verify
from crlseq.data.values import Scan, Values, better_layers, scan, values_of
from crlseq.errors import InputError
from crlseq.storage.runfolder import default_output

OPTIONS = (  # that say how labels and values are read
    "guide_key", "guide_counts", "guide_map", "guide_min_umis", "guide_min_share", "perturbation_key", "control_label",
    "separator", "combinations", "layer", "batch_key", "context_key", "values", "min_cells", "gene_positions",
)  # fmt: skip

Batches = tuple[Perturbations, np.ndarray, tuple[str, ...]]  # labels, and batches of the cells within contexts

# A share of cells to judge the fit by, where so many cells a condition (median) are left to fit and to compare with.
HELD_OUT, ENOUGH_CELLS = 0.2, 50


def describe(source: str | Path | ad.AnnData, config: DataConfig) -> dict[str, Any]:
    """Everything that ``crlseq check`` shows, as numbers, strings and lists; problems are listed, not raised.

    InputError if the file cannot be opened as a screen at all, or a prepared store is not what was written.
    """
    if isinstance(source, str | Path) and read_manifest(source) is not None:
        verify(source)
    with open_screen(source, config.layer) as screen:
        found: dict[str, Any] = {
            "file": screen.source, "n_cells": screen.n_cells, "n_genes": screen.n_genes, "layers": list(screen.layers),
            "problems": [], "notes": [*screen.notes],
        }  # fmt: skip
        scanned, values = _describe_values(found, screen, source, config)
        measured = GeneNames.of(screen.var).known
        found["columns"] = [
            {
                "column": c.key, "style": "guides" if recognised(c.names, measured) else c.style, "control": c.control_label, "separator": c.separator,
                "perturbations": len(c.names), "combinations": sum(len(parts) > 1 for parts in c.conditions),
                "control_cells": int(c.is_control.sum()), "why": c.reason,
            }
            for c in candidates(screen.obs)
        ]  # fmt: skip
        labels, guides = _attempt(found, lambda: read_conditions(screen, source, config)) or (None, None)
        if labels is not None and values is not None and scanned is not None:
            labels = without_silent_cells(labels, scanned, values)
            beside = covariates(screen, labels, values, scanned.totals)
            found["covariates"] = [asdict(c) | {"matters": c.matters, "batch": c.looks_like_batch} for c in beside]
            found["batches"] = [row for row in found["covariates"] if row["batch"]]
            found["notes"] += in_words(beside, config.batch_key)
        if labels is not None:
            found["guides"] = None if guides is None else guides.record
            found |= _describe_labels(labels, screen)
            found["positions"] = _attempt(found, lambda: _describe_positions(labels, screen, config))
            batches: Batches | None = _attempt(
                found, lambda: by_context(labels, *read_batches(screen, config.batch_key, labels))
            )
            own = labels if batches is None else batches[0]
            selection = _attempt(found, lambda: select_conditions(own, config))
            if selection is not None:
                found["fitted_conditions"] = int(selection.fitted[1:].sum())
                sizes = np.bincount(own.condition[own.condition >= 0], minlength=len(own.conditions))
                enough = np.median(sizes[1:][selection.fitted[1:]]) >= ENOUGH_CELLS
                found["hold_out_cells"] = HELD_OUT if enough else 0.0
                found["notes"] += selection.notes
                if batches is not None:
                    found["notes"] += _lonely_batches(batches, config, selection)
            if not found["problems"]:
                found["command"] = _command(screen, labels, config, found)
        return found


def _describe_values(
    found: dict[str, Any], screen: Screen, source: str | Path | ad.AnnData, config: DataConfig
) -> tuple[Scan | None, Values | None]:
    """What the matrix holds, and what layers do."""
    scanned: Scan | None = _attempt(found, lambda: scan(screen))
    if scanned is None:
        return None, None
    found["density"] = scanned.n_nonzero / (screen.n_cells * screen.n_genes)
    found["n_silent_cells"] = int((scanned.totals == 0).sum())
    found["n_silent_genes"] = int((scanned.detected == 0).sum())
    found["layers_hold"] = better_layers(source, screen.layers, config.layer)
    values: Values | None = _attempt(found, lambda: values_of(source, screen, scanned, config))
    if values is not None:
        found["values"], found["values_reason"] = values.kind, values.reason
        found["notes"] += filter(None, [values.doubt])
    return scanned, values


def _attempt(found: dict[str, Any], action: Callable[[], Any]) -> Any:
    try:
        return action()
    except InputError as error:
        found["problems"].append(str(error))
        return None


def _describe_labels(labels: Perturbations, screen: Screen) -> dict[str, Any]:
    counts = np.bincount(labels.condition[labels.condition >= 0], minlength=len(labels.conditions))
    names = GeneNames.of(screen.var)
    measured = {name for name, target in zip(labels.names, labels.targets, strict=True) if names.find(target)}
    return {
        "perturbation_key": labels.key,
        "control_label": labels.control_label,
        "control_labels": list(labels.control_labels),
        "separator": labels.separator,
        "label_reason": labels.reason,
        "control_cells": int(counts[0]),
        "cells_per_condition": {name: int(n) for name, n in zip(labels.condition_names[1:], counts[1:], strict=True)},
        "n_singles": sum(len(parts) == 1 for parts in labels.conditions),
        "n_combinations": sum(len(parts) > 1 for parts in labels.conditions),
        "dropped": dict(labels.dropped),
        "targets_reason": targets_in_words(names, labels.targets),
        "targets_measured": [name for name in labels.names if name in measured],
        "targets_not_measured": [name for name in labels.names if name not in measured],
    }


def _describe_positions(labels: Perturbations, screen: Screen, config: DataConfig) -> str | None:
    """How many genes have a position on a chromosome, and from where; None without any."""
    positions = read_positions(screen.var, config.gene_positions)
    return None if positions is None else positions.in_words(GeneNames.of(screen.var), labels.targets)


def _lonely_batches(batches: Batches, config: DataConfig, selection: Selection) -> list[str]:
    """What a fit says of batches without controls, with the split of its first seed."""
    labels, batch, names = batches
    split = splits.split_cells(
        labels.condition, selection.fitted, selection.held_out, config.validation_cells, config.hold_out_cells,
        np.random.default_rng([0, 0]),
    )  # fmt: skip
    return lonely_batches(batch, names, labels, split)


def _command(screen: Screen, labels: Perturbations, config: DataConfig, found: dict[str, Any]) -> str:
    """The fit that reads the labels in this way, of better values and with the batches that there are.

    What is as by default is not said. A batch column is taken if there is one alone that differs in expression, and cells are
    held out where there are enough.
    """
    asked = {name: getattr(config, name) for name in OPTIONS if getattr(config, name) != getattr(DataConfig(), name)}
    if labels.key != GUIDE_LABELS:
        asked |= {"perturbation_key": labels.key, "control_label": labels.control_labels}
        asked |= {} if labels.separator is None else {"separator": labels.separator}
    if found["values"] == "continuous" and found["layers_hold"] and config.values == "auto":
        asked["layer"] = next(iter(found["layers_hold"]))
    batches = [row["column"] for row in found["batches"] if row["matters"]]
    if len(batches) == 1:
        asked.setdefault("batch_key", batches[0])
    words = ["crlseq", "fit", screen.source]
    for name in OPTIONS:
        if name in asked:
            flag, values = f"--{name.replace('_', '-')}", asked[name]
            several = values if isinstance(values, tuple) else (values,)
            words += ["--no-combinations"] if name == "combinations" else [w for v in several for w in (flag, str(v))]
    if held_out := found["hold_out_cells"]:
        words += ["--hold-out-cells", f"{held_out:g}"]
    return shlex.join([*words, "--output", str(default_output(screen.source))])
