"""A fit of a screen of whose cells a part escaped: penetrance, interventions of hit cells, and the mean that is kept."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

import crlseq
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.run.run import Run
from crlseq.storage.checkpoint import load_model, save_weights
from crlseq.training.residuals import measure_missed
from tests.support import dense, small_screen

P, K = 2, 6


@pytest.fixture(scope="module")
def escaping() -> ad.AnnData:
    """Hard interventions on two programs, 40 to 90 % of their cells hit."""
    return small_screen(
        n_latents=P, perturbations_per_latent=3, n_genes=60, cells_per_perturbation=400, n_control=800, noise="gaussian",
        penetrance=(0.4, 0.9), shift_size=(3.5, 5.0), expected_parents=0.5, n_doubles=1, seed=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(escaping: ad.AnnData) -> Run:
    return crlseq.fit(escaping, method="linear", n_latents=P, bootstrap=0)


def test_interventions_are_those_of_hit_cells(run: Run, escaping: ad.AnnData) -> None:
    true, found = escaping.uns["truth"]["target"], run.interventions
    share = found["penetrance"].to_numpy()
    np.testing.assert_allclose(share, true["penetrance"], atol=0.05)
    np.testing.assert_array_equal(run.model.penetrance.numpy(), share.astype(np.float32))
    scale = np.array([program.scale for program in run.facts.programs])[found["program"].str[1:].astype(int)]
    raw = np.abs(found["shift"] * scale)  # noise of unit variance
    np.testing.assert_allclose(raw, np.abs(true["shift"]), rtol=0.12)
    assert np.abs(found["noise_scale"] - 0.7).mean() < 0.1 and (found["noise_scale"] < 1).all()  # of all cells 2 to 3


@torch.no_grad()
def test_the_mean_of_virtual_cells_is_that_of_all_cells(run: Run, escaping: ad.AnnData) -> None:
    labels, x = escaping.obs["perturbation"].astype(str).to_numpy(), dense(escaping)
    names = run.interventions["perturbation"].tolist()
    virtual, hit = (run.predict(names, source=escaping, n_cells=800, hit_cells=only) for only in (False, True))
    measured = np.stack([x[labels == name].mean(0) - x[labels == "control"].mean(0) for name in names], 1)
    effect = virtual.varm["crlseq_effect"]
    share = np.linalg.norm(effect - measured, axis=0) / np.linalg.norm(measured, axis=0)
    assert (share < 0.12).all()
    np.testing.assert_allclose(
        effect, hit.varm["crlseq_effect"] * run.interventions["penetrance"].to_numpy(), atol=1e-5
    )
    # In a mixture cells vary along the effect, as measured ones do; hit cells alone do not.
    for j, name in enumerate(names):
        along = measured[:, j] / np.linalg.norm(measured[:, j])
        spread = [np.var(cells @ along) for cells in (x[labels == name], *(
            made[(made.obs["perturbation"] == name).to_numpy()].X for made in (virtual, hit)
        ))]  # fmt: skip
        assert abs(np.log(spread[1] / spread[0])) < 0.35 < np.log(spread[0] / spread[2])


@torch.no_grad()
def test_what_the_latents_miss_is_missed_in_hit_cells(run: Run, escaping: ad.AnnData) -> None:
    """Without shifts the whole effect is missed; a penetrance of .5 doubles it, so that the mean stays."""
    data: PerturbSeqData = read_data(escaping, crlseq.config.make_config().data, 0)
    model = run.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.scm.shift.zero_()
    found = []
    for share in (1.0, 0.5):
        model.penetrance.fill_(share)
        measure_missed(model, data, 0)
        found.append(model.missed(torch.arange(K)[:, None])[:, 0])
    model.load_state_dict(before)
    change = data.dense(data.cells(data.conditions.index((0,)), splits.TRAIN)).mean(0) - data.dense(
        data.cells(0, splits.TRAIN)
    ).mean(0)
    assert float(np.corrcoef(found[0][0], change)[0, 1]) > 0.95
    size = found[0].abs() > 0.3
    torch.testing.assert_close((found[1] / 2)[size], found[0][size], rtol=0.15, atol=0.05)


def test_training_keeps_penetrances_and_is_deterministic(escaping: ad.AnnData) -> None:
    made = [crlseq.fit(escaping, n_latents=P, bootstrap=0, epochs=2, threads=1) for _ in range(2)]
    first, second = (one.model.state_dict() for one in made)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["penetrance"] < 0.95).any()
    assert np.isfinite(made[0].history.to_numpy()).all()


def test_weights_without_a_penetrance_are_those_of_hit_cells(run: Run, tmp_path: Path) -> None:
    assert run.weights is not None
    state = {name: value for name, value in run.weights[0].items() if name != "penetrance"}
    save_weights(tmp_path / "old.safetensors", state, run.weights[1])
    assert (load_model(tmp_path / "old.safetensors", later=("penetrance",)).penetrance == 1).all()
