"""Escaped cells against a known truth, and what a fit does with them."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import crlseq
from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.projection import principal_components
from crlseq.data.responders import Responders, _mixture, find_responders, left_out
from crlseq.discovery.effects import effect_tests
from tests.support import check_refusal, fit_h5ad, invoke, small_screen


def escaping(share: float, shift: tuple[float, float] = (4.0, 5.0), **changes: object) -> ad.AnnData:
    """Three perturbations, of whose cells a share does not respond; shifts as large as those of STAT1 in Papalexi et al."""
    options = {
        "perturbations_per_latent": 1, "n_genes": 100, "cells_per_perturbation": 150, "n_control": 300, "depth": 4000.0,
        "penetrance": (1 - share, 1 - share), "shift_size": shift, "seed": 2,
    }  # fmt: skip
    return small_screen(**{**options, **changes})


def found_in(adata: ad.AnnData, **options: object) -> tuple[Responders, PerturbSeqData]:
    data = read_data(adata, make_config(**options).data, 0)
    scores = principal_components(data, 20, 0).scores
    return find_responders(data, scores, effect_tests(data, scores, 0)["fdr"]), data


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_escapers_are_found(share: float) -> None:
    adata = escaping(share)
    found, data = found_in(adata)
    told = ~np.isnan(found.posterior)
    escaped, called = ~adata.obs["hit"].to_numpy()[told], found.posterior[told] < 0.5
    assert len(set(data.condition[told])) >= 2
    assert called[escaped].mean() > 0.8  # sensitivity
    assert (~called[~escaped]).mean() > 0.8  # specificity
    # A posterior is a probability: as many escape as it says.
    assert (1 - found.posterior[told]).mean() == pytest.approx(share, abs=0.1)
    shares = found.table.loc[found.table["why"] == "", "share"]
    assert shares.mean() == pytest.approx(1 - share, abs=0.12)


def test_all_cells_stay_where_all_respond() -> None:
    found, _ = found_in(escaping(0.0))
    assert not len(found.escaped) and np.isnan(found.posterior).all()
    assert "none are excluded" in found.in_words()
    assert (found.table["why"] != "").all()


def test_all_cells_stay_without_an_effect_and_in_combinations() -> None:
    adata = escaping(0.3, n_doubles=1)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    labels[np.flatnonzero(labels == "control")[:100]] = "nothing"
    adata.obs["perturbation"] = labels
    found, data = found_in(adata)
    table = found.table.set_index("perturbation")
    assert table.loc["nothing", "why"] == "no detectable effect"
    double = next(name for name in data.condition_names if "+" in name)
    assert table.loc[double, "why"] == "a combination"
    for name in ("nothing", double):
        assert np.isnan(found.posterior[data.condition == data.condition_names.index(name)]).all()


def test_test_cells_have_no_say_and_are_never_left_out() -> None:
    adata = escaping(0.4)
    found, data = found_in(adata, hold_out_cells=0.3)
    assert len(found.escaped) and not (data.split[found.escaped] == splits.TEST).any()
    test = np.flatnonzero((data.split == splits.TEST) & (data.condition > 0))
    assert (found.posterior[test] < 0.5).any()  # told all the same
    scores = principal_components(data, 20, 0).scores
    fdr = effect_tests(data, scores, 0)["fdr"]
    before = find_responders(data, scores, fdr)
    scores[data.split == splits.TEST] *= 5
    after = find_responders(data, scores, fdr)
    np.testing.assert_array_equal(before.escaped, after.escaped)
    rest = left_out(data, before.escaped, "said")
    assert (rest.split == splits.UNUSED).sum() == (data.split == splits.UNUSED).sum() + len(before.escaped)
    assert rest.notes[-1] == "said"


def test_batches_are_centred_on_their_own_controls() -> None:
    adata = escaping(0.4, n_batches=2, batch_scale=1.0)
    found, _ = found_in(adata, batch_key="batch")
    told = ~np.isnan(found.posterior)
    escaped, called = ~adata.obs["hit"].to_numpy()[told], found.posterior[told] < 0.5
    assert told.any() and called[escaped].mean() > 0.75 and (~called[~escaped]).mean() > 0.75


def test_a_mixture_with_a_known_half() -> None:
    rng = np.random.default_rng(0)
    s = np.concatenate([rng.normal(0, 1, 6000), rng.normal(5, 0.5, 14000)])
    share, m, sd = _mixture(s, 0.0, 1.0)
    assert (share, m, sd) == (pytest.approx(0.7, abs=0.01), pytest.approx(5, abs=0.02), pytest.approx(0.5, abs=0.02))


def test_a_fit_of_responders(tmp_path: Path) -> None:
    adata = escaping(0.4)
    run = fit_h5ad(adata, tmp_path, "--responders")
    record = run.info["responders"]
    obs = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad").obs
    left = (obs["crlseq_responder"] < 0.5).to_numpy()
    assert record["n_left_out"] == left.sum() > 50
    assert (obs["crlseq_split"][left] == "unused").all()
    assert not (obs["crlseq_split"][~left] == "unused").any()
    assert run.info["cells"]["unused"] == left.sum()
    assert sum(row["n_left_out"] for row in record["perturbations"]) == left.sum()
    assert any("excluded" in note and "Responders" in note for note in run.info["notes"])
    assert run.interventions["n_cells"].tolist() == [150, 150, 150]  # what the tests saw
    again = run.annotate(adata.copy())
    np.testing.assert_array_equal(again.obs["crlseq_responder"].to_numpy(), obs["crlseq_responder"].to_numpy())


def test_a_streamed_store_is_refused(tmp_path: Path) -> None:
    escaping(0.4).write_h5ad(tmp_path / "screen.h5ad")
    assert invoke("prepare", tmp_path / "screen.h5ad", "--output", tmp_path / "STORE", "--quiet").code == 0
    words = [
        "fit",
        tmp_path / "STORE",
        "--output",
        tmp_path / "RUN",
        "--epochs",
        1,
        "--method",
        "gradient",
        "--responders",
    ]
    answer = invoke(*words, "--streamed")
    check_refusal(answer.code, answer.out, answer.err, 2, "--in-memory")
    assert not (tmp_path / "RUN").exists()
    assert invoke(*words, "--in-memory", "--n-latents", 2).code == 0
    record = crlseq.load(tmp_path / "RUN").info["responders"]
    assert record["n_left_out"] > 50
