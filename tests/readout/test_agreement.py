"""Agreement of tables with cells: a perturbation unlike its program, and what is not claimed."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from crlseq.config import make_config
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.readout.agreement import effect_agreement
from crlseq.readout.programs import Interventions, Programs

N_GENES = 30


def made(effects: dict[str, np.ndarray], n: int = 200, seed: int = 0) -> PerturbSeqData:
    """Gaussian cells whose means are those of the effects."""
    rng = np.random.default_rng(seed)
    labels = ["control"] * 400 + [name for name in effects for _ in range(n)]
    mean = np.concatenate([np.zeros((400, N_GENES)), *(np.tile(effect, (n, 1)) for effect in effects.values())])
    adata = ad.AnnData(
        (mean + rng.normal(size=mean.shape)).astype(np.float32), obs=pd.DataFrame({"perturbation": labels})
    )
    adata.obs_names = [f"c{i}" for i in range(len(labels))]
    adata.var_names = [f"gene{i}" for i in range(N_GENES)]
    return read_data(adata, make_config(values="continuous").data, 0)


def told(total: np.ndarray, target: list[int], shift: list[float]) -> tuple[Programs, Interventions]:
    p, k = len(total), len(target)
    programs = Programs(total, total, np.ones(p), np.zeros(p))
    return programs, Interventions(np.eye(p)[target], np.array(target), np.array(shift), np.ones(k), np.ones(k))


def test_a_perturbation_that_does_something_else_disagrees() -> None:
    rng = np.random.default_rng(1)
    axis, other = rng.normal(size=(2, N_GENES)) * 0.4
    data = made({"A": 2 * axis, "B": axis, "C": 3 * axis, "D": 2 * other})
    total = np.stack([axis])
    found = effect_agreement(data, *told(total, [0] * 4, [2.0, 1.0, 3.0, 2.0]), np.ones(4))
    assert found["disagrees"].tolist() == [0, 0, 0, 1]
    assert (np.abs(found["agrees"][:3] - 1) < 0.35).all()
    assert found["explained"][:3] == pytest.approx(np.ones(3), abs=0.1)
    assert found["explained"][3] < 0.3


def test_errors_of_agreement_hold() -> None:
    rng = np.random.default_rng(2)
    axis, z = rng.normal(size=N_GENES) * 0.4, []
    for seed in range(60):
        data = made({"A": axis, "B": 3 * axis, "C": 3 * axis}, n=60, seed=seed)
        found = effect_agreement(data, *told(np.stack([axis]), [0] * 3, [1.0, 3.0, 3.0]), np.ones(3))
        z.append((found["agrees"][0] - 1) / found["agrees_se"][0])
    assert 0.75 < np.std(z) < 1.35


def test_others_too_weak_to_tell_say_nothing() -> None:
    axis = np.random.default_rng(4).normal(size=N_GENES) * 0.4
    data = made({"A": 5 * axis, "B": 0.1 * axis, "C": -0.1 * axis})
    found = effect_agreement(data, *told(np.stack([axis]), [0] * 3, [5.0, 0.1, -0.1]), np.ones(3))
    assert np.isnan(found["agrees"][0]) and np.isnan(found["disagrees"][0])
    assert not (found["disagrees"][1:] > 0).any()


def test_one_perturbation_alone_agrees_with_no_other() -> None:
    axis = np.full(N_GENES, 0.5)
    data = made({"A": axis, "B": -axis})
    found = effect_agreement(data, *told(np.stack([axis, -axis]), [0, 1], [1.0, 1.0]), np.ones(2))
    assert np.isnan(found["agrees"]).all() and np.isnan(found["disagrees"]).all()
