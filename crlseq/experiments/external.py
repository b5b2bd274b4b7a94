"""Methods of other packages, where these are installed: programs alone, to which perturbations are assigned as by varimax."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import issparse

from crlseq.data.simulate import CONTROL
from crlseq.discovery.factor_result import mean_shifts
from crlseq.errors import UsageError
from crlseq.evaluation import recovery

RUNS = 20  # of the factorisation, among which the consensus is taken
OUTLYING = 0.5  # distance to its neighbours beyond which a factor of a run is left out, as cNMF's guide has it


def fit_external(name: str, screen: ad.AnnData, seed: int) -> dict[str, Any]:
    """Scores of a method of `crlseq.experiments.scenarios.EXTERNAL`; a `UsageError` if it is absent or cannot take the screen."""
    truth = screen.uns["truth"]
    if importlib.util.find_spec(name) is None:
        raise UsageError(f"Skipped: the package {name} is not installed.", f"Install it: pip install {name}.")
    latents = ADAPTERS[name](screen, len(truth["adjacency"]), seed)
    labels = screen.obs["perturbation"].astype(str).to_numpy()
    perturbations = truth["target"].index.astype(str)
    environment = pd.Categorical(labels, [CONTROL, *perturbations]).codes.astype(np.int64)
    shifts, errors = mean_shifts(latents, environment, len(perturbations))
    programs = [f"P{k}" for k in (np.abs(shifts) / errors).argmax(1)]
    interventions = pd.DataFrame({"perturbation": perturbations, "program": programs})
    nothing = pd.DataFrame({"source": [], "target": [], "weight": []})
    scores = recovery.score_recovery(interventions, nothing, truth, latents, screen.obsm["true_latents"])
    return {**scores, "n_edges": 0, "n_latents": latents.shape[1], "verdict": "not identified"}


def _cnmf(screen: ad.AnnData, p: int, seed: int) -> np.ndarray:
    """Usages (cells, p) of consensus non-negative matrix factorisation (Kotliar et al. 2019, eLife 8:e43803)."""
    if not issparse(screen.X):
        raise UsageError("cNMF needs counts, and these values are continuous.", "Choose a scenario with counts.")
    from cnmf import cNMF

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        plain = ad.AnnData(screen.X, obs=pd.DataFrame(index=screen.obs_names), var=pd.DataFrame(index=screen.var_names))
        plain.write_h5ad(Path(folder) / "counts.h5ad")
        run = cNMF(output_dir=folder, name="run")
        genes = min(2000, screen.n_vars)
        run.prepare(str(Path(folder) / "counts.h5ad"), [p], n_iter=RUNS, seed=seed, num_highvar_genes=genes)
        run.factorize(0, 1)
        run.combine()
        run.consensus(p, OUTLYING, show_clustering=False)
        usage = run.load_results(p, OUTLYING)[0]
    return np.asarray(usage.reindex(screen.obs_names).fillna(0.0).to_numpy(), dtype=np.float64)


ADAPTERS: dict[str, Callable[[ad.AnnData, int, int], np.ndarray]] = {"cnmf": _cnmf}
