"""Scores of the cell cycle: the published genes, scanpy's scores, own transcripts, and screens without the genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from crlseq.config import DataConfig
from crlseq.data.cell_cycle import G2M_GENES, RENAMED, S_GENES, phases
from crlseq.data.dataset import read_data
from crlseq.errors import InputError

GENES = [*S_GENES, *G2M_GENES]


def cycle_screen(
    seed: int = 0, n_control: int = 200, n_cells: int = 50, arrest: float = 1.5, noise: str = "counts"
) -> ad.AnnData:
    """``arrests`` raises the G2/M genes and does nothing else, ``acts`` moves other genes, ``n0 .. n5`` nothing; 247 genes."""
    rng = np.random.default_rng(seed)
    names = ["control", "arrests", "acts", *(f"n{i}" for i in range(6))]
    label = np.repeat(names, [n_control, *[n_cells] * 8])
    genes = [*GENES, *(f"x{i}" for i in range(150))]
    cycle = rng.normal(size=(len(label), 2))
    cycle[label == "arrests", 1] += arrest
    x = rng.normal(size=(len(label), 3)) @ rng.normal(0, 0.2, (3, len(genes)))
    x[:, : len(S_GENES)] += 0.5 * cycle[:, :1]
    x[:, len(S_GENES) : len(GENES)] += 0.5 * cycle[:, 1:]
    x[np.ix_(label == "acts", np.arange(97, 157))] += 0.5 * rng.choice([-1, 1], 60)
    obs = pd.DataFrame({"perturbation": label}, index=[f"c{i}" for i in range(len(label))])
    if noise == "counts":
        rate = np.exp(x + rng.normal(0, 0.8, len(genes)))
        values = rng.poisson(2500 * rate / rate.sum(1, keepdims=True) * rng.gamma(5, 0.2, rate.shape))
    else:
        values = x + rng.normal(0, 0.5, x.shape)
    return ad.AnnData(values.astype(np.float32), obs, pd.DataFrame(index=genes))


def scores(adata: ad.AnnData) -> dict[str, np.ndarray]:
    return {
        column.name: column.values for column in read_data(adata, DataConfig(covariates=("cell-cycle",)), 0).covariates
    }


def test_the_published_genes() -> None:
    assert (len(S_GENES), len(G2M_GENES), len({*GENES})) == (43, 54, 97)
    assert {"PCNA", "MCM5"} < {*S_GENES} and {"MKI67", "CDK1"} < {*G2M_GENES} and {*RENAMED} < {*GENES}


def test_scores_are_scanpys() -> None:
    adata = cycle_screen()
    own = scores(adata)
    theirs = adata.copy()
    sc.pp.normalize_total(theirs)
    sc.pp.log1p(theirs)
    sc.tl.score_genes_cell_cycle(theirs, s_genes=list(S_GENES), g2m_genes=list(G2M_GENES))
    for name in ("S_score", "G2M_score"):
        assert np.corrcoef(own[name], theirs.obs[name])[0, 1] > 0.98
    names = np.array(["G1", "G2M", "S"])  # levels in order
    assert (names[own["phase"]] == phases(own["S_score"], own["G2M_score"])).all()


def test_phases_by_hand() -> None:
    assert phases(np.array([-1.0, 1.0, 1.0, -1.0]), np.array([-2.0, 0.5, 2.0, 0.1])).tolist() == [
        "G1",
        "S",
        "G2M",
        "G2M",
    ]


def test_an_own_transcript_is_no_arrest() -> None:
    """RRM2 does not count in the S score of a screen that perturbs it."""
    adata = cycle_screen(noise="gaussian")
    label = adata.obs["perturbation"].to_numpy().copy()
    label[label == "n0"] = "RRM2"
    adata.obs["perturbation"] = label
    before = scores(adata)["S_score"]
    adata.X[np.ix_(label == "RRM2", [adata.var_names.get_loc("RRM2")])] -= 5
    assert np.allclose(scores(adata)["S_score"], before, atol=1e-6)
    adata.obs["perturbation"] = np.where(label == "RRM2", "n0", label)
    assert scores(adata)["S_score"][label == "RRM2"].mean() < before[label == "RRM2"].mean() - 5 / 43 / 2


def test_names_that_are_not_known() -> None:
    adata = cycle_screen()
    adata.var_names = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    with pytest.raises(InputError, match="cell-cycle needs 10 genes of each phase") as refusal:
        scores(adata)
    assert "Ensembl" in str(refusal.value.hint)
    adata.var["gene_name"] = [*(RENAMED.get(gene, gene) for gene in GENES), *(f"X{i}" for i in range(150))]
    assert set(scores(adata)) == {"S_score", "G2M_score", "phase"}
