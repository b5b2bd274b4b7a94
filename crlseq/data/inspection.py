"""What is in a file: for ``crlseq check``, before anything is fitted."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from crlseq.config import DataConfig
from crlseq.data.dataset import select_conditions
from crlseq.data.guide_names import recognised
from crlseq.data.guides import GUIDE_LABELS, measured_names, read_labels
from crlseq.data.matrix import Screen, open_screen, scan
from crlseq.data.perturbations import Perturbations, candidates
from crlseq.data.preprocess import kind_of_values, refuse_silent_cells
from crlseq.data.store import read_manifest, verify
from crlseq.errors import InputError

BATCH_WORDS = ("batch", "rep", "donor", "lane", "gem_group", "plate", "sample", "library", "channel")
SYMBOL_COLUMNS = ("gene_name", "gene_symbol", "gene_symbols", "gene_short_name", "feature_name", "symbol")
MAX_BATCHES = 100
OPTIONS = (  # that say how labels and values are read
    "guide_key", "guide_counts", "guide_map", "guide_min_umis", "guide_min_share", "perturbation_key", "control_label",
    "separator", "combinations", "layer", "batch_key", "values", "min_cells",
)  # fmt: skip


def describe(source: str | Path | ad.AnnData, config: DataConfig) -> dict[str, Any]:
    """Everything that ``crlseq check`` shows, as numbers, strings and lists; problems are listed, not raised.

    InputError if the file cannot be opened as a screen at all, or a prepared store is not what was written.
    """
    if isinstance(source, str | Path) and read_manifest(source) is not None:
        verify(source)
    with open_screen(source, config.layer) as screen:
        found: dict[str, Any] = {
            "file": screen.source, "n_cells": screen.n_cells, "n_genes": screen.n_genes, "layers": list(screen.layers),
            "problems": [],
        }  # fmt: skip
        scanned = _attempt(found, lambda: scan(screen))
        if scanned is not None:
            found["density"] = scanned.n_nonzero / (screen.n_cells * screen.n_genes)
            found["n_silent_cells"] = int((scanned.totals == 0).sum())
            found["n_silent_genes"] = int((scanned.detected == 0).sum())
            kind = _attempt(found, lambda: kind_of_values(scanned, screen.source, config.values))
            if kind is not None:
                found["values"], found["values_reason"] = kind
        measured = measured_names(screen)
        found["columns"] = [
            {
                "column": c.key, "style": "guides" if recognised(c.names, measured) else c.style, "control": c.control_label, "separator": c.separator,
                "perturbations": len(c.names), "combinations": sum(len(parts) > 1 for parts in c.conditions),
                "control_cells": int(c.is_control.sum()), "why": c.reason,
            }
            for c in candidates(screen.obs)
        ]  # fmt: skip
        found["batches"] = _batch_columns(screen)
        labels, guides = _attempt(found, lambda: read_labels(screen, source, config)) or (None, None)
        if labels is not None:
            found["guides"] = None if guides is None else guides.record
            found |= _describe_labels(labels, screen)
            selection = _attempt(found, lambda: select_conditions(labels, config))
            if selection is not None:
                found["fitted_conditions"] = int(selection.fitted[1:].sum())
                found["left_out"] = selection.notes
                used = np.append(selection.fitted | selection.held_out, False)[labels.condition]
                if scanned is not None and found.get("values", "continuous") != "continuous":
                    _attempt(found, lambda: refuse_silent_cells(screen, scanned, used))
            if not found["problems"]:
                found["command"] = _command(screen, labels, config)
        return found


def _attempt(found: dict[str, Any], action: Callable[[], Any]) -> Any:
    try:
        return action()
    except InputError as error:
        found["problems"].append(str(error))
        return None


def _describe_labels(labels: Perturbations, screen: Screen) -> dict[str, Any]:
    counts = np.bincount(labels.condition[labels.condition >= 0], minlength=len(labels.conditions))
    # Names in the index, and symbols where a column beside Ensembl identifiers has them.
    symbols = [screen.var[key].dropna().astype(str) for key in screen.var.columns if key in SYMBOL_COLUMNS]
    measured = {*screen.genes, *(name for column in symbols for name in column)}
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
        "targets_measured": [name for name in labels.names if name in measured],
        "targets_not_measured": [name for name in labels.names if name not in measured],
    }


def _batch_columns(screen: Screen) -> list[dict[str, Any]]:
    """Columns named like batches with a few levels."""
    found = []
    for key in screen.obs.columns:
        if any(word in str(key).casefold().split("_") for word in BATCH_WORDS):
            counts = pd.Series(np.asarray(screen.obs[key].astype(str))).value_counts()
            if 2 <= len(counts) <= MAX_BATCHES:
                found.append({"column": str(key), "levels": len(counts), "smallest": int(counts.min())})
    return found


def _command(screen: Screen, labels: Perturbations, config: DataConfig) -> str:
    """The fit that reads the labels in this way; what is as by default is not said."""
    asked = {name: getattr(config, name) for name in OPTIONS if getattr(config, name) != getattr(DataConfig(), name)}
    if labels.key != GUIDE_LABELS:
        asked |= {"perturbation_key": labels.key, "control_label": labels.control_labels}
        asked |= {} if labels.separator is None else {"separator": labels.separator}
    words = ["crlseq", "fit", screen.source]
    for name in OPTIONS:
        if name in asked:
            flag, values = f"--{name.replace('_', '-')}", asked[name]
            several = values if isinstance(values, tuple) else (values,)
            words += ["--no-combinations"] if name == "combinations" else [w for v in several for w in (flag, str(v))]
    name = Path(screen.source).stem if Path(screen.source).suffix else "screen"
    return shlex.join([*words, "--output", f"{name}-run"])
