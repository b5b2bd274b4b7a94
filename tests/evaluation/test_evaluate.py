"""Evaluations of small runs: groups, what is compared with what, and that no measured cell has a say in a prediction."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import crlseq
from crlseq.errors import InputError, UsageError
from crlseq.evaluation.baselines import BASELINES, Indices, TrainingEffects
from crlseq.evaluation.compare import (
    AXIOMS,
    METRICS,
    REGISTERED,
    bootstrap_interval,
    compare,
    digits,
    in_words,
    summarise,
)
from crlseq.evaluation.evaluate import Evaluation, evaluate
from crlseq.evaluation.recovery import known_recovery, score_recovery
from crlseq.run.run import Run
from tests.support import PREDICTORS, dense

LINEAR = {"method": "linear", "n_latents": 3, "bootstrap": 0}


@pytest.fixture(scope="module")
def doubles(screen: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on singles alone."""
    return crlseq.fit(screen.copy(), tmp_path_factory.mktemp("doubles") / "RUN", combinations=False, **LINEAR)


@pytest.fixture(scope="module")
def held_out(finished: Run) -> Evaluation:
    """The evaluation of a run with held-out cells."""
    return evaluate(finished, legacy=True)


def split_of(run: Run) -> np.ndarray:
    return ad.read_h5ad(run.path / "crlseq.h5ad", backed="r").obs["crlseq_split"].to_numpy()


def normalised_cells(run: Run, screen: ad.AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of a screen of counts by hand, and the labels and the split of its cells."""
    x = dense(screen)
    x = np.log1p(x / x.sum(1, keepdims=True) * run.info["preprocessing"]["target_sum"])
    return x, screen.obs["perturbation"].to_numpy(), split_of(run)


def test_every_condition_has_every_predictor(held_out: Evaluation) -> None:
    table = held_out.conditions
    assert list(table.columns) == ["condition", "group", "predictor", "n_cells", *METRICS, *AXIOMS]
    assert table["group"].unique().tolist() == ["held-out cells"]
    assert sorted(table["condition"].unique()) == ["g0", "g1", "g2", "g2+g4", "g3", "g3+g4", "g4", "g5", "g6"]
    assert (table.groupby("condition")["predictor"].agg(list).map(tuple) == PREDICTORS).all()
    assert (table["n_cells"] == 12).all()
    assert not held_out.notes
    model = table[table["predictor"] == "model"].drop(columns=["condition", "group", "predictor"])
    assert model.drop(columns=["sign_agreement", "de_score", "realised"]).notna().all(axis=None)
    assert table.loc[table["predictor"] != "model", [*AXIOMS]].isna().all(axis=None)


def test_changes_are_against_controls_of_the_same_batches(
    finished: Run, screen: ad.AnnData, held_out: Evaluation
) -> None:
    """No change and additive by hand, of normalised counts."""
    x, labels, split = normalised_cells(finished, screen)
    control = x[(labels == "control") & (split == "train")].mean(0)
    trained, measured = (x[(labels == "g0") & (split == name)].mean(0) for name in ("train", "test"))
    rows = held_out.conditions[held_out.conditions["condition"] == "g0"].set_index("predictor")
    assert rows.loc["no_change", "l2"] == pytest.approx(np.linalg.norm(control - measured), rel=1e-5)
    assert rows.loc["additive", "l2"] == pytest.approx(np.linalg.norm(trained - measured), rel=1e-5)
    expected = np.corrcoef(trained - control, measured - control)[0, 1]
    assert rows.loc["additive", "pearson_delta"] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(rows.loc["no_change", "pearson_delta"])
    cells = x[(labels == "g0") & (split == "test")]
    floor = np.sqrt((cells.var(0, ddof=1) / len(cells)).sum())
    assert rows.loc["sampling_floor", "l2"] == pytest.approx(floor, rel=1e-4)


def test_counterfactuals_are_judged(finished: Run, held_out: Evaluation) -> None:
    """As `predict` finds it for the same cells; no change is no error for a model that abducts its noise."""
    rows = held_out.conditions[held_out.conditions["predictor"] == "model"].set_index("condition")
    assert (rows["composition"] < 1e-10).all() and (rows["change"] > 0).any()
    summary = held_out.summary.set_index(["predictor", "metric"])
    assert summary.loc[("model", "effectiveness"), "mean"] == pytest.approx(rows["effectiveness"].mean())
    assert ("additive", "effectiveness") not in summary.index
    split = split_of(finished)
    own = ad.read_h5ad(finished.path / "crlseq.h5ad")
    controls = own[(own.obs["perturbation"] == "control") & (split == "train")].copy()
    predicted = finished.predict(["g0"], source=controls, n_cells=controls.n_obs, counterfactual=True)
    expected = predicted.uns["crlseq_prediction"]["summary"].loc["g0"]
    for name in AXIOMS[1:]:
        assert rows.loc["g0", name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_known_truth_is_scored(finished: Run, held_out: Evaluation, screen: ad.AnnData, tmp_path: Path) -> None:
    expected = score_recovery(
        finished.interventions,
        finished.edges,
        screen.uns["truth"],
        finished.latents(screen),
        screen.obsm["true_latents"],
        finished.pairs,
    )
    assert held_out.recovery == pytest.approx(expected, nan_ok=True)
    assert {"mcc", "dci_disentanglement", "dci_completeness", "dci_informativeness", "irs"} <= expected.keys()
    other = screen.copy()
    del other.obsm["true_latents"]
    recovery, _ = known_recovery(finished, other)
    assert (
        recovery is not None
        and np.isnan(recovery["mcc"])
        and recovery["target_accuracy"] == expected["target_accuracy"]
    )
    other.uns["truth"] = {"adjacency": np.eye(3)[:2]}
    assert known_recovery(finished, other)[0] is None and "truth" in known_recovery(finished, other)[1][0]
    bare = ad.AnnData(screen.X, obs=screen.obs, var=screen.var)
    run = crlseq.fit(bare, tmp_path / "RUN", **LINEAR)
    assert known_recovery(run, None) == (None, []) and evaluate(run).recovery is None


def test_noise_that_changes_share_is_told(screen: ad.AnnData, tmp_path: Path) -> None:
    """Few controls: their mean is off by as much in every change."""
    rare = np.flatnonzero(screen.obs["perturbation"] == "control")[25:]
    few = screen[np.setdiff1d(np.arange(screen.n_obs), rare)].copy()
    run = crlseq.fit(few, tmp_path / "RUN", hold_out_cells=0.2, **LINEAR)
    told = [note for note in evaluate(run).notes if "sampling error of the controls' mean" in note]
    assert len(told) == 1
    assert not any("sampling error" in note for note in evaluate(run, screen.copy()).notes)


def test_held_out_controls(finished: Run, screen: ad.AnnData, linear_folder: Path) -> None:
    """Every change against test controls, by hand; and what the fit made of the others stays as it is."""
    found = evaluate(finished, held_out_controls=True)
    x, labels, split = normalised_cells(finished, screen)
    control, other = (x[(labels == "control") & (split == name)].mean(0) for name in ("test", "train"))
    trained, measured = (x[(labels == "g0") & (split == name)].mean(0) for name in ("train", "test"))
    rows = found.conditions[found.conditions["condition"] == "g0"].set_index("predictor")
    assert rows.loc["additive", "l2"] == pytest.approx(np.linalg.norm(control + trained - other - measured), rel=1e-5)
    assert rows.loc["no_change", "l2"] == pytest.approx(np.linalg.norm(control - measured), rel=1e-5)
    with pytest.raises(InputError, match="0 control cells were held out"):
        evaluate(crlseq.load(linear_folder), held_out_controls=True)


def test_to_decode_cells_afresh_is_no_effect(screen: ad.AnnData, tmp_path: Path) -> None:
    """The published model without shifts: what it makes of cells differs from them, under every condition alike."""
    run = crlseq.fit(screen.copy(), tmp_path / "RUN", preset="paper", epochs=1, n_latents=2, hold_out_cells=0.2)
    with torch.no_grad():
        run.model.scm.shift.zero_()
    for held_out_controls in (False, True):
        predicted = evaluate(run, held_out_controls=held_out_controls).predicted
        np.testing.assert_allclose(predicted["model"], predicted["no_change"], atol=1e-6)


def test_the_error_of_fitted_controls_is_known_and_that_of_others_is_not(finished: Run, screen: ad.AnnData) -> None:
    """By hand: changes against the fit's controls have what the model knows of these, changes against others do not."""
    model, sources = finished.model, ({}, {"held_out_controls": True}, {"data": screen.copy()})
    before = model.control_error.clone()
    try:
        model.control_error.zero_()
        without = [evaluate(finished, **source).predicted["model"] for source in sources]
        model.control_error.fill_(0.25)
        found = [evaluate(finished, **source).predicted["model"] for source in sources]
    finally:
        model.control_error.copy_(before)
    assert before.any()
    np.testing.assert_allclose(found[0], without[0] - 0.25, atol=1e-6)
    np.testing.assert_allclose(found[1], without[1])
    np.testing.assert_allclose(found[2], without[2])


def test_batches_are_matched(screen: ad.AnnData, tmp_path: Path) -> None:
    """One batch with every value moved: a change against the other batch's controls would be all batch."""
    adata = screen.copy()
    x = np.log1p(dense(adata))
    second = (adata.obs["batch"] == adata.obs["batch"].unique()[1]).to_numpy()
    x[second] += 3
    rows = ~((adata.obs["perturbation"] == "g0").to_numpy() & ~second)  # g0 lies in the second batch alone
    moved = ad.AnnData(x, obs=adata.obs, var=adata.var)[rows].copy()
    run = crlseq.fit(moved, tmp_path / "RUN", batch_key="batch", hold_out_cells=0.2, values="log", **LINEAR)
    found = evaluate(run).conditions.set_index(["condition", "predictor"])
    far = np.sqrt(x.shape[1]) * 3
    assert found.loc[("g0", "no_change"), "l2"] < far / 2
    assert found.loc[("g0", "additive"), "l2"] < found.loc[("g0", "no_change"), "l2"]
    assert found.loc[("g0", "model"), "l2"] < found.loc[("g0", "no_change"), "l2"]


def test_held_out_doubles_are_grouped_by_parts_seen(doubles: Run) -> None:
    found = evaluate(doubles)
    assert found.conditions["group"].unique().tolist() == ["combinations, 2 of 2 parts seen"]
    assert sorted(found.conditions["condition"].unique()) == ["g2+g4", "g3+g4"]
    assert found.verdict[0].startswith("combinations, 2 of 2 parts seen, 2 conditions: against the best baseline,")


def test_a_double_with_parts_that_were_never_fitted(screen: ad.AnnData, tmp_path: Path) -> None:
    adata = screen[~screen.obs["perturbation"].isin(["g2", "g3"])].copy()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace({"g3+g4": "g2+g3"})
    run = crlseq.fit(adata, tmp_path / "RUN", combinations=False, **LINEAR)
    found = evaluate(run)
    groups = found.conditions.drop_duplicates("condition").set_index("condition")["group"].to_dict()
    assert groups == {
        "g2+g3": "combinations, 0 of 2 parts seen",
        "g2+g4": "combinations, 1 of 2 parts seen",
    }
    assert "Not fitted, so no method predicts an effect: g2, g3." in found.notes
    rows = found.conditions.set_index(["condition", "predictor"])
    assert rows.loc[("g2+g3", "model"), "l2"] == rows.loc[("g2+g3", "no_change"), "l2"]
    assert rows.loc[("g2+g4", "model"), "l2"] != rows.loc[("g2+g4", "no_change"), "l2"]


def test_measured_cells_change_no_prediction(screen: ad.AnnData, doubles: Run, tmp_path: Path) -> None:
    """Leakage: other test cells, the same predictions to the bit; and the metrics do change."""
    adata = ad.read_h5ad(doubles.path / "crlseq.h5ad")
    tested = (adata.obs["crlseq_split"] == "test").to_numpy()
    x = dense(adata)
    x[tested] = np.random.default_rng(0).poisson(3, (tested.sum(), adata.n_vars))
    adata.X = sp.csr_matrix(x)
    other = shutil.copytree(doubles.path, tmp_path / "RUN")
    adata.write_h5ad(other / "crlseq.h5ad")
    before, after = evaluate(doubles), evaluate(crlseq.load(other))
    assert set(before.predicted) == {"model", *BASELINES}
    for name, predicted in before.predicted.items():
        assert (predicted == after.predicted[name]).all(), name
    assert (before.conditions["l2"] != after.conditions["l2"]).all()


def test_fitted_cells_of_another_file_are_left_out(finished: Run, screen: ad.AnnData, held_out: Evaluation) -> None:
    """The input itself as --data, under other names: what was fitted does not judge."""
    other = screen.copy()
    other.obs_names = [f"again {i}" for i in range(other.n_obs)]
    found = evaluate(finished, other)
    n_fitted = sum(finished.info["cells"][name] for name in ("train", "validation"))
    controls = (screen.obs["perturbation"] == "control").sum()
    n_controls = {row["name"]: row["cells"] for row in finished.info["conditions"]}["control"]
    assert controls == 200
    expected = n_fitted - n_controls["train"] - n_controls["validation"]
    assert any(note.startswith(f"{expected} cells of") for note in found.notes)
    assert (found.conditions["n_cells"] == 12).all()
    both = [e.conditions.set_index(["condition", "predictor"])["l2"] for e in (found, held_out)]
    assert both[0].corr(both[1]) > 0.9


def test_another_file_with_reordered_and_more_genes(finished: Run, screen: ad.AnnData) -> None:
    more = ad.AnnData(np.full((screen.n_obs, 2), 30.0), obs=screen.obs, var=pd.DataFrame(index=["x", "y"]))
    wider = evaluate(finished, ad.concat([screen, more], axis=1, merge="first"))
    assert (wider.conditions["n_cells"] == 12).all() and any("2 of its 42 genes" in note for note in wider.notes)
    other = screen[:, ::-1].copy()
    assert evaluate(finished, other).conditions.equals(evaluate(finished, screen.copy()).conditions)


def test_another_file_that_lacks_genes(finished: Run, screen: ad.AnnData) -> None:
    """Compared is what is there; the model is given the controls' mean of the rest, and that is said."""
    kept = np.delete(np.arange(screen.n_vars), [3, 17, 30])
    found = evaluate(finished, screen[:, kept[::-1]].copy())
    assert any("3 of the 40 fitted genes are missing, first 'gene3'" in note for note in found.notes)
    assert "37 of 40 fitted genes are compared." in found.notes
    assert all(mean.shape[1] == 37 for mean in found.predicted.values())
    assert (found.conditions["n_cells"] == 12).all()  # other totals do not hide cells that were fitted
    whole = evaluate(finished, screen.copy())
    both = [e.conditions.set_index(["condition", "predictor"])["l2"] for e in (found, whole)]
    model = [values.xs("model", level="predictor") for values in both]
    assert (model[0] < 1.1 * model[1]).all() and model[0].corr(model[1]) > 0.8


def test_validation_cells_judge_where_there_are_no_others(linear_folder: Path) -> None:
    found = evaluate(crlseq.load(linear_folder))
    assert found.conditions["group"].unique().tolist() == ["validation cells"]
    assert "validation cells are used" in found.notes[0]


def test_an_evaluation_repeats(finished: Run, held_out: Evaluation) -> None:
    again = evaluate(finished, legacy=True)
    assert again.conditions.equals(held_out.conditions)
    assert again.summary.equals(held_out.summary)
    assert again.verdict == held_out.verdict


def test_bad_evaluation_sets(finished: Run, screen: ad.AnnData) -> None:
    cases = {
        "two are needed": screen[screen.obs["perturbation"] != "control"],
        "25 of the 40 fitted genes are missing": screen[:, 25:],
        "no column 'perturbation'": ad.AnnData(screen.X, obs=screen.obs[["batch"]], var=screen.var),
        "no cells to evaluate on": screen[screen.obs["perturbation"] == "control"],
    }
    for message, adata in cases.items():
        with pytest.raises(InputError, match=message):
            evaluate(finished, adata.copy())
    fractional = screen.copy()
    fractional.X = dense(screen) + 0.5
    with pytest.raises(InputError, match="not counts"):
        evaluate(finished, fractional)


def scores(**columns: list[float]) -> pd.DataFrame:
    """Two metrics of three conditions; predictors not given are undefined."""
    rows = []
    for predictor in PREDICTORS:
        for i in range(3):
            l2 = columns.get(f"{predictor}_l2", [np.nan] * 3)[i]
            pearson = columns.get(predictor, [np.nan] * 3)[i]
            rows.append(
                {"condition": f"c{i}", "group": "g", "predictor": predictor, "pearson_delta": pearson, "l2": l2}
            )
    return pd.DataFrame(rows)


def test_comparisons_by_hand() -> None:
    table = scores(
        model=[0.5, 0.7, 0.9], additive=[0.4, 0.8, 0.6], ridge=[0.9, np.nan, np.nan],
        model_l2=[1, 2, 3], additive_l2=[2, 2, 5], ridge_l2=[1, 1, 1],
    )  # fmt: skip
    found = compare(table, 0).set_index(["metric", "baseline"])
    row = found.loc[("pearson_delta", "additive")]
    assert (row["n"], row["better"]) == (3, 2)
    assert row["difference"] == pytest.approx(0.1)
    assert row["low"] == pytest.approx(-0.1) and row["high"] == pytest.approx(0.3)  # the least and largest difference
    assert row["best"]  # ridge is defined for one condition alone
    assert found.loc[("l2", "additive"), "better"] == 2  # a tie is no win
    assert found.loc[("l2", "ridge"), "best"] and not found.loc[("l2", "additive"), "best"]
    assert found.loc[("pearson_delta", "ridge"), ["n", "model", "value"]].tolist() == [1, 0.5, 0.9]
    assert in_words(compare(table, 0)) == (
        "g, 3 conditions: against the best baseline, the model is not clearly different by Pearson delta (0.700; the sum "
        "of single effects 0.600) and not clearly different by L2 (2.00; ridge 1.00).",
    )
    means = summarise(table, 0).set_index(["predictor", "metric"])
    assert means.loc[("ridge", "pearson_delta"), ["n", "mean"]].tolist() == [1, 0.9]
    assert means.loc[("model", "l2"), "mean"] == 2


def test_a_clear_win_and_a_clear_loss() -> None:
    table = scores(model=[0.5, 0.7, 0.9], additive=[0.4, 0.5, 0.6], model_l2=[3, 4, 5], additive_l2=[2, 2, 2])
    assert in_words(compare(table, 0)) == (
        "g, 3 conditions: against the best baseline, the model is better by Pearson delta (0.700; the sum of single "
        "effects 0.500) and worse by L2 (4.00; the sum of single effects 2.00).",
    )
    without = compare(table.assign(pearson_delta=np.nan), 0)
    assert in_words(without)[0].startswith(
        "g, 3 conditions: against the best baseline, the model is worse by L2 (4.00;"
    )


def test_numbers_have_three_significant_digits() -> None:
    found = {digits(x) for x in (0.0, 0.12345, 12.345, 99.96, 1234.5, 2.2e-5, -0.5, 999.9, float("nan"))}
    assert found == {"0", "0.123", "12.3", "100", "1230", "2.2e-05", "-0.500", "1000", "nan"}


def test_bootstrap_intervals_cover() -> None:
    rng = np.random.default_rng(0)
    draws = [bootstrap_interval(rng.normal(size=30), seed) for seed in range(200)]
    assert 0.88 < np.mean([low < 0 < high for low, high in draws]) < 0.99
    assert np.isnan(bootstrap_interval(np.array([1.0]), 0)).all()


def test_a_metric_and_a_baseline_of_the_user(doubles: Run) -> None:
    def worst(predicted: np.ndarray, measured: np.ndarray, control: np.ndarray) -> np.ndarray:
        return np.abs(predicted - measured).max(1) / np.abs(measured - control).max(1)

    def half(train: TrainingEffects, queries: Sequence[Indices]) -> np.ndarray:
        return BASELINES["additive"].function(train, queries) / 2

    before = evaluate(doubles)
    crlseq.register_metric("worst_gene", worst, larger_is_better=False)
    crlseq.register_baseline("half", half, "half of the sum")
    try:
        found = evaluate(doubles)
        assert list(found.conditions)[-len(AXIOMS) - 1] == "worst_gene"
        changes = {name: found.predicted[name] - found.predicted["no_change"] for name in ("half", "additive")}
        assert changes["half"] == pytest.approx(changes["additive"] / 2)
        of = found.conditions.set_index("predictor")["worst_gene"]
        assert of["no_change"].to_numpy() == pytest.approx(np.ones(len(of["no_change"])))
        rows = found.comparisons.set_index(["metric", "baseline"])
        assert rows.loc[("worst_gene", "half"), "n"].max() > 0
        kept = found.conditions[found.conditions["predictor"] != "half"].drop(columns="worst_gene")
        pd.testing.assert_frame_equal(kept.reset_index(drop=True), before.conditions)  # nothing else changed
    finally:
        del METRICS["worst_gene"], REGISTERED["worst_gene"], BASELINES["half"]
    for name in ("l2", "composition"):
        with pytest.raises(UsageError, match="own metrics"):
            crlseq.register_metric(name, worst, larger_is_better=False)
    with pytest.raises(UsageError, match="own predictors"):
        crlseq.register_baseline("model", half)
    crlseq.register_baseline("wrong", lambda train, queries: np.zeros((1, 1)))
    try:
        with pytest.raises(UsageError, match="The baseline wrong gave no"):
            evaluate(doubles)
    finally:
        del BASELINES["wrong"]


def test_a_run_in_memory_is_evaluated_as_its_folder(screen: ad.AnnData, tmp_path: Path) -> None:
    options = LINEAR | {"hold_out_cells": 0.2}
    inside, written = crlseq.fit(screen, **options), crlseq.fit(screen, tmp_path / "RUN", **options)
    assert inside.path is None
    pd.testing.assert_frame_equal(evaluate(inside).conditions, evaluate(written).conditions)
    with pytest.raises(InputError, match="never written"):
        evaluate(replace(inside, source=None))
    with pytest.raises(InputError, match="not the screen that was fitted"):
        evaluate(replace(inside, source=screen[:100].copy()))
