"""``crlseq prepare`` and fits of what it writes, through the command line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import crlseq
from crlseq.data import matrix, storewriter
from crlseq.data.prepare import prepare
from crlseq.data.store import read_manifest
from tests.support import check_refusal, clear_screen, dense, files_below, fit_file, invoke, small_screen, succeeds


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 50 cells, buckets of 100, chunks of 256 values and shards of 1024."""
    monkeypatch.setattr(matrix, "BLOCK_VALUES", 2000)
    for name, value in (("CHUNK", 256), ("SHARD", 1024), ("BUCKET_VALUES", 4000)):
        monkeypatch.setattr(storewriter, name, value)


@pytest.fixture
def two_files(folder: Path) -> tuple[ad.AnnData, list[Path]]:
    """A screen, and its halves with genes in another order, other columns and categories."""
    adata = clear_screen()
    first, second = adata[:300].copy(), adata[300:, ::-1].copy()
    for half in (first, second):
        half.obs["perturbation"] = half.obs["perturbation"].cat.remove_unused_categories()
    first.obs["donor"] = "d1"
    second.obs["score"] = np.arange(second.n_obs, dtype=float)
    paths = [folder / "first.h5ad", folder / "second.h5ad"]
    first.write_h5ad(paths[0])
    second.write_h5ad(paths[1], compression="gzip")
    return adata, paths


def contents(store: Path) -> dict[str, str]:
    return {
        str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in store.rglob("*")
        if file.is_file()
    }


def refuse(folder: Path, *words: object, says: tuple[str, ...] = ()) -> None:
    before = files_below(folder.parent)
    check_refusal(*invoke("prepare", *words, "--output", folder.parent / "STORE"), 3, *says)
    assert files_below(folder.parent) == before


def test_several_files_become_one_store(two_files: tuple[ad.AnnData, list[Path]], folder: Path) -> None:
    adata, paths = two_files
    answer = invoke("prepare", *paths, "--output", folder / "STORE")
    assert (answer.code, answer.out) == (0, "")
    assert "740 cells x 40 genes" in answer.err and "crlseq fit" in answer.err
    assert not (folder / "STORE.partial").exists()
    read = ad.read_zarr(folder / "STORE")
    assert list(read.var_names) == list(adata.var_names)
    assert np.array_equal(dense(read), dense(adata[read.obs_names]))
    assert list(read.obs.columns) == ["perturbation", "batch", "donor", "score", "crlseq_input"]
    joined = read.obs.loc[adata.obs_names]
    assert joined["perturbation"].astype(str).equals(adata.obs["perturbation"].astype(str))
    assert list(joined["crlseq_input"]) == ["first.h5ad"] * 300 + ["second.h5ad"] * 440
    assert list(joined["donor"].dropna()) == ["d1"] * 300
    assert np.array_equal(joined["score"].to_numpy()[300:], np.arange(440.0))
    assert joined["score"][:300].isna().all()
    assert json.loads(succeeds("check", folder / "STORE", "--json").out)["n_cells"] == 740


def test_names_of_cells_that_several_files_use_are_told_apart(folder: Path) -> None:
    for name, seed in (("a.h5ad", 0), ("b.h5ad", 1)):
        small_screen(seed=seed).write_h5ad(folder / name)
    succeeds("prepare", folder / "a.h5ad", folder / "b.h5ad", "--output", folder / "STORE")
    read = ad.read_zarr(folder / "STORE")
    assert read.n_obs == 560 and read.obs_names.is_unique
    assert np.array_equal(dense(read["c5-1"]), dense(small_screen(seed=1)["c5"]))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.toarray().astype(np.int64),
        lambda x: sp.csc_matrix(x.astype(np.float64)),
        lambda x: np.random.default_rng(0).standard_normal(x.shape),
    ],
    ids=["whole numbers", "by gene", "continuous"],
)
def test_values_stay_as_they_are(folder: Path, change: Callable[[Any], Any]) -> None:
    adata = small_screen()
    adata.X = change(adata.X)
    adata.write_h5ad(folder / "a.h5ad")
    succeeds("prepare", folder / "a.h5ad", "--output", folder / "STORE")
    read = ad.read_zarr(folder / "STORE")
    assert read.X.dtype == adata.X.dtype
    assert np.array_equal(dense(read), dense(adata[read.obs_names]))


def test_a_layer(folder: Path) -> None:
    adata = small_screen()
    adata.layers["raw"], adata.X = adata.X, sp.csr_matrix(np.full(adata.shape, 0.5))
    adata.write_h5ad(folder / "a.h5ad")
    succeeds("prepare", folder / "a.h5ad", "--layer", "raw", "--output", folder / "STORE")
    read = ad.read_zarr(folder / "STORE")
    assert np.array_equal(dense(read), adata[read.obs_names].layers["raw"].toarray())


class _Stop(BaseException):
    """What a kill does to a process, as far as files go."""


@pytest.mark.parametrize("where", ["block 3", "block 11", "shard 1", "shard 9", "manifest 2"])
def test_an_interrupted_preparation_goes_on_and_ends_in_the_same_bytes(
    two_files: tuple[ad.AnnData, list[Path]], folder: Path, where: str
) -> None:
    paths = two_files[1]
    prepare(paths, folder / "whole")
    kind, number = where.split()
    owner: Any
    owner, name = {
        "block": (storewriter.Buckets, "add"), "shard": (storewriter, "sha256_of"),
        "manifest": (crlseq.data.prepare, "sha256_of"),  # type: ignore[attr-defined]
    }[kind]  # fmt: skip
    inner, calls = getattr(owner, name), 0

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        done = inner(*args)
        if calls > int(number):
            raise _Stop  # after the file was written and before that was noted
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(_Stop):
            prepare(paths, folder / "STORE")
    assert not (folder / "STORE").exists()
    check_refusal(*invoke("prepare", *paths, "--output", folder / "STORE"), 3, "unfinished store", "--resume")
    answer = invoke("prepare", *paths, "--output", folder / "STORE", "--seed", 1, "--resume")
    assert answer.code == 3 and "other options" in answer.err
    read: list[int] = []
    blocks = storewriter.Buckets.add

    def counted(self: Any, records: Any) -> None:
        read.append(len(records))
        blocks(self, records)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storewriter.Buckets, "add", counted)
        succeeds("prepare", *paths, "--output", folder / "STORE", "--resume")
    assert contents(folder / "STORE") == contents(folder / "whole")
    assert len(read) == (15 - int(number) if kind == "block" else 0)  # 300 and 440 cells in blocks of 50
    assert not (folder / "STORE.partial").exists()


def test_resuming_what_is_finished(two_files: tuple[ad.AnnData, list[Path]], folder: Path) -> None:
    """As a script that is run again does; also where the last attempt ended before it had cleared up."""
    paths, store = two_files[1], folder / "STORE"
    prepare(paths, store)
    before = contents(store)
    left = folder / "STORE.partial"
    left.mkdir()
    (left / "progress.json").write_text("{}")
    assert "already finished" in succeeds("prepare", *paths, "--output", store, "--resume").err
    assert contents(store) == before and not left.exists()
    answer = invoke("prepare", *paths, "--output", store, "--seed", 1, "--resume")
    check_refusal(*answer, 3, "with other options", "--force")
    check_refusal(*invoke("prepare", paths[0], "--output", store, "--resume"), 3, "other files", "--force")
    assert contents(store) == before


def test_starting_over_and_replacing(two_files: tuple[ad.AnnData, list[Path]], folder: Path) -> None:
    target, paths = folder / "STORE", two_files[1]
    succeeds("prepare", paths[0], "--output", target)
    before = contents(target)
    check_refusal(*invoke("prepare", *paths, "--output", target), 3, "exists", "--force")
    assert contents(target) == before
    assert invoke("prepare", *paths, "--output", target, "--force", "--quiet").err == ""
    manifest = read_manifest(target)
    assert manifest is not None and manifest.n_cells == 740


def test_what_is_no_store_is_left_alone(two_files: tuple[ad.AnnData, list[Path]], folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("hello")
    (folder / "other.partial").mkdir()
    (folder / "other.partial" / "notes.txt").write_text("hello")
    for name in ("mine", "other"):
        check_refusal(*invoke("prepare", *two_files[1], "--output", folder / name, "--force"), 3, "left alone")
    assert (folder / "mine" / "notes.txt").exists() and (folder / "other.partial" / "notes.txt").exists()


def test_files_with_other_genes(folder: Path) -> None:
    small_screen().write_h5ad(folder / "a.h5ad")
    small_screen()[:, :39].copy().write_h5ad(folder / "b.h5ad")
    refuse(folder, folder / "a.h5ad", folder / "b.h5ad", says=("do not have the same genes", "gene39", "b.h5ad lacks"))


def test_files_with_other_values(folder: Path) -> None:
    adata = small_screen()
    adata.write_h5ad(folder / "a.h5ad")
    adata.X = np.log1p(dense(adata))
    adata.write_h5ad(folder / "b.h5ad")
    answer = invoke("prepare", folder / "a.h5ad", folder / "b.h5ad", "--output", folder / "STORE")
    check_refusal(answer.code, answer.out, answer.err.replace("  Column", "• "), 3, "log values", "count values")
    assert not (folder / "STORE").exists()


def test_files_without_labels_or_without_a_matrix(folder: Path) -> None:
    adata = small_screen()
    adata.obs = pd.DataFrame(index=adata.obs_names)
    adata.write_h5ad(folder / "a.h5ad")
    refuse(folder, folder / "a.h5ad", says=("control",))
    refuse(folder, folder / "none.h5ad", says=("There is no file",))


# --- fits


@pytest.fixture
def store(folder: Path, screen_file: Path) -> Path:
    succeeds("prepare", screen_file, "--output", folder / "store")
    return folder / "store"


def test_a_streamed_fit_is_the_fit_in_memory(store: Path, screen: ad.AnnData) -> None:
    options = ("--bootstrap", 2, "--epochs", 2, "--hold-out-cells", 0.1, "--batch-key", "batch")
    runs = []
    for mode in ("--streamed", "--in-memory"):
        runs.append(fit_file(store, *options, mode, method="straighten"))
        path = runs[-1].path
        assert path is not None
        shutil.move(path, path.with_name(mode))
        runs[-1] = crlseq.load(path.with_name(mode))
    one, other = runs
    for name, table in one.tables().items():
        pd.testing.assert_frame_equal(table, other.tables()[name], check_exact=True)
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key]), key
    assert one.path is not None
    annotated = ad.read_h5ad(one.path / "crlseq.h5ad")
    assert annotated.X.dtype == np.float32
    assert np.array_equal(dense(annotated), dense(screen[annotated.obs_names]))
    scores = crlseq.evaluate(one)
    assert set(scores.conditions["condition"]) == set(screen.obs["perturbation"].unique()) - {"control"}


def test_labels_are_those_it_was_prepared_with(folder: Path) -> None:
    adata = small_screen()
    adata.obs["guide"] = adata.obs.pop("perturbation").cat.rename_categories({"control": "safe"})
    adata.write_h5ad(folder / "a.h5ad")
    words = ("--perturbation-key", "guide", "--control-label", "safe")
    succeeds("prepare", folder / "a.h5ad", *words, "--output", folder / "store")
    run = fit_file(folder / "store")
    assert (run.info["perturbation_key"], run.info["control_label"]) == ("guide", "safe")


@pytest.mark.parametrize("command", ["check", "fit"])
@pytest.mark.parametrize("damage", ["missing", "changed", "short", "manifest", "table"])
def test_damaged_stores_are_refused(store: Path, command: str, damage: str) -> None:
    shard = store / "X" / "data" / "c" / "2"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "changed":
        content[20] ^= 1
        shard.write_bytes(content)
    elif damage == "short":
        shard.write_bytes(content[:-30])
    elif damage == "manifest":
        (store / "crlseq.json").write_text("{}")
    else:  # as another version of anndata would write it
        meta = json.loads((store / "obs" / "zarr.json").read_text())
        meta["attributes"]["encoding-version"] = "9.0.0"
        (store / "obs" / "zarr.json").write_text(json.dumps(meta))
    words = ["fit", store, "--output", store.parent / "RUN"] if command == "fit" else ["check", store]
    check_refusal(*invoke(*words), 3, "is damaged")
    assert not (store.parent / "RUN").exists()
