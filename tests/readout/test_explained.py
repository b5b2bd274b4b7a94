"""Shares of variance and of effects: worked out by hand on a decoder that is a line."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from crlseq.config import make_config
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.readout.explained import effect_explained, variance_explained
from crlseq.readout.programs import encode


def screen(effects: dict[str, list[float]], n: int, noise: float, batches: int = 1) -> PerturbSeqData:
    """Log-normalised cells of three genes: control at 5, perturbations moved by their effects; batches 1 apart, control in half of each."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", *effects], n)
    moves = np.array([effects.get(label, [0.0, 0.0, 0.0]) for label in labels])
    # Perturbed cells lie in three quarters in the last batch: against all controls their effects would be others.
    batch = np.where(
        labels == "control", np.arange(len(labels)) % batches, (batches - 1) * (np.arange(len(labels)) % 4 > 0)
    )
    x = 5 + moves + noise * rng.normal(size=moves.shape) + batch[:, None]
    obs = pd.DataFrame({"perturbation": labels, "batch": [f"b{b}" for b in batch]}, index=[str(i) for i in range(len(x))])  # fmt: skip
    adata = ad.AnnData(x.astype(np.float32), obs, pd.DataFrame(index=["a", "b", "c"]))
    return read_data(adata, make_config(values="continuous", batch_key="batch").data, 0)


def model(shifts: list[float]) -> DiscrepancyVAE:
    """Two latents without edges; the decoder is gene a = 10 + u_0, gene b = 10 + u_1, gene c = 0; every perturbation one latent."""
    found = DiscrepancyVAE(3, 2, len(shifts), n_hidden=4, intervention="shift").double().eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
        for k in range(2):
            found.decoder.hidden.weight[k, k] = 1
            found.decoder.hidden.bias[k] = 10  # hidden units stay positive, so that the decoder is linear
            found.decoder.output.weight[k, k] = 1
        found.scm.shift.copy_(torch.tensor(shifts).double())
        found.intervention_encoder.logits.bias.copy_(torch.tensor([50.0, 0.0]))  # all perturbations act on latent 0
    return found


def test_effects_by_hand() -> None:
    data = screen({"A": [3.0, 0.0, 0.0], "B": [0.0, 0.0, 4.0]}, 40, 0.0)
    # A: (3, 0, 0) by the model (2, 0, 0): 9 - 1 = 8. B: (0, 0, 4) by the model (1, 0, 0): 16 - 17 = -1. Of 9 + 16.
    explained = effect_explained(model([2.0, 1.0]), data, np.array([0, 1]))
    assert explained == pytest.approx([8 / 25, -1 / 25], abs=1e-6)
    # Without a claim B is in neither sum.
    assert effect_explained(model([2.0, 1.0]), data, np.array([0, -1])) == pytest.approx([8 / 9, 0.0], abs=1e-6)
    assert np.isnan(effect_explained(model([2.0, 1.0]), data, np.array([-1, -1]))).all()


def test_effects_are_taken_within_batches() -> None:
    data = screen({"A": [3.0, 0.0, 0.0], "B": [0.0, 0.0, 4.0]}, 40, 0.0, batches=2)
    assert effect_explained(model([2.0, 1.0]), data, np.array([0, 1])) == pytest.approx([8 / 25, -1 / 25], abs=0.01)


def test_sampling_noise_is_taken_off() -> None:
    """A perfect model explains all of an effect, although the measured one is larger by its noise."""
    data = screen({"A": [1.0, 0.0, 0.0], "B": [2.0, 0.0, 0.0]}, 400, 1.0)
    assert effect_explained(model([1.0, 2.0]), data, np.array([0, 0]))[0] == pytest.approx(1.0, abs=0.06)


def test_variance_is_that_of_a_regression_on_each_latent() -> None:
    data = screen({"A": [3.0, 0.0, 0.0], "B": [0.0, 0.0, 4.0]}, 60, 1.0, batches=2)
    torch.manual_seed(0)
    free = DiscrepancyVAE(3, 2, 2, n_hidden=4).double().eval()
    explained = variance_explained(free, data)
    controls = data.cells(0, splits.TRAIN, splits.VALIDATION)
    x, v = data.dense(controls).astype(float), encode(free, data, controls)
    within = np.stack([data.batch[controls] == b for b in (0, 1)], 1).astype(float)
    for k in range(2):
        design = np.column_stack([within, v[:, k]])
        left = x - design @ np.linalg.lstsq(design, x, rcond=None)[0]
        base = x - within @ np.linalg.lstsq(within, x, rcond=None)[0]
        assert explained[k] == pytest.approx(1 - (left**2).sum() / (base**2).sum(), rel=1e-6)
    assert np.isnan(variance_explained(model([1.0, 1.0]), data)).all()  # an encoder that is constant explains nothing
