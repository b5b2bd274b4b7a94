"""Wrong usage and unusable configurations, through the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import check_refusal, files_below, invoke, refused, spawn


@pytest.mark.parametrize("content", ["epochs = = 3", "[training", "x = '", "\x00"])
def test_bad_toml(folder: Path, screen_file: Path, content: str) -> None:
    (folder / "run.toml").write_text(content)
    refused(folder, screen_file, "--config", folder / "run.toml", says=("TOML",))


def test_missing_config(folder: Path, screen_file: Path) -> None:
    refused(folder, screen_file, "--config", folder / "none.toml", says=("none.toml",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[training]\nepoch = 3", "epoch"),
        ("[trainin]\nepochs = 3", "trainin"),
        ("epochs = 3", "epochs"),
        ("[training]\nbatch_size = 'many'", "batch_size"),
        ("[training]\nseed = -1", "seed"),
        ("preset = 'fast'", "fast"),
        ("preset = 3", "preset"),
        ("[data]\nn_top_genes = 0", "n_top_genes"),
        ("[model]\nmmd_bandwidth = -1.0", "mmd_bandwidth"),
        ("[model]\nkl_weight = nan", "kl_weight"),
        ("data = 3", "data"),
    ],
)
def test_bad_options_in_a_config(folder: Path, screen_file: Path, content: str, says: str) -> None:
    (folder / "run.toml").write_text(content)
    refused(folder, screen_file, "--config", folder / "run.toml", code=2, says=(says,))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--min-cells", 0), ("--hold-out-cells", 1.5), ("--hold-out-cells", "nan"), ("--n-top-genes", 0),
        ("--n-top-genes", -5), ("--n-top-genes", "most"), ("--seed", -1), ("--threads", 0), ("--n-latents", 0),
        ("--n-latents", "x"), ("--n-latents", -1), ("--n-latents", 2.5), ("--bootstrap", -1), ("--method", "guess"),
        ("--batch-size", 1), ("--values", "raw"), ("--device", "tpu"), ("--intervention", "none"),
        ("--equations", "cubic"), ("--preset", "fast"), ("--epochs", 0),
    ],
)  # fmt: skip
def test_options_out_of_range(folder: Path, screen_file: Path, option: str, value: object) -> None:
    name = option[2:].replace("-", "_")
    refused(folder, screen_file, option, value, code=2, says=(name,))


@pytest.mark.parametrize("words", [["--wrong"], ["--epochs", "many"], ["--seed"], ["extra"]])
def test_wrong_usage(tmp_path: Path, screen_file: Path, words: list[str]) -> None:
    answer = invoke("fit", screen_file, "--output", tmp_path / "RUN", *words)
    assert (answer.code, answer.out) == (2, "")
    assert "Traceback" not in answer.err and "Error: " in answer.err
    assert not files_below(tmp_path)


@pytest.mark.parametrize("words", [["fit"], ["export", "RUN"], ["wrong"], ["check"], ["inspect", "programs"]])
def test_missing_arguments(words: list[str]) -> None:
    answer = invoke(*words)
    assert (answer.code, answer.out) == (2, "")


def test_through_a_child_process(tmp_path: Path, screen_file: Path) -> None:
    target = tmp_path / "RUN"
    missing = spawn("fit", tmp_path / "none.h5ad", "--output", target)
    check_refusal(missing.returncode, missing.stdout, missing.stderr, 3, "There is no file")
    usage = spawn("fit", screen_file, "--output", target, "--seed", "-1")
    check_refusal(usage.returncode, usage.stdout, usage.stderr, 2, "seed")
    assert not files_below(tmp_path)


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    shown = spawn("--debug", "check", tmp_path / "none.h5ad")
    assert shown.returncode == 1 and "Traceback" in shown.stderr


@pytest.mark.parametrize("name", ["check", "inspect", "export", "report"])
def test_other_commands_refuse_what_is_missing(tmp_path: Path, name: str) -> None:
    options = {"export": ["--format", "csv", "--output", tmp_path / "tables"]}.get(name, [])
    check_refusal(*invoke(name, tmp_path / "none", *options), 3, "none")
    assert not files_below(tmp_path)
