"""Cross-validation: a fold's fit is given no cell that judges it, and what each fold holds out."""

from __future__ import annotations

import io
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import crlseq
from crlseq.data.perturbations import Perturbations, read_perturbations
from crlseq.errors import InputError, UsageError
from crlseq.experiments import crossvalidation
from crlseq.experiments.crossvalidation import cross_validate, default_splits, fold_config, make_folds, over_folds
from crlseq.run.run import Run
from tests.support import PREDICTORS, check_refusal, dense, invoke, succeeds

LINEAR = {"method": "linear", "n_latents": 2, "bootstrap": 0}


@pytest.fixture(scope="module")
def labelled(screen: ad.AnnData) -> Perturbations:
    return read_perturbations(screen.obs, "perturbation", "control", "+")


@pytest.fixture(scope="module")
def linear(screen: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return crlseq.fit(screen.copy(), tmp_path_factory.mktemp("cv") / "RUN", **LINEAR)


def test_no_cell_is_fitted_and_judged(linear: Run, labelled: Perturbations) -> None:
    plan = make_folds(labelled, linear, 5, ("cells", "combinations", "singles"))
    control = labelled.condition == 0
    for fold in plan:
        assert not np.intersect1d(fold.train, fold.judged).size
        assert control[fold.train].sum() == control.sum() and not control[fold.judged].any()


def test_every_perturbed_cell_is_judged_once_by_cells(linear: Run, labelled: Perturbations) -> None:
    plan = make_folds(labelled, linear, 5, ("cells",))
    judged = np.concatenate([fold.judged for fold in plan])
    assert sorted(judged) == np.flatnonzero(labelled.condition > 0).tolist()
    for fold in plan:
        shares = np.bincount(labelled.condition[fold.judged])[1:] / np.bincount(labelled.condition)[1:]
        assert np.abs(shares - 0.2).max() < 0.02
        assert len(fold.train) + len(fold.judged) == (labelled.condition >= 0).sum()


def test_held_out_conditions_leave_no_cell_and_no_combination_behind(linear: Run, labelled: Perturbations) -> None:
    plan = make_folds(labelled, linear, 3, ("singles", "combinations"))
    for fold in plan:
        judged, trained = (set(labelled.condition[index]) - {0} for index in (fold.judged, fold.train))
        assert not judged & trained
        lost = {labelled.conditions[c][0] for c in judged if len(labelled.conditions[c]) == 1}
        assert lost and not any(lost & set(labelled.conditions[c]) for c in trained)
    held_out = [c for fold in plan for c in set(labelled.condition[fold.judged])]
    assert set(held_out) == set(range(1, len(labelled.conditions)))
    singles = [c for c in held_out if len(labelled.conditions[c]) == 1]
    assert len(singles) == len(set(singles))


def test_what_the_run_held_out_is_in_no_folds_file(screen: ad.AnnData, labelled: Perturbations, tmp_path: Path) -> None:
    run = crlseq.fit(screen.copy(), tmp_path / "RUN", combinations=False, hold_out=("g5",), **LINEAR)
    plan = make_folds(labelled, run, 4, ("cells",))
    names = np.array(labelled.condition_names)[labelled.condition]
    for fold in plan:
        assert not {"g5", "g2+g4", "g3+g4"} & set(names[fold.train])
    assert sum((names[fold.judged] == "g5").sum() for fold in plan) == (names == "g5").sum()
    config = fold_config(run, labelled)
    assert not config.data.hold_out and config.data.hold_out_cells == 0 and config.model == run_config(run).model


def run_config(run: Run) -> crlseq.config.Config:
    return crlseq.config.Config.model_validate(run.info["config"])


def test_judged_cells_change_nothing_that_is_fitted(
    screen: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leakage: with other values in all cells that judge a fold, its fit is the same to the bit, and its scores are not.

    The values are such that a look at them would show: another depth, other genes, one that is silent elsewhere.
    """
    x = dense(screen)
    x[:, 7] = 0
    silent = ad.AnnData(x, obs=screen.obs, var=screen.var)
    run = crlseq.fit(silent.copy(), tmp_path / "before", n_top_genes=30, **LINEAR)
    labels = read_perturbations(screen.obs, "perturbation", "control", "+")
    plan = make_folds(labels, run, 2, ("cells", "combinations"))
    rng = np.random.default_rng(0)
    x[plan[0].judged] = rng.poisson(30 * rng.random(x.shape[1]), (len(plan[0].judged), x.shape[1]))
    other = ad.AnnData(x, obs=screen.obs, var=screen.var)
    other_run = crlseq.fit(other, tmp_path / "after", n_top_genes=30, **LINEAR)

    fits: list[Run] = []
    predictions: list[dict[str, np.ndarray]] = []

    def recording_fit(*args: object, **options: object) -> Run:
        fits.append(crlseq.fit(*args, **options))  # type: ignore[arg-type]
        return fits[-1]

    def recording_evaluate(*args: object) -> object:
        found = crlseq.evaluate(*args)  # type: ignore[arg-type]
        predictions.append(found.predicted)
        fits[-1].model  # noqa: B018 - read before its folder is gone
        return found

    monkeypatch.setattr(crossvalidation, "fit", recording_fit)
    monkeypatch.setattr(crossvalidation, "evaluate", recording_evaluate)
    before = cross_validate(run, folds=2, splits=("cells", "combinations")).conditions
    after = cross_validate(other_run, folds=2, splits=("cells", "combinations")).conditions
    for first, second, same in ((fits[0], fits[2], True), (fits[1], fits[3], False)):
        assert (first.info["preprocessing"] == second.info["preprocessing"]) == same
        assert first.programs.equals(second.programs) == same
        assert first.interventions.equals(second.interventions) == same
        assert (first.info["conditions"] == second.info["conditions"]) or not same
    state, other_state = (fits[i].model.state_dict() for i in (0, 2))
    assert all((state[name] == other_state[name]).all() for name in state)
    for name, mean in predictions[0].items():
        assert (mean == predictions[2][name]).all(), name
    one = [table[(table["fold"] == 0) & (table["predictor"] == "model")]["l2"].to_numpy() for table in (before, after)]
    assert (one[0] != one[1]).all()


def test_a_cross_validation(linear: Run) -> None:
    found = cross_validate(linear, folds=2, splits=("cells", "combinations"))
    table = found.conditions
    assert sorted(table["fold"].unique()) == [0, 1]
    assert set(table["group"]) == {"held-out cells", "combinations, 2 of 2 parts seen"}
    assert set(table["predictor"]) == set(PREDICTORS)
    doubles = table[(table["group"] != "held-out cells") & (table["predictor"] == "model")]
    assert sorted(doubles["condition"]) == ["g2+g4", "g3+g4"]  # each in one fold
    rows = found.summary.set_index(["group", "predictor", "metric"])
    g0 = table[(table["condition"] == "g0") & (table["predictor"] == "model")]
    assert len(g0) == 2 and g0["n_cells"].sum() == 60
    means = over_folds(table).set_index(["group", "condition", "predictor"])
    assert means.loc[("held-out cells", "g0", "model"), "l2"] == pytest.approx(g0["l2"].mean())
    assert rows.loc[("held-out cells", "model", "l2"), "n"] == 9
    assert found.notes[0] == "2 folds; held out: cells, combinations."
    assert len(found.verdict) >= 2


def test_unseen_singles_and_combinations_of_them(linear: Run, labelled: Perturbations) -> None:
    assert default_splits(linear, labelled) == ("cells", "combinations", "singles")
    found = cross_validate(linear, folds=3, splits=("singles",)).conditions
    groups = found.drop_duplicates(["fold", "condition"])[["condition", "group"]]
    single = groups[~groups["condition"].str.contains("+", regex=False)]
    assert (single["group"] == "unseen perturbations").all() and len(single) == 7
    assert groups["group"].str.contains("parts seen").any()


def test_command_and_refusals(linear: Run, tmp_path: Path) -> None:
    path = tmp_path / "folds.csv"
    words = ["evaluate", linear.path, "--cross-validate", "--folds", 2, "--splits", "cells"]
    answer = succeeds(*words, "--output", path)
    assert "fold 2 of 2" in answer.err and "against the best baseline, the model is" in answer.err
    assert set(pd.read_csv(path)["fold"]) == {0, 1}
    assert set(pd.read_csv(io.StringIO(answer.out), sep="\t")["held out"]) == {"held-out cells"}
    for more, said in (
        (["--data", path], "--data names another"),
        (["--splits", "genes"], "There is no split 'genes'"),
    ):
        check_refusal(*invoke(*words, *more), 2, said)
    check_refusal(*invoke("evaluate", linear.path, "--splits", "cells"), 2, "--cross-validate")


def test_nothing_to_hold_out_and_damage(linear: Run, screen: ad.AnnData, tmp_path: Path) -> None:
    singles = screen[~screen.obs["perturbation"].str.contains("+", regex=False)].copy()
    run = crlseq.fit(singles, tmp_path / "RUN", **LINEAR)
    with pytest.raises(InputError, match="nothing to hold out"):
        cross_validate(run, splits=("combinations",))
    with pytest.raises(UsageError, match="1 folds"):
        cross_validate(run, folds=1)
    (run.path / "crlseq.h5ad").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read"):
        cross_validate(run)
