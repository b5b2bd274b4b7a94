"""Real screens from the workspace's data folder; skipped where it is absent."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np

import crlseq
from crlseq.config import DataConfig
from crlseq.data.inspection import describe
from crlseq.run.run import Run
from tests.paths import shared
from tests.support import files_of, invoke


def check_and_fit(path: Path, folder: Path, *options: object) -> Run:
    """Fit with the very command that `check` gives, and look at what must hold for every run."""
    few = ["--min-cells", 2] if "--min-cells" in options else []
    found = json.loads(invoke("check", path, "--json", *few).out)
    assert found["problems"] == []
    answer = invoke("fit", path, "--output", folder, *options)
    assert answer.code == 0, answer.err
    untrained = {"resume.pt"} if "linear" in options else set()
    assert {file.name for file in folder.iterdir()} == files_of(folder) - untrained
    run = crlseq.load(folder)
    kept = ad.read_h5ad(folder / "crlseq.h5ad", backed="r")
    assert kept.obsm["X_crlseq"].shape == (found["n_cells"], run.info["n_latents"])
    assert np.isfinite(kept.obsm["X_crlseq"]).all()
    assert list(kept.uns["crlseq"]["interventions"].index) == run.interventions["perturbation"].tolist()
    assert run.info["preprocessing"]["values"] == found["values"]
    assert run.info["control_label"] == found["control_label"]
    kept.file.close()
    for name in ("programs", "interventions", "dag", "history"):
        assert invoke("inspect", name, folder).code == 0
    return run


def test_papalexi(tmp_path: Path) -> None:
    path = shared("data/papalexi2021_thp1_20729x299.h5ad")
    run = check_and_fit(
        path, tmp_path / "RUN", "--method", "linear", "--bootstrap", 0, "--batch-key", "bio_rep", "--n-latents", 6
    )
    assert (run.info["perturbation_key"], run.info["control_label"]) == ("perturbation", "control")
    assert run.info["preprocessing"]["values"] == "counts"
    assert len(run.interventions) == 25
    assert sum(run.info["cells"].values()) == 20729
    fdr = run.interventions.set_index("perturbation")["fdr"]
    assert (fdr[["IFNGR1", "IFNGR2", "JAK2", "STAT1", "IRF1"]] <= 0.05).all()
    assert (fdr > 0.05).any()  # several targets are without effect


def test_norman(tmp_path: Path) -> None:
    path = shared("data/norman2019_k562_perturbench_3375x500.h5ad")
    run = check_and_fit(path, tmp_path / "RUN", "--epochs", 2, "--n-latents", 5, "--bootstrap", 2)
    names = [row["name"] for row in run.info["conditions"]]
    assert run.info["perturbation_key"] in ("perturbation", "condition")  # the file has both, and they agree
    assert run.info["preprocessing"]["values"] == "log"
    assert sum("+" in name for name in names) == 15
    assert len(names) == 1 + 18 + 15
    kept = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad")
    original = ad.read_h5ad(path)
    assert "counts" in kept.layers
    assert (kept.layers["counts"] != original.layers["counts"]).sum() == 0
    assert (kept.X != original.X).sum() == 0


def test_norman_counts_and_held_out_doubles(tmp_path: Path) -> None:
    path = shared("data/norman2019_k562_perturbench_3375x500.h5ad")
    run = crlseq.fit(path, layer="counts", combinations=False, epochs=1, n_latents=3, n_top_genes=100, bootstrap=0)
    assert run.info["preprocessing"]["values"] == "counts"
    assert len(run.info["preprocessing"]["genes"]) == 100
    assert run.evaluation["condition"].str.contains("+", regex=False).all()
    assert len(run.evaluation) == 5  # of 15: the others have a part that no single perturbation shows
    assert any("were fitted" in note for note in run.info["notes"])
    assert len(run.interventions) == 18


def test_adamson(tmp_path: Path) -> None:
    path = shared("data/adamson2016_trishift_320x160.h5ad")
    run = check_and_fit(path, tmp_path / "RUN", "--epochs", 2, "--bootstrap", 2)
    assert run.info["control_label"] == "ctrl"
    assert "HSPA5" in set(run.interventions["perturbation"])
    assert not run.interventions["perturbation"].str.contains("ctrl").any()


def test_gears_tiny(tmp_path: Path) -> None:
    path = shared("data/norman2019_gears_tiny_50x50.h5ad")
    run = check_and_fit(path, tmp_path / "RUN", "--epochs", 2, "--min-cells", 2)
    assert run.info["control_label"] == "ctrl"
    assert not run.interventions["perturbation"].str.contains("ctrl").any()
    labels = ad.read_h5ad(path).obs["condition"].astype(str)
    fitted = [row for row in run.info["conditions"] if "train" in row["cells"]]
    for row in fitted[1:]:
        parts = frozenset(row["perturbations"])
        same = labels.map(lambda label, parts=parts: frozenset(label.split("+")) - {"ctrl"} == parts)
        assert sum(row["cells"].values()) == same.sum()


def test_targets_are_found_among_symbols_beside_ensembl_identifiers() -> None:
    found = describe(shared("data/adamson2016_trishift_320x160.h5ad"), DataConfig())
    var = ad.read_h5ad(shared("data/adamson2016_trishift_320x160.h5ad"), backed="r").var
    assert all(name.startswith("ENSG") for name in var.index)
    expected = sorted(set(var["gene_name"].astype(str)) & set(found["cells_per_condition"]))
    assert found["targets_measured"] == expected
