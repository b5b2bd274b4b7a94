"""Scores against the truth that a simulated screen carries: ``uns["truth"]`` and ``obsm["true_latents"]``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from crlseq.data.matrix import open_store, readable
from crlseq.errors import InputError
from crlseq.evaluation.recovery import score_recovery
from crlseq.run.run import Run

PLACES = (("uns", "truth"), ("obsm", "true_latents"))


def known_recovery(run: Run, data: str | Path | ad.AnnData | None) -> tuple[dict[str, float] | None, list[str]]:
    """`score_recovery` of a run and notes; None where neither `data` nor the run's own file has a truth.

    Latents are those of every cell of that file, none if it has no true ones: they are read off cells alike, fitted or not.
    """
    for source in (data, run.path and run.path / "crlseq.h5ad"):
        if source is None:
            continue
        truth, true_latents = _read(source)
        if truth is None:
            continue
        if not _is_truth(truth):
            return None, ["uns['truth'] is not in the format of `crlseq simulate` and is ignored."]
        notes, latents = [], None
        try:
            latents = None if true_latents is None else run.latents(source)
        except InputError as error:  # genes are missing: targets and graph can be scored all the same
            notes.append(f"No latents are scored: {error.message}")
        return score_recovery(run.interventions, run.edges, truth, latents, true_latents), notes
    return None, []


def _read(source: str | Path | ad.AnnData) -> tuple[Any, np.ndarray | None]:
    if isinstance(source, ad.AnnData):
        return source.uns.get("truth"), source.obsm.get("true_latents")
    with open_store(Path(source)) as store, readable(str(source), "the truth"):
        truth, latents = (
            ad.io.read_elem(store[slot][name]) if slot in store and name in store[slot] else None
            for slot, name in PLACES
        )
    return truth, latents


def _is_truth(truth: Any) -> bool:
    if not isinstance(truth, Mapping) or not {"adjacency", "target"} <= truth.keys():
        return False
    shape, target = np.shape(truth["adjacency"]), truth["target"]
    square = len(shape) == 2 and shape[0] == shape[1]
    return square and isinstance(target, pd.DataFrame) and "latent" in target
