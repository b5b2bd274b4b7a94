"""Virtual cells: a linear model by hand, counterfactual axioms, intervals, and files that scanpy opens."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import crlseq
from crlseq.errors import InputError, UsageError
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.prediction.predict import draw_controls, predict
from crlseq.run.run import Run
from tests.support import dense, small_screen
from tests.synthetic import found_by_bootstrap, synthetic_run

matplotlib.use("Agg")

GENES = ("a", "b", "c", "d")
SHIFT_A, SHIFT_B = 2.0, -1.0
EDGE = 0.5


def linear(hidden: nn.Linear, output: nn.Linear, first: np.ndarray, second: np.ndarray) -> None:
    """Weights with which the two layers give v @ first @ second: relu(v) - relu(-v) = 1.2 v of slope 0.2."""
    p = first.shape[1]
    with torch.no_grad():
        for layer in (hidden, output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        hidden.weight[: 2 * p] = torch.from_numpy(np.concatenate([first.T, -first.T]))
        output.weight[:, : 2 * p] = torch.from_numpy(np.concatenate([second.T, -second.T], 1) / 1.2)


def hand_run(intervention: str = "hard", read: float = 1.0, **changes: Any) -> Run:
    """u0 -> u1 with weight 0.5; A shifts u0 by 2, B shifts u1 by -1, N does nothing, R raises gene d by 0.25.

    Genes a and b are u0 and u1, c = 2 u0 and d = 3 u1. The encoder reads the share ``read`` of u off a and b.
    """
    model = DiscrepancyVAE(4, 2, 4, n_hidden=8, intervention=intervention).double()
    loadings = np.array([[1.0, 0, 2, 0], [0, 1, 0, 3]])
    reading = np.zeros((4, 2))
    reading[:2] = read * np.array([[1, -EDGE], [0, 1]])  # z0 = u0, z1 = u1 - u0 / 2
    linear(model.encoder.hidden, model.encoder.mean, reading, np.eye(2))
    nn.init.zeros_(model.encoder.variance.weight)
    nn.init.constant_(model.encoder.variance.bias, -60.0)  # softplus: no variance
    linear(model.decoder.hidden, model.decoder.output, np.eye(2), loadings)
    with torch.no_grad():
        model.scm.graph.zero_()[0, 1] = EDGE
        model.scm.shift.copy_(torch.tensor([SHIFT_A, SHIFT_B, 1.0, 1.0]))
        model.intervention_encoder.given[0, 0] = model.intervention_encoder.given[1, 1] = 1.0
        model.intervention_encoder.is_given.fill_(True)
        model.residual[3, 3] = 0.25
    names = ["A", "B", "N", "R"]
    table = pd.DataFrame({"perturbation": names, "program": ["P0", "P1", "", ""]})
    table = table.assign(n_cells=[100, 10**9, 50, 50], noise_scale=[1.0, 1.0, np.nan, np.nan])
    conditions = [{"name": "control", "perturbations": [], "cells": {"train": 9}}]
    conditions += [{"name": name, "perturbations": [name], "cells": {"train": 9}} for name in names]
    conditions.append({"name": "A+N", "perturbations": ["A", "N"], "cells": {"test": 9}})
    plain = synthetic_run(2, 4, epochs=0).info
    info: dict[str, Any] = {
        **plain, "version": "0", "perturbation_key": "perturbation", "control_label": "control", "conditions": conditions,
        "programs": [row | {"scale": scale} for row, scale in zip(plain["programs"], (1.0, 2.0), strict=True)],
        "config": plain["config"] | {"data": plain["config"]["data"] | {"hold_out": ["H"]}},
        "preprocessing": {
            "values": "continuous", "reason": "", "layer": None, "target_sum": None, "genes": GENES, "gene_choice": "",
            "n_genes_in_file": 4, "n_silent_genes": 0,
        },
    }  # fmt: skip
    architecture = {"n_genes": 4, "n_latents": 2, "n_perturbations": 4, "n_hidden": 8, "intervention": intervention}
    nothing = pd.DataFrame()
    return Run(
        {**info, **changes}, nothing, table, nothing, nothing, nothing, weights=(model.state_dict(), architecture)
    )


def cells(x: Any, genes: tuple[str, ...] = GENES) -> ad.AnnData:
    """Cells without labels."""
    x = np.atleast_2d(np.asarray(x, dtype=np.float32))
    names = pd.DataFrame(index=[f"c{i}" for i in range(len(x))])
    return ad.AnnData(x, obs=names, var=pd.DataFrame(index=list(genes)))


def many(n: int = 400) -> ad.AnnData:
    return cells(np.random.default_rng(0).normal(size=(n, 4)))


def effects(run: Run, labels: list[str], source: ad.AnnData, **options: Any) -> np.ndarray:
    """(labels, genes) predicted mean effects."""
    return np.asarray(predict(run, labels, source=source, **options).varm["crlseq_effect"]).T


def quality(run: Run, *labels: str) -> pd.DataFrame:
    """The summary of counterfactuals."""
    summary: pd.DataFrame = predict(run, labels, source=many(), counterfactual=True).uns["crlseq_prediction"]["summary"]
    return summary


CELL = [1.0, 1.0, 2.5, 3.0]  # u = (1, 1), z = (1, 0.5); 0.5 of gene c is no latent's


@pytest.mark.parametrize(
    ("intervention", "label", "expected"),
    [
        ("hard", "A", [3.0, 2.0, 6.5, 6.0]),  # u = (z0 + 2 = 3 ... hard on a root is a shift, 3 / 2 + 0.5)
        ("hard", "B", [1.0, -0.5, 2.5, -1.5]),  # u1 = z1 - 1, cut from u0
        ("hard", "A+B", [3.0, -0.5, 6.5, -1.5]),  # A no longer reaches u1
        ("shift", "B", [1.0, 0.0, 2.5, 0.0]),  # u1 = 1 / 2 + 0.5 - 1
        ("shift", "A+B", [3.0, 1.0, 6.5, 3.0]),  # u1 = 3 / 2 + 0.5 - 1
        ("shift", "A+B+R", [3.0, 1.0, 6.5, 3.25]),
        ("hard", "N", CELL),
        ("hard", "R", [1.0, 1.0, 2.5, 3.25]),
    ],
)
def test_by_hand(intervention: str, label: str, expected: list[float]) -> None:
    run = hand_run(intervention)
    found = predict(run, label, source=cells(CELL), counterfactual=True)
    np.testing.assert_allclose(found.X[1], expected, atol=1e-6)
    np.testing.assert_array_equal(found.X[0], np.float32(CELL))
    u = np.array(expected[:2]) / [1.0, 2.0]  # genes a and b are the latents; program scales 1 and 2
    np.testing.assert_allclose(found.obsm["X_crlseq"][1], u, atol=1e-6)
    np.testing.assert_allclose(found.varm["crlseq_effect"][:, 0], np.subtract(expected, CELL), atol=1e-6)
    np.testing.assert_allclose(found.varm["crlseq_mean"][:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(found.var["control_mean"], CELL)


def test_escaped_cells_are_control_cells() -> None:
    """A hits a quarter of the cells, R half of them: the mean effect is exact, whichever cells are drawn."""
    run, source = hand_run(), many(2000)
    run.model.penetrance[[0, 3]] = torch.tensor([0.25, 0.5]).double()
    found = predict(run, ["A", "A+R"], source=source, n_cells=2000)
    change = found.X[:2000] - source.X
    hit = found.obs["hit"].to_numpy()
    np.testing.assert_allclose(change[hit[:2000]], np.tile([2.0, 1, 4, 3], (hit[:2000].sum(), 1)), atol=1e-5)
    np.testing.assert_allclose(change[~hit[:2000]], 0, atol=1e-6)
    assert hit[:2000].mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_allclose(found.varm["crlseq_effect"][:, 0], [0.5, 0.25, 1, 0.75], atol=1e-6)
    np.testing.assert_allclose(found.varm["crlseq_effect"][:, 1], [0.5, 0.25, 1, 0.75 + 0.125], atol=1e-6)
    kinds, sizes = np.unique((found.X[2000:] - source.X).round(2)[:, [0, 3]], axis=0, return_counts=True)
    assert kinds.tolist() == [[0, 0], [0, 0.25], [2, 3], [2, 3.25]]
    np.testing.assert_allclose(sizes / 2000, [0.375, 0.375, 0.125, 0.125], atol=0.03)
    assert hit[2000:].mean() == pytest.approx(1 - 0.375, abs=0.03)
    error = (found.varm["crlseq_effect_upper"] - found.varm["crlseq_effect"])[:, 0] / 1.96
    # 100 cells of which a quarter is hit: of unit noise, and shifted by 2.
    assert error[0] == pytest.approx(np.sqrt((1 + 0.25 * 0.75 * 4) / 100), rel=0.3)


def test_hit_cells_alone() -> None:
    run, source = hand_run(), many()
    plain = predict(run, "A", source=source)
    run.model.penetrance[0] = 0.25
    for options in ({"hit_cells": True}, {"counterfactual": True}):
        found = predict(run, "A", source=source, **options)
        assert found.obs["hit"].equals(found.obs["predicted"].rename("hit"))
        np.testing.assert_allclose(found.varm["crlseq_effect"], plain.varm["crlseq_effect"], atol=1e-6)
    np.testing.assert_array_equal(predict(run, "A", source=source, hit_cells=True).X, plain.X)
    assert run.model.penetrance[0] == 0.25


def test_shifts_add_and_hard_interventions_do_not() -> None:
    """B cuts its target from what A moves: the double lacks A's way through it, 2 x 0.5 on b and three times that on d."""
    source = many()
    a, b, both = effects(hand_run("shift"), ["A", "B", "A+B"], source)
    np.testing.assert_allclose(both, a + b, atol=1e-9)
    a, b, both = effects(hand_run("hard"), ["A", "B", "A+B"], source)
    np.testing.assert_allclose(both - (a + b), [0, -EDGE * SHIFT_A, 0, -3 * EDGE * SHIFT_A], atol=1e-9)
    assert not np.allclose(a[1], 0)


def test_unrelated_hard_interventions_add() -> None:
    """Without the edge nothing is cut."""
    run = hand_run("hard")
    with torch.no_grad():
        run.model.scm.graph.zero_()
    a, b, both = effects(run, ["A", "B", "A+B"], many())
    np.testing.assert_allclose(both, a + b, atol=1e-9)


def test_simulated_upstream_downstream() -> None:
    """True loadings and equations of a simulation: the virtual double is the measured double, the sum of singles is not."""
    screen = crlseq.simulate(
        n_latents=2, perturbations_per_latent=1, n_genes=4, expected_parents=0.5, n_control=4000,
        cells_per_perturbation=4000, n_doubles=1, noise="gaussian", seed=3,
    )  # fmt: skip
    adjacency, u = screen.uns["truth"]["adjacency"], screen.obsm["true_latents"]
    (i,), (j,) = np.nonzero(adjacency)
    labels = screen.obs["perturbation"].to_numpy()
    run = hand_run("hard")
    up, down = f"g{i}", f"g{j}"
    moved = {name: u[labels == name].mean(0) - u[labels == "control"].mean(0) for name in (up, down, "g0+g1")}
    with torch.no_grad():
        run.model.scm.graph[0, 1] = adjacency[i, j]
        reading = np.array([[1, -adjacency[i, j]], [0, 1], [0, 0], [0, 0]])
        linear(run.model.encoder.hidden, run.model.encoder.mean, reading, np.eye(2))
        run.model.scm.shift[0], run.model.scm.shift[1] = float(moved[up][i]), float(moved[down][j])
    x = np.concatenate([u[labels == "control"][:, [i, j]], np.zeros((4000, 2))], 1)
    a, b, both = effects(run, ["A", "B", "A+B"], cells(x))
    measured = moved["g0+g1"][[i, j]]
    assert np.linalg.norm(both[:2] - measured) < 0.1
    assert np.linalg.norm(a[:2] + b[:2] - measured) > 0.5


def test_composition_is_exact(finished: Run) -> None:
    """No intervention gives every cell back to the bit, and a perturbation without a program adds what the latents miss."""
    found = predict(hand_run(), "N", source=many(), counterfactual=True)
    np.testing.assert_array_equal(found.X[:400], found.X[400:])
    assert found.uns["crlseq_prediction"]["summary"].loc["N", "composition"] < 1e-14

    assert finished.interventions.set_index("perturbation").loc["g6", "program"] == ""
    found = predict(finished, "g6", counterfactual=True)
    n = found.n_obs // 2
    residual = finished.model.missed(torch.tensor([[6]]))[0, 0].numpy()
    np.testing.assert_allclose(found.X[n:] - found.X[:n], np.broadcast_to(residual, (n, 40)), atol=1e-6)
    assert found.uns["crlseq_prediction"]["summary"].loc["g6", "composition"] < 1e-12
    assert any("g6" in text and "no detectable effect" in text for text in found.uns["crlseq_prediction"]["notes"])


def test_effectiveness_and_reversibility_by_hand() -> None:
    """An encoder that inverts the decoder reads what was set, and takes it back; one that reads half does neither."""
    summary = quality(hand_run(), "A", "B", "A+B")
    np.testing.assert_allclose(summary[["effectiveness", "reversibility"]], 0, atol=1e-9)
    np.testing.assert_allclose(summary["realised"], 1)
    row = quality(hand_run("shift", read=0.5), "A").loc["A"]
    # u moves by (2, 1), in units of the programs (2, 1/2); half of it is read off a and b.
    assert row["realised"] == pytest.approx(0.5)
    assert row["effectiveness"] == pytest.approx(np.sqrt((1.0**2 + 0.25**2) / 2))
    assert row["change"] == pytest.approx(np.sqrt((2**2 + 1**2 + 4**2 + 3**2) / 4))
    # A shift taken back is taken back whole, whatever the encoder reads: the equations and the decoder are linear.
    assert row["reversibility"] == pytest.approx(0, abs=1e-9)
    # A's shift of u0 is half read; 1 is left of it, and of that one half reaches b again once B's cut is mended.
    row = quality(hand_run("hard", read=0.5), "A+B").loc["A+B"]
    assert row["reversibility"] == pytest.approx(np.sqrt((0.5**2 + 1.5**2) / 4))


def test_equations_can_be_taken_back(finished: Run) -> None:
    """Reversibility of the structural equations themselves: abduction under the intervention gives the noise back."""
    model = copy.deepcopy(finished.model).double()
    scm = model.scm
    conditions = torch.tensor([[0, -1], [3, -1], [0, 5]])
    mechanism = scm.mechanism(conditions, model.target_weights(conditions))
    z = torch.randn((3, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(scm.abduct(scm(z, mechanism), mechanism), z, rtol=0, atol=1e-10)


def test_intervals_by_hand() -> None:
    """B's effect on gene b is -1 - u0 / 2, with the standard error of the mean of u0 / 2; A's has that of its shift."""
    source, moves = many(), np.array([1, EDGE, 2, 3 * EDGE])
    found = predict(hand_run(), ["A", "B"], source=source)
    half = (found.varm["crlseq_effect_upper"] - found.varm["crlseq_effect_lower"]) / 2 / 1.96
    error = EDGE * source.X[:, 0].std() / 20  # of 400 cells; B itself has cells without number
    np.testing.assert_allclose(half[:, 1], [0, error, 0, 3 * error], rtol=0.3, atol=1e-3)
    np.testing.assert_allclose(half[:, 0], 0.1 * moves, rtol=0.3)  # unit noise over 100 cells
    middle = (found.varm["crlseq_effect_upper"] + found.varm["crlseq_effect_lower"]) / 2
    np.testing.assert_allclose(middle, found.varm["crlseq_effect"], atol=1e-9)

    found_before = found_by_bootstrap(2)
    found_before["bootstrap"] |= {"perturbations": ["B", "A"], "shift_error": [None, 0.3]}
    found = predict(hand_run(discovery=found_before), ["A", "B"], source=source)
    half = (found.varm["crlseq_effect_upper"] - found.varm["crlseq_effect_lower"]) / 2 / 1.96
    np.testing.assert_allclose(half[:, 0], 0.3 * moves, rtol=0.3)
    np.testing.assert_allclose(half[:, 1], [0, error, 0, 3 * error], rtol=0.3, atol=1e-3)


def test_intervals_cover_the_effect_in_the_population() -> None:
    """Over samples of control cells, 95 % intervals of B's effect cover that in all control cells."""
    rng = np.random.default_rng(1)
    covered = []
    for seed in range(60):
        found = predict(hand_run(), "B", source=cells(rng.normal(size=(60, 4))), seed=seed)
        covered.append(
            found.varm["crlseq_effect_lower"][1, 0] <= SHIFT_B <= found.varm["crlseq_effect_upper"][1, 0]
        )  # mean of u0 is 0 and of z1 as well
    assert 0.85 <= np.mean(covered) <= 1.0


def test_order_of_cells_does_not_matter() -> None:
    source = many(50)
    shuffled = source[np.random.default_rng(0).permutation(50)].copy()
    one, other = (predict(hand_run(), "A+B", source=s, counterfactual=True) for s in (source, shuffled))
    np.testing.assert_allclose(other[one.obs_names].X, one.X, atol=1e-6)


def test_genes_are_aligned_by_name() -> None:
    source = many(50)
    x = np.concatenate([source.X[:, [2, 0, 3, 1]], np.ones((50, 1))], 1)
    found = predict(hand_run(), "A", source=cells(x, ("c", "a", "d", "b", "extra")), counterfactual=True)
    np.testing.assert_array_equal(found.X, predict(hand_run(), "A", source=source, counterfactual=True).X)
    assert list(found.var_names) == list(GENES)
    with pytest.raises(InputError, match="2 of the 4 fitted genes are missing, first 'c'"):
        predict(hand_run(), "A", source=cells(source.X[:, :2], ("a", "b")))


def test_missing_genes_are_filled_and_told(finished: Run, screen: ad.AnnData) -> None:
    told: list[str] = []
    some = screen[:, np.delete(np.arange(40), [5, 6])].copy()
    found = predict(finished, "g0", source=some, n_cells=100, note=told.append)
    assert any("2 of the 40 fitted genes are missing, first 'gene5'" in text for text in told)
    assert found.n_vars == 40
    whole = predict(finished, "g0", source=screen.copy(), n_cells=100)
    assert found.obs["cell"].tolist() == whole.obs["cell"].tolist()
    np.testing.assert_allclose(found.varm["crlseq_effect"], whole.varm["crlseq_effect"], atol=0.1)
    controls = screen[(screen.obs["perturbation"] == "control").to_numpy()]
    x = dense(controls)
    mean = np.log1p(x / x.sum(1, keepdims=True) * finished.info["preprocessing"]["target_sum"])[:, 5].mean()
    assert found.var["control_mean"].iloc[5] == pytest.approx(mean, rel=1e-5)
    told.clear()
    predict(finished, "g0", source=ad.concat([screen, more(screen)], axis=1, merge="first"), note=told.append)
    assert any("3 of its 43 genes were not fitted and are ignored" in text for text in told)
    with pytest.raises(InputError, match="22 of the 40 fitted genes are missing, first 'gene0'"):
        predict(finished, "g0", source=screen[:, 22:].copy())


def more(screen: ad.AnnData) -> ad.AnnData:
    """Three genes beside those of a screen."""
    return ad.AnnData(np.ones((screen.n_obs, 3)), obs=screen.obs, var=pd.DataFrame(index=["x", "y", "z"]))


def test_seed(finished: Run) -> None:
    """One seed, one answer, whatever else is asked for; another seed, other cells."""
    one, same = predict(finished, "g0+g1", n_cells=50), predict(finished, ["g2", "g1+g0"], n_cells=50)
    np.testing.assert_array_equal(one.X, same.X[50:])
    np.testing.assert_array_equal(one.varm["crlseq_effect_upper"][:, 0], same.varm["crlseq_effect_upper"][:, 1])
    assert one.obs["cell"].tolist() != predict(finished, "g0+g1", n_cells=50, seed=1).obs["cell"].tolist()


def test_virtual_cells_are_those_of_the_model(finished: Run, screen: ad.AnnData) -> None:
    """The space of the fit: the mean effect of a fitted perturbation is close to what was measured."""
    found = predict(finished, "g0")
    labels = screen.obs["perturbation"].astype(str).to_numpy()
    counts = dense(screen)
    x = np.log1p(counts / counts.sum(1, keepdims=True) * finished.info["preprocessing"]["target_sum"])
    start = x[screen.obs_names.get_indexer(found.obs["cell"])]
    np.testing.assert_allclose(found.var["control_mean"], start.mean(0), atol=1e-5)
    assert set(labels[screen.obs_names.get_indexer(found.obs["cell"])]) == {"control"}
    measured = x[labels == "g0"].mean(0) - x[labels == "control"].mean(0)
    assert np.corrcoef(found.varm["crlseq_effect"][:, 0], measured)[0, 1] > 0.8


def test_controls_come_from_batches_in_proportion() -> None:
    batch = np.repeat(["x", "y", "z"], [60, 30, 10])
    controls = np.arange(100)
    rng = np.random.default_rng(0)
    drawn = draw_controls(controls, batch, 20, rng)
    assert np.unique(batch[drawn], return_counts=True)[1].tolist() == [12, 6, 2]
    assert len(np.unique(drawn)) == 20
    drawn = draw_controls(controls[::2], batch, 120, rng)  # 50 controls: twice each, and 20 three times
    assert set(np.bincount(drawn, minlength=100)[::2]) == {2, 3} and len(drawn) == 120


def test_more_cells_than_there_are() -> None:
    found = predict(hand_run(), "A", source=many(50), n_cells=70)
    assert found.n_obs == 70 and found.obs_names.is_unique
    assert any("more than once" in text for text in found.uns["crlseq_prediction"]["notes"])
    assert predict(hand_run(), "A", source=many(50)).n_obs == 50
    with pytest.raises(UsageError, match="70 counterfactuals"):
        predict(hand_run(), "A", source=many(50), n_cells=70, counterfactual=True)
    with pytest.raises(UsageError, match="0 cells"):
        predict(hand_run(), "A", source=many(50), n_cells=0)


def test_controls_of_other_files() -> None:
    source = many(50)
    source.obs["perturbation"] = ["control"] * 20 + ["A"] * 15 + ["B"] * 15
    assert set(predict(hand_run(), "A", source=source).obs["cell"]) == {f"c{i}" for i in range(20)}
    source.obs["perturbation"] = "control"  # no screen, and controls all the same
    assert predict(hand_run(), "A", source=source).n_obs == 50
    source.obs["perturbation"] = "A"
    with pytest.raises(InputError, match="no cell is labelled 'control'"):
        predict(hand_run(), "A", source=source)
    with pytest.raises(InputError, match="never written"):
        predict(hand_run(), "A")


def test_published_model() -> None:
    """Without noise that is abducted a virtual cell is decoded whole, and composition is the reconstruction error."""
    screen = small_screen()
    run = crlseq.fit(screen, preset="paper", epochs=1, n_latents=2)
    found = predict(run, "g0", source=screen, counterfactual=True)
    n = found.n_obs // 2
    x = torch.from_numpy(found.X[:n]).double()
    with torch.no_grad():
        back = run.model.double().decoder(run.model.latents(x))
    row = found.uns["crlseq_prediction"]["summary"].loc["g0"]
    assert row["composition"] == pytest.approx(float((back - x).abs().max()), rel=1e-6)
    effect = found.X[n:].mean(0) - back.mean(0).numpy()  # against the same cells decoded without a perturbation
    np.testing.assert_allclose(found.varm["crlseq_effect"][:, 0], effect, atol=1e-5)
    assert (found.varm["crlseq_effect_upper"] > found.varm["crlseq_effect_lower"]).all()


def test_scanpy_opens_it(finished: Run, tmp_path: Path) -> None:
    """PCA, an embedding by perturbation, and the measured cells beside the virtual ones; names with a slash survive."""
    import scanpy as sc

    run = replace(finished, interventions=finished.interventions.replace({"perturbation": {"g0": "x/y"}}))
    info = run.info | {"conditions": [row for row in run.info["conditions"] if "g0" not in row["perturbations"]]}
    virtual = predict(replace(run, info=info), ["x/y", "g1+x/y"], n_cells=40, counterfactual=True)
    virtual.write_h5ad(tmp_path / "virtual.h5ad")
    virtual = ad.read_h5ad(tmp_path / "virtual.h5ad")
    about = virtual.uns["crlseq_prediction"]
    assert list(about["perturbations"]) == ["x/y", "x/y+g1"] == list(about["summary"].index)
    assert virtual.X.dtype == np.float32 and virtual.n_obs == 120
    assert virtual.obs["counterfactual"].tolist() == [False] * 40 + [True] * 80
    assert virtual.obs["cell"].tolist() == virtual.obs["cell"].tolist()[:40] * 3
    assert virtual.varm["crlseq_effect"].shape == (40, 2)
    assert finished.path is not None
    measured = ad.read_h5ad(finished.path / "crlseq.h5ad")
    both = ad.concat([measured, virtual], label="from", keys=["measured", "virtual"])
    assert both.obs_names.is_unique and "perturbation" in both.obs and both.obsm["X_crlseq"].shape == (len(both), 3)
    sc.pp.pca(virtual, n_comps=5)
    sc.pl.embedding(virtual, "X_pca", color="perturbation", show=False)
    sc.pl.embedding(both, "X_crlseq", color=["perturbation", "gene0"], show=False)


def test_method_of_a_run(finished: Run) -> None:
    np.testing.assert_array_equal(finished.predict("g1", n_cells=20).X, predict(finished, ["g1"], n_cells=20).X)


def test_notes_are_told() -> None:
    told: list[str] = []
    source = many(20)
    predict(hand_run(), ["N"], source=source, n_cells=30, note=told.append)
    assert len(told) == 3  # no labels, too few cells, no effect
