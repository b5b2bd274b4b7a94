"""Combinations: virtual cells have the law's mean, whatever their start; equations where the graph tells; honest intervals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import crlseq
from crlseq.config import make_config
from crlseq.data.dataset import read_data
from crlseq.errors import InputError
from crlseq.model.combination_law import CombinationLaw
from crlseq.prediction.predict import predict
from crlseq.run.run import Run
from crlseq.training.combinations import fit_law
from tests.prediction.test_predict import EDGE, GENES, hand_run
from tests.support import small_screen

NOISE = np.array([0.01, 0.01, 0.04, 0.09])


def with_law(run: Run, beta: float, gamma: float, equations: tuple[tuple[int, int], ...] = ()) -> Run:
    pairs = torch.tensor(equations, dtype=torch.int64).reshape(-1, 2)
    law = CombinationLaw.prior(torch.tensor([1.0, 0, 0, 0]).double(), torch.from_numpy(NOISE), pairs)
    run.model.law = replace(law, factors=torch.tensor([beta, gamma], dtype=torch.float64))
    return run


def cells(n: int = 40) -> ad.AnnData:
    x = np.random.default_rng(0).normal(2.0, 0.5, (n, len(GENES))).astype(np.float32)
    made = ad.AnnData(x)
    made.var_names = list(GENES)
    return made


def effect(run: Run, label: str, **options: object) -> np.ndarray:
    return np.asarray(predict(run, label, source=cells(), **options).varm["crlseq_effect"])[:, 0]


def test_virtual_cells_have_the_mean_of_the_law() -> None:
    run = with_law(hand_run(), 0.5, 0.5)
    a, r = effect(run, "A"), effect(run, "R")
    assert a == pytest.approx([2.0, 1.0, 4.0, 3.0], abs=1e-5)  # u0 by 2 and, through the edge, u1 by 1
    size = np.array([np.linalg.norm(a), np.linalg.norm(r)])
    w = size / size.sum()
    expected = w[0] * a + w[1] * r + (1 - (w**2).sum()) * np.array([1.0, 0, 0, 0])
    assert effect(run, "A+R") == pytest.approx(expected, abs=1e-6)
    virtual = predict(run, "A+R", source=cells())
    assert np.asarray(virtual.X).mean(0) - cells().X.mean(0) == pytest.approx(expected, abs=1e-5)


def test_factors_of_a_sum_leave_unrelated_perturbations_as_they_were() -> None:
    plain = effect(hand_run(), "A+R")
    assert effect(with_law(hand_run(), 1.0, 0.0), "A+R") == pytest.approx(plain, abs=1e-6)


def test_the_equations_combine_what_the_graph_tells() -> None:
    plain = effect(hand_run(), "A+B")
    # B cuts u1 off from u0: the sum of the single effects would raise u1 by 1 more.
    lost = EDGE * float(cells().X[:, 0].mean())
    assert plain == pytest.approx([2.0, -1.0 - lost, 4.0, 3 * (-1.0 - lost)], abs=1e-5)
    assert effect(with_law(hand_run(), 0.5, 0.5, ((0, 1),)), "A+B") == pytest.approx(plain, abs=1e-6)
    assert effect(with_law(hand_run(), 1.0, 0.0), "A+B") - plain == pytest.approx([0.0, 1.0, 0.0, 3.0], abs=1e-5)


def test_intervals_hold_what_combinations_do_beyond_the_law() -> None:
    run = with_law(hand_run(), 1.0, 0.0)
    found = predict(run, ["A", "R", "A+R", "A+B+R"], source=cells())
    half = (np.asarray(found.varm["crlseq_effect_upper"]) - np.asarray(found.varm["crlseq_effect"])) / 1.959964
    a, r = (np.asarray(found.varm["crlseq_effect"])[:, i] for i in (0, 1))
    squares = a**2 + r**2
    expected = 0.25 * squares + 0.15 * squares.mean() + NOISE + half[:, 0] ** 2 + half[:, 1] ** 2
    assert half[:, 2] ** 2 == pytest.approx(expected, rel=1e-5)
    assert (half[:, 3] > half[:, 2]).all()


def test_a_pair_of_cells_with_and_without_a_combination_is_taken_back() -> None:
    found = predict(with_law(hand_run(), 0.5, 0.5), "A+R", source=cells(), counterfactual=True)
    row = found.uns["crlseq_prediction"]["summary"].iloc[0]
    assert row["composition"] == pytest.approx(0.0, abs=1e-6)
    assert row["reversibility"] < 0.35 * row["change"]


@pytest.fixture(scope="module")
def doubles() -> ad.AnnData:
    return small_screen(perturbations_per_latent=3, cells_per_perturbation=60, n_control=200, n_doubles=10, seed=4)


def fit(screen: ad.AnnData, folder: Path, **options: object) -> Run:
    return crlseq.fit(screen, folder, method="linear", bootstrap=0, **options)


def test_the_law_is_fitted_to_measured_combinations_and_kept(doubles: ad.AnnData, tmp_path: Path) -> None:
    run = fit(doubles, tmp_path / "RUN")
    law, table = run.info["combinations"], run.interactions
    assert table is not None
    label = doubles.obs["perturbation"].astype(str)
    pairs = {frozenset(name.split("+")) for name in label.unique() if "+" in name}
    names = run.interventions["perturbation"]
    told = {frozenset(names.iloc[pair]) for pair in run.model.law.equations.tolist()}
    assert law["fitted"] and law["n_measured"] == len(pairs - told) < len(pairs)
    assert 0 < law["beta_error"] < 0.25
    assert (table["scope"] == "combination").sum() == law["n_measured"]
    first = next(name for name in label if "+" in name)
    loaded = crlseq.load(tmp_path / "RUN")
    source = doubles[doubles.obs["perturbation"] == "control"].copy()
    one, other = (np.asarray(each.predict(first, source=source).X) for each in (run, loaded))
    assert np.array_equal(one, other)


def test_cells_that_judge_have_no_part_in_the_law(doubles: ad.AnnData, tmp_path: Path) -> None:
    label = doubles.obs["perturbation"].astype(str).to_numpy()
    held = sorted({name for name in label if "+" in name})[:3]
    run = fit(doubles, tmp_path / "RUN", hold_out=tuple(held))
    changed = doubles.copy()
    x = np.asarray(changed.X.todense())
    rows = np.isin(label, held)
    x[rows] = x[rows][:, ::-1]
    changed.X = sp.csr_matrix(x)
    config = make_config(hold_out=tuple(held))
    laws = [
        fit_law(run.model, read_data(screen, config.data, 0), np.zeros((0, 2), int), 0).law
        for screen in (doubles, changed)
    ]
    assert len(laws[0].measured) == 7
    for name, tensor in laws[0].tensors().items():
        assert torch.equal(tensor, laws[1].tensors()[name]), name


def test_a_damaged_law_is_told(doubles: ad.AnnData, tmp_path: Path) -> None:
    fit(doubles, tmp_path / "RUN")
    (tmp_path / "RUN" / "combinations.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"combinations\.safetensors cannot be read"):
        _ = crlseq.load(tmp_path / "RUN").model
