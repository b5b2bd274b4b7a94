"""What ``--resume`` goes on with: the fit of the same input, options and version, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata as ad
import pytest

import crlseq
from crlseq.config import DataConfig
from crlseq.pipeline.identity import TABLES, Identity
from crlseq.pipeline.progress import Progress
from tests.support import Answer, edit_info, files_below, invoke

OPTIONS = ("--method", "linear", "--bootstrap", 0, "--n-latents", 2)


@pytest.fixture
def other(tmp_path: Path, screen: ad.AnnData) -> Path:
    """A screen that differs by one cell."""
    path = tmp_path / "other.h5ad"
    screen[:-1].copy().write_h5ad(path)
    return path


def fit(source: Path, run: Path, *more: object) -> Answer:
    return invoke("fit", source, "--output", run, *OPTIONS, *more)


def interrupted(source: Path, run: Path, **options: object) -> Path:
    """The folder of a fit that was stopped once effects were tested."""

    def stop(text: str) -> None:
        if text.startswith("finding the programs"):
            raise KeyboardInterrupt

    options = {"method": "linear", "bootstrap": 0, "n_latents": 2, **options}
    with pytest.raises(KeyboardInterrupt):
        crlseq.fit(source, run, progress=Progress(stage=stop), **options)
    return run.with_name(f"{run.name}.partial")


def fitted_to(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["input"]["path"])


def test_a_finished_run_is_of_its_input(screen_file: Path, other: Path, tmp_path: Path) -> None:
    run = tmp_path / "RUN"
    assert fit(screen_file, run).code == 0
    before = files_below(run)
    for source, words, says in (
        (other, (), "the input has other content"),
        (screen_file, ("--seed", 3), "seed was 0 and is 3"),
        (other, ("--min-cells", 11, "--n-latents", 3), "content; min_cells was 10 and is 11; n_latents was 2 and is 3"),
        (tmp_path / "gone.h5ad", (), "There is no file"),
        (tmp_path / "gone.h5ad", ("--force",), "There is no file"),
    ):
        answer = fit(source, run, *words, "--resume")
        assert answer.code == 3 and says in answer.err and "Traceback" not in answer.err, answer.err
    assert files_below(run) == before
    copy = tmp_path / "moved.h5ad"
    shutil.copyfile(screen_file, copy)  # the content is what counts, not the path
    for words in ((), ("--force",)):
        answer = fit(copy, run, "--resume", *words)
        assert answer.code == 0 and "finished already" in answer.err
    assert files_below(run) == before


def test_a_run_of_another_version_is_told(screen_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "RUN"
    assert fit(screen_file, run).code == 0
    edit_info(run, version="0.0.9")
    answer = fit(screen_file, run, "--resume")
    assert answer.code == 3 and f"crlseq was 0.0.9 and is {crlseq.__version__}" in answer.err


def test_an_unfinished_run_is_of_its_input(screen_file: Path, other: Path, tmp_path: Path) -> None:
    run = tmp_path / "RUN"
    partial = interrupted(screen_file, run)
    before = files_below(partial)
    assert (partial / "identity.json").is_file()
    for source, words, says in (
        (other, (), "the input has other content"),
        (screen_file, ("--method", "straighten"), "method was 'linear' and is 'straighten'"),
    ):
        answer = fit(source, run, *words, "--resume")
        assert answer.code == 3 and says in answer.err, answer.err
        assert files_below(partial) == before and not run.exists()
    assert fit(screen_file, run, "--resume").code == 0
    assert not partial.exists() and not (run / "identity.json").exists()


def test_force_and_resume_go_on_or_replace(screen_file: Path, other: Path, tmp_path: Path) -> None:
    """A fit that replaces a run was interrupted: the same command with --resume ends it, wherever it was."""
    run = tmp_path / "RUN"
    assert fit(screen_file, run).code == 0
    partial = interrupted(other, run, force=True)
    refused = fit(other, run, "--resume")
    assert refused.code == 3 and "the input has other content" in refused.err and fitted_to(run) == str(screen_file)
    effects = (partial / "stage-effects.pt").stat().st_ino
    again = interrupted(other, run, force=True, resume=True)
    assert (again / "stage-effects.pt").stat().st_ino == effects  # it went on
    ended = fit(other, run, "--force", "--resume")
    assert ended.code == 0 and fitted_to(run) == str(other) and not partial.exists()
    replaced = fit(screen_file, run, "--force", "--resume")  # nothing unfinished is left
    assert replaced.code == 0 and "the input has other content" in replaced.err and fitted_to(run) == str(screen_file)
    assert "finished already" not in replaced.err


def test_force_and_resume_begin_anew_beside_another_fit(screen_file: Path, other: Path, tmp_path: Path) -> None:
    partial = interrupted(screen_file, tmp_path / "RUN")
    (partial / "stage-of-the-other.pt").write_bytes(b"?")
    again = interrupted(other, tmp_path / "RUN", force=True, resume=True)
    assert not (again / "stage-of-the-other.pt").exists()
    assert fit(other, tmp_path / "RUN", "--resume").code == 0
    assert fitted_to(tmp_path / "RUN") == str(other)


def test_tables_beside_the_screen_count(screen_file: Path, tmp_path: Path) -> None:
    table = tmp_path / "vectors.csv"
    table.write_text("gene,a,b\n" + "".join(f"g{i},{i % 3},{i % 2}\n" for i in range(9)))
    words = ("--embeddings", table)
    assert fit(screen_file, tmp_path / "RUN", *words).code == 0
    table.write_text(table.read_text().replace("g8,", "g9,"))
    answer = fit(screen_file, tmp_path / "RUN", *words, "--resume")
    assert answer.code == 3 and "the file of embeddings has other content" in answer.err
    table.unlink()
    assert fit(screen_file, tmp_path / "RUN", *words, "--resume").code == 3


def test_every_option_that_names_a_table_is_known() -> None:
    assert set(TABLES) >= {"embeddings", "gene_sets", "guide_map"}
    assert all(DataConfig.model_fields[name].annotation == (str | None) for name in TABLES)


def test_what_differs_in_words() -> None:
    one = Identity("1", "a", {"gene_sets": "x"}, {"preset": "default", "data": {"genes": ["A"], "layer": None}})
    two = Identity("2", "b", {"gene_sets": "y"}, {"preset": "paper", "data": {"genes": ["B"], "layer": None}})
    assert one.differences(one) == []
    assert one.differences(two) == [
        "the input has other content",
        "the file of gene_sets has other content",
        "preset was 'default' and is 'paper'",
        "genes was ['A'] and is ['B']",
        "the version of crlseq was 1 and is 2",
    ]
