"""How every HDF5 file is written: HDF5 is not told of a full disk, since it cannot close a file after that and crashes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import anndata as ad


class Target(io.FileIO):
    """A file for `h5py.File` that takes whatever is written to it, and keeps the first error.

    Once there is one, nothing more is written, and what is not there is read as zeros.
    """

    error: OSError | None = None
    end = 0  # of what the file would hold

    def __fspath__(self) -> str:
        return os.fsdecode(self.name)

    def write(self, data: Any) -> int:
        """All of it; FileIO itself may write less."""
        at, view = self.tell(), memoryview(data).cast("B")
        try:
            written = 0
            while self.error is None and written < len(view):
                written += super().write(view[written:]) or 0
        except OSError as error:
            self.error = error
        return self.seek(at + len(view)) - at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of the whole file."""
        at = super().seek(offset, whence)
        self.end = max(self.end, at)
        return super().seek(self.end) if whence == os.SEEK_END and self.error is not None else at

    def truncate(self, size: int | None = None) -> int:
        """To a size, which may be larger."""
        self.end = self.tell() if size is None else size
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
        return self.end

    def readinto(self, buffer: Any) -> int:
        """All of it."""
        read = super().readinto(buffer) or 0
        if self.error is not None:
            buffer[read:] = bytes(len(buffer) - read)
            return len(buffer)
        return read


@contextmanager
def hdf5_target(path: Path, mode: str = "w+") -> Iterator[Target]:
    """What `h5py.File` is to write to in place of the path; OSError at the end of the block if the disk did not take it."""
    with Target(path, mode) as target:
        try:
            yield target
        except Exception as error:
            if target.error is not None:
                raise target.error from error
            raise
        if target.error is not None:
            raise target.error


def write_h5ad(adata: ad.AnnData, path: Path, compression: str | None = None) -> None:
    """As `anndata.AnnData.write_h5ad`, of cells in memory; OSError if the disk does not take them."""
    import anndata as ad
    import h5py

    adata.strings_to_categoricals()
    if adata.raw is not None:
        adata.strings_to_categoricals(adata.raw.var)
    kinds = {} if compression is None else {"compression": compression}
    with hdf5_target(path) as target, h5py.File(target, "w") as handle:
        ad.io.write_elem(handle, "/", adata, dataset_kwargs=kinds)
