"""fit, inspect and report with gene sets: kept in the run, named in its tables, and refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import crlseq
from crlseq.data.genesets import fitted_sets
from crlseq.data.names import GeneNames
from crlseq.errors import InputError
from crlseq.run.run import Run
from tests.report.test_page import Page
from tests.support import FAST, Answer, after_epoch, check_refusal, files_of, interrupt, invoke, succeeds

LINEAR = ["--method", "linear", "--n-latents", 3, "--bootstrap", 0]
EVIL = ["<img src=x onerror=alert(1)>", "\x1b[31mred", "=1+1", "'`{{ 7*7 }}", "NA"]


@pytest.fixture(scope="module")
def gmt(tmp_path_factory: pytest.TempPathFactory, screen: ad.AnnData) -> Path:
    """Ten sets of eight genes, the first of them under names that no page, terminal or spreadsheet should act upon."""
    path, rng = tmp_path_factory.mktemp("sets") / "sets.gmt", np.random.default_rng(0)
    names = [*EVIL, *(f"S{i}" for i in range(5))]
    lines = ["\t".join([name, "<b>about</b>", *rng.choice(screen.var_names, 8, replace=False)]) for name in names]
    path.write_text("\n".join([*lines, "small\t\tgene0\tgene1", ""]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(screen_file: Path, gmt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose encoder reads the sets, and whose gmt file is gone."""
    place = tmp_path_factory.mktemp("read")
    shutil.copy(gmt, place / "mine.gmt")
    answer = succeeds("fit", screen_file, "--output", place / "RUN", "--gene-sets", place / "mine.gmt", *LINEAR)
    assert "The encoder reads 10 gene sets" in answer.err and "1 with fewer than 5 fitted genes" in answer.err
    assert "Share of each program's variance" in answer.err
    (place / "mine.gmt").unlink()
    return place / "RUN"


@pytest.fixture(scope="module")
def read(folder: Path) -> Run:
    return crlseq.load(folder)


def test_what_the_run_says(folder: Path, read: Run) -> None:
    assert {file.name for file in folder.iterdir()} == files_of(folder) - {"resume.pt"} | {
        "pathways.csv",
        "gene_sets.gmt",
    }
    assert read.pathways is not None
    assert set(read.pathways["gene_set"]) == {*EVIL, *(f"S{i}" for i in range(5))}
    assert read.pathways.groupby("program")["rank"].apply(list).tolist() == [list(range(1, 11))] * 3
    assert (read.pathways["n_genes"] == 8).all() and np.isfinite(read.pathways["weight"]).all()
    said = read.info["gene_sets"]
    assert (said["n_sets"], said["n_small"], said["n_same"]) == (10, 1, 0)
    for share, by_all in zip(said["explained"], said["explained_by_all_genes"], strict=True):
        assert -0.2 < share <= by_all + 0.05 <= 1.05


def test_the_encoder_reads_the_sets_alone(folder: Path, read: Run) -> None:
    genes = read.info["preprocessing"]["genes"]
    members = fitted_sets(folder / "gene_sets.gmt", GeneNames(genes, {})).members
    weight = read.model.encoder.hidden.weight.detach().numpy()
    assert weight.shape == (10, 40)
    assert not weight[~members].any() and weight[members].all()


def test_predictions_without_the_file(folder: Path, screen: ad.AnnData, tmp_path: Path) -> None:
    succeeds("predict", folder, "--perturbation", "g0", "--output", tmp_path / "g0.h5ad")
    assert np.isfinite(ad.read_h5ad(tmp_path / "g0.h5ad").X).all()
    kept = ad.read_h5ad(folder / "crlseq.h5ad").obsm["X_crlseq"]
    assert crlseq.load(folder).latents(screen) == pytest.approx(kept, abs=1e-4)


def test_inspect(folder: Path, read: Run) -> None:
    assert read.pathways is not None
    first = read.pathways[read.pathways["program"] == "P1"].iloc[0]
    answer = invoke("inspect", "program", folder, "P1", "--top", 2, "--json")
    told = json.loads(answer.out)["gene_sets"]
    assert len(told) == 2
    assert (told[0]["gene_set"], told[0]["n_genes"]) == (first["gene_set"], 8)
    assert told[0]["weight"] == pytest.approx(first["weight"])
    piped = invoke("inspect", "program", folder, "P1", "--top", 10)
    assert piped.out.count("gene set\t") == 10 and "\x1b" not in piped.out and "\\x1b[31mred" in piped.out
    summary = json.loads(invoke("inspect", "summary", folder, "--json").out)
    assert summary["encoder"].startswith("10 gene sets") and "P2" in summary["sets explain"]


def test_report(folder: Path, tmp_path: Path) -> None:
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert "img" not in {tag for tag, _ in page.tags} and not page.attributes("onerror")
    assert "that the encoder reads it from" in page.text["P0"]
    sets = tmp_path / "sets.gmt"
    shutil.copy(folder / "gene_sets.gmt", sets)
    pytest.importorskip("gseapy")
    succeeds("report", folder, "--gene-sets", sets, "--output", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "img" not in {tag for tag, _ in page.tags} and not page.attributes("onerror")


def test_a_damaged_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "RUN")
    (tmp_path / "RUN" / "pathways.csv").unlink()
    with pytest.raises(InputError, match=r"damaged: .*pathways\.csv"):
        crlseq.load(tmp_path / "RUN")


def test_it_goes_on_without_the_file_and_not_with_another(screen_file: Path, gmt: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gmt"
    shutil.copy(gmt, mine)
    options = {**FAST, "epochs": 2, "gene_sets": str(mine)}
    whole = crlseq.fit(screen_file, tmp_path / "WHOLE", **options)
    with pytest.raises(KeyboardInterrupt):
        crlseq.fit(screen_file, tmp_path / "RUN", progress=after_epoch(0, interrupt), **options)
    mine.write_text(mine.read_text().replace("S0\t", "T0\t"))
    with pytest.raises(InputError, match="another input or other options"):
        crlseq.fit(screen_file, tmp_path / "RUN", resume=True, **options)
    mine.unlink()
    resumed = crlseq.fit(screen_file, tmp_path / "RUN", resume=True, **options)
    assert resumed.pathways is not None and resumed.pathways.equals(whole.pathways)
    assert len(resumed.history) == 2


def test_the_published_model_reads_sets_too(screen: ad.AnnData, gmt: Path) -> None:
    run = crlseq.fit(screen, preset="paper", epochs=1, n_latents=3, gene_sets=str(gmt), gene_set_leak=0.1)
    assert run.pathways is not None and len(run.pathways) == 30
    assert (run.model.encoder.hidden.weight != 0).all()
    assert "explained" not in run.info["gene_sets"]  # there is nothing that it was to read


BAD = {
    "missing": (None, "No such file"),
    "of other names": (b"A\tabout\tENSG00000115415\tENSG00000096968\n", "Ensembl identifiers"),
    "malformed": (b"A,about,gene0\n", "Line 1"),
    "twice": (b"A\tx\tgene0\nA\tx\tgene1\n", "repeats the name"),
    "empty": (b"", "no gene set"),
    "packed": (b"\x1f\x8b\x08\0", "gzip"),
}


def asked(command: str, run: Path, screen_file: Path, sets: Path, place: Path) -> Answer:
    words: dict[str, list[object]] = {
        "fit": ["fit", screen_file, "--output", place / "RUN", *LINEAR],
        "inspect": ["inspect", "programs", run],
        "report": ["report", run, "--output", place / "page.html"],
    }
    return invoke(*words[command], "--gene-sets", sets)


@pytest.mark.parametrize("command", ["fit", "inspect", "report"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_files(command: str, kind: str, screen_file: Path, linear_folder: Path, tmp_path: Path) -> None:
    content, said = BAD[kind]
    if command != "fit":
        pytest.importorskip("gseapy")
    if content is not None:
        (tmp_path / "sets.gmt").write_bytes(content)
    check_refusal(*asked(command, linear_folder, screen_file, tmp_path / "sets.gmt", tmp_path), 3, said)
    assert {file.name for file in tmp_path.iterdir()} <= {"sets.gmt"}


@pytest.mark.parametrize("kind", sorted(set(BAD) - {"of other names"}))
def test_bad_files_are_refused_before_anything_is_read(kind: str, tmp_path: Path) -> None:
    """Neither screen nor run is there, and the gene sets are what is told of."""
    content, said = BAD[kind]
    if content is not None:
        (tmp_path / "sets.gmt").write_bytes(content)
    for command in ("fit", "inspect", "report"):
        answer = asked(command, tmp_path / "RUN", tmp_path / "screen.h5ad", tmp_path / "sets.gmt", tmp_path)
        check_refusal(*answer, 3, said)
        assert "stage 2" not in answer.err
    assert {file.name for file in tmp_path.iterdir()} <= {"sets.gmt"}


@pytest.mark.parametrize("command", ["fit", "inspect"])
def test_gene_sets_through_a_pipe(
    command: str, gmt: Path, screen_file: Path, linear_folder: Path, tmp_path: Path
) -> None:
    """It can be read once."""
    if command != "fit":
        pytest.importorskip("gseapy")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(gmt.read_bytes()))
    writer.start()
    answer = asked(command, linear_folder, screen_file, tmp_path / "pipe", tmp_path)
    assert answer.code == 0, answer.err
    writer.join()


def test_a_missing_library_is_named(linear_folder: Path, gmt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crlseq.readout.enrichment.find_spec", lambda name: None)
    check_refusal(*invoke("inspect", "programs", linear_folder, "--gene-sets", gmt), 2, "gseapy", ".[enrich]")
