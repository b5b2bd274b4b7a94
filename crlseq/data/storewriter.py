"""Writes the matrix and tables of a prepared store: buckets of cells, put in order, into shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from numcodecs import Blosc
from zarr.codecs import BloscCodec

from crlseq.data.cluster import mapped
from crlseq.data.store import sha256_of
from crlseq.errors import InputError

BUCKET_VALUES = 100_000_000  # dense values of a bucket: at a density of 10 %, 80 MB
MAX_BUCKETS = 1024  # what a block is spread over; of very many cells each holds more
CHUNK = 32_768  # values that are compressed as one: some 40 cells
SHARD = 256 * CHUNK
TABLE_CHUNK = 1 << 20
EMPTY = ("layers", "obsm", "obsp", "uns", "varm", "varp")
ARRAYS = "indices", "data"
UNFINISHED = ".partial"  # the end of zarr's names of files that are being written
PACKING = Blosc("lz4", 1, Blosc.SHUFFLE)  # of buckets: quick, and a quarter of the bytes


@dataclass(frozen=True)
class Packing:
    """How cells are divided among buckets of so many places, and written there; a file of a bucket is a row of records.

    A record: how many cells, and bytes of genes and of values; the cells' places and numbers of values; genes; values.
    """

    cells: int  # of a bucket
    dtype: np.dtype[Any]  # of values

    def records(self, block: sp.csr_matrix, place: np.ndarray) -> dict[int, bytes]:
        """The record of each bucket that some of these cells, with their places, go to."""
        order = np.argsort(place)
        place, block = place[order], block[order]
        found = {}
        for bucket in np.unique(place // self.cells).tolist():
            rows = slice(*np.searchsorted(place, [bucket * self.cells, (bucket + 1) * self.cells]).tolist())
            entries = slice(int(block.indptr[rows.start]), int(block.indptr[rows.stop]))
            counts = np.diff(block.indptr[rows.start : rows.stop + 1]).astype(np.int64)
            genes = _packed(block.indices[entries].astype(np.int32))
            values = _packed(block.data[entries].astype(self.dtype))
            header = np.array([len(counts), len(genes), len(values)], dtype=np.int64)
            found[bucket] = b"".join((header.tobytes(), place[rows].tobytes(), counts.tobytes(), genes, values))
        return found


class Buckets:
    """Cells on their way to the store, in files by stretches of places (`Packing`).

    `sizes` are the bytes of each bucket that are good, kept up to date: what a file holds beyond is of an interrupted
    block.
    """

    def __init__(self, folder: Path, n_cells: int, n_genes: int, dtype: np.dtype[Any], sizes: dict[str, int]) -> None:
        self.folder, self.n_cells, self.dtype, self.sizes = folder.absolute(), n_cells, dtype, sizes
        self.cells = max(BUCKET_VALUES // n_genes, -(-n_cells // MAX_BUCKETS), 1)
        self.packing = Packing(self.cells, dtype)
        folder.mkdir(exist_ok=True)

    def __len__(self) -> int:
        return -(-self.n_cells // self.cells)

    def add(self, records: dict[int, bytes]) -> None:
        """Append records to their buckets."""
        for bucket, record in records.items():
            known = self.sizes.get(str(bucket), 0)
            with (self.folder / str(bucket)).open("r+b" if known else "wb") as handle:
                handle.truncate(known)
                handle.seek(known)
                handle.write(record)
                self.sizes[str(bucket)] = handle.tell()

    def counts(self) -> np.ndarray:
        """(cells,) number of values of the cell at each place."""
        found = np.zeros(self.n_cells, dtype=np.int64)
        for bucket in range(len(self)):
            for place, counts, _, _ in self._records(bucket, headers=True):
                found[place] = counts
        return found

    def read(self, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """Genes and values of a bucket's cells by their places."""
        place, counts, genes, values = (np.concatenate(parts) for parts in zip(*self._records(bucket), strict=True))
        start = np.concatenate([[0], counts.cumsum()])
        cells = sp.csr_matrix((values, genes, start), shape=(len(place), int(genes.max(initial=0)) + 1))
        del genes, values
        cells = cells[np.argsort(place)]
        return cells.indices, cells.data

    def _records(self, bucket: int, headers: bool = False) -> Iterator[tuple[np.ndarray, ...]]:
        end = self.sizes.get(str(bucket), 0)
        if not end:
            return
        with (self.folder / str(bucket)).open("rb") as handle:
            while handle.tell() < end:
                n, n_genes, n_values = np.fromfile(handle, np.int64, 3).tolist()
                place, counts = np.fromfile(handle, np.int64, n), np.fromfile(handle, np.int64, n)
                if headers:
                    handle.seek(n_genes + n_values, 1)
                    yield place, counts, place[:0], place[:0]
                    continue
                genes, values = (PACKING.decode(handle.read(size)) for size in (n_genes, n_values))
                yield place, counts, np.frombuffer(genes, np.int32), np.frombuffer(values, self.dtype)


def _packed(values: np.ndarray) -> bytes:
    return bytes(PACKING.encode(np.ascontiguousarray(values)))


@dataclass(frozen=True)
class _Shard:
    """Values `first` to `last` of a store, from `bucket` on, whose own first value is `begin`."""

    number: int
    first: int
    last: int
    bucket: int
    begin: int

    def names(self) -> list[str]:
        """Of its files."""
        return [f"X/{name}/c/{self.number}" for name in ARRAYS]


class _ShardWriter:
    """Writes shards of a store, in this process or on workers, from the files of its buckets."""

    def __init__(self, store: Path, buckets: Buckets) -> None:
        self.store, self.buckets = store.absolute(), buckets
        # The last bucket, where the next shard begins.
        self.held: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None

    def write(self, shards: list[_Shard]) -> dict[str, str]:
        """Writes shards one after the other; digests of their files by name. InputError where files are not seen."""
        for shard in shards:
            self._write(shard)
        return {name: sha256_of(self.store / name) for shard in shards for name in shard.names()}

    def _write(self, shard: _Shard) -> None:
        parts, bucket, begin = [], shard.bucket, shard.begin
        while begin < shard.last:
            genes, values = self._read(bucket)
            own = slice(max(shard.first - begin, 0), shard.last - begin)
            parts.append((genes[own], values[own]))
            begin, bucket = begin + len(genes), bucket + 1
        for name, held in zip(ARRAYS, zip(*parts, strict=True), strict=True):
            with zarr.config.set({"array.write_empty_chunks": True}):  # also values of the first gene alone are a file
                array = zarr.open_array(str(self.store / "X" / name), mode="r+")
                array[shard.first : shard.last] = np.concatenate(held)

    def _read(self, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        if self.held is None or self.held[0] != bucket:
            path = self.buckets.folder / str(bucket)
            if not path.is_file() or path.stat().st_size < self.buckets.sizes[str(bucket)]:
                raise _not_seen(path)
            self.held = None  # before the next is there
            self.held = bucket, self.buckets.read(bucket)
        return self.held[1]


def _not_seen(path: Path) -> InputError:
    """Of a machine that has another disk."""
    hint = "The machines of a cluster write the store together: give all of them one file system, or prepare without --cluster."
    return InputError(f"A worker and this machine do not see the same file {path}.", hint)


def write_matrix(
    store: Path, buckets: Buckets, start: np.ndarray, n_genes: int, done: dict[str, str]
) -> Iterator[dict[str, str]]:
    """``X`` of a store as CSR from buckets and row pointers; yields digests by name of shards' files once they are there.

    Shards that begin in one bucket are one task of those that are `mapped`: nearly every bucket is read once or twice. What
    is `done` (digests by name) stays as it is.
    """
    n = int(start[-1])
    size = min(SHARD, max(1, -(-n // CHUNK)) * CHUNK)
    group = zarr.open_group(str(store), mode="a", zarr_format=3, use_consolidated=False).require_group("X")
    shape = [buckets.n_cells, n_genes]
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
    for name, dtype in zip(ARRAYS, (np.dtype(np.int32), buckets.dtype), strict=True):
        _sharded(group, name, dtype, n, size)
    group.create_array("indptr", shape=start.shape, chunks=(TABLE_CHUNK,), dtype=start.dtype, overwrite=True)[:] = start
    for left in store.glob(f"X/*/c/*{UNFINISHED}"):  # of a process that was killed
        left.unlink()
    shards = []
    for i, first in enumerate(range(0, n, size)):
        bucket = (int(np.searchsorted(start, first, side="right")) - 1) // buckets.cells
        shard = _Shard(i, first, min(first + size, n), bucket, int(start[bucket * buckets.cells]))
        if not all(name in done and _is(store / name, done[name]) for name in shard.names()):
            shards.append(shard)
    tasks = [[*own] for _, own in groupby(shards, key=lambda shard: shard.bucket)]
    for made in mapped(_ShardWriter(store, buckets).write, tasks):
        for name in made:
            if not (store / name).is_file():
                raise _not_seen(store / name)
        yield made


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _sharded(group: Any, name: str, dtype: np.dtype[Any], n: int, shard: int) -> Any:
    if name in group:
        return group[name]
    codec = BloscCodec(cname="zstd", clevel=3, shuffle="shuffle", typesize=dtype.itemsize)
    return group.create_array(name, shape=(n,), chunks=(CHUNK,), shards=(shard,), dtype=dtype, compressors=codec)


def write_tables(store: Path, obs: pd.DataFrame, var: pd.DataFrame) -> None:
    """Tables of cells and genes, and what else makes the folder an AnnData store."""
    with warnings.catch_warnings(), ad.settings.override(allow_write_nullable_strings=True):
        # Of anndata and zarr: sharding to come, consolidated metadata, and strings that zarr v3 has yet to settle.
        warnings.simplefilter("ignore")
        group = zarr.open_group(str(store), mode="a", zarr_format=3, use_consolidated=False)
        for name, elem in {"obs": obs, "var": var, **{n: {} for n in EMPTY}}.items():
            ad.io.write_elem(group, name, elem)
        group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        zarr.consolidate_metadata(str(store), zarr_format=3)
