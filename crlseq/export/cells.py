"""The cells of a run: annotated for scanpy and muon, or labelled as pertpy and GEARS have them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from crlseq.data.files import open_store, readable
from crlseq.data.guides import guide_counts
from crlseq.data.matrix import RAW, as_csr, open_screen
from crlseq.data.names import GeneNames
from crlseq.data.perturbations import read_perturbations
from crlseq.errors import InputError
from crlseq.run.run import Run
from crlseq.storage.hdf5 import hdf5_target, write_h5ad


def h5ad(run: Run, path: Path) -> None:
    """The annotated input, as it lies in the run's folder."""
    run.write_h5ad(run.folder / "crlseq.h5ad", path)


def _read(run: Run) -> ad.AnnData:
    path = run.folder / "crlseq.h5ad"
    with open_store(path), readable(str(path), "the file"):
        return ad.read_h5ad(path)


def _labelled(run: Run) -> tuple[ad.AnnData, list[tuple[str, ...]], list[str]]:
    """Cells that carry a perturbation or are control, log-normalised as for the fit, and what each of them carries."""
    adata, record, facts = _read(run), run.preprocessing, run.facts
    separator = facts.config.data.separator
    labels = read_perturbations(adata.obs, facts.perturbation_key, facts.controls, separator)
    known = np.flatnonzero(labels.condition >= 0)
    left = adata.n_obs - len(known)
    notes = [f"{left} cells carry no known perturbation and are excluded."] if left else []
    adata = adata[known].copy()
    if record.layer == RAW and RAW not in adata.layers:
        annotations = adata.obsm, adata.uns
        adata = adata.raw.to_adata()
        adata.obsm, adata.uns = annotations
    elif record.layer is not None:
        adata.X = adata.layers[record.layer].copy()
    if record.values == "counts":
        counts = as_csr(adata.X)
        adata.layers["counts"] = counts.astype(np.float32)
        adata.X = record.apply(counts).astype(np.float32)
    parts = [tuple(labels.names[i] for i in condition) for condition in labels.conditions]
    return adata, [parts[c] for c in labels.condition[known]], notes


def pertpy(run: Run, path: Path) -> list[str]:
    """``obs["perturbation"]``: ``control``, ``A`` or ``A+B``; ``obs["nperts"]``; counts in ``layers["counts"]``."""
    adata, carried, notes = _labelled(run)
    adata.obs["perturbation"] = pd.Categorical(["+".join(parts) or "control" for parts in carried])
    adata.obs["nperts"] = [len(parts) for parts in carried]
    write_h5ad(adata, path, "gzip")
    return notes


def gears(run: Run, path: Path) -> list[str]:
    """``obs["condition"]``: ``ctrl``, ``A+ctrl`` or ``A+B``; ``obs["cell_type"]`` and ``var["gene_name"]``."""
    adata, carried, notes = _labelled(run)
    few = np.array([len(parts) <= 2 for parts in carried])
    if not few.all():
        notes.append(
            f"{(~few).sum()} cells carry more than two perturbations, which GEARS cannot represent, and are excluded."
        )
        adata, carried = adata[few].copy(), [parts for parts, kept in zip(carried, few, strict=True) if kept]
    adata.obs["condition"] = pd.Categorical(["+".join([*parts, "ctrl"][:2]) if parts else "ctrl" for parts in carried])
    if "cell_type" not in adata.obs:
        adata.obs["cell_type"] = pd.Categorical(["cell"] * adata.n_obs)
    if "gene_name" not in adata.var:
        adata.var["gene_name"] = GeneNames.of(adata.var).symbols.astype(str)
    write_h5ad(adata, path, "gzip")
    return notes


def h5mu(run: Run, path: Path) -> list[str]:
    """``rna`` with crlseq's keys, and ``guide`` with the counts by which cells were assigned, if they were."""
    import mudata

    adata, notes = _read(run), list[str]()
    modalities = {"rna": adata}
    guides = run.facts.guides or {}
    where = next((name for name in ("features", "obsm", "modality") if name in guides), None)
    if where is not None:
        source: Any = run.facts.input.path if where == "modality" else adata
        try:
            with open_screen(source) as screen:
                counts, names, _ = guide_counts(screen, source, guides[where])
        except InputError as error:
            notes.append(f"The guide counts are omitted: {error}")
        else:
            modality = ad.AnnData(counts.astype(np.float32), obs=pd.DataFrame(index=adata.obs_names))
            modality.var_names = names
            modality.var["perturbation"] = [guides["genes"].get(name, "") for name in names]
            modalities["guide"] = modality
    # What became the rule in 0.4, without a warning about it.
    rule = nullcontext() if hasattr(mudata, "settings") else mudata.set_options(pull_on_update=False)
    with rule, hdf5_target(path) as target:
        mudata.write_h5mu(target, mudata.MuData(modalities))
    return notes
