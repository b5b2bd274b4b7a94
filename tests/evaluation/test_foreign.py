"""Other tools' predictions: means and cells, by hand; what counts as known; what is refused."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from crlseq.errors import InputError
from crlseq.evaluation.foreign import evaluate_predictions
from tests.support import dense

GENES = [f"gene{i}" for i in range(30)]


def effects() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    single = {name: rng.normal(size=30) for name in "ABCD"}
    return {**single, "A+B": single["A"] + single["B"], "C+D": 0.5 * (single["C"] + single["D"])}


def measured(n: int = 40, seed: int = 1) -> ad.AnnData:
    """Cells of every condition, and controls, in random order."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(["ctrl", *effects()], n)
    change = {"ctrl": np.zeros(30), **effects()}
    x = 5 + np.stack([change[label] for label in labels]) + 0.5 * rng.normal(size=(len(labels), 30))
    order = rng.permutation(len(labels))
    obs = pd.DataFrame({"condition": labels[order]}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(x[order], obs=obs, var=pd.DataFrame(index=GENES))


def means(rows: dict[str, np.ndarray]) -> ad.AnnData:
    return ad.AnnData(5 + np.stack([*rows.values()]), obs=pd.DataFrame(index=[*rows]), var=pd.DataFrame(index=GENES))


def table(found: object) -> pd.DataFrame:
    return found.conditions.set_index(["condition", "predictor"])  # type: ignore[attr-defined]


def test_means_by_hand() -> None:
    data, predicted = measured(), {name: 0.8 * effects()[name] for name in ("A+B", "C+D")}
    found = evaluate_predictions(means(predicted), data)
    rows, x, label = table(found), dense(data), data.obs["condition"].to_numpy()
    of = {name: x[label == name].mean(0) for name in {*label}}
    for name in predicted:
        row = rows.loc[(name, "model")]
        assert row["mae"] == pytest.approx(np.abs(5 + predicted[name] - of[name]).mean(), rel=1e-5)
        assert row["l2"] == pytest.approx(np.linalg.norm(5 + predicted[name] - of[name]), rel=1e-5)
        expected = np.corrcoef(5 + predicted[name] - of["ctrl"], of[name] - of["ctrl"])[0, 1]
        assert row["pearson_delta"] == pytest.approx(expected, rel=1e-5)
        single = sum(of[part] - of["ctrl"] for part in name.split("+"))
        common = np.mean([of[part] - of["ctrl"] for part in "ABCD"], axis=0)
        for predictor, change in (("additive", single), ("shrunk_additive", single / 2 + common / 2), ("mean", common)):
            distance = np.linalg.norm(of["ctrl"] + change - of[name])
            assert rows.loc[(name, predictor), "l2"] == pytest.approx(distance, rel=1e-4), predictor
    assert found.conditions["group"].unique().tolist() == ["combinations, 2 of 2 parts seen"]
    assert rows.loc[("A+B", "additive"), "l2"] < rows.loc[("A+B", "shrunk_additive"), "l2"]
    assert rows.loc[("C+D", "additive"), "l2"] > rows.loc[("C+D", "shrunk_additive"), "l2"]
    assert not found.notes and len(found.verdict) == 1 and "the prediction is" in found.verdict[0]


def test_cells_are_their_means_and_files_are_read_alike(tmp_path: Path) -> None:
    data, predicted = measured(), measured(seed=2)
    predicted = predicted[predicted.obs["condition"].isin(["A+B", "C+D", "ctrl"])].copy()
    x, label = dense(predicted), predicted.obs["condition"].to_numpy()
    by_means = evaluate_predictions(means({name: x[label == name].mean(0) - 5 for name in ("A+B", "C+D")}), data)
    by_cells = evaluate_predictions(predicted, data)
    pd.testing.assert_frame_equal(by_means.conditions, by_cells.conditions, rtol=1e-4, atol=1e-6)
    data.X = sp.csr_matrix(data.X)
    data[:, ::-1].copy().write_h5ad(tmp_path / "data.h5ad")
    predicted.write_h5ad(tmp_path / "predicted.h5ad")
    from_files = evaluate_predictions(tmp_path / "predicted.h5ad", tmp_path / "data.h5ad")
    pd.testing.assert_frame_equal(from_files.conditions, by_cells.conditions, rtol=1e-4, atol=1e-6)


def test_a_predicted_condition_makes_no_baseline() -> None:
    """Leakage: with the singles predicted too, they are judged, and the sum of their effects is no baseline of anything."""
    found = evaluate_predictions(means(effects()), measured())
    assert set(found.conditions["group"]) == {"single perturbations", "combinations"}
    assert {"additive", "ridge"}.isdisjoint(found.conditions["predictor"])
    assert any("Every measured condition is predicted" in note for note in found.notes)
    data = measured()
    x, label = dense(data), data.obs["condition"].to_numpy()
    of = {name: x[label == name].mean(0) for name in {*label}}
    others = np.mean([of[name] for name in effects() if name != "A"], axis=0)
    assert table(found).loc[("A", "mean"), "l2"] == pytest.approx(np.linalg.norm(others - of["A"]), rel=1e-4)


def test_counts_of_both_are_normalised_alike(screen: ad.AnnData) -> None:
    predicted = screen[screen.obs["perturbation"] == "g0"].copy()
    found = table(evaluate_predictions(predicted, screen.copy()))
    assert found.loc[("g0", "model"), "l2"] == pytest.approx(0, abs=1e-5)
    normalised = predicted.copy()
    normalised.X = sp.csr_matrix(np.log1p(dense(predicted)))
    with pytest.raises(InputError, match="holds counts, and the AnnData does not"):
        evaluate_predictions(normalised, screen.copy())


def test_a_measured_table_of_means() -> None:
    data, truth = {"ctrl": np.zeros(30), **effects()}, effects()
    found = evaluate_predictions(means({name: truth[name] for name in ("A+B", "C+D")}), labelled(means(data)))
    rows = table(found).xs("model", level="predictor")
    assert rows["l2"].to_numpy() == pytest.approx(0, abs=1e-5) and rows["wmse"].to_numpy() == pytest.approx(0, abs=1e-9)
    assert rows["de_score"].isna().all() and "sampling_floor" not in set(found.conditions["predictor"])
    assert any("one row per condition" in note for note in found.notes)


def labelled(adata: ad.AnnData) -> ad.AnnData:
    adata.obs["condition"] = adata.obs_names.to_numpy()
    return adata


def test_missing_genes_and_conditions_are_told() -> None:
    predicted = means({"A+B": effects()["A+B"], "E+F": effects()["A"]})
    found = evaluate_predictions(predicted[:, 3:].copy(), measured()[:, :28].copy())
    assert "25 of 27 predicted genes are compared." in found.notes
    assert "1 predicted conditions are not measured and not judged: E+F." in found.notes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p, d: (p[:, :10].copy(), d[:, 10:].copy()), "have 0 genes in common"),
        (lambda p, d: (means({"X+Y": effects()["A"]}), d), "No condition of the AnnData is measured"),
        (lambda p, d: (p, d[d.obs["condition"] != "ctrl"].copy()), "control"),
        (lambda p, d: (ad.AnnData(np.where(p.X > 6, np.nan, p.X), p.obs, p.var), d), "NaN or infinite"),
    ],
)
def test_refusals(change: object, said: str) -> None:
    predicted = means({name: effects()[name] for name in ("A+B", "C+D")})
    with pytest.raises(InputError, match=said):
        evaluate_predictions(*change(predicted, measured()))  # type: ignore[operator]
