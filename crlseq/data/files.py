"""Files by their kind: those that are read, and the line that converts those that are not."""

from __future__ import annotations

import shlex
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import zarr
from zarr.storage import ZipStore

from crlseq.data.hdf5 import open_hdf5, refuse_values_for_groups
from crlseq.errors import CrlseqError, InputError, few
from crlseq.storage.files import refuse_links_outside, refuse_special
from crlseq.storage.runfolder import is_run

# Modalities of a MuData file that are the screen, the first that is there.
EXPRESSION = (
    "rna", "gene", "genes", "gex", "expression", "gene_expression", "gene expression", "mrna", "scrna", "transcriptome",
)  # fmt: skip
MATRIX_FILES = ("matrix.mtx.gz", "matrix.mtx")  # of Cell Ranger
ZARR_FILES = (".zgroup", "zarr.json")
READ = (
    "crlseq reads .h5ad files and .zarr stores as anndata writes them, .h5mu files as mudata does, and the matrices that "
    "Cell Ranger writes."
)


@contextmanager
def readable(source: str, what: str) -> Iterator[None]:
    """Turns whatever a reader throws at a damaged file into one `InputError`."""
    try:
        yield
    except (CrlseqError, MemoryError):
        raise
    except Exception as error:  # h5py, zarr and anndata raise almost every type for damaged files
        detail = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")[:200]
        hint = "The file may be cut short or damaged; check that `anndata.read_h5ad` opens it."
        raise InputError(f"{source}: {what} cannot be read ({detail}).", hint) from error


@contextmanager
def open_store(path: Path) -> Iterator[Any]:
    """An h5ad file, the modality of an h5mu file with the expression, or a zarr store, as a mapping for `anndata.io.read_elem`."""
    refuse_special(path)
    try:
        is_folder = path.is_dir()
        if not is_folder:
            path.open("rb").close()
    except FileNotFoundError:
        raise InputError(f"There is no file {path}.", "Check the path.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from None
    if is_folder or zipfile.is_zipfile(path):
        yield zarr_store(path)
        return
    if not h5py.is_hdf5(path):
        raise InputError(f"{path} is not a file that crlseq reads.", _conversion(path))
    with ExitStack() as opened:
        with readable(str(path), "the file"):
            handle = opened.enter_context(open_hdf5(path))
            if "obs" not in handle or "var" not in handle:
                raise InputError(
                    f"{path} is an HDF5 file but not an h5ad: it has no obs and var.", _conversion(path, handle)
                )
            screen = handle
            if handle.attrs.get("encoding-type") == "MuData":
                screen = handle["mod"][expression_modality(handle, str(path))]
            refuse_values_for_groups(screen, path)
        yield screen


def zarr_store(path: Path) -> zarr.Group:
    """An AnnData in a zarr folder, or in a zip of one, by itself or within one folder of its own."""
    inner = ""
    if not path.is_dir():
        with readable(str(path), "the zip"), zipfile.ZipFile(path) as archive:
            roots = {name.rpartition("/")[0] for name in archive.namelist() if name.endswith(ZARR_FILES)}
        inner = min(roots, key=len, default="")
    elif is_run(path):
        hint = f"`crlseq inspect {path}` shows it. Its screen is {path / 'crlseq.h5ad'}."
        raise InputError(f"{path} is a finished run and no screen.", hint)
    elif not any((path / name).is_file() for name in ZARR_FILES):
        within = sorted(str(each) for each in path.iterdir() if any((each / name).is_file() for name in ZARR_FILES))
        screens = sorted(str(each) for each in path.iterdir() if each.suffix in (".h5ad", ".h5mu", ".h5"))
        there = few([*within, *screens])
        raise InputError(f"{path} is a folder without a screen.", f"Name what it holds: {there}." if there else READ)
    with readable(str(path), "the zarr store"):
        store = zarr.open_group(str(path) if path.is_dir() else ZipStore(path, mode="r"), path=inner or None, mode="r")
    if "obs" not in store or "var" not in store:
        raise InputError(f"{path} is not an AnnData zarr store: it has no obs and var.", READ)
    if path.is_dir():
        refuse_links_outside(path)  # which readers would follow
    return store


def _conversion(path: Path, handle: h5py.File | None = None) -> str:
    """What makes a screen of a file of another kind."""
    name, to = shlex.quote(str(path)), shlex.quote(f"{path.name.split('.')[0]}.h5ad")
    if handle is not None and {"matrix", "row_attrs", "col_attrs"} <= handle.keys():
        return f"Convert loom: python -c 'import sys, scanpy as sc; sc.read_loom(sys.argv[1]).write(sys.argv[2])' {name} {to}."
    if handle is not None and {"assays", "cell.names"} & handle.keys():
        return f"Convert h5Seurat in R: SeuratDisk::Convert({str(path)!r}, dest = 'h5ad')."
    suffix = path.suffix.casefold()
    if suffix in (".rds", ".rdata", ".rda", ".qs"):
        return "Convert it in R: zellkonverter::writeH5AD(Seurat::as.SingleCellExperiment(object), 'screen.h5ad')."
    if suffix == ".gz" and handle is None:
        return f"Decompress it: gunzip --keep {name}."
    if suffix in (".csv", ".tsv", ".txt", ".mtx"):
        return (
            "Read it with scanpy (`sc.read_csv`, `sc.read_mtx`), add the labels as a column of obs, and write an .h5ad."
        )
    return READ


def expression_modality(handle: h5py.File, source: str) -> str:
    """Name of the modality with the expression: a known one, or the only one whose features are genes; InputError if none."""
    modalities = handle.get("mod", {})
    there = {str(name).casefold(): str(name) for name in modalities if {"obs", "var"} <= modalities[name].keys()}
    named = [there[name] for name in EXPRESSION if name in there]
    of_genes = [name for name in there.values() if _is_of_genes(modalities[name]["var"])]
    if not named and len(of_genes) != 1:
        raise InputError(
            f"{source} has no modality 'rna' or 'gene' with cells and genes.",
            f"Rename the modality with the expression to 'rna'; there are: {few([*map(repr, modalities)]) or 'none'}.",
        )
    return (named or of_genes)[0]


def _is_of_genes(var: Any) -> bool:
    if "feature_types" not in var:
        return False
    kinds = ad.io.read_elem(var["feature_types"])
    return len(kinds) > 0 and set(map(str, kinds)) == {"Gene Expression"}


def is_cell_ranger(path: Path) -> bool:
    """Whether a file or folder is Cell Ranger's, by what is in it."""
    try:
        if path.is_dir():
            return any((path / name).is_file() for name in MATRIX_FILES)
        if not path.is_file() or not h5py.is_hdf5(path):
            return False
        with h5py.File(path, "r") as handle:
            # The kind of link first: what an external one names may be a pipe, on which opening it waits.
            links = (handle.get(name, getlink=True) for name in ("matrix", "matrix/barcodes"))
            return "obs" not in handle and all(isinstance(link, h5py.HardLink) for link in links)
    except (OSError, RuntimeError):  # the latter of damaged files
        return False


def read_cell_ranger(path: Path) -> ad.AnnData:
    """All features, guides and antibodies too; ``var["feature_types"]`` tells them apart."""
    import scanpy as sc  # late: seconds to import

    if path.is_dir():
        return sc.read_10x_mtx(path.absolute(), gex_only=False)
    with open_hdf5(path):
        return sc.read_10x_h5(path, gex_only=False)
