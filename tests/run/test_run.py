"""The run folder: its files, columns and contents; loading, damaged folders, annotation of cells."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import crlseq
from crlseq.data import splits
from crlseq.errors import InputError
from crlseq.run.run import Run
from crlseq.storage.runfolder import TABLES
from tests.support import FAST, dense, edit_info, files_of, invoke, small_screen, succeeds
from tests.synthetic import synthetic_run


def test_files(run_folder: Path) -> None:
    assert {file.name for file in run_folder.iterdir()} == files_of(run_folder)
    assert [path.name for path in run_folder.parent.iterdir()] == ["RUN"]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("programs", "program,gene,loading,total_effect,rank"),
        ("interventions", "perturbation,program,weight,shift,retention,n_cells,p_value,fdr"),
        ("dag", "source,target,weight,support"),
        ("history", "epoch"),
    ],
)
def test_columns(run_folder: Path, name: str, columns: str) -> None:
    """The names that docs/formats.md promises come first and in this order; more may follow."""
    header = (run_folder / f"{name}.csv").read_text().splitlines()[0]
    assert header == columns or header.startswith(columns + ",")


def test_tables(finished: Run) -> None:
    programs, interventions = finished.programs, finished.interventions
    assert finished.program_names == ["P0", "P1", "P2"]
    assert len(programs) == 3 * 40
    for _, rows in programs.groupby("program"):
        assert rows["rank"].tolist() == list(range(1, 41))
        assert (np.diff(rows["loading"].abs()) <= 0).all()
        assert (rows["loading"] * rows["loading"].abs()).sum() >= 0  # the sign convention
    assert interventions["perturbation"].tolist() == [f"g{i}" for i in range(7)]
    assert interventions["p_value"].between(0, 1).all()
    assert (interventions["fdr"] >= interventions["p_value"]).all()
    assert (interventions["n_cells"] == 48).all()
    claims = interventions[interventions["fdr"] <= 0.05]
    assert claims["perturbation"].tolist() == [f"g{i}" for i in range(6)]
    assert set(claims["program"]) == set(finished.program_names)
    assert (claims["weight"] == 1).all()  # the likelihood gives one target each
    assert claims["retention"].between(0, 1).all() and (claims["noise_scale"] > 0).all()
    assert (claims["shift"] != 0).all() and np.isfinite(claims["shift"]).all()
    assert claims["support"].between(0.5, 1).all()
    assert finished.history["epoch"].tolist() == [0, 1, 2]
    assert np.isfinite(finished.history.to_numpy()).all()
    assert not finished.edges.empty
    assert finished.edges["support"].between(0.5, 1).all()
    assert (finished.edges["identified"] == finished.info["identification"]["verdict"]).all()
    assert all(int(a[1:]) < int(b[1:]) for a, b in zip(finished.edges["source"], finished.edges["target"], strict=True))


def test_a_perturbation_without_effect_gets_no_claim(finished: Run, run_folder: Path) -> None:
    """The same before and after the files: an empty program and no numbers, and the report says so."""
    row = finished.interventions.set_index("perturbation").loc["g6"]
    assert row["fdr"] > 0.05 and row["energy_distance"] < 0.1
    assert row["program"] == ""
    assert row[["weight", "shift", "retention", "noise_scale", "support"]].isna().all()
    assert all("g6" not in program["drivers"].split(", ") for program in finished.info["programs"])
    line = (run_folder / "interventions.csv").read_text().splitlines()[-1]
    assert line.startswith("g6,,,,,48,")
    page = (run_folder / "report.html").read_text()
    assert page.count("no detectable effect, no target claimed") == 1
    assert re.search(r"<td>g6</td><td colspan=\"6\" class=\"none\">no detectable effect", page)
    assert "nan" not in page


def test_the_discovery_is_told(finished: Run) -> None:
    found = finished.info["discovery"]
    assert (found["equations"], found["straightened"]) == ("linear", False)
    assert found["intervention"] in ("hard", "soft")
    assert found["n_latents_curve"] is None and finished.info["n_latents_reason"] == "as asked"
    bootstrap = found["bootstrap"]
    assert bootstrap["replicates"] + bootstrap["failed"] == 20
    assert bootstrap["perturbations"] == [f"g{i}" for i in range(6)]
    edge = np.array(bootstrap["edge"])
    for row in finished.edges.to_dict("records"):
        assert row["support"] == edge[int(row["source"][1:]), int(row["target"][1:])]
    assignment = np.array(bootstrap["assignment"])
    np.testing.assert_allclose(assignment.sum(1), 1)
    for k, row in enumerate(finished.interventions.to_dict("records")[:6]):
        assert row["support"] == assignment[k, int(row["program"][1:])]


def test_the_likelihood_alone(linear_folder: Path) -> None:
    """``--method linear`` trains nothing; without a bootstrap there is no support, and the edges stay."""
    assert {file.name for file in linear_folder.iterdir()} == files_of(linear_folder) - {"resume.pt"}
    run = crlseq.load(linear_folder)
    assert run.history.empty and (linear_folder / "history.csv").read_text() == "epoch,total\n"
    assert run.info["training"]["epochs_run"] == 0
    assert run.info["discovery"]["bootstrap"] is None
    assert not run.edges.empty and run.edges["support"].isna().all()
    assert run.interventions["support"].isna().all()
    assert run.interventions["program"].ne("").tolist() == [True] * 6 + [False]
    assert not any("support" in values for _, _, values in run.dag.edges(data=True))
    assert len(run.evaluation) == 9 and run.evaluation["mmd2"].notna().all()
    page = (linear_folder / "report.html").read_text()
    assert "No network was trained" in page
    assert "<polyline" not in page and "<h2>Loss</h2>" not in page
    succeeds("report", linear_folder, "--output", linear_folder.parent / "page.html")


def test_the_likelihood_alone_in_memory_and_in_its_folder(screen: ad.AnnData, tmp_path: Path) -> None:
    run = crlseq.fit(screen, method="linear", n_latents=2, bootstrap=0)
    run.write_tables(tmp_path)
    again = crlseq.load(tmp_path)
    for name, table in run.tables().items():
        pd.testing.assert_frame_equal(again.tables()[name], table, check_exact=True)


def test_run_json(finished: Run, run_folder: Path, screen_file: Path) -> None:
    info = json.loads((run_folder / "run.json").read_text())
    assert info == finished.info
    assert info["version"] == crlseq.__version__
    assert info["command"].startswith(f"crlseq fit {screen_file}")
    assert info["input"]["sha256"] == hashlib.sha256(screen_file.read_bytes()).hexdigest()
    assert info["input"]["path"] == str(screen_file)
    assert (info["input"]["n_cells"], info["input"]["n_genes"]) == (740, 40)
    genes = "\n".join(f"gene{i}" for i in range(40))
    assert info["var_names_sha256"] == hashlib.sha256(genes.encode()).hexdigest()
    assert (info["seed"], info["device"], info["config"]["training"]["epochs"]) == (0, "cpu", 3)
    assert {"python", "torch", "numpy", "anndata", "scanpy"} <= info["packages"].keys()
    assert info["started"] <= info["finished"]
    assert info["seconds"] > 0
    assert info["metrics"]["evaluated_on"] == "test"
    assert sum(info["cells"].values()) == 740
    assert info["preprocessing"]["values"] == "counts"


def test_weights(run_folder: Path, finished: Run) -> None:
    from safetensors import safe_open

    with safe_open(run_folder / "model.safetensors", framework="pt") as handle:
        metadata = handle.metadata()
        names = set(handle.keys())
    assert all(isinstance(value, str) for value in metadata.values())
    architecture = json.loads(metadata["architecture"])
    assert (architecture["n_genes"], architecture["n_latents"], architecture["n_perturbations"]) == (40, 3, 7)
    assert names == set(finished.model.state_dict())
    assert not finished.model.training


def test_resume_file_holds_no_objects(run_folder: Path) -> None:
    import torch

    state = torch.load(run_folder / "resume.pt", weights_only=True)
    assert {"learners", "epoch", "identity"} <= state.keys()
    assert all({"model", "optimizer", "best_state"} <= learner.keys() for learner in state["learners"])


def test_round_trip_is_exact(finished: Run, tmp_path: Path) -> None:
    finished.write_tables(tmp_path)
    shutil.copy(finished.path / "model.safetensors", tmp_path)  # type: ignore[operator]
    again = crlseq.load(tmp_path)
    assert again.info == finished.info
    for name in TABLES:
        assert (tmp_path / f"{name}.csv").read_bytes() == (finished.path / f"{name}.csv").read_bytes()  # type: ignore[operator]
        pd.testing.assert_frame_equal(again.tables()[name], finished.tables()[name], check_exact=True)


def test_memory_and_folder_hold_the_same(screen: ad.AnnData, tmp_path: Path) -> None:
    """Floats to the bit and equal types, with awkward numbers put in."""
    run = crlseq.fit(screen, epochs=1, n_latents=2, bootstrap=2)
    assert run.interventions.loc[6, ["weight", "shift", "retention", "noise_scale", "support"]].isna().all()
    rng = np.random.default_rng(0)
    run.programs["loading"] = rng.standard_normal(len(run.programs)) * 10.0 ** rng.integers(
        -300, 300, len(run.programs)
    )
    run.programs.loc[:3, "total_effect"] = [0.1 + 0.2, 5e-324, 1e308, -0.0]
    run.interventions.loc[2, ["p_value", "fdr"]] = np.nan
    run.write_tables(tmp_path)
    again = crlseq.load(tmp_path)
    for name, table in run.tables().items():
        pd.testing.assert_frame_equal(again.tables()[name], table, check_exact=True)
        for column in table.select_dtypes("float"):
            there = table[column].notna()
            assert (
                again.tables()[name][column][there].to_numpy().view("i8") == table[column][there].to_numpy().view("i8")
            ).all()


def test_no_edges_and_no_evaluation(screen: ad.AnnData, tmp_path: Path) -> None:
    run = crlseq.fit(screen, tmp_path / "RUN", epochs=1, n_latents=2, causal_layer=False, validation_cells=0.01)
    assert (tmp_path / "RUN" / "dag.csv").read_text().splitlines() == ["source,target,weight,support,identified"]
    assert run.edges.empty
    assert run.evaluation.empty
    assert run.edges["weight"].dtype == float
    assert run.dag.number_of_edges() == 0
    assert "no graph" in run.dag.graph["reason"]
    assert "No edge is declared" in (tmp_path / "RUN" / "report.html").read_text()
    for words in ([], ["dag"], ["history"], ["programs"], ["interventions"]):
        succeeds("inspect", *words, tmp_path / "RUN")


# --- folders that cannot be loaded


def test_unfinished(tmp_path: Path) -> None:
    (tmp_path / "RUN.partial").mkdir()
    with pytest.raises(InputError, match=r"not finished.*--resume"):
        crlseq.load(tmp_path / "RUN")


def test_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="not a run folder"):
            crlseq.load(path)


def test_newer_format(copied_run: Path) -> None:
    edit_info(copied_run, format=99, version="9.0")
    with pytest.raises(InputError, match=r"crlseq 9\.0, which is newer.*Update"):
        crlseq.load(copied_run)


def test_older_runs(copied_run: Path) -> None:
    """What can no longer be read is refused with a hint."""
    edit_info(copied_run, version="0.0.9")
    assert crlseq.load(copied_run).info["version"] == "0.0.9"

    hint = r"Fit again with the command in its run\.json, or read it with that version\."
    (copied_run / "history.csv").write_text("epoch\n0\n")
    with pytest.raises(
        InputError, match=rf"crlseq 0\.0\.9, which version .* history\.csv has no column 'total'\. {hint}"
    ):
        crlseq.load(copied_run)
    edit_info(copied_run, version="0.0.1", format=0)
    with pytest.raises(
        InputError, match=rf"crlseq 0\.0\.1, which version .* its format is 0; this version reads 1 and later\. {hint}"
    ):
        crlseq.load(copied_run)


def test_keys_of_later_versions_are_kept_and_wrong_ones_named(copied_run: Path, screen: ad.AnnData) -> None:
    path = copied_run / "run.json"
    edit_info(copied_run, training={"later": {"key": 1}})
    info, run = json.loads(path.read_text()), crlseq.load(copied_run)
    assert run.info == info and run.facts.training.epochs_run == 3
    assert json.loads(run.annotate(screen.copy()).uns["crlseq"]["run_json"]) == info
    del info["training"]["kept_seed"]
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"is damaged: run\.json lacks 'training\.kept_seed'\."):
        crlseq.load(copied_run)
    edit_info(copied_run, training={"kept_seed": "two"})
    with pytest.raises(
        InputError, match=r"is damaged: training\.kept_seed in run\.json: Input should be a valid integer"
    ):
        crlseq.load(copied_run)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "run.json cut": lambda folder: cut(folder / "run.json"),
    "run.json empty": lambda folder: (folder / "run.json").write_text(""),
    "run.json a list": lambda folder: (folder / "run.json").write_text("[1]"),
    "run.json without content": lambda folder: (folder / "run.json").write_text('{"format": 1}'),
    "run.json with an odd format": lambda folder: (folder / "run.json").write_text('{"format": "1"}'),
    "run.json binary": lambda folder: (folder / "run.json").write_bytes(b"\xff\xfe\x00"),
    "no table": lambda folder: (folder / "dag.csv").unlink(),
    "empty table": lambda folder: (folder / "programs.csv").write_text(""),
    "other columns": lambda folder: (folder / "interventions.csv").write_text("a,b\n1,2\n"),
    "text for numbers": lambda folder: (folder / "programs.csv").write_text(
        "program,gene,loading,total_effect,rank\nP0,a,x,1,1\n"
    ),
    "binary table": lambda folder: (folder / "history.csv").write_bytes(b"\xff\xfe\x00\x01"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged(copied_run: Path, damage: str) -> None:
    DAMAGES[damage](copied_run)
    with pytest.raises(InputError, match="is damaged") as caught:
        crlseq.load(copied_run)
    assert "\n" not in caught.value.message
    answer = invoke("inspect", copied_run)
    assert (answer.code, answer.out) == (3, "")


def test_damaged_weights_and_cells(copied_run: Path, screen: ad.AnnData) -> None:
    cut(copied_run / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        _ = crlseq.load(copied_run).model
    (copied_run / "crlseq.h5ad").unlink()
    with pytest.raises(InputError, match=r"crlseq\.h5ad cannot be read"):
        crlseq.load(copied_run).annotate(screen.copy())


# --- cells


def test_annotating_the_fitted_cells(finished: Run, run_folder: Path, screen: ad.AnnData) -> None:
    adata = screen.copy()
    assert finished.annotate(adata) is adata
    kept = ad.read_h5ad(run_folder / "crlseq.h5ad")
    np.testing.assert_array_equal(adata.obsm["X_crlseq"], kept.obsm["X_crlseq"])
    np.testing.assert_array_equal(adata.varm["crlseq_programs"], kept.varm["crlseq_programs"])
    assert adata.obs["crlseq_split"].tolist() == kept.obs["crlseq_split"].tolist()
    controls = (adata.obs["perturbation"] == "control") & adata.obs["crlseq_split"].isin(["train", "validation"])
    latents = adata.obsm["X_crlseq"][controls.to_numpy()].astype(float)
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-5)
    # In standard deviations of control cells without measurement noise, of which these have some.
    assert (latents.std(0) > 0.7).all()
    raw = finished.latents(screen) * [program.scale for program in finished.facts.programs]
    np.testing.assert_allclose(adata.obsm["X_crlseq"] * [p.scale for p in finished.facts.programs], raw, rtol=1e-5)


def test_annotating_other_cells(finished: Run) -> None:
    other = small_screen(seed=5)
    other.obs_names = [f"new{i}" for i in range(len(other))]
    extra = ad.AnnData(np.ones((len(other), 2)), other.obs[[]], pd.DataFrame(index=["x", "y"]))
    order = np.random.default_rng(0).permutation(42)
    both = ad.concat([other, extra], axis=1)[:, order].copy()
    finished.annotate(both)
    finished.annotate(other)
    assert (both.obs["crlseq_split"] == "unused").all()
    np.testing.assert_allclose(finished.latents(both[:, other.var_names].copy()), other.obsm["X_crlseq"], atol=1e-5)
    assert not both.varm["crlseq_programs"][both.var_names.isin(["x", "y"])].any()
    assert not both.var["crlseq_fitted"][["x", "y"]].any()
    by_gene = pd.DataFrame(both.varm["crlseq_programs"], index=both.var_names).loc[other.var_names]
    np.testing.assert_array_equal(by_gene.to_numpy(), other.varm["crlseq_programs"])


def test_cells_that_cannot_be_annotated(finished: Run, screen: ad.AnnData) -> None:
    with pytest.raises(InputError, match=r"1 of the 40 fitted genes are missing, first 'gene7'"):
        finished.annotate(screen[:, screen.var_names != "gene7"].copy())
    logged = screen.copy()
    logged.X = np.log1p(dense(screen))
    with pytest.raises(InputError, match="not counts"):
        finished.annotate(logged)
    logged.X[0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        finished.annotate(logged)


def test_splits_lie_within_conditions(run_folder: Path) -> None:
    obs = ad.read_h5ad(run_folder / "crlseq.h5ad").obs
    counts = obs.groupby("perturbation", observed=True)["crlseq_split"].value_counts().unstack(fill_value=0)
    assert set(obs["crlseq_split"].cat.categories) == set(splits.SPLITS)
    assert counts.loc["control", ["test", "validation", "train"]].tolist() == [40, 20, 140]
    assert (counts.drop("control")["test"] == 12).all()


# --- shown in a session


def test_a_run_is_shown_in_a_few_lines(finished: Run) -> None:
    lines = repr(finished).splitlines()
    assert lines[0] == "FittedRun" and 6 <= len(lines) <= 15 and max(map(len, lines)) < 120
    assert "perturbations: 7, 6 with a detectable effect" in lines[2] and "programs: 3" in lines[3]
    assert lines[-2].strip().startswith(f"graph: {finished.facts.identification.verdict}, ")
    page = finished._repr_html_()
    assert ElementTree.fromstring(page).tag == "table" and all(
        f"<th>{name}</th>" in page for name in ("P0", "P2", "graph")
    )
    assert len(page) < 3000


def test_many_programs_and_odd_names_stay_short() -> None:
    run = synthetic_run(50, 60)
    run.info["input"]["path"] = "a\n<b>" + "x" * 500
    run.info["programs"][0]["label"] = "<script>\n\x1b[31m"
    lines = repr(run).splitlines()
    assert len(lines) == 15 and max(map(len, lines)) < 120 and "...: 42 more" in lines[-3] and "\x1b" not in repr(run)
    assert "folder: not written" in lines[-1]
    page = run._repr_html_()
    assert "<script>" not in page and ElementTree.fromstring(page).find(".//b") is None


# --- finished runs and --resume, --force


def test_force_replaces_a_run(screen_file: Path, tmp_path: Path) -> None:
    first = crlseq.fit(screen_file, tmp_path / "RUN", **FAST)
    (tmp_path / "RUN" / "note.txt").write_text("mine")
    second = crlseq.fit(screen_file, tmp_path / "RUN", **FAST, seed=7, force=True)
    assert (first.info["seed"], second.info["seed"]) == (0, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]
    assert not (tmp_path / "RUN" / "note.txt").exists()


def test_force_replaces_a_link_to_a_run(screen_file: Path, tmp_path: Path) -> None:
    crlseq.fit(screen_file, tmp_path / "first", **FAST)
    (tmp_path / "RUN").symlink_to(tmp_path / "first")
    crlseq.fit(screen_file, tmp_path / "RUN", **FAST, seed=7, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"RUN", "first"}
    assert crlseq.load(tmp_path / "first").info["seed"] == 0


def test_resuming_what_is_finished(run_folder: Path, screen_file: Path) -> None:
    options: dict[str, Any] = {"epochs": 3, "hold_out_cells": 0.2, "n_latents": 3}
    assert crlseq.fit(screen_file, run_folder, resume=True, **options).info == crlseq.load(run_folder).info
    with pytest.raises(InputError, match="finished, but was fitted with other options"):
        crlseq.fit(screen_file, run_folder, resume=True, epochs=4)


def test_a_folder_of_0202a24_opens_and_says_the_same(tmp_path: Path) -> None:
    """Written by the code before modules were moved: every file that a run writes again is the same to the byte."""
    folder = Path(__file__).parent / "folder_0202a24"
    run = crlseq.load(folder)
    run.write_tables(tmp_path)
    for file in folder.iterdir():
        assert file.name == "model.safetensors" or (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
    assert run.described["P0"].up["gene"].tolist() and run.facts.training.epochs_run == len(run.history)
    assert run.model.scm.graph.shape == (5, 5)
