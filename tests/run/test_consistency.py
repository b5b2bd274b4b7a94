"""A run folder whose files do not belong together is damaged, and is told so when it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import crlseq
from crlseq.errors import InputError
from tests.support import FAST, check_refusal, invoke


@pytest.fixture
def run(linear_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(linear_folder, tmp_path / "RUN"))


def in_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def tamper(run: Path) -> None:
        info = json.loads((run / "run.json").read_text())
        change(info)
        (run / "run.json").write_text(json.dumps(info))

    return tamper


def in_table(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def tamper(run: Path) -> None:
        table = pd.read_csv(run / f"{name}.csv", dtype=str, keep_default_na=False)
        change(table).to_csv(run / f"{name}.csv", index=False)

    return tamper


def named(name: str, column: str, value: str) -> Callable[[Path], None]:
    return in_table(name, lambda t: t.assign(**{column: [value, *t[column].iloc[1:]]}))


def edges(*pairs: str) -> Callable[[Path], None]:
    rows = [
        {"source": a, "target": b, "weight": 1, "support": 1, "identified": "identified"}
        for a, b in map(str.split, pairs)
    ]
    return in_table("dag", lambda t: pd.DataFrame(rows))


TAMPERED = {
    "a program less": (in_json(lambda i: i["programs"].pop()), "n_latents 3 and 2 programs"),
    "another number": (in_json(lambda i: i.update(n_latents=4)), "n_latents 4 and 3 programs"),
    "a row of edges less": (in_json(lambda i: i["adjacency"].pop()), "adjacency in run.json is not 3 x 3"),
    "an edge that is no number": (in_json(lambda i: i["adjacency"][0].__setitem__(1, float("nan"))), "no number"),
    "a scale": (in_json(lambda i: i["programs"][0].update(scale=float("inf"))), "scale is no number"),
    "another gene": (in_json(lambda i: i["preprocessing"]["genes"].__setitem__(0, "zzz")), "other programs or genes"),
    "a condition": (in_json(lambda i: i["conditions"][1].update(perturbations=["zzz"])), "run.json names 'zzz'"),
    "a loading twice": (in_table("programs", lambda t: pd.concat([t, t.iloc[:1]])), "other programs or genes"),
    "a loading less": (in_table("programs", lambda t: t.iloc[1:]), "other programs or genes"),
    "a perturbation twice": (in_table("interventions", lambda t: pd.concat([t, t.iloc[:1]])), "a perturbation twice"),
    "no such program": (named("interventions", "program", "-1"), "interventions.csv names '-1'"),
    "no such pair": (named("pairs", "target", "1e308"), "pairs.csv names '1e308'"),
    "a pair less": (in_table("pairs", lambda t: t.iloc[1:]), "does not have every pair of programs once"),
    "no such edge": (edges("P0 P9"), "dag.csv names 'P9'"),
    "an edge twice": (edges("P0 P1", "P0 P1"), "dag.csv has an edge twice"),
    "a cycle": (edges("P0 P1", "P1 P0"), "dag.csv has a cycle"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAMPERED)
def test_files_that_contradict_one_another(run: Path, kind: str) -> None:
    tamper, says = TAMPERED[kind]
    tamper(run)
    for words in (["inspect", "programs"], ["inspect", "dag"], ["report", "--force"]):
        check_refusal(*invoke(*words, run), 3, "is damaged", says)


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def tamper(run: Path) -> None:
        path = run / "model.safetensors"
        with safe_open(path, framework="pt") as handle:
            about = handle.metadata()
        state = load_file(path)
        change(state)
        save_file(state, path, metadata=about)

    return tamper


WEIGHTS = {
    "missing": (with_tensors(lambda s: s.pop("penetrance")), "penetrance is missing"),
    "no number": (with_tensors(lambda s: s["scm.graph"].fill_(float("nan"))), "scm.graph has a value that is no number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_whole(run: Path, tmp_path: Path, kind: str) -> None:
    tamper, says = WEIGHTS[kind]
    tamper(run)
    answer = invoke("predict", run, "-p", "g0", "-o", tmp_path / "virtual.h5ad")
    check_refusal(*answer, 3, "model.safetensors cannot be read", says)


def test_weights_of_another_run(run: Path, screen_file: Path, tmp_path: Path) -> None:
    crlseq.fit(screen_file, tmp_path / "OTHER", **FAST)  # of two programs
    shutil.copy(tmp_path / "OTHER" / "model.safetensors", run)
    with pytest.raises(InputError, match="model of another run"):
        _ = crlseq.load(run).model


def test_a_record_of_the_preprocessing_that_is_not_whole(run: Path, tmp_path: Path) -> None:
    in_json(lambda i: i["preprocessing"].pop("n_silent_genes"))(run)
    answer = invoke("predict", run, "-p", "g0", "-o", tmp_path / "virtual.h5ad")
    check_refusal(*answer, 3, "preprocessing in run.json cannot be read")


def test_a_configuration_of_another_version(run: Path, tmp_path: Path) -> None:
    in_json(lambda i: i["config"]["data"].update(values="zzz"))(run)
    check_refusal(*invoke("predict", run, "-p", "g0", "-o", tmp_path / "virtual.h5ad"), 3, "is not one of this version")
