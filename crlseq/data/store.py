"""Prepared stores: an AnnData zarr store whose cells lie sorted by perturbation and shuffled within each.

`crlseq.data.prepare.prepare` writes them, this reads them. A contiguous run of one perturbation's cells is a random
sample of them, so that training reads runs and never the whole matrix. ``crlseq.json`` at the root says how cells were
sorted and holds the SHA-256 of every file.

The matrix ``X`` is CSR in two sharded zarr arrays. Their inner chunks are read here by byte range: zarr's own reader
costs 1.5 to 2.5 ms for a run of 64 cells and array, most of it under the interpreter's lock, which is as much as the
training of those cells.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import zarr
from numcodecs import Blosc

from crlseq.errors import InputError
from crlseq.storage.text import to_json

MANIFEST = "crlseq.json"
FORMAT = 1
NEVER_WRITTEN = 2**64 - 1  # of a chunk that holds zeros alone
BLOSC = Blosc()  # what to decode is in the bytes
RESTORE = "Restore it, or prepare it again."
SAME_PATH = "Every machine needs the same file under the same path."


@dataclass(frozen=True)
class Manifest:
    """How a store was made."""

    version: str
    perturbation_key: str  # with the next two: what its cells are sorted by
    control_label: str
    separator: str
    seed: int
    values: str  # their kind
    n_cells: int
    n_genes: int
    n_nonzero: int
    inputs: tuple[str, ...]
    files: dict[str, str]  # SHA-256 of every file by its path within the store
    identity: str  # digest of what was prepared: inputs by name, size and time of change, options, seed
    control_labels: tuple[str, ...] = ()  # of several labels of control cells
    context_key: str | None = None  # column of contexts by which its cells are sorted as well

    def to_json(self) -> str:
        """As it lies at the root of the store."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        return to_json({"format": FORMAT, **own}) + "\n"


def read_manifest(source: Any) -> Manifest | None:
    """The manifest of a prepared store; None for any other source; InputError if it is damaged or of a later format."""
    if not isinstance(source, str | Path) or not (Path(source) / MANIFEST).is_file():
        return None
    path = Path(source) / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") > FORMAT:
            raise InputError(f"{source} was prepared by crlseq {values['version']}, which is newer.", "Update crlseq.")
        manifest = Manifest(
            **{**values, **{name: tuple(values[name]) for name in ("inputs", "control_labels") if name in values}}
        )
        if not all(isinstance(digest, str) for digest in manifest.files.values()):
            raise ValueError("no digests")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"The store {source} is damaged: {MANIFEST} cannot be read ({error}).", RESTORE) from error
    return manifest


def verify(source: str | Path) -> str:
    """Compare every file of a store with its digest; the digest of the manifest, which stands for them all.

    InputError if a file is missing or is not what was written.
    """
    manifest = read_manifest(source)
    assert manifest is not None
    for name, expected in manifest.files.items():
        try:
            found = sha256_of(Path(source) / name)
        except FileNotFoundError:
            raise InputError(f"The store {source} is damaged: {name} is missing.", RESTORE) from None
        except OSError as error:
            raise InputError(f"{source}: {name} cannot be read: {error.strerror}.", RESTORE) from None
        if found != expected:
            raise InputError(f"The store {source} is damaged: {name} has changed since it was written.", RESTORE)
    return sha256_of(Path(source) / MANIFEST)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(path: Path) -> list[Path]:
    """The files of a folder by path, or the file itself."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


class ShardedVector:
    """A one-dimensional sharded zarr array of Blosc chunks; InputError if it is laid out in another way."""

    def __init__(self, folder: Path) -> None:
        try:
            meta = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
            (_,) = meta["shape"]
            (self.shard,) = meta["chunk_grid"]["configuration"]["chunk_shape"]
            (sharding,) = meta["codecs"]
            (self.chunk,) = sharding["configuration"]["chunk_shape"]
            self.dtype = np.dtype(meta["data_type"]).newbyteorder("<")
            plain = [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "blosc"]
            if not plain or sharding["configuration"].get("index_location", "end") != "end":
                raise ValueError("codecs")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} is not an array written by crlseq prepare.", RESTORE) from error
        self.folder = folder
        self.places: dict[int, np.ndarray] = {}

    def read(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Elements of ascending disjoint ranges ``first <= i < last``, one after the other."""
        found = np.empty(int((last - first).sum()), dtype=self.dtype)
        at, held, chunk = 0, -1, found[:0]
        for start, stop in zip(first.tolist(), last.tolist(), strict=True):
            while start < stop:
                if start // self.chunk != held:
                    held = start // self.chunk
                    chunk = self._chunk(held)
                within = start - held * self.chunk
                n = min(stop - start, self.chunk - within)
                found[at : at + n] = chunk[within : within + n]
                at, start = at + n, start + n
        return found

    def _chunk(self, number: int) -> np.ndarray:
        in_shard = self.shard // self.chunk
        shard, place = divmod(number, in_shard)
        path = f"{self.folder}/c/{shard}"
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                if shard not in self.places:
                    size = 16 * in_shard
                    index = os.pread(handle, size, os.fstat(handle).st_size - size - 4)  # 4: its checksum
                    self.places[shard] = np.frombuffer(index, dtype="<u8").reshape(-1, 2)
                offset, size = map(int, self.places[shard][place])
                if offset == NEVER_WRITTEN:
                    return np.zeros(self.chunk, dtype=self.dtype)
                packed = os.pread(handle, size, offset)
                if len(packed) != size or int.from_bytes(packed[12:16], "little") != size:  # as the chunk says itself
                    raise ValueError("a chunk is cut short")
                decoded = np.frombuffer(BLOSC.decode(packed), dtype=self.dtype)
            finally:
                os.close(handle)
            if len(decoded) != self.chunk:
                raise ValueError("a chunk has another size")
        except (OSError, ValueError, RuntimeError, IndexError, OverflowError) as error:
            raise InputError(f"The store is damaged: {path} cannot be read ({error}).", RESTORE) from error
        return decoded


class StoredMatrix:
    """The matrix (cells, genes) of a prepared store as it was written; rows are read when they are asked for."""

    format = "csr"

    def __init__(self, store: Path) -> None:
        self.store = store
        group = zarr.open_group(str(store / "X"), mode="r")
        shape: Any = group.attrs["shape"]
        self.shape = (int(shape[0]), int(shape[1]))
        start: Any = group["indptr"]
        self.start = np.asarray(start[:], dtype=np.int64)
        if len(self.start) != self.shape[0] + 1:
            raise InputError(f"The store {store} is damaged: X/indptr does not match its cells.", RESTORE)
        self.values, self.genes = ShardedVector(store / "X" / "data"), ShardedVector(store / "X" / "indices")
        self.dtype = self.values.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.store.resolve(), sha256_of(self.store / MANIFEST))

    def __getitem__(self, rows: slice | np.ndarray) -> sp.csr_matrix:
        """A slice of cells, or cells by ascending index without repetition."""
        index = np.arange(self.shape[0])[rows]
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        begin = index[np.concatenate([[0], breaks])] if len(index) else index
        end = index[np.concatenate([breaks - 1, [-1]]).astype(np.int64)] + 1 if len(index) else index
        first, last = self.start[begin], self.start[end]
        counts = self.start[index + 1] - self.start[index]
        start = np.concatenate([[0], counts.cumsum()])
        parts = self.values.read(first, last), self.genes.read(first, last), start
        return sp.csr_matrix(parts, shape=(len(index), self.shape[1]))


@lru_cache(maxsize=2)
def _opened(store: Path, digest: str) -> StoredMatrix:
    """A store that another process reads, here opened once."""
    if not (store / MANIFEST).is_file() or sha256_of(store / MANIFEST) != digest:
        raise InputError(f"A worker finds no store at {store}, or another one.", SAME_PATH)
    return StoredMatrix(store)
