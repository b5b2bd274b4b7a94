"""Options of `crlseq fit` on small screens: values, batches, splits, configuration files."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import anndata as ad
import numpy as np
import pytest
import typer
from rich.text import Text

import crlseq
from crlseq.cli.app import app
from crlseq.cli.options import FLAGS, option, read_config
from tests.support import FAST, SINGLES, dense, fit_file, fit_h5ad, invoke, small_screen, spawn, succeeds


@pytest.mark.parametrize("asked", ["auto", "3", None])
def test_number_of_programs(screen_file: Path, tmp_path: Path, asked: str | None) -> None:
    words = [] if asked is None else ["--n-latents", asked]
    succeeds("fit", screen_file, "--output", tmp_path / "RUN", "--method", "linear", "--bootstrap", 0, *words)
    run = crlseq.load(tmp_path / "RUN")
    assert run.info["config"]["model"]["n_latents"] == (3 if asked == "3" else "auto")
    assert len(run.program_names) == run.info["n_latents"] == len(run.adjacency)
    curve = run.info["discovery"]["n_latents_curve"]
    if asked == "3":
        assert (run.info["n_latents"], run.info["n_latents_reason"], curve) == (3, "as asked", None)
    else:
        assert 2 <= run.info["n_latents"] <= 4  # the truth is 3, of which the data show 2 well
        assert run.info["n_latents_reason"] != "as asked" and curve
        assert run.info["n_latents_reason"] in invoke("inspect", tmp_path / "RUN").out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_dtype(screen_file: Path, tmp_path: Path, preset: str, dtype: str) -> None:
    words = ["--preset", preset, "--dtype", dtype, "--epochs", 1, "--method", "gradient"]
    succeeds("fit", screen_file, "--output", tmp_path / "RUN", *words)
    assert str(crlseq.load(tmp_path / "RUN").model.scm.graph.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("method", ["straighten", "linear", "gradient"])
def test_without_a_causal_layer_there_is_no_graph(screen: ad.AnnData, method: str) -> None:
    run = crlseq.fit(screen, method=method, causal_layer=False, epochs=1, n_latents=2)
    assert run.edges.empty and not run.adjacency.any()
    assert "no graph" in run.info["identification"]["reason"]


@pytest.mark.parametrize("replicates", [0, 3])
def test_bootstrap(screen_file: Path, tmp_path: Path, replicates: int) -> None:
    path = tmp_path / "screen.h5ad"
    path.write_bytes(screen_file.read_bytes())
    run = fit_file(path, method="straighten", bootstrap=replicates)
    header, *rows = csv.reader((tmp_path / "RUN" / "interventions.csv").read_text().splitlines())
    support = [row[header.index("support")] for row in rows]
    assert len(support) == 7
    if replicates:
        assert run.info["discovery"]["bootstrap"]["replicates"] == 3
        assert all(float(value) * 3 == pytest.approx(round(float(value) * 3)) for value in support[:6])
        assert support[6] == ""
    else:
        assert support == [""] * 7 and run.info["discovery"]["bootstrap"] is None
        assert run.edges["support"].isna().all()


def test_values_overruled(tmp_path: Path) -> None:
    adata = small_screen()
    x = dense(adata)
    adata.X = np.minimum(x, 1) + (x > np.median(x)) * 0.0 + 0.0
    adata.X[0, 0] = 1
    run = fit_h5ad(adata, tmp_path, "--values", "counts")
    assert run.info["preprocessing"]["values"] == "counts"
    adata.X = x / 10
    run = crlseq.fit(adata, values="continuous", **FAST)
    assert run.info["preprocessing"]["target_sum"] is None


def test_batches_and_held_out_cells(screen_file: Path, screen: ad.AnnData, tmp_path: Path) -> None:
    path = tmp_path / "screen.h5ad"
    path.write_bytes(screen_file.read_bytes())
    run = fit_file(path, "--batch-key", "batch", "--hold-out-cells", 0.3, "--no-combinations", "--min-cells", 20)
    split = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad").obs["crlseq_split"]
    label = screen.obs["perturbation"].astype(str).to_numpy()
    doubles = np.char.find(label.astype(str), "+") >= 0
    assert (split[doubles] == "test").all()
    for name in SINGLES:
        assert (split[label == name] == "test").sum() == 18
        assert (split[label == name] == "validation").sum() == 6
    assert set(run.evaluation["split"]) == {"test"}
    assert len(run.evaluation) == 9


def test_batches_with_controls_in_one_only(tmp_path: Path) -> None:
    adata = small_screen()
    lane = np.where(np.arange(len(adata)) % 3 == 0, "b", "a")
    lane[adata.obs["perturbation"] == "control"] = "a"
    adata.obs["lane"] = lane
    run = fit_h5ad(adata, tmp_path, "--batch-key", "lane")
    assert any("Batches without control cells" in note and "b" in note for note in run.info["notes"])


def test_perturbations_in_batches_without_controls_get_no_target() -> None:
    """What the batch does was taken for their effect."""
    adata = small_screen(cells_per_perturbation=60, n_control=260, depth=2000.0)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    labels[np.flatnonzero(labels == "control")[:60]] = "nothing"
    adata.obs["perturbation"] = labels
    second = np.isin(labels, ["g0", "nothing"]) | ((labels == "g1") & (np.arange(len(labels)) % 2 == 0))
    adata.obs["lane"] = np.where(second, "b", "a")
    x = dense(adata)
    x[np.ix_(second, range(10))] *= 8
    adata.X = x.astype(np.float32)
    run = crlseq.fit(adata, batch_key="lane", method="linear", bootstrap=0, n_latents=2, threads=1)
    table = run.interventions.set_index("perturbation")
    alone = ["g0", "nothing"]
    assert table.loc[alone, "p_value"].isna().all() and (table.loc[alone, "n_cells"] > 50).all()
    assert (table.loc[alone, "program"].fillna("") == "").all()
    assert table.drop(index=alone)["p_value"].max() < 0.01
    assert (table.drop(index=alone)["program"] != "").all()
    assert any(note.startswith("Batches without control cells: b.") and "no target: g0, nothing." in note for note in run.info["notes"])  # fmt: skip


def test_min_cells(tmp_path: Path) -> None:
    adata = small_screen()
    some = np.flatnonzero(adata.obs["perturbation"] == "g2")
    adata = adata[np.setdiff1d(np.arange(len(adata)), some[4:])].copy()
    run = fit_h5ad(adata, tmp_path)
    assert "g2" not in set(run.interventions["perturbation"])
    assert any("fewer than 10 cells" in note and "g2" in note for note in run.info["notes"])
    again = fit_file(tmp_path / "screen.h5ad", "--min-cells", 3, "--force")
    assert "g2" in set(again.interventions["perturbation"])


def test_config_file_and_flags_that_win(screen_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "screen.h5ad"
    path.write_bytes(screen_file.read_bytes())
    (tmp_path / "run.toml").write_text(
        "preset = 'paper'\n[data]\nmin_cells = 12\ncombinations = true\n[training]\nepochs = 50\nseed = 4\n"
    )
    run = fit_file(path, "--config", tmp_path / "run.toml")
    config = run.info["config"]
    assert (config["preset"], config["training"]["epochs"], config["training"]["seed"]) == ("paper", 1, 4)
    assert (config["data"]["min_cells"], config["data"]["combinations"]) == (12, True)
    assert config["training"]["dtype"] == "float64"
    assert run.info["identification"]["verdict"] == "not identified"
    for shown in (invoke("inspect", tmp_path / "RUN").out, invoke("inspect", "dag", tmp_path / "RUN").err):
        assert "not identified" in shown
    assert "not identified" in (tmp_path / "RUN" / "report.html").read_text()
    assert "not identified" in (tmp_path / "RUN" / "dag.graphml").read_text()


def test_a_run_can_be_fitted_again(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "screen.h5ad").write_bytes((run_folder / "crlseq.h5ad").read_bytes())
    run = fit_file(tmp_path / "screen.h5ad", "--n-latents", 2)
    kept = ad.read_h5ad(tmp_path / "RUN" / "crlseq.h5ad")
    assert list(kept.uns["crlseq"]["program_names"]) == ["P0", "P1"] == run.program_names
    assert kept.obsm["X_crlseq"].shape[1] == 2


@pytest.mark.parametrize("separator", ["", "+"])
def test_the_command_that_check_gives(
    screen: ad.AnnData, tmp_path: Path, separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = screen.copy()
    adata.obs["two words"] = adata.obs["perturbation"].astype(str).replace({"control": "no guide"})
    del adata.obs["perturbation"]
    adata.write_h5ad(tmp_path / "a screen.h5ad")
    monkeypatch.chdir(tmp_path)
    options = ["--perturbation-key", "two words", "--control-label", "no guide", "--batch-key", "batch"]
    found = json.loads(invoke("check", "a screen.h5ad", *options, "--separator", separator, "--json").out)
    words = shlex.split(found["command"])
    assert words[:2] == ["crlseq", "fit"]
    succeeds(*words[1:], "--epochs", 1, "--method", "gradient")
    run = crlseq.load(tmp_path / "a screen-run")
    assert len(run.interventions) == found["n_singles"] == (7 if separator else 9)
    assert run.info["config"]["data"]["batch_key"] == "batch"


@pytest.mark.parametrize(("cells", "share"), [(49, 0.0), (50, 0.2)])
def test_check_holds_cells_out_where_there_are_enough(tmp_path: Path, cells: int, share: float) -> None:
    """By the median condition: two of six have fewer."""
    adata = small_screen(cells_per_perturbation=cells)
    few = [np.flatnonzero(adata.obs["perturbation"] == name)[:20] for name in ("g0", "g1")]
    adata = adata[np.setdiff1d(np.arange(adata.n_obs), np.concatenate(few))].copy()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    found = json.loads(invoke("check", tmp_path / "screen.h5ad", "--json").out)
    assert found["hold_out_cells"] == share
    assert ("--hold-out-cells 0.2" in found["command"]) == (share > 0)
    assert ("20% of the cells" in invoke("check", tmp_path / "screen.h5ad").out) == (share > 0)


def test_an_ensemble_says_what_its_seeds_agree_on(screen_file: Path, tmp_path: Path) -> None:
    words = ["fit", screen_file, "--n-latents", 2, "--ensemble", 3, "--epochs", 2]
    succeeds(*words, "--method", "gradient", "--output", tmp_path / "RUN")
    run = crlseq.load(tmp_path / "RUN")
    assert run.ensemble is not None
    counts = run.ensemble["kind"].value_counts()
    assert counts["program"] == 2 and counts["intervention"] == (run.interventions["program"] != "").sum() > 0
    assert run.ensemble["agreement"].between(0, 1).all()
    assert run.info["training"]["kept_seed"] in (0, 1, 2)

    answer = invoke(*words, "--method", "linear", "--output", tmp_path / "other")
    assert answer.code == 2 and not (tmp_path / "other").exists()


def test_one_seed_has_no_ensemble(run_folder: Path) -> None:
    assert crlseq.load(run_folder).ensemble is None and not (run_folder / "ensemble.csv").exists()


def test_help_says_what_the_configuration_says() -> None:
    told = " ".join(invoke("fit", "--help").out.replace("│", " ").split())
    assert "…" not in told, "a terminal of 80 columns cuts it off"
    for name, flag in FLAGS.items():
        for word in flag["switch"].split("/") if flag["switch"] else ["--" + name.replace("_", "-")]:
            assert word in told


@pytest.mark.parametrize(
    ("name", "kind", "brackets"),
    [
        ("perturbation_key", str, "[default: detected]"),
        ("guide_min_umis", int, "[at least 1; default: 5]"),
        ("guide_min_share", float, "[above 0.5, at most 1; default: 0.8]"),
        ("guide_map", Path, "[default: read from the guide names]"),
        ("genes", Path, "[default: most variable genes]"),
        ("n_top_genes", str, "[at least 2, or all; default: 5000]"),
        ("hold_out", list[str], "[default: none]"),
        ("streamed", bool, "[default: by its size]"),
        ("combinations", bool, "[default: --combinations]"),
        ("equations", str, "[auto|linear|nonlinear|flow; default: auto]"),
        ("epochs", int, "[at least 1; default: 100, or more for a small screen]"),
    ],
)
def test_an_option_is_made_from_its_field(name: str, kind: type, brackets: str | None) -> None:
    hint, declared = get_args(option(name))
    assert hint == kind | None
    text = Text.from_markup(declared.help).plain
    assert text.endswith(f" {brackets}")


def options_of(command: Any, words: str) -> Iterator[tuple[str, Any]]:
    """Every option of every command."""
    for name, own in getattr(command, "commands", {}).items():
        yield from options_of(own, f"{words} {name}")
    for each in command.params:
        if each.param_type_name == "option" and not each.hidden:
            yield f"{words} {each.opts[0]}", each


@pytest.mark.parametrize(("name", "found"), options_of(typer.main.get_command(app), "crlseq"))
def test_every_option_tells_what_is_taken_without_it(name: str, found: Any) -> None:
    """A value that nobody needs to give has a default in the help, and a list of words is no list[str]."""
    told = Text.from_markup(found.help).plain
    if not found.is_flag and not found.required:
        assert "[default: " in told or "; default: " in told or found.default not in (None, ()), told
    assert found.metavar is not None or not found.multiple


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("fit x --device ", {"auto", "cpu", "cuda"}), ("fit x --method l", {"linear"}), ("fit x --preset p", {"paper"}),
        ("fit x --intervention s", {"shift", "soft"}), ("fit x --n-latents a", {"auto"}), ("fit x --n-top-genes ", {"all"}),
        ("export RUN --format h5", {"h5ad", "h5mu"}), ("plot RUN da", {"dag"}),
        ("benchmark --method s", {"score", "score-linear", "sparse", "sparse-vae", "squires"}), ("simulate --noise ", {"counts", "gaussian"}),
    ],
)  # fmt: skip
def test_a_shell_completes_values(words: str, completed: set[str]) -> None:
    asked = {
        "_CRLSEQ_COMPLETE": "complete_bash",
        "COMP_WORDS": f"crlseq {words}",
        "COMP_CWORD": str(words.count(" ") + 1),
    }
    assert set(spawn(**asked).stdout.split()) == completed


def test_a_run_is_named_after_its_screen_where_nobody_names_it(
    screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = succeeds("fit", screen_file, "--method", "linear", "--n-latents", 2, "--bootstrap", 0)
    assert "Written to screen-run in " in answer.err and "Next: crlseq inspect screen-run" in answer.err
    assert crlseq.load("screen-run").facts.n_latents == 2
    again = invoke("fit", screen_file)
    assert (again.code, "screen-run" in again.err) == (3, True)


def test_what_is_typed_is_read_as_the_configuration_has_it(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("# mine\nb\na\n\nb\n")
    given = {
        "genes": tmp_path / "genes.txt", "gene_sets": Path("sets.gmt"), "n_top_genes": "all", "n_latents": "7",
        "hold_out": ["A+B", "C"], "separator": "", "perturbation_key": "7", "combinations": False, "seed": 0, "epochs": None,
    }  # fmt: skip
    config = read_config(given)
    assert (config.data.genes, config.data.gene_sets) == (("b", "a"), "sets.gmt")
    assert (config.data.n_top_genes, config.model.n_latents) == ("all", 7)
    assert (config.data.hold_out, config.data.separator, config.data.perturbation_key) == (("A+B", "C"), "", "7")
    assert (config.data.combinations, config.training.seed, config.training.epochs) == (False, 0, None)
