"""Norman's doubles, predicted by a fit on singles alone; skipped where the file is absent."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import crlseq
from tests.paths import shared
from tests.support import dense, invoke


def test_norman_doubles(tmp_path: Path) -> None:
    path = shared("data/norman2019_k562_perturbench_3375x500.h5ad")
    answer = invoke(
        "fit", path, "--output", tmp_path / "RUN", "--no-combinations", "--epochs", 3, "--n-latents", 4,
        "--bootstrap", 0,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    answer = invoke("evaluate", tmp_path / "RUN", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    conditions = pd.DataFrame(found["conditions"])
    groups = conditions.drop_duplicates("condition")["group"].value_counts().to_dict()
    assert groups == {f"combinations, {k} of 2 parts seen": n for k, n in ((0, 7), (1, 3), (2, 5))}
    both = conditions[conditions["group"] == "combinations, 2 of 2 parts seen"].groupby("predictor")
    l2, correlation = both["l2"].mean(), both["pearson_delta"].mean()
    # Known of these five: adding the single effects is far better than no change, and the mean of all is no help.
    assert l2["additive"] < 0.5 * l2["no_change"] and correlation["additive"] > 0.8
    assert l2["mean"] > 0.8 * l2["no_change"]
    assert l2["sampling_floor"] < l2["split_half"] < l2["no_change"]
    assert correlation["split_half"] > 0.8
    assert l2["model"] < 0.6 * l2["no_change"]


def test_intervals_of_norman_doubles(tmp_path: Path) -> None:
    """95 % intervals and the sampling error of what was measured: nearly all genes of the five doubles are within."""
    screen = ad.read_h5ad(shared("data/norman2019_k562_perturbench_3375x500.h5ad"))
    run = crlseq.fit(screen.copy(), tmp_path / "RUN", combinations=False, epochs=3, n_latents=4, bootstrap=0)
    fitted = set(run.interventions["perturbation"])
    label, x = screen.obs[run.info["perturbation_key"]].astype(str).to_numpy(), dense(screen)
    if run.info["preprocessing"]["target_sum"]:
        x = np.log1p(x / x.sum(1, keepdims=True) * run.info["preprocessing"]["target_sum"])
    x = x[:, screen.var_names.get_indexer(run.info["preprocessing"]["genes"])]
    control = x[label == run.info["control_label"]]
    doubles = [name for name in np.unique(label) if "+" in name and {*name.split("+")} <= fitted]
    found = run.predict(doubles, source=screen, n_cells=len(control))
    assert len(doubles) == 5
    variance, covered = x.var(0), []
    for i, name in enumerate(found.uns["crlseq_prediction"]["perturbations"]):
        measured = x[label == name]
        error = (found.varm["crlseq_effect_upper"][:, i] - found.varm["crlseq_effect"][:, i]) / 1.96
        total = np.sqrt(error**2 + variance / len(measured) + variance / len(control))
        off = np.abs(measured.mean(0) - control.mean(0) - found.varm["crlseq_effect"][:, i])
        covered.append((off <= 1.96 * total).mean())
    assert np.mean(covered) > 0.9
