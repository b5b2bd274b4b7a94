"""Fits with covariates: confounded screens of two kinds, an arrest that is kept or taken off, files, and what comes after a fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import crlseq
from crlseq.config import make_config
from crlseq.data.dataset import read_data
from crlseq.data.projection import principal_components
from crlseq.data.source import content_of
from crlseq.discovery.beyond_covariates import effects_and_beyond
from crlseq.discovery.components import whitened_components
from crlseq.run.covariates import changes_in_words, covariates_in_words
from tests.data.test_cell_cycle import cycle_screen
from tests.support import files_of, invoke

ACTING, NULL = [f"g{i}" for i in range(4)], [f"n{i}" for i in range(8)]
LINEAR: dict[str, Any] = {"method": "linear", "bootstrap": 0, "n_top_genes": "all"}


def confounded(kind: str, covariate: str, seed: int, strength: float = 1.0) -> ad.AnnData:
    """Four perturbations with an effect and eight without; cells of half of all differ from controls in a covariate."""
    rng = np.random.default_rng(seed)
    label = np.repeat(["control", *ACTING, *NULL], [400, *[80] * 12])
    differs = np.isin(label, [*ACTING[::2], *NULL[::2]]) * strength
    n, n_genes = len(label), 120
    z = rng.normal(size=n) + differs
    if covariate == "donor":
        z = (rng.random(n) < 1 / (1 + np.exp(-1.8 * differs))).astype(float)
    x = rng.normal(size=(n, 3)) @ rng.normal(0, 0.25, (3, n_genes)) + np.outer(z, rng.normal(0, 0.3, n_genes))
    for name in ACTING:
        x[label == name] += rng.normal(0, 0.3, n_genes)
    column = np.where(z > 0, "d2", "d1") if covariate == "donor" else z
    obs = pd.DataFrame({"perturbation": label, covariate: column}, index=[f"c{i}" for i in range(n)])
    if kind == "counts":
        rate = np.exp(x + rng.normal(0, 1, n_genes))
        x = rng.poisson(1500 * rate / rate.sum(1, keepdims=True) * rng.gamma(5, 0.2, rate.shape))
    else:
        x = x + rng.normal(0, 0.5, x.shape)
    return ad.AnnData(x.astype(np.float32), obs)


def found(adata: ad.AnnData, **options: Any) -> pd.DataFrame:
    data = read_data(adata, make_config(None, n_top_genes="all", **options).data, 0)
    tests = effects_and_beyond(data, principal_components(data, 50, 0), 0)
    return pd.DataFrame(tests, index=list(data.perturbation_names))


@pytest.mark.parametrize(
    ("kind", "covariate"), [("counts", "age"), ("counts", "donor"), ("continuous", "age"), ("continuous", "donor")]
)
def test_confounded_screens(kind: str, covariate: str) -> None:
    """Of 32 perturbations without an effect about half are called without the covariate and at most two with it."""
    without, with_it, power = 0, 0, 0
    for seed in range(4):
        adata = confounded(kind, covariate, seed)
        without += int((found(adata).loc[NULL, "fdr"] <= 0.05).sum())
        fdr = found(adata, covariates=(covariate,))["fdr"]
        with_it += int((fdr[NULL] <= 0.05).sum())
        power += int((fdr[ACTING] <= 0.05).sum())
    assert without >= 14 and with_it <= 2 and power == 16


def test_components_of_cells_do_not_differ_where_a_covariate_does() -> None:
    """Cells of a perturbation without an effect lie where controls lie, and so do its genes."""
    adata = confounded("counts", "age", 0)
    lengths = {}
    for names in ((), ("age",)):
        data = read_data(adata, make_config(None, n_top_genes="all", covariates=names).data, 0)
        y, _ = whitened_components(data, 20, 10, 0)
        lengths[names] = np.linalg.norm(y[data.condition == data.condition_names.index("n0")].mean(0))
    assert lengths["age",] < 0.35 * lengths[()]


def test_an_arrest_is_an_effect_unless_it_is_taken_off() -> None:
    adata = cycle_screen(seed=1, n_control=400, n_cells=80)
    kept = found(adata, covariates=("cell-cycle",))
    removed = found(adata, covariates=("cell-cycle",), remove_covariate_effects=True)
    assert kept.loc["arrests", "fdr"] <= 0.05 < kept.loc["arrests", "beyond"] and removed.loc["arrests", "fdr"] > 0.05
    assert kept.loc["acts", "fdr"] <= 0.05 and removed.loc["acts", "fdr"] <= 0.05
    assert removed["beyond"].isna().all()


def test_files_and_what_is_said(tmp_path: Path) -> None:
    adata = cycle_screen(seed=1, n_control=400, n_cells=80)
    adata.obs["donor"] = np.random.default_rng(0).choice(["d1", "d2"], len(adata))
    adata.write_h5ad(tmp_path / "screen.h5ad")
    run, words = (
        tmp_path / "run",
        ("--method", "linear", "--bootstrap", 0, "--n-top-genes", "all", "--covariates", "cell-cycle,donor"),
    )
    answer = invoke("fit", tmp_path / "screen.h5ad", "--output", run, *words)
    assert answer.code == 0 and {path.name for path in run.iterdir()} == files_of(run) - {"resume.pt"}
    assert "of 8 perturbations changes G2M_score (FDR 5%): arrests (+1." in " ".join(answer.err.split())
    table = crlseq.load(run).covariates
    assert set(table["covariate"]) == {"S_score", "G2M_score", "phase", "donor"} and len(table) == 8 * (1 + 1 + 3 + 2)
    phases = table[(table["perturbation"] == "arrests") & (table["covariate"] == "phase")].set_index("level")
    assert phases["mean"].sum() == pytest.approx(1) and phases.loc["G2M", "difference"] > 0.3 and phases["kept"].all()
    assert not table.loc[table["covariate"] == "donor", "kept"].any()
    shown = invoke("inspect", "covariates", run, "--json")
    assert json.loads(shown.out)[0]["perturbation"] == "arrests"
    assert (
        "Its cells differ from controls in G2M_score by +1."
        in invoke("inspect", "perturbation", run, "arrests", "--json").out
    )
    page = (run / "report.html").read_text()
    assert (
        "phase: share of cells per perturbation" in page
        and "G2M_score: difference from controls per perturbation" in page
    )
    # The fit is finished; with other covariates it is another one.
    assert invoke("fit", tmp_path / "screen.h5ad", "--output", run, *words, "--resume").code == 0
    other = invoke("fit", tmp_path / "screen.h5ad", "--output", run, *words[:-1], "donor", "--resume")
    assert other.code == 3 and "covariates was" in other.err
    # Activities of other cells need no column of theirs.
    bare = adata[:50].copy()
    bare.obs = bare.obs[[]]
    assert np.isfinite(crlseq.load(run).latents(bare)).all()
    without = tmp_path / "without"
    assert invoke("fit", tmp_path / "screen.h5ad", "--output", without, *words[:-2]).code == 0
    assert invoke("inspect", "covariates", without).code == 3


def test_a_prepared_store_has_its_columns(tmp_path: Path) -> None:
    adata = confounded("counts", "donor", 0)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    assert invoke("prepare", tmp_path / "screen.h5ad", "--output", tmp_path / "store").code == 0
    tables = []
    for streamed in (False, True):
        run = crlseq.fit(tmp_path / "store", covariates=("donor", "log-depth"), streamed=streamed, **LINEAR)
        tables.append(run.covariates)
        assert set(run.covariates["covariate"]) == {"donor", "log-depth"} and not run.covariates["kept"].any()
    pd.testing.assert_frame_equal(*tables)


def test_cells_in_memory_are_known_by_their_covariates() -> None:
    adata = confounded("continuous", "age", 0)
    config = make_config(None, covariates=("age",)).data
    one = content_of(read_data(adata, config, 0))
    adata.obs["age"] = adata.obs["age"].to_numpy()[::-1].copy()
    assert content_of(read_data(adata, config, 0)) != one


def test_sentences() -> None:
    """CDK1 arrests and does nothing else, MYC also acts, TP53 has cells of another donor."""
    columns = ("perturbation", "covariate", "level", "difference", "fdr", "kept", "beyond")
    rows = [
        ("CDK1", "phase", "G2M", 0.31, 0.001, True, 0.4), ("CDK1", "phase", "S", -0.2, 0.01, True, 0.4),
        ("MYC", "phase", "G2M", -0.12, 0.02, True, 0.01), ("TP53", "phase", "G2M", 0.0, 0.9, False, np.nan),
        ("TP53", "age", "", -0.5, 0.03, False, np.nan), ("CDK1", "age", "", 0.1, 0.6, False, 0.4),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    assert covariates_in_words(table) == [
        "2 of 3 perturbations change phase (FDR 5%): CDK1 (+31 % of cells G2M), MYC (−12 % of cells G2M). That is kept as their effect.",
        "1 of 3 perturbations has cells that differ from controls in age (FDR 5%): TP53 (−0.50 SD). That is taken off.",
        "CDK1 changes phase, and no effect beyond that is detectable (FDR 0.4).",
    ]
    assert changes_in_words(table, "TP53") == ["Its cells differ from controls in age by −0.50 SD (FDR 0.03)."]
    assert changes_in_words(table, "ETV7") == covariates_in_words(None) == []
