"""The benchmark: its scenarios, its table, going on after an interruption, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import crlseq
import crlseq.experiments.fits as module
from crlseq.discovery.methods import NAMES
from crlseq.errors import ConvergenceError, InputError, UsageError
from crlseq.evaluation.recovery import PAIR_COUNTS, PAIR_SCORES, closure, score_recovery
from crlseq.experiments.benchmark import COLUMNS, benchmark, summarise
from crlseq.experiments.fits import scenario_screen
from crlseq.experiments.peers import toy as toy_screen
from crlseq.experiments.picture import draw
from crlseq.experiments.scenarios import METHODS, SCENARIOS
from tests.paths import shared

TINY: dict[str, Any] = {"cells_per_perturbation": 12, "n_control": 40}
SMALL: dict[str, Any] = {
    "scenarios": ["linear-counts"], "methods": ["default"], "seeds": [3], "threads": 1,
    "simulator": {**TINY, "n_latents": 3, "perturbations_per_latent": 2, "n_genes": 30},
    "options": {"epochs": 1, "method": "gradient"},
}  # fmt: skip


def labels(screen: ad.AnnData) -> np.ndarray:
    return screen.obs["perturbation"].astype(str).to_numpy()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of two scenarios, two seeds and two methods; read it only."""
    folder = tmp_path_factory.mktemp("benchmark") / "B"
    wanted = {**SMALL, "simulator": TINY, "scenarios": ["toy", "linear-gaussian"], "methods": ["paper", "default"]}
    benchmark(folder, **{**wanted, "seeds": [1, 2]})
    return folder


def test_toy_by_hand() -> None:
    screen = toy_screen(0)
    x, label = np.asarray(screen.X, dtype=float), labels(screen)
    assert dict(pd.Series(label).value_counts()) == {"control": 10240} | {f"t{k}": 2048 for k in range(5)}
    assert (x[:, 5:] == 0).all() and np.allclose(x[:, :5], screen.obsm["true_latents"], atol=1e-5)
    # Mean of a rectified standard normal: 1 / sqrt(2 pi); the first latent has no parent.
    assert x[label == "control", :2].mean(0) == pytest.approx([0, 1 / np.sqrt(2 * np.pi)], abs=0.05)
    check_chain(screen)


def check_chain(screen: ad.AnnData) -> None:
    """What a parent does not explain is standard normal noise, plus 5 under the latent's own perturbation."""
    x, label = np.asarray(screen.X, dtype=float)[:, :5], labels(screen)
    noise = x - np.hstack([np.zeros((len(x), 1)), np.maximum(x[:, :4], 0)])
    for k in range(5):
        assert noise[label == f"t{k}"].mean(0) == pytest.approx(5 * np.eye(5)[k], abs=0.1)  # 4.5 standard errors
        noise[label == f"t{k}", k] -= 5
    alone = np.isin(label, ["control", *(f"t{k}" for k in range(5))])
    assert np.cov(noise[alone].T) == pytest.approx(np.eye(5), abs=0.05)
    assert (screen.uns["truth"]["adjacency"] == np.eye(5, k=1)).all()
    assert list(screen.uns["truth"]["target"]["latent"]) == list(range(5))


def test_toy_has_the_law_of_the_published_one() -> None:
    published = ad.read_h5ad(shared("data/toy_zhang2023_relu_chain.h5ad"))
    check_chain(published)
    own = toy_screen(1)
    assert published.shape[1] == own.shape[1] and (np.asarray(published.X)[:, 5:] == 0).all()
    counts = published.obs["perturbation"].value_counts()
    assert counts[list(set(labels(own)))].to_dict() == dict(pd.Series(labels(own)).value_counts())


OURS = [name for name, options in SCENARIOS.items() if options.get("generator", "toy") == "toy"]


@pytest.mark.parametrize("name", OURS)
def test_every_scenario_can_be_simulated(name: str) -> None:
    screen = scenario_screen(name, 5, **TINY)
    truth = screen.uns["truth"]
    p, k = (8, 32) if name.startswith("real-") else {"toy": (5, 5), "large": (30, 200)}.get(name, (10, 40))
    assert truth["adjacency"].shape == (p, p) and len(truth["target"]) == k
    assert set(truth["target"]["latent"]) == set(range(p))
    assert set(labels(screen)) == {"control", *truth["target"].index}
    assert screen.obsm["true_latents"].shape == (40 + 12 * k, p)
    again = scenario_screen(name, 5, **TINY)
    assert (again.obsm["true_latents"] == screen.obsm["true_latents"]).all()


def test_files_and_rows(finished: Path) -> None:
    names = {"settings.json", "benchmark.csv", "summary.csv", "benchmark.png", "benchmark.svg"}
    assert {file.name for file in finished.iterdir()} == names
    table = pd.read_csv(finished / "benchmark.csv")
    assert tuple(table.columns) == COLUMNS
    assert list(dict.fromkeys(table["scenario"])) == ["linear-gaussian", "toy"]
    assert list(dict.fromkeys(table["method"])) == ["default", "paper", "random", "empty"]
    assert len(table) == 2 * 2 * 4 and not table.duplicated(["scenario", "seed", "method"]).any()
    fits, others = table[table["method"].isin(["default", "paper"])], table[table["method"].isin(["random", "empty"])]
    assert table["error"].isna().all()
    # Every latent of these scenarios moves every gene, and these methods find neither pairs nor shares of hit cells.
    unknown = ["list_precision", "list_recall", *PAIR_SCORES, *PAIR_COUNTS, "penetrance_error"]
    assert fits.drop(columns=["error", *unknown]).notna().all(axis=None) and fits[unknown].isna().all(axis=None)
    assert others[["target_accuracy", "ari", "mcc", "n_latents", "verdict", "seconds"]].isna().all(axis=None)
    assert others[["ancestor_f1", "shd"]].notna().all(axis=None)
    assert dict(zip(fits["scenario"], fits["n_latents"], strict=True)) == {"linear-gaussian": 10, "toy": 5}
    toy_empty = table[(table["scenario"] == "toy") & (table["method"] == "empty")]
    assert set(toy_empty["shd"]) == {4.0} and set(toy_empty["n_edges"]) == {0}


def test_screens_like_real_ones_have_what_their_names_say() -> None:
    small = {"n_genes": 40, "n_control": 100, "cells_per_perturbation": 60}
    screens = {name: scenario_screen(name, 3, **small) for name in SCENARIOS if name.startswith("real-")}
    truth = {name: screen.uns["truth"] for name, screen in screens.items()}
    for name, screen in screens.items():
        assert screen.obsm["true_background"].shape[1] == 4 and screen.obs["guide"].nunique() == 3 * 33
        hit = screen.obs["hit"][screen.obs["perturbation"] != "control"].mean()
        assert hit == 0 if name == "real-null" else 0.5 < hit < 0.75
    assert set(truth["real-soft"]["target"]["retention"]) == {0.5}
    assert set(truth["real-shift"]["target"]["retention"]) == {1.0}
    assert {name for name, each in truth.items() if (each["target"]["second_latent"] >= 0).any()} == {"real-second"}
    assert {name for name, each in truth.items() if "hidden" in each} == {"real-hidden"}
    # A path of eight edges among eight latents comes back to one of them.
    cyclic = {name for name, each in truth.items() if np.linalg.matrix_power(each["adjacency"] != 0, 8).any()}
    assert cyclic == {"real-cycle"}


def test_pairs_and_penetrance_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.fit

    def with_pairs(screen: ad.AnnData, **options: Any) -> Any:
        run = real(screen, **options)
        ends = {"source": ["P0", "P1"], "target": ["P1", "P0"]}
        pairs = pd.DataFrame({**ends, "status": ["both ways", "both ways"]})
        return replace(run, pairs=pairs, interventions=run.interventions.assign(penetrance=0.75))

    monkeypatch.setattr(module, "fit", with_pairs)
    summary = benchmark(tmp_path / "B", **{**SMALL, "seeds": [3, 4]}).set_index("method").loc["default"]
    assert summary["both_ways"] == 1 and summary["penetrance_error"] == 0.25  # all cells are hit
    true = sum(
        closure(scenario_screen("linear-counts", seed, **SMALL["simulator"]).uns["truth"]["adjacency"] != 0).sum()
        for seed in (3, 4)
    )
    assert summary["pairs_true"] == true > 0 and summary["upstream_right"] == summary["upstream_wrong"] == 0
    assert np.isnan(summary["upstream_precision"]) and summary["upstream_recall"] == 0


def test_summary_is_of_the_rows(finished: Path) -> None:
    table, summary = (pd.read_csv(finished / f"{name}.csv") for name in ("benchmark", "summary"))
    row = summary.set_index(["scenario", "method"]).loc[("linear-gaussian", "paper")]
    values = table.loc[(table["scenario"] == "linear-gaussian") & (table["method"] == "paper"), "shd"]
    low, high = sorted(values)
    assert (row["runs"], row["failed"], row["verdict"]) == (2, 0, "not identified 2")
    assert row["shd"] == (low + high) / 2 and row["shd_q25"] == low + (high - low) / 4
    true = [(scenario_screen("linear-gaussian", seed, **TINY).uns["truth"]["adjacency"] != 0).sum() for seed in (1, 2)]
    assert row["edges_true"] == sum(true) and np.isnan(row["pairs_true"])


def test_rows_there_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = module.fit, []

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "fit", counting)
    with pytest.raises(KeyboardInterrupt):
        benchmark(tmp_path / "B", **{**SMALL, "seeds": [3, 4]})
    assert calls == [3, 4]
    before = pd.read_csv(tmp_path / "B" / "benchmark.csv")
    assert set(before.loc[before["method"] == "default", "seed"]) == {3}
    notes: list[str] = []
    benchmark(tmp_path / "B", **{**SMALL, "seeds": [3, 4]}, note=notes.append)
    assert calls == [3, 4, 4] and len(notes) == 1 and "seed 4" in notes[0]
    after = pd.read_csv(tmp_path / "B" / "benchmark.csv")
    same = after[after["seed"] == 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, before[before["seed"] == 3].reset_index(drop=True), check_dtype=False)
    benchmark(tmp_path / "B", **{**SMALL, "seeds": [3, 4]})
    assert calls == [3, 4, 4]


def test_a_failed_fit_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.fit

    def failing(*args: Any, **options: Any) -> Any:
        if options["seed"] == 3:
            raise ConvergenceError("The loss is not finite.", "Lower the learning rate.")
        return real(*args, **options)

    monkeypatch.setattr(module, "fit", failing)
    summary = benchmark(tmp_path / "B", **{**SMALL, "seeds": [3, 4]}).set_index("method")
    table = pd.read_csv(tmp_path / "B" / "benchmark.csv").set_index(["method", "seed"])
    assert table.loc[("default", 3), "error"] == "The loss is not finite. Lower the learning rate."
    assert np.isnan(table.loc[("default", 3), "shd"]) and table.loc[("default", 4), "shd"] >= 0
    assert (summary.loc["default", "runs"], summary.loc["default", "failed"]) == (2, 1)
    assert summary.loc["default", "shd"] == table.loc[("default", 4), "shd"]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every fit, none of which comes to an end."""
    found: list[dict[str, Any]] = []

    def refusing(source: Any, **options: Any) -> Any:
        found.append(options)
        raise ConvergenceError("No.")

    monkeypatch.setattr(module, "fit", refusing)
    return found


def test_what_a_fit_is_given(tmp_path: Path, given: list[dict[str, Any]]) -> None:
    wanted = {"scenarios": ["linear-counts", "toy"], "seeds": [6], "simulator": TINY, "n_latents": "auto"}
    benchmark(tmp_path / "B", **wanted)
    assert [options["values"] for options in given] == ["counts"] * len(METHODS) + ["continuous"] * len(METHODS)
    # The published model and the sparse VAE take no number of latents from the data.
    by_method = dict(zip(METHODS, given, strict=False))
    for p, options in ((10, given[: len(METHODS)]), (5, given[len(METHODS) :])):
        told = {name: each["n_latents"] for name, each in zip(METHODS, options, strict=True)}
        assert told == {name: p if name in ("paper", "sparse-vae") else None for name in METHODS}
    own = {name: {"method": name} for name in METHODS if name in NAMES}
    own |= {"sparse": {"decoder": "sparse"}, "paper": {"preset": "paper"}}
    own["sparse-vae"] = {"decoder": "sparse", "method": "gradient", "causal_layer": False, "mmd_weight": 0.0}
    for name, options in by_method.items():
        said = {
            key: options[key] for key in ("method", "decoder", "preset", "causal_layer", "mmd_weight") if key in options
        }
        assert said == own.get(name, {})
    # The one method that is told which latent each perturbation acts on.
    assert [name for name, options in by_method.items() if "targets" in options] == ["cauca"]
    assert {options["seed"] for options in given} == {6}


def test_failures_alone_can_be_drawn_and_summarised() -> None:
    row = {"scenario": "toy", "seed": 0, "method": "paper", "error": "No."}
    table = pd.DataFrame([row], columns=list(COLUMNS))
    texts = [text.get_text() for axes in draw(table).axes for text in axes.texts]
    assert texts == ["all fits failed"] * 4
    assert summarise(table)["failed"].tolist() == [1]


def test_picture_has_a_mark_a_seed(finished: Path) -> None:
    table = pd.read_csv(finished / "benchmark.csv", dtype={"error": object})
    panels = draw(table).axes
    assert len(panels) == 2 * 4
    marks = [len(dots.get_offsets()) for dots in panels[0].collections if hasattr(dots, "get_sizes")]
    assert sorted(m for m in marks if m) == [2, 2, 2, 2]  # two seeds of four methods
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["default", "paper", "random", "empty"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scenarios": ["no-such"]}, "no-such"), ({"methods": ["best"]}, "best"), ({"scenarios": []}, "scenario"),
        ({"seeds": []}, "Seeds"), ({"seeds": [-1]}, "Seeds"), ({"n_latents": "many"}, "many"),
        ({"simulator": {"n_genes": 0}}, "n_genes"), ({"simulator": {"genes": 3}}, "genes"),
    ],
)  # fmt: skip
def test_wrong_usage(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        benchmark(tmp_path / "B", **{**SMALL, **changes})


def test_other_settings_are_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "B"
    copy.mkdir()
    for file in finished.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    same = {**SMALL, "simulator": TINY}
    for changes, says in [
        ({"n_latents": "auto"}, "'known' there and 'auto' here"),
        ({"threads": 2}, "threads is 1 there and 2 here"),
        ({"options": {}}, "options"),
    ]:
        with pytest.raises(InputError, match=says):
            benchmark(copy, **{**same, **changes})
    assert {file.name for file in copy.iterdir()} == {file.name for file in finished.iterdir()}
    assert all((copy / file.name).read_bytes() == file.read_bytes() for file in finished.iterdir())


def test_foreign_and_damaged_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a benchmark"):
        benchmark(tmp_path, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="cannot be written"):
        benchmark(tmp_path / "notes.txt", **SMALL)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "settings.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        benchmark(damaged, **SMALL)
    (damaged / "settings.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="damaged"):
        benchmark(damaged, **SMALL)


def test_damaged_rows_are_refused(tmp_path: Path, finished: Path) -> None:
    copy = tmp_path / "B"
    copy.mkdir()
    (copy / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    (copy / "benchmark.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"benchmark\.csv"):
        benchmark(copy, **{**SMALL, "simulator": TINY})
    assert (copy / "benchmark.csv").read_text() == "a,b\n1,2\n"


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.fit

    def meanwhile(*args: Any, **options: Any) -> Any:
        with pytest.raises(InputError, match="Another crlseq"):
            benchmark(tmp_path / "B", **SMALL)
        return real(*args, **options)

    monkeypatch.setattr(module, "fit", meanwhile)
    benchmark(tmp_path / "B", **SMALL)
    assert not (tmp_path / "B" / "lock").exists()


def test_supports_of_all_fits_are_kept_and_calibrated(tmp_path: Path) -> None:
    simulator = {"n_latents": 3, "perturbations_per_latent": 2, "n_genes": 30, "cells_per_perturbation": 60}
    wanted = {**SMALL, "methods": ["linear"], "simulator": simulator, "options": {"bootstrap": 2}}
    for seeds in ([3], [3, 4]):
        benchmark(tmp_path / "B", **{**wanted, "seeds": seeds})
        found = pd.read_csv(tmp_path / "B" / "calibration.csv")
        assert found["pairs"].sum() == 6 * len(seeds)
    names = {f"linear-counts_{seed}_linear.csv" for seed in (3, 4)}
    assert {file.name for file in (tmp_path / "B" / "supports").iterdir()} == names
    table = pd.read_csv(tmp_path / "B" / "benchmark.csv")
    true = sum(
        (scenario_screen("linear-counts", seed, **simulator).uns["truth"]["adjacency"] != 0).sum() for seed in (3, 4)
    )
    assert found["true"].sum() == true and len(table) == 6


def test_without_interventions(tmp_path: Path) -> None:
    """The sparse VAE sees no labels: its latents and lists are scored, targets and graph are not."""
    summary = benchmark(
        tmp_path / "B", scenarios=["sparse-counts"], seeds=[0], methods=["sparse-vae"],
        simulator={**TINY, "n_latents": 4}, options={"epochs": 2}, threads=1,
    )  # fmt: skip
    row = pd.read_csv(tmp_path / "B" / "benchmark.csv").set_index("method").loc["sparse-vae"]
    known = ["mcc", "dci_disentanglement", "list_precision", "list_recall", "program_length", "n_latents"]
    assert row[known].astype(float).notna().all() and row["n_latents"] == 4
    assert row[["error", "target_accuracy", "ancestor_f1", "shd", "verdict"]].isna().all()
    assert summary.set_index("method").loc["sparse-vae", "failed"] == 0


def test_options_of_single_methods(tmp_path: Path, given: list[dict[str, Any]]) -> None:
    wanted = {**SMALL, "methods": ["default", "paper"], "of_methods": {"paper": {"epochs": 7}}}
    benchmark(tmp_path / "B", **wanted)
    assert [options["epochs"] for options in given] == [1, 7]
    with pytest.raises(InputError, match="of_methods"):
        benchmark(tmp_path / "B", **{**wanted, "of_methods": {}})


def test_jobs_give_the_same_rows(tmp_path: Path) -> None:
    wanted = {**SMALL, "methods": ["linear", "squires"], "seeds": [3, 4], "options": {"bootstrap": 0}}
    benchmark(tmp_path / "ONE", **wanted)
    benchmark(tmp_path / "TWO", **wanted, jobs=2)
    one, two = (pd.read_csv(tmp_path / name / "benchmark.csv").drop(columns="seconds") for name in ("ONE", "TWO"))
    pd.testing.assert_frame_equal(one, two)
    refused = one[one["method"] == "squires"]["error"]
    assert len(refused) == 2 and refused.str.contains("one perturbation for each program").all()


def test_the_toy_of_the_published_model_is_found() -> None:
    """One mere shift a program and equations with a ReLU: linear equations under hard interventions fit better than linear ones
    under shifts and describe nothing; nonlinear ones under shifts take their place.
    """
    screen = toy_screen(1, n_control=4000, cells_per_perturbation=1000)
    run = crlseq.fit(screen, values="continuous", n_latents=5, epochs=1, seed=1, bootstrap=0)
    assert (run.facts.discovery.intervention, run.facts.discovery.equations) == ("shift", "nonlinear")
    scores = score_recovery(run.interventions, run.edges, screen.uns["truth"])
    assert (scores["target_accuracy"], scores["shd"]) == (1, 0)
    assert run.facts.identification.verdict == "ancestry only"
