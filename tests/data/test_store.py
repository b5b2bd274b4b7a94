"""Prepared stores: what is read is what was written, cell for cell, and damage is told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.config import DataConfig
from crlseq.data import dataset, splits, storewriter
from crlseq.data.batches import ControlPartners, epoch_batches
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.prepare import prepare
from crlseq.data.store import MANIFEST, ShardedVector, StoredMatrix, read_manifest, verify
from crlseq.data.streamed import StreamedExpression
from crlseq.errors import InputError
from tests.support import clear_screen, dense


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """740 cells and 40 genes in chunks of 256 values, shards of 1024 and buckets of 100 cells."""
    folder = tmp_path_factory.mktemp("store")
    adata = clear_screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].cat.add_categories("unassigned")
    adata.obs.iloc[[3, 300], adata.obs.columns.get_loc("perturbation")] = "unassigned"
    adata.write_h5ad(folder / "screen.h5ad")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CHUNK", 256), ("SHARD", 1024), ("BUCKET_VALUES", 4000)):
            patch.setattr(storewriter, name, value)
        prepare([folder / "screen.h5ad"], folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def whole(store: Path) -> PerturbSeqData:
    return read_data(store, DataConfig(streamed=False, n_top_genes=25), 0)


@pytest.fixture(scope="module")
def streamed(store: Path) -> PerturbSeqData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "CONTROL_POOL", 70)
        return read_data(store, DataConfig(streamed=True, n_top_genes=25), 0)


def test_anndata_reads_the_cells_as_they_were(store: Path) -> None:
    read, before = ad.read_zarr(store), ad.read_h5ad(store.parent / "screen.h5ad")
    assert sorted(read.obs_names) == sorted(before.obs_names)
    assert list(read.var_names) == list(before.var_names)
    same = before[read.obs_names]
    assert read.obs.equals(same.obs[read.obs.columns]) and list(read.obs.columns) == list(before.obs.columns)
    assert np.array_equal(dense(read), dense(same))
    assert read.X.dtype == before.X.dtype


def test_cells_lie_by_perturbation_shuffled_within_each_and_unlabelled_ones_last(store: Path) -> None:
    read, before = ad.read_zarr(store), ad.read_h5ad(store.parent / "screen.h5ad")
    labels = read.obs["perturbation"].astype(str).to_numpy()
    first = [labels[0], *labels[1:][labels[1:] != labels[:-1]]]
    assert first[0] == "control" and first[-1] == "unassigned"
    assert len(first) == len(set(first)) == before.obs["perturbation"].nunique()
    number = np.array([int(name[1:]) for name in read.obs_names])
    for label in ("control", "g0", "g6"):
        steps = np.diff(number[labels == label])
        assert 0.3 < (steps > 0).mean() < 0.7  # neither in the order of the file nor in the reverse
    half = number[labels == "control"][:100]
    assert abs(half.mean() - number[labels == "control"].mean()) < 3 * number[labels == "control"].std() / 10


def test_seeds_shuffle_differently(store: Path, tmp_path: Path) -> None:
    prepare([store.parent / "screen.h5ad"], tmp_path / "other", seed=1)
    assert list(ad.read_zarr(tmp_path / "other").obs_names) != list(ad.read_zarr(store).obs_names)


@pytest.fixture(scope="module")
def both(store: Path) -> tuple[StoredMatrix, sp.csr_matrix]:
    """The matrix as it is read here, and as anndata reads it."""
    return StoredMatrix(store), ad.read_zarr(store).X


@settings(deadline=None)
@given(st.sets(st.integers(0, 739)))
def test_rows_by_ascending_index(both: tuple[StoredMatrix, sp.csr_matrix], cells: set[int]) -> None:
    index = np.array(sorted(cells), dtype=np.int64)
    assert (both[0][index] != both[1][index]).nnz == 0


def test_rows_by_slice(both: tuple[StoredMatrix, sp.csr_matrix]) -> None:
    matrix, x = both
    for rows in (slice(None), slice(5, 6), slice(100, 700), slice(8, 8), slice(700, 2000)):
        assert matrix[rows].shape == x[rows].shape
        assert (matrix[rows] != x[rows]).nnz == 0


def test_streamed_rows_are_those_in_memory_to_the_bit(whole: PerturbSeqData, streamed: PerturbSeqData) -> None:
    assert isinstance(streamed.x, StreamedExpression) and not isinstance(whole.x, StreamedExpression)
    assert streamed.genes == whole.genes and len(whole.genes) == 25
    rng = np.random.default_rng(0)
    held = streamed.control_pool(splits.TRAIN)
    for index in (
        np.arange(740), rng.permutation(740), rng.integers(740, size=300), held, held[::-1], np.arange(735, 740),
        np.zeros(0, dtype=np.int64),
    ):  # fmt: skip
        assert np.array_equal(streamed.dense(index), whole.dense(index))
    assert np.array_equal(streamed.dense(np.arange(740))[3:90], np.asarray(whole.dense(np.arange(3, 90))))


def test_labels_and_splits_do_not_depend_on_how_it_is_read(whole: PerturbSeqData, streamed: PerturbSeqData) -> None:
    assert np.array_equal(whole.split, streamed.split)
    assert np.array_equal(whole.condition, streamed.condition)
    assert whole.preprocessing == streamed.preprocessing
    assert whole.notes == streamed.notes


def test_moments_of_cells(whole: PerturbSeqData, streamed: PerturbSeqData, monkeypatch: pytest.MonkeyPatch) -> None:
    index = np.arange(5, 700, 3)
    x = whole.dense(index).astype(float)
    monkeypatch.setattr(dataset, "ROWS", 50)
    for data in (whole, streamed):
        mean, square = data.moments(index)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(square, (x**2).mean(0), rtol=1e-12)


def test_moments_that_are_known_are_those_of_the_same_cells_alone(
    whole: PerturbSeqData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "KNOWN_MOMENTS", 3 * 16 * whole.n_genes)  # of three sets of cells
    data, sets = replace(whole), [np.arange(i, i + n) for i, n in ((0, 4), (1, 4), (0, 5), (7, 1), (7, 0))]
    for _ in range(2):
        for index in sets:
            mean = data.dense(index).mean(0, dtype=float) if len(index) else np.zeros(data.n_genes)
            np.testing.assert_allclose(data.moments(index)[0], mean, rtol=1e-12)
    data.moments(sets[0])[0][:] = -1.0  # changes nothing that is known
    assert (data.moments(sets[0])[0] >= 0).all()


def test_training_cells_and_their_pieces_are_runs(whole: PerturbSeqData) -> None:
    cells = whole.cells_by_condition(splits.TRAIN)
    partners = ControlPartners(whole.control_pool(splits.TRAIN), whole.batch)
    seen = []
    for batch in epoch_batches(cells, partners, 16, 4, np.random.default_rng(0), whole.shuffled):
        for condition, mask, own in zip(batch.condition, batch.mask, batch.perturbed, strict=True):
            seen.append(own[mask])
            # a ring of the condition's cells is cut in two by validation cells and in pieces by batches
            positions = np.searchsorted(cells[condition], own[mask])
            assert (np.diff(positions) % len(cells[condition]) == 1).all()
            assert (np.diff(own[mask]) != 1).sum() <= 2
    assert np.array_equal(np.sort(np.concatenate(seen)), np.sort(np.concatenate(cells[1:])))


def test_the_control_pool_is_bounded_in_a_store_alone(
    whole: PerturbSeqData, screen_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "CONTROL_POOL", 20)
    assert np.array_equal(whole.control_pool(splits.TRAIN), whole.cells(0, splits.TRAIN)[:20])
    unsorted = read_data(screen_file, DataConfig(), 0)
    assert not unsorted.shuffled
    assert np.array_equal(unsorted.control_pool(splits.TRAIN), unsorted.cells(0, splits.TRAIN))


def test_a_store_is_loaded_or_streamed_by_its_size(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(read_data(store, DataConfig(), 0).x, StreamedExpression)
    monkeypatch.setattr(dataset, "IN_MEMORY", 1e-9)
    assert isinstance(read_data(store, DataConfig(), 0).x, StreamedExpression)


def test_other_labels_than_it_is_sorted_by_are_not_taken_for_runs(store: Path) -> None:
    assert read_data(store, DataConfig(), 0).shuffled
    assert not read_data(store, DataConfig(control_label="g0", min_cells=2), 0).shuffled


# --- damage


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "store"))


def test_whole_stores_verify(store: Path) -> None:
    assert verify(store) == verify(store)
    manifest = read_manifest(store)
    assert manifest is not None
    assert (manifest.n_cells, manifest.n_genes, manifest.values) == (740, 40, "counts")
    assert manifest.n_nonzero == ad.read_zarr(store).X.nnz
    on_disk = {str(file.relative_to(store)) for file in store.rglob("*") if file.is_file()}
    assert set(manifest.files) == on_disk - {MANIFEST}


@pytest.mark.parametrize(
    "name", ["X/data/c/3", "X/indices/c/0", "X/indptr/c/0", "zarr.json", "obs/perturbation/codes/c/0"]
)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        verify(copy)


@pytest.mark.parametrize("name", ["X/data/c/3", "X/indices/zarr.json", "obs/perturbation/codes/c/0"])
def test_a_changed_byte_is_found(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} has changed since it was written"):
        verify(copy)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_shard_that_is_cut_short_cannot_be_read(copy: Path, share: float) -> None:
    path = copy / "X" / "data" / "c" / "1"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="damaged"):
        StoredMatrix(copy)[:]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": "x"}'])
def test_a_damaged_manifest(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=r"crlseq\.json cannot be read"):
        read_manifest(copy)


def test_a_store_of_a_later_version(copy: Path) -> None:
    values = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**values, "format": 2, "version": "9.0"}))
    with pytest.raises(InputError, match=r"prepared by crlseq 9\.0, which is newer"):
        read_manifest(copy)


def test_arrays_of_another_layout_are_refused(copy: Path) -> None:
    for name in ("X/indptr", "obs"):
        with pytest.raises(InputError, match="not an array written by crlseq prepare"):
            ShardedVector(copy / name)
