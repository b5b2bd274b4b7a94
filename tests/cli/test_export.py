"""``crlseq export``: parts of a run written again."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from crlseq.run.run import Run
from tests.support import invoke, succeeds


@pytest.mark.parametrize("part", ["h5ad", "graphml", "json", "csv"])
def test_export_writes_each_part_again(run_folder: Path, tmp_path: Path, part: str) -> None:
    path = tmp_path / "sub" / f"out.{part}"
    words = ["export", run_folder, "--format", part, "--output", path]
    answer = invoke(*words)
    assert (answer.code, answer.out) == (0, ""), answer.err
    assert str(path) in answer.err
    original = {"graphml": "dag.graphml", "json": "dag.json"}
    if part in original:
        assert path.read_bytes() == (run_folder / original[part]).read_bytes()
    elif part == "csv":
        for file in path.iterdir():
            assert file.read_bytes() == (run_folder / file.name).read_bytes()
        assert len(list(path.iterdir())) == 8
    else:
        again, first = ad.read_h5ad(path), ad.read_h5ad(run_folder / "crlseq.h5ad")
        np.testing.assert_array_equal(again.obsm["X_crlseq"], first.obsm["X_crlseq"])
        assert again.obs["crlseq_split"].tolist() == first.obs["crlseq_split"].tolist()
        assert again.uns["crlseq"]["run_json"] == first.uns["crlseq"]["run_json"]
    refused = invoke(*words)
    assert (refused.code, refused.out) == (3, "")
    assert "--force" in refused.err
    succeeds(*words, "--force")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_export_says_whether_the_graph_is_identified(run_folder: Path, finished: Run, tmp_path: Path) -> None:
    answer = invoke("export", run_folder, "--format", "dot", "--output", tmp_path / "dag.dot")
    assert finished.info["identification"]["reason"] in answer.err


def test_export_that_cannot_be_written(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for words in (
        ["--format", "graphml", "--output", tmp_path / "file" / "x"],
        ["--format", "csv", "--output", tmp_path / "file", "--force"],
        ["--format", "h5ad", "--output", tmp_path, "--force"],
    ):
        answer = invoke("export", run_folder, *words)
        assert (answer.code, answer.out) == (3, ""), answer.err
        assert len(answer.err.splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not list(tmp_path.parent.glob("*.tmp"))
    assert (tmp_path / "file").read_text() == "mine"
    for words in (
        [],
        ["--format", "dot"],
        ["--output", tmp_path / "x"],
        ["--format", "docx", "--output", tmp_path / "x"],
    ):
        assert invoke("export", run_folder, *words).code == 2
