"""check, inspect and the entry points: tables into pipes, JSON, terminals, broken pipes, quick help."""

from __future__ import annotations

import inspect
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import crlseq
from crlseq.cli.simulate import RANGES
from crlseq.cli.simulate import simulate as simulate_command
from crlseq.run.run import Run
from crlseq.storage.csv import EXACT
from tests.support import Answer, dense, edit_info, environment, forked, invoke, small_screen, spawn, succeeds

TABLES = ["programs", "interventions", "dag", "history", "pairs"]
QUICK = ["--n-latents", 3, "--bootstrap", 0]  # the default method at its shortest


def on_terminal(*words: object, columns: int = 100) -> tuple[int, str]:
    """``crlseq WORDS`` with stdin, stdout and stderr on a terminal; its exit code and plain text."""
    parent, terminal = pty.openpty()

    def connect() -> None:
        for handle in range(3):
            os.dup2(terminal, handle)
        os.close(parent)
        os.environ.update(COLUMNS=str(columns), TERM="xterm")

    child = forked(connect, *words)
    os.close(terminal)
    content = b""
    while select.select([parent], [], [], 60)[0]:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # Linux says so when the child has closed its side
            break
        if not piece:
            break
        content += piece
    os.close(parent)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", content.decode()).replace("\r\n", "\n")


def table(answer: Answer) -> pd.DataFrame:
    assert answer.code == 0, answer.err
    return pd.read_csv(io.StringIO(answer.out), sep="\t", keep_default_na=False, **EXACT)


@pytest.mark.parametrize("name", TABLES)
def test_tables_into_a_pipe(finished: Run, run_folder: Path, name: str) -> None:
    shown = table(invoke("inspect", name, run_folder))
    assert list(shown.columns) == list(finished.tables()[name].columns)
    if name != "programs":
        assert len(shown) == len(finished.tables()[name])
    as_json = json.loads(invoke("inspect", name, run_folder, "--json").out)
    assert (len(as_json["nodes"]) == 3) if name == "dag" else (len(as_json) == len(shown))


@pytest.fixture(scope="module")
def ordered_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, in which P0 is upstream of P1, and P2 likely of P0."""
    folder = tmp_path_factory.mktemp("ordered") / "RUN"
    shutil.copytree(run_folder, folder)
    pairs = pd.read_csv(folder / "pairs.csv").assign(status="excluded", detectable=0.2, guards="change, one way")
    pairs.loc[0, ["status", "change", "se", "z"]] = ["upstream", -0.5, 0.05, -10.0]
    pairs.loc[4, ["status", "change", "se", "z"]] = ["likely", 0.4, 0.05, 8.0]
    pairs.loc[5, ["status", "detectable"]] = ["undecided", 0.6]
    pairs.to_csv(folder / "pairs.csv", index=False)
    return folder


def test_ancestry(finished: Run, run_folder: Path, ordered_folder: Path) -> None:
    shown = table(invoke("inspect", "ancestry", run_folder))
    support = np.array(finished.info["discovery"]["bootstrap"]["ancestor"])
    declared = set()
    for row in shown.to_dict("records"):
        assert float(row["support"]) == support[int(row["ancestor"][1:]), int(row["descendant"][1:])]
        if str(row["declared"]) == "True":
            declared.add((row["ancestor"], row["descendant"]))
        else:
            assert row["status"] == "likely" or float(row["support"]) >= 0.1
    assert set(finished.dag.edges) <= declared
    ordered = table(invoke("inspect", "ancestry", ordered_folder)).set_index(["ancestor", "descendant"])
    assert [str(value) for value in ordered.loc[[("P0", "P1"), ("P2", "P0")], "declared"]] == ["True", "False"]
    assert ordered.loc[[("P0", "P1"), ("P2", "P0")], "status"].tolist() == ["upstream", "likely"]


def test_pairs_as_json_and_on_a_terminal(ordered_folder: Path) -> None:
    answer = invoke("inspect", "pairs", ordered_folder, "--json")
    rows = json.loads(answer.out)
    assert answer.err == ""
    assert [row["status"] for row in rows] == ["upstream", "excluded", "excluded", "excluded", "likely", "undecided"]
    graph = json.loads(invoke("inspect", "dag", ordered_folder, "--json").out)
    assert [row["sentence"] for row in graph["pairs"]] == [row["sentence"] for row in rows]
    code, text = on_terminal("inspect", "pairs", ordered_folder)
    assert code == 0 and "\t" not in text
    words = " ".join(text.split())
    assert rows[0]["sentence"] in words and "loses −0.50 ± 0.05 SD of what P0 gave it" in rows[0]["sentence"]
    assert rows[4]["sentence"] in words and "(guard dose)" in rows[4]["sentence"]
    assert re.findall(r"^(\w+) \((\d)\):", text, re.MULTILINE) == [
        ("upstream", "1"), ("likely", "1"), ("excluded", "3"), ("undecided", "1"),
    ]  # fmt: skip


def test_the_matrix_of_pairs_on_a_terminal(ordered_folder: Path) -> None:
    code, text = on_terminal("inspect", "dag", ordered_folder)
    assert code == 0
    lines = text.split("Pairs of programs")[1].splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["P0", "P1", "P2"], ["P0", "−", "0"], ["P1", "0", "0"], ["P2", "+?", "·"],
    ]  # fmt: skip
    assert text.index("Declared edges") < text.index("Pairs of programs") < text.index("±  upstream") < text.index("The graph is")  # fmt: skip


def test_a_run_without_pairs_says_why(tmp_path: Path, screen_file: Path) -> None:
    folder = tmp_path / "RUN"
    succeeds("fit", screen_file, "--output", folder, "--method", "gradient", "--epochs", 1)
    old = Path(__file__).parents[1] / "run" / "folder_0202a24"
    for path, why in ((folder, "found by likelihood"), (old, "before crlseq judged pairs")):
        answer = invoke("inspect", "pairs", path)
        assert why in answer.err and len(table(answer)) == 0 and "detectable" in answer.out
        assert json.loads(invoke("inspect", "pairs", path, "--json").out) == []
        assert "pairs" not in json.loads(invoke("inspect", "dag", path, "--json").out)
        assert why in table(invoke("inspect", path)).set_index("what")["value"]["pairs"]
        code, text = on_terminal("inspect", "dag", path)
        assert code == 0 and why in " ".join(text.split())
        succeeds("inspect", "ancestry", path)
        succeeds("report", path, "--output", tmp_path / "page.html", "--force")
        assert why in (tmp_path / "page.html").read_text()
        succeeds("plot", path, "pairs", "--output", tmp_path / "pairs.svg", "--force")
        assert why in " ".join((tmp_path / "pairs.svg").read_text().split())


def test_values_survive_the_pipe(finished: Run, run_folder: Path) -> None:
    shown = table(invoke("inspect", "history", run_folder))
    assert shown["total"].tolist() == [float(f"{value:.6g}") for value in finished.history["total"]]  # six digits
    assert shown["epoch"].tolist() == [0, 1, 2]
    records = json.loads(invoke("inspect", "history", run_folder, "--json").out)
    assert [row["total"] for row in records] == pytest.approx(finished.history["total"].tolist(), rel=1e-14)


def test_programs_options(finished: Run, run_folder: Path) -> None:
    shown = table(invoke("inspect", "programs", run_folder, "--program", "P1", "--top", 5))
    expected = finished.programs.query("program == 'P1' and rank <= 5")
    assert shown["gene"].tolist() == expected["gene"].tolist()
    assert shown["loading"].tolist() == [float(f"{value:.6g}") for value in expected["loading"]]
    assert len(table(invoke("inspect", "programs", run_folder))) == 3 * 20
    assert invoke("inspect", "programs", run_folder, "--top", 0).code == 2


def test_one_program_into_a_pipe(finished: Run, run_folder: Path) -> None:
    shown = table(invoke("inspect", "program", run_folder, "P1", "--top", 4))
    told = finished.described["P1"]
    assert shown["what"].tolist() == ["driver"] * len(told.drivers) + ["up"] * 4 + ["down"] * 4
    drivers, genes = shown[shown["what"] == "driver"], shown[shown["what"] != "driver"]
    assert drivers["name"].tolist() == told.drivers["perturbation"].tolist()
    assert drivers["shift"].astype(float).tolist() == pytest.approx(told.drivers["shift"].tolist(), rel=5e-6)
    assert drivers["n_cells"].astype(int).tolist() == told.drivers["n_cells"].tolist()
    assert genes["name"].tolist() == [*told.up["gene"][:4], *told.down["gene"][:4]]
    expected = [*told.up["total_effect"][:4], *told.down["total_effect"][:4]]
    assert genes["total_effect"].astype(float).tolist() == pytest.approx(expected, rel=5e-6)


def test_one_program_as_json_and_on_a_terminal(finished: Run, run_folder: Path) -> None:
    told = next(program for program in finished.described.values() if program.children)
    answer = invoke("inspect", "program", run_folder, told.name, "--json")
    found = json.loads(answer.out)
    assert answer.err == ""
    assert (found["program"], found["title"], found["children"]) == (told.name, told.title, told.children)
    assert [row["gene"] for row in found["up"]] == told.up["gene"][:15].tolist()
    assert found["effect_explained"] == told.effect_explained and 0 < found["stability"] <= 1
    code, text = on_terminal("inspect", "program", run_folder, told.name)
    assert code == 0 and "\t" not in text
    assert f"{told.name}  {told.title}" in text and "of the effects of perturbations" in text
    assert f"downstream: {', '.join(f'{name} ({weight:+.2f})' for name, weight in told.children.items())}" in text


def test_one_perturbation(finished: Run, run_folder: Path) -> None:
    row = next(row for row in finished.interventions.to_dict("records") if row["program"])
    name, own = row["perturbation"], finished.effects[finished.effects["perturbation"] == row["perturbation"]]
    shown = table(invoke("inspect", "perturbation", run_folder, name))
    assert shown["gene"].tolist() == own["gene"].tolist()
    assert shown["change"].astype(float).tolist() == own["change"].tolist()
    found = json.loads(invoke("inspect", "perturbation", run_folder, name, "--json").out)
    assert found["shift"] == row["shift"] and len(found["genes"]) == len(own)
    changed = int((own["fdr"] <= 0.05).sum())
    sentences = " ".join(found["findings"])
    assert f"{name} has {row['n_cells']} cells" in sentences and f"{changed} of {len(own)} genes change" in sentences
    assert f"It moves {row['program']}" in sentences and f"by {row['shift']:+.2f}" in sentences
    code, text = on_terminal("inspect", "perturbation", run_folder, name, "--top", 3)
    assert code == 0 and "program" in text and own["gene"].iloc[0] in text
    wrong = invoke("inspect", "perturbation", run_folder, "G00")
    assert wrong.code == 3 and "Did you mean 'g0'" in wrong.err


def test_a_run_of_an_older_format_has_no_effects(copied_run: Path, tmp_path: Path) -> None:
    of_g0 = ("inspect", "perturbation", copied_run, "g0")
    (copied_run / "effects.csv").unlink()
    damaged = invoke(*of_g0)
    assert damaged.code == 3 and "damaged" in damaged.err
    edit_info(copied_run, format=3, version="0.0.9")
    for words in (of_g0, ("plot", copied_run, "effects-map", "-o", tmp_path / "x.png")):
        answer = invoke(*words)
        assert answer.code == 3 and "crlseq 0.0.9, whose runs hold no effects on genes" in answer.err
    succeeds("inspect", copied_run)


def test_interventions_are_sorted_by_program_and_those_without_a_claim_come_last(run_folder: Path) -> None:
    shown = table(invoke("inspect", "interventions", run_folder))
    programs = shown["program"].tolist()
    assert programs[-1] == "" and "" not in programs[:-1]
    assert programs[:-1] == sorted(programs[:-1], key=lambda name: int(name[1:]))
    last = shown.iloc[-1]
    assert last["perturbation"] == "g6"
    assert (last[["weight", "shift", "retention", "noise_scale", "support"]] == "").all()
    assert float(last["fdr"]) > 0.05
    records = json.loads(invoke("inspect", "interventions", run_folder, "--json").out)
    assert (records[-1]["program"], records[-1]["shift"], records[-1]["n_cells"]) == ("", None, 48)


def test_no_claim_on_a_terminal(run_folder: Path) -> None:
    code, text = on_terminal("inspect", "interventions", run_folder)
    assert code == 0
    row = next(line for line in text.splitlines() if line.startswith("g6"))
    assert row.split()[1:4] == ["–", "–", "–"]  # no program stands before weight, shift and retention


def test_summary(finished: Run, run_folder: Path) -> None:
    rows = table(invoke("inspect", run_folder)).set_index("what")["value"]
    assert rows["graph"].startswith(finished.info["identification"]["verdict"])
    assert rows["cells"] == ", ".join(f"{n} {name}" for name, n in finished.info["cells"].items() if n)
    assert "test cells" in rows["held out"]
    answer = invoke("inspect", run_folder, "--json")
    assert answer.err == ""
    assert json.loads(answer.out)["metrics"] == finished.info["metrics"]


def test_findings_come_first(finished: Run, run_folder: Path) -> None:
    told = json.loads(invoke("inspect", run_folder, "--json").out)
    about = [finding["about"] for finding in told["findings"]]
    assert about[0] == "effects" and about[1:4] == finished.program_names and about[-1] == "graph"
    detected, n = finished.facts.metrics.n_detected, len(finished.interventions)
    assert told["findings"][0]["sentence"].startswith(f"{detected} of {n} perturbations have a detectable effect")
    shown = table(invoke("inspect", run_folder))
    assert shown["what"].tolist()[: len(about)] == ["finding"] * len(about)
    assert shown["value"][1] == f"P0: {told['findings'][1]['sentence']}"
    code, text = on_terminal("inspect", run_folder)
    assert code == 0 and text.startswith(f"• {detected} of {n} perturbations have")
    assert list(told["next"]) == ["Is the graph identified?", "Better than baselines?", "Did the fit converge?"]
    assert all(" ".join(step.split()) in " ".join(text.split()) for step in told["next"].values())


@pytest.mark.parametrize("words", [["dag"], []])
def test_the_verdict_is_shown(finished: Run, run_folder: Path, words: list[str]) -> None:
    answer = invoke("inspect", *words, run_folder)
    assert finished.info["identification"]["reason"] in answer.out + answer.err
    answer = invoke("inspect", *words, run_folder, "--json")
    assert finished.info["identification"]["reason"] in answer.out


def test_terminal(finished: Run, run_folder: Path) -> None:
    code, text = on_terminal("inspect", "programs", run_folder, "--top", 3)
    assert code == 0
    assert "\t" not in text
    for program in finished.info["programs"]:
        assert f"{program['name']}  {program['label']}" in text
    code, text = on_terminal("inspect", "dag", run_folder)
    assert code == 0
    assert " ".join(finished.info["identification"]["reason"].split()) in " ".join(text.split())
    for source, target in finished.dag.edges:
        assert re.search(rf"^{source} (.*\n)+?  [├└]─▶ {target} ", text, re.MULTILINE)


def test_a_run_without_epochs(linear_folder: Path) -> None:
    shown = invoke("inspect", "history", linear_folder)
    assert (shown.code, shown.out) == (0, "epoch\ttotal\n")
    assert json.loads(invoke("inspect", "history", linear_folder, "--json").out) == []
    assert on_terminal("inspect", "history", linear_folder)[0] == 0
    rows = table(invoke("inspect", linear_folder)).set_index("what")["value"]
    assert rows["training"].startswith("no epochs")


def test_history_fits_a_terminal(run_folder: Path) -> None:
    code, text = on_terminal("inspect", "history", run_folder)
    assert code == 0
    # Training and validation, one below the other.
    assert len([line for line in text.splitlines() if re.match(r" +\d+ ", line)]) == 2 * 3
    assert max(map(len, text.splitlines())) <= 100


def test_a_wide_table_on_a_narrow_terminal_breaks_no_word(run_folder: Path, finished: Run) -> None:
    code, text = on_terminal("inspect", "interventions", run_folder, columns=40)
    assert code == 0
    lines = text.splitlines()
    assert max(map(len, lines)) <= 40
    words = set(text.split())
    assert {"perturbation", "support", "shift", *finished.interventions["perturbation"]} <= words
    assert [line.split()[0] for line in lines if line.startswith("g0 ")] == ["g0"] * 2  # the name leads all blocks


def test_interventions_are_one_block_of_80_columns(linear_folder: Path) -> None:
    code, text = on_terminal("inspect", "interventions", linear_folder, columns=80)
    assert code == 0
    lines = text.splitlines()
    assert sum(line.startswith("g0 ") for line in lines) == 1
    assert "support" not in crlseq.load(linear_folder).interventions.dropna(
        axis=1, how="all"
    )  # no bootstrap, and told so
    assert {"support", "shift", "fdr"} <= set(text.split()) and "retention" not in text


def test_check_on_a_terminal(screen_file: Path) -> None:
    code, text = on_terminal("check", screen_file, columns=80)
    assert code == 0
    # The command stands on one line, to be copied.
    assert re.search(
        rf"^crlseq fit {screen_file} --perturbation-key perturbation .*--output screen-run$", text, re.MULTILINE
    )


def test_fit_on_a_terminal_has_a_bar_and_quiet_says_nothing(screen_file: Path, tmp_path: Path) -> None:
    code, text = on_terminal("fit", screen_file, "--output", tmp_path / "RUN", "--epochs", 2, *QUICK)
    assert code == 0
    assert "━" in text and re.search(r"stage 6 of 8: training the network .*[0-9]+ s elapsed", text)
    assert text.count("stage 1 of 8: reading the screen") > 1 and "• stage" not in text  # one line, drawn again
    quiet = invoke("fit", screen_file, "--output", tmp_path / "RUN", "--epochs", 1, *QUICK, "--quiet", "--force")
    assert quiet == Answer(0, "", "")


def test_names_that_stdout_cannot_encode(tmp_path: Path, screen_file: Path) -> None:
    folder = tmp_path / "Δ"
    succeeds("fit", screen_file, "--output", folder, "--epochs", 1, "--method", "gradient")
    for name, text in (("interventions.csv", "g0"), ("run.json", '"g0"')):
        (folder / name).write_text((folder / name).read_text().replace(text, text.replace("g0", "漢")))
    shown = spawn("inspect", "interventions", folder, PYTHONIOENCODING="ascii")
    assert shown.returncode == 0, shown.stderr
    assert "\\u6f22" in shown.stdout


# --- check


def test_check_json(screen_file: Path) -> None:
    answer = invoke("check", screen_file, "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    expected: dict[str, Any] = {
        "n_cells": 740, "n_genes": 40, "problems": [], "values": "counts", "perturbation_key": "perturbation",
        "control_label": "control", "separator": "+", "control_cells": 200, "n_singles": 7, "n_combinations": 2,
        "fitted_conditions": 9, "n_silent_genes": 0, "targets_measured": [], "dropped": {},
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert [(row["column"], row["levels"], row["matters"]) for row in found["batches"]] == [("batch", 2, False)]
    assert any(note.startswith("No --batch-key was given.") for note in found["notes"])
    assert set(found["cells_per_condition"].values()) == {60}
    assert found["command"].endswith("--output screen-run")


def test_check_lists_problems_and_fails(tmp_path: Path) -> None:
    adata = small_screen()
    x = dense(adata)
    x[4, 4] = np.nan
    adata.X = x
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace({"control": "AAVS1"})
    adata.write_h5ad(tmp_path / "screen.h5ad")
    answer = invoke("check", tmp_path / "screen.h5ad", "--json")
    assert answer.code == 3
    problems = json.loads(answer.out)["problems"]
    assert any("No column has a known control label" in problem for problem in problems)
    assert any("is nan" in problem for problem in problems)
    assert "command" not in json.loads(answer.out)
    shown = invoke("check", tmp_path / "screen.h5ad")
    assert shown.code == 3
    assert all(problem in shown.err for problem in problems)


def test_check_agrees_with_fit_about_cells_that_are_not_used(tmp_path: Path) -> None:
    adata = small_screen()
    x = dense(adata)
    labels = adata.obs["perturbation"].astype(str)
    labels.iloc[5] = "unassigned"
    x[5] = 0
    adata.X = x
    adata.obs["perturbation"] = labels
    adata.write_h5ad(tmp_path / "screen.h5ad")
    succeeds("check", tmp_path / "screen.h5ad")
    succeeds("fit", tmp_path / "screen.h5ad", "--output", tmp_path / "RUN", "--epochs", 1, "--method", "gradient")
    x[6] = 0
    adata.X = x
    adata.write_h5ad(tmp_path / "screen.h5ad")
    assert "Cells without counts are excluded (1)." in invoke("check", tmp_path / "screen.h5ad").err


def test_check_says_when_too_few_genes_or_controls_are_left(tmp_path: Path) -> None:
    adata = small_screen()
    controls = adata.obs["perturbation"] == "control"
    few = adata[~controls | (controls.cumsum() == 1)].copy()
    few.write_h5ad(tmp_path / "screen.h5ad")
    answer = invoke("check", tmp_path / "screen.h5ad", "--json")
    assert answer.code == 3
    assert "Too few control cells: 1." in " ".join(json.loads(answer.out)["problems"])


# --- entry points


def test_version_and_module() -> None:
    assert spawn("--version").stdout == f"crlseq {crlseq.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [["--help"], ["-h"], ["fit", "--help"], ["inspect", "--help"], ["inspect", "programs", "--help"], ["check", "-h"]],
)
def test_help(words: list[str]) -> None:
    assert "Usage" in succeeds(*words).out


HEAVY = {"torch", "scanpy", "anndata", "pandas", "numpy", "scipy", "sklearn", "networkx", "h5py", "matplotlib", "zarr"}


def imported_by(*commands: list[object]) -> set[str]:
    """Which of the heavy libraries these commands, one after the other, have imported in the end."""
    code = (
        "import json, sys\nfrom crlseq.cli.app import main\nfor words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['crlseq', *words]\n"
        "    try:\n        main()\n    except SystemExit as done:\n        assert not done.code\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", code, words], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy() -> None:
    assert imported_by(["--help"], ["fit", "--help"], ["--version"]) == set()


def test_inspect_and_report_need_no_torch(run_folder: Path, tmp_path: Path) -> None:
    found = imported_by(
        ["inspect", run_folder], ["inspect", "dag", run_folder], ["inspect", "program", run_folder, "P0"],
        ["report", run_folder, "--output", tmp_path / "x.html"],
    )  # fmt: skip
    assert "pandas" in found and not {"torch", "scanpy", "anndata", "matplotlib", "zarr"} & found


@pytest.mark.parametrize(
    "words",
    [
        ["--noise", "wrong"], ["--n-latents", "0"], ["--depth", "nan"], ["--penetrance", "0.5"],
        ["--penetrance", "0.9,0.3"], ["--shift-size", "low,high"], ["--hidden", "1", "--n-latents", "2"],
    ],
)  # fmt: skip
def test_simulate_refuses(tmp_path: Path, words: list[str]) -> None:
    answer = invoke("simulate", "--output", tmp_path / "s.h5ad", *words)
    assert (answer.code, answer.out) == (2, "")
    assert len(answer.err.splitlines()) == 2
    assert not list(tmp_path.iterdir())


def test_simulate_has_the_arguments_and_defaults_of_the_function() -> None:
    told, known = (inspect.signature(function).parameters for function in (simulate_command, crlseq.simulate))
    defaults = {name: each.default for name, each in told.items() if name not in ("output", "force")}
    for name in RANGES:
        defaults[name] = tuple(map(float, defaults[name].split(",")))
    assert defaults == {name: each.default for name, each in known.items()}


def test_simulate(tmp_path: Path) -> None:
    path = tmp_path / "s.h5ad"
    small = "--n-latents 2 --n-genes 20 --cells-per-perturbation 10 --n-control 20 --expected-parents 0.5"
    words = ["simulate", "--output", path, *small.split()]
    succeeds(*words)
    succeeds("check", path, "--json")
    again = invoke(*words)
    assert again.code == 3
    assert "--force" in again.err
    succeeds(*words, "--force")
    more = [
        "--penetrance",
        "0.4,0.6",
        "--guides",
        "2",
        "--background",
        "1",
        "--cell-cycle",
        "--edge-size",
        "1,1",
        "--force",
    ]
    succeeds(*words, *more)
    screen = ad.read_h5ad(path)
    assert screen.obsm["true_background"].shape[1] == 3 and screen.obs["guide"].nunique() == 2 * 9
    assert screen.uns["truth"]["target"]["penetrance"].between(0, 1, inclusive="neither").any()
    (tmp_path / "file").write_text("")
    assert invoke("simulate", "--output", tmp_path / "file" / "s.h5ad").code == 3
