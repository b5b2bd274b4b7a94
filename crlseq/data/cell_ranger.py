"""What Cell Ranger writes, read by scanpy: a ``.h5`` file or a folder with a matrix, barcodes and features."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py

MATRIX_FILES = ("matrix.mtx.gz", "matrix.mtx")


def is_cell_ranger(path: Path) -> bool:
    """Whether a file or folder is Cell Ranger's, by what is in it."""
    try:
        if path.is_dir():
            return any((path / name).is_file() for name in MATRIX_FILES)
        if not path.is_file() or not h5py.is_hdf5(path):
            return False
        with h5py.File(path, "r") as handle:
            return "obs" not in handle and isinstance(handle.get("matrix/barcodes"), h5py.Dataset)
    except OSError:
        return False


def read_cell_ranger(path: Path) -> ad.AnnData:
    """All features, guides and antibodies too; ``var["feature_types"]`` tells them apart."""
    import scanpy as sc  # late: seconds to import

    if path.is_dir():
        return sc.read_10x_mtx(path, gex_only=False)
    return sc.read_10x_h5(path, gex_only=False)
