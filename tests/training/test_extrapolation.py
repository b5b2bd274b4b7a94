"""Embeddings: the map by hand, its fall-backs, what a run does with genes never perturbed, and bad tables."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import crlseq
from crlseq.data.embeddings import Embeddings, read_embeddings
from crlseq.errors import InputError
from crlseq.evaluation.evaluate import evaluate
from crlseq.experiments.crossvalidation import cross_validate
from crlseq.model.discrepancy_vae import DiscrepancyVAE, extended
from crlseq.run.run import Run
from crlseq.training.extrapolation import Extrapolation, fit_extrapolation, load_extrapolation
from tests.support import check_refusal, invoke, small_screen

LINEAR = {"method": "linear", "n_latents": 3, "bootstrap": 0, "intervention": "shift"}
LOST = ("g4", "g9")


def screen() -> ad.AnnData:
    return small_screen(perturbations_per_latent=6, cells_per_perturbation=40, n_control=300, depth=3000.0, n_doubles=3)


def vectors(adata: ad.AnnData, noise: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """What each perturbation does to each true latent on average, and noise; with genes that are not in the screen."""
    label, u = adata.obs["perturbation"].astype(str), adata.obsm["true_latents"]
    effect = pd.DataFrame(u).groupby(label.to_numpy()).mean()
    effect = effect.loc[[name for name in effect.index if "+" not in name and name != "control"]]
    effect.loc["stranger"] = effect.mean()
    values = effect.to_numpy() + noise * np.random.default_rng(seed).normal(size=effect.shape)
    return pd.DataFrame(values, index=effect.index)


@pytest.fixture(scope="module")
def full() -> ad.AnnData:
    return screen()


@pytest.fixture(scope="module")
def run(full: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Fitted without two perturbations and what contains them, but with vectors of their genes."""
    folder = tmp_path_factory.mktemp("embedded")
    vectors(full).to_csv(folder / "vectors.csv")
    return crlseq.fit(without_lost(full), folder / "RUN", embeddings=str(folder / "vectors.csv"), **LINEAR)


def without_lost(full: ad.AnnData) -> ad.AnnData:
    lost = full.obs["perturbation"].astype(str).str.split("+").map(lambda parts: bool({*parts} & {*LOST}))
    return full[~lost.to_numpy()].copy()


def test_the_map_is_the_ridge_regression() -> None:
    """Against scikit-learn, on standardised vectors."""
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    table = Embeddings(tuple("abcdefgh"), rng.normal(size=(8, 3)))
    found = Extrapolation(table, tuple("abcdef"), "ridge", 2.0, 0.5, np.zeros((6, 2)), np.zeros(4))
    effects = rng.normal(size=(6, 4))
    z = (table.vectors - table.vectors.mean(0)) / table.vectors.std(0)
    expected = Ridge(2.0 * 3).fit(z[:6], effects).predict(z)
    np.testing.assert_allclose(found.weights(table.names) @ effects, expected)
    assert np.allclose(found.weights(["g"]).sum(), 1)


def linear_model(shifts: np.ndarray) -> DiscrepancyVAE:
    """Perturbation k shifts latent k % 2; genes are the latents."""
    model = DiscrepancyVAE(2, 2, len(shifts), n_hidden=8, intervention="shift").double()
    with torch.no_grad():
        for layer in (model.decoder.hidden, model.decoder.output, model.encoder.hidden, model.encoder.mean):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        model.decoder.hidden.weight[:4] = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
        model.decoder.output.weight[:, :4] = torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, -1]]) / 1.2
        model.scm.graph.zero_()
        model.scm.shift.copy_(torch.from_numpy(shifts))
        model.intervention_encoder.given[torch.arange(len(shifts)), torch.arange(len(shifts)) % 2] = 1.0
        model.intervention_encoder.is_given.fill_(True)
    return model


def test_leave_one_out_chooses() -> None:
    """Vectors that are the effects, vectors that say nothing, and effects that are all alike."""
    rng = np.random.default_rng(1)
    shifts = rng.normal(size=20)
    names, control, cells = [f"g{i}" for i in range(20)], np.zeros((3, 2)), np.ones(20, dtype=bool)
    effects = np.zeros((20, 2))
    effects[np.arange(20), np.arange(20) % 2] = shifts
    good = fit_extrapolation(linear_model(shifts), Embeddings(tuple(names), effects), names, cells, control)
    assert good.choice == "ridge" and good.skill > 0.99 and good.penalty < 0.1
    np.testing.assert_allclose(good.weights(names) @ effects, effects, atol=0.02)
    poor = Embeddings(tuple(names), rng.normal(size=(20, 30)))
    found = fit_extrapolation(linear_model(shifts), poor, names, cells, control)
    assert found.choice in ("none", "mean") or found.skill < 0.15
    alike = fit_extrapolation(linear_model(1 + 0.01 * shifts), poor, names, cells, control)
    assert alike.choice == "mean" or alike.penalty == 1e4
    by_hand = np.array([effects[k] - np.delete(effects, k, 0).mean(0) for k in range(20)])
    mean = Extrapolation(poor, tuple(names), "mean", 0.0, 0.0, np.zeros((20, 2)), np.zeros(2))
    np.testing.assert_allclose(mean.weights(["g3"]) @ effects, [effects.mean(0)])
    assert (by_hand**2).sum() > (effects**2).sum()
    assert found.choice != "mean"


def test_an_extended_model_does_what_was_given_and_what_it_did() -> None:
    for kind in ("shift", "hard", "soft"):
        model = DiscrepancyVAE(5, 3, 4, n_hidden=8, intervention=kind).double().eval()
        shift = torch.tensor([[1.5, -2, 0]]).double()
        residual = torch.arange(5.0).double()[None]
        new = extended(model, shift, residual, residual)
        conditions = torch.tensor([[4, 5, 6], [0, 2, -1]])
        got = new.scm.mechanism(conditions, new.target_weights(conditions))
        torch.testing.assert_close(got.shift[:1], shift)
        torch.testing.assert_close(got.retention[0], torch.ones(3).double())
        assert not got.log_scale[0].any()
        torch.testing.assert_close(new.missed(conditions)[0], residual)
        x = torch.randn((1, 6, 5), dtype=torch.float64)
        before, after = (m(x, conditions[1:]).virtual for m in (model, new))
        torch.testing.assert_close(before, after, atol=1e-12, rtol=1e-12)


def test_a_prediction_is_the_weighted_sum_of_effects(run: Run) -> None:
    """What leave-one-out chose is what is predicted: with shifts and linear equations, the same sum of mean effects."""
    table = run.extrapolation
    found = run.predict(["g4", *table.fitted], counterfactual=True)
    effects = np.asarray(found.varm["crlseq_effect"]).T
    np.testing.assert_allclose(effects[0], (table.weights(["g4"]) @ effects[1:])[0], atol=0.05)


@torch.no_grad()
def test_what_all_perturbations_do_is_predicted_once(run: Run) -> None:
    """The common effect is in the weighted sum of what the fitted ones do past the programs, and not added to it."""
    table, names = run.extrapolation, run.interventions["perturbation"].tolist()
    model = copy.deepcopy(run.model).double()
    model.common.fill_(2.0)
    model.penetrance.fill_(0.5)
    new, rows = table.extended(model, names, ["g4"])
    fitted = torch.tensor([[names.index(name)] for name in table.fitted])
    expected = table.weights(["g4"])[0] @ (0.5 * model.missed(fitted)[:, 0]).numpy()
    np.testing.assert_allclose(new.missed(torch.tensor([rows["g4"]]))[0, 0].numpy(), expected, atol=1e-12)


def test_a_gene_never_perturbed_is_predicted(run: Run, full: ad.AnnData) -> None:
    assert run.info["embeddings"]["choice"] == "ridge" and run.info["embeddings"]["skill"] > 0.3
    told: list[str] = []
    found = run.predict(["g4", "g0", "g4+g0", "stranger"], note=told.append)
    summary = found.uns["crlseq_prediction"]["summary"]
    assert summary["seen"].tolist() == ["extrapolated", "fitted", "extrapolated", "extrapolated"]
    assert summary.index.tolist()[:2] == ["g4", "g0"] and summary["n_parts"].tolist() == [1, 1, 2, 1]
    assert any("never perturbed" in text.lower() and "g4" in text for text in told)
    alone = run.predict(["g0"])
    np.testing.assert_array_equal(found[found.obs["perturbation"] == "g0"].X, alone.X)
    x = np.log1p(full.X.toarray() / full.X.toarray().sum(1, keepdims=True) * run.info["preprocessing"]["target_sum"])
    label = full.obs["perturbation"].to_numpy()
    true = x[label == "g4"].mean(0) - x[label == "control"].mean(0)
    assert np.corrcoef(found.varm["crlseq_effect"][:, 0], true)[0, 1] > 0.7
    half = (found.varm["crlseq_effect_upper"] - found.varm["crlseq_effect_lower"])[:, 0] / 2
    cells = x[label == "g4"]
    off = np.abs(found.varm["crlseq_effect"][:, 0] - true)
    assert (off <= np.sqrt(half**2 + 1.96**2 * cells.var(0) / len(cells))).mean() > 0.8
    for label in ("g77", "g4+g4"):
        with pytest.raises(InputError):
            run.predict(label)


def test_evaluation_of_held_out_singles(run: Run, full: ad.AnnData) -> None:
    found = evaluate(run, full)
    rows = found.conditions[found.conditions["group"] == "unseen perturbations"].set_index(["condition", "predictor"])
    assert set(rows.index.get_level_values(0)) == {*LOST}
    for name in LOST:
        assert rows.loc[(name, "model"), "l2"] < rows.loc[(name, "no_change"), "l2"]
        assert rows.loc[(name, "model"), "effectiveness"] > 0
    assert any("extrapolated from embeddings" in note and "g4, g9" in note for note in found.notes)


def test_a_loaded_run_needs_no_table(run: Run, tmp_path: Path) -> None:
    again = crlseq.load(run.path)
    (run.path.parent / "vectors.csv").rename(tmp_path / "gone.csv")
    one, other = (found.predict("g4", n_cells=20) for found in (run, again))
    (tmp_path / "gone.csv").rename(run.path.parent / "vectors.csv")
    np.testing.assert_allclose(one.X, other.X, atol=1e-6)
    stored = load_extrapolation(run.path / "embeddings.h5ad")
    assert again.info["embeddings"] == stored.summary() == run.extrapolation.summary()


def test_cross_validation_holds_singles_out(run: Run) -> None:
    found = cross_validate(run, folds=4, splits=("singles",))
    l2 = found.summary.set_index(["group", "predictor", "metric"])["mean"].xs("l2", level="metric")
    assert l2["unseen perturbations", "model"] < 0.9 * l2["unseen perturbations", "no_change"]


def test_vectors_that_say_nothing(full: ad.AnnData, tmp_path: Path) -> None:
    table = vectors(full)
    table.loc[:, :] = np.random.default_rng(3).normal(size=table.shape)
    ad.AnnData(table.to_numpy(), obs=pd.DataFrame(index=table.index)).write_h5ad(tmp_path / "random.h5ad")
    run = crlseq.fit(without_lost(full), embeddings=str(tmp_path / "random.h5ad"), **LINEAR)
    assert run.info["embeddings"]["choice"] in ("none", "mean") or run.info["embeddings"]["skill"] < 0.15
    if run.info["embeddings"]["choice"] == "none":
        assert "no predictive information" in run.extrapolation.in_words()


BAD: dict[str, tuple[Callable[[Path, pd.DataFrame], object], str]] = {
    "twice.csv": (lambda p, t: pd.concat([t, t.iloc[:1]]).to_csv(p), "more than once"),
    "nan.csv": (lambda p, t: t.assign(x=np.where(t.index == "g2", np.nan, 1.0)).to_csv(p), "'' for 'g2'"),
    "inf.csv": (lambda p, t: t.assign(x=np.where(t.index == "g2", np.inf, 1.0)).to_csv(p), "no finite number for 'g2'"),
    "text.csv": (lambda p, t: t.assign(x="much").to_csv(p), "'much'"),
    "constant.csv": (lambda p, t: (t * 0 + 1).to_csv(p), "the same for all genes"),
    "strangers.csv": (lambda p, t: t.rename(index="ENSG{}".format).to_csv(p), "0 of the 18 fitted"),
    "few.csv": (lambda p, t: t.iloc[:3].to_csv(p), "3 of the 18 fitted"),
    "names.csv": (lambda p, t: t.iloc[:, :0].to_csv(p), "0 numbers"),
    "empty.csv": (lambda p, t: p.write_text(""), "cannot be read"),
    "binary.csv": (lambda p, t: p.write_bytes(bytes(range(256)) * 9), "cannot be read"),
    "screen.h5ad": (lambda p, t: screen().write_h5ad(p), "0 of the 18 fitted"),
    "broken.h5ad": (lambda p, t: p.write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 99), "cannot be opened"),
    "absent.csv": (lambda p, t: None, "There is no embeddings file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables(full: ad.AnnData, tmp_path: Path, name: str) -> None:
    write, said = BAD[name]
    write(tmp_path / name, vectors(full))
    (tmp_path / "in").mkdir()
    full.copy().write_h5ad(tmp_path / "in" / "screen.h5ad")
    words = ["fit", tmp_path / "in" / "screen.h5ad", "--output", tmp_path / "RUN", "--embeddings", tmp_path / name]
    answer = invoke(*words, "--method", "linear", "--bootstrap", 0, "--n-latents", 3)
    check_refusal(answer.code, answer.out, answer.err, 3, said)
    assert not (tmp_path / "RUN").exists()


def test_tables_that_are_read_alike(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": [1.0, 2, 3], "b": [4.0, 5, 4], "same": 7.0}, index=["NA", "TP53", "x"])
    table.to_csv(tmp_path / "headed.csv")
    table.set_axis([0, 1, 2], axis=1).rename_axis("gene").to_csv(tmp_path / "numbered.csv")
    table.to_csv(tmp_path / "bare.tsv", header=False, sep="\t")
    ad.AnnData(table.to_numpy(), obs=table[[]]).write_h5ad(tmp_path / "X.h5ad")
    bare = ad.AnnData(obs=table[[]])
    bare.obsm["X_vectors"] = table.to_numpy()
    bare.write_h5ad(tmp_path / "obsm.h5ad")
    for name in ("headed.csv", "numbered.csv", "bare.tsv", "X.h5ad", "obsm.h5ad"):
        found = read_embeddings(tmp_path / name)
        assert found.names == ("NA", "TP53", "x"), name
        assert (found.vectors == table[["a", "b"]].to_numpy()).all(), name


def test_commands(full: ad.AnnData, tmp_path: Path) -> None:
    without_lost(full).write_h5ad(tmp_path / "screen.h5ad")
    vectors(full).to_csv(tmp_path / "vectors.csv")
    words = ["--method", "linear", "--bootstrap", 0, "--n-latents", 3, "--embeddings", tmp_path / "vectors.csv"]
    answer = invoke("fit", tmp_path / "screen.h5ad", "--output", tmp_path / "RUN", *words)
    assert answer.code == 0 and "reduces the squared error" in answer.err, answer.err
    answer = invoke("predict", tmp_path / "RUN", "-p", "g4", "-o", tmp_path / "out.h5ad", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["predictions"][0]["seen"] == "extrapolated"
    assert "extrapolated from embeddings" in answer.err
    answer = invoke("predict", tmp_path / "RUN", "-p", "nobody", "-o", tmp_path / "other.h5ad")
    check_refusal(answer.code, answer.out, answer.err, 3, "no vector among the embeddings")


def test_a_map_that_only_beats_no_effect_is_not_believed() -> None:
    """Effects that are nearly alike, of vectors that say no more: the ridge beats no effect by far, and the mean by nothing."""
    rng = np.random.default_rng(5)
    names, control, cells = [f"g{i}" for i in range(24)], np.zeros((3, 2)), np.ones(24, dtype=bool)
    shifts = 2 + rng.normal(size=24)
    model = linear_model(np.repeat(shifts[::2], 2))  # both latents alike
    table = Embeddings(tuple(names), rng.normal(size=(24, 3)))
    found = fit_extrapolation(model, table, names, cells, control)
    assert found.choice != "ridge" and found.skill == 0
    assert "carry no predictive information" in found.in_words()


def coexpressed(n: int = 400, seed: int = 0) -> ad.AnnData:
    """Three modules of genes that vary together in all cells; a perturbed gene lowers its module."""
    rng = np.random.default_rng(seed)
    module = np.arange(30) % 3
    genes = [f"G{i}" for i in range(30)]
    labels = ["control"] * n + [g for g in genes[:15] for _ in range(60)]
    activity = rng.normal(size=(len(labels), 3))
    for i, label in enumerate(labels):
        if label != "control":
            activity[i, module[int(label[1:])]] -= 2.0
    x = activity[:, module] + rng.normal(size=(len(labels), 30))
    return ad.AnnData(x, obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))]),
                      var=pd.DataFrame(index=genes))  # fmt: skip


def test_coexpression_stands_in_for_a_table(tmp_path: Path) -> None:
    """A gene never perturbed does what the genes do that it varies with; the fit was given no table."""
    full = coexpressed()
    lost = full.obs["perturbation"] == "G4"
    run = crlseq.fit(full[~lost].copy(), tmp_path / "RUN", embeddings="screen", values="continuous", **LINEAR)
    assert run.info["embeddings"]["choice"] == "ridge" and run.info["embeddings"]["n_genes"] == 30
    x, control = np.asarray(full.X), (full.obs["perturbation"] == "control").to_numpy()
    true = x[lost.to_numpy()].mean(0) - x[control].mean(0)
    for one in (run, crlseq.load(run.path)):
        effect = one.predict("G4").varm["crlseq_effect"][:, 0]
        assert np.corrcoef(effect, true)[0, 1] > 0.9
    vectors = run.extrapolation.table.vectors
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    same = np.equal.outer(np.arange(30) % 3, np.arange(30) % 3) & ~np.eye(30, dtype=bool)
    correlation = unit @ unit.T
    assert correlation[same].min() > correlation[~same & ~np.eye(30, dtype=bool)].max()
    found = cross_validate(run, folds=3, splits=("singles",))
    l2 = found.summary.set_index(["group", "predictor", "metric"])["mean"].xs("l2", level="metric")
    assert l2["unseen perturbations", "model"] < 0.8 * l2["unseen perturbations", "mean"]


def test_coexpression_needs_perturbed_genes_that_are_fitted(tmp_path: Path) -> None:
    full = coexpressed()
    with pytest.raises(InputError, match="2 of the 15 fitted perturbations target a fitted gene"):
        crlseq.fit(full[:, [0, 1, *range(15, 30)]].copy(), embeddings="screen", values="continuous", **LINEAR)
