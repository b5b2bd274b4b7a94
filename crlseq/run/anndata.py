"""A fit as keys of an AnnData, which scanpy opens, and the annotated copy of its input."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from crlseq.errors import InputError
from crlseq.run.columns import CELL_COLUMNS
from crlseq.run.schema import RunInfo
from crlseq.storage.hdf5 import hdf5_target, write_h5ad
from crlseq.storage.text import to_json

if TYPE_CHECKING:
    import anndata as ad
    import h5py

COPIED, COPIED_CELLS = 1 << 16, 8192  # values of a chunk, and cells of a block, of a copied store


def read_cells(path: Path) -> pd.DataFrame:
    """`CELL_COLUMNS` that an annotated file has, by the name of the cell; InputError if it cannot be read."""
    import anndata as ad

    from crlseq.data.files import open_store
    from crlseq.data.matrix import unique_names

    try:
        with open_store(path) as store:
            obs: pd.DataFrame = ad.io.read_elem(store["obs"])
        obs = obs.set_axis(unique_names(obs.index, "cell")[0], axis=0)
        return obs[["crlseq_split", *(name for name in CELL_COLUMNS[1:] if name in obs)]].copy()
    except (OSError, KeyError, InputError) as error:
        raise InputError(
            f"{path} cannot be read, so the split of cells is unknown.", "Restore it, or fit again."
        ) from error


def anndata_keys(
    info: Mapping[str, Any],
    facts: RunInfo,
    programs: pd.DataFrame,
    interventions: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame | None],
    genes: pd.Index,
    fitted_genes: pd.Index,
    latents: np.ndarray,
    cells: pd.DataFrame,
) -> dict[str, dict[str, Any]]:
    """The keys that crlseq adds to an AnnData with these `genes`, by slot; `fitted_genes` are called as there.

    ``info`` and ``facts`` are ``run.json`` as it is and with types; ``tables`` are kept as they are, by name; of the AnnData's cells are ``latents`` (cells, p)
    float32 and `CELL_COLUMNS`.
    """
    names = [program.name for program in facts.programs]
    wide = programs.pivot(index="gene", columns="program", values="loading")[names]
    loadings = wide.reindex(genes)
    fitted = genes.isin(fitted_genes)
    order = np.argsort(-wide.to_numpy(), axis=0, kind="stable")
    scores = np.take_along_axis(wide.to_numpy(), order, axis=0).astype(np.float32)
    # What scanpy's readers of `rank_genes_groups` take besides: log2 fold changes of one standard deviation of the
    # program, and p-values, which loadings have none of.
    untested = np.full_like(scores, np.nan)
    changes = untested if facts.preprocessing.values == "continuous" else scores / np.log(2)
    # One level of numbers, strings and bools, all that every anndata writes; the rest is in `run_json`.
    params, plain = {"preset": info["config"]["preset"]}, (str, int, float, bool)
    for section in ("data", "model", "training"):
        params |= {name: value for name, value in info["config"][section].items() if isinstance(value, plain)}
    genes_of = np.asarray(wide.index, dtype=str)[order]
    ranked = {"names": genes_of, "scores": scores, "logfoldchanges": changes, "pvals": untested, "pvals_adj": untested}
    if not names:  # records have a field at least
        ranked = {}
    return {
        "obsm": {"X_crlseq": np.ascontiguousarray(latents, dtype=np.float32)},
        "varm": {"crlseq_programs": np.ascontiguousarray(loadings.fillna(0.0).to_numpy(np.float32))},
        "obs": {
            str(name): pd.Categorical(column) if column.dtype == "category" else column.to_numpy()
            for name, column in cells.items()
        },
        "var": {"crlseq_fitted": fitted},
        "uns": {
            "crlseq": {
                "params": params
                | {"reference": facts.control_label, "groupby": facts.perturbation_key, "use_raw": False},
                "program_names": np.array(names, dtype=str),
                "program_labels": np.array([program.label for program in facts.programs], dtype=str),
                "adjacency": np.array(facts.adjacency, dtype=float).reshape(len(names), len(names)),
                "interventions": interventions.set_index("perturbation"),
                **{
                    name: table.set_axis(table.index.astype(str)) for name, table in tables.items() if table is not None
                },
                "identified": facts.identification.verdict,
                "identified_reason": facts.identification.reason,
                **{
                    key: np.rec.fromarrays(list(values.T), [(name, values.dtype) for name in names])
                    for key, values in ranked.items()
                },
                "run_json": to_json(info, None),
            }
        },
    }


def add_effects(keys: dict[str, dict[str, Any]], effects: pd.DataFrame) -> None:
    """Changes (genes, perturbations) of log expression among `anndata_keys`, NaN of genes that were not fitted."""
    keys["varm"]["crlseq_effects"] = np.ascontiguousarray(effects.to_numpy(np.float32))
    keys["uns"]["crlseq"]["effect_names"] = np.array(effects.columns, dtype=str)


def set_keys(adata: ad.AnnData, keys: Mapping[str, Mapping[str, Any]]) -> None:
    """Put `anndata_keys` into an AnnData in memory."""
    for slot, values in keys.items():
        for name, value in values.items():
            getattr(adata, slot)[name] = value


def _copy_store(source: str | Path, path: Path) -> None:
    """A prepared store as an h5ad file, in blocks of cells."""
    import anndata as ad
    import h5py
    import scipy.sparse as sp

    from crlseq.data.matrix import open_screen

    kinds = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "chunks": (COPIED,)}
    with open_screen(source) as screen, hdf5_target(path) as target, h5py.File(target, "w") as handle:
        ad.io.write_elem(handle, "/", ad.AnnData(obs=screen.obs, var=screen.var))
        parts = np.empty(0, screen.matrix.dtype), np.empty(0, np.int32), np.zeros(1, np.int64)
        empty = sp.csr_matrix(parts, shape=(0, screen.n_genes))
        empty.indptr = parts[2]  # type: ignore[assignment]  # 64 bits: scipy takes fewer of an empty one
        ad.io.write_elem(handle, "X", empty, dataset_kwargs=kinds)
        matrix = ad.io.sparse_dataset(handle["X"])
        for start in range(0, screen.n_cells, COPIED_CELLS):
            matrix.append(screen.matrix[start : start + COPIED_CELLS])


def _copy_file(source: str | Path, path: Path) -> None:
    """An h5ad file, or of an h5mu file the modality with the expression."""
    import h5py

    from crlseq.data.files import expression_modality

    with h5py.File(source, "r") as handle:
        if handle.attrs.get("encoding-type") != "MuData":
            shutil.copyfile(source, path)
            return
        modality = handle["mod"][expression_modality(handle, str(source))]
        with hdf5_target(path) as target, h5py.File(target, "w") as new:
            for name in modality:
                modality.copy(name, new)
            for name, value in modality.attrs.items():
                new.attrs[name] = value


def write_annotated(source: str | Path | ad.AnnData, path: Path, keys: Mapping[str, Mapping[str, Any]]) -> None:
    """The input with crlseq's keys as an h5ad file.

    An h5ad file is copied and the keys are added to the copy, so that the matrix is never read and nothing else
    in it changes; a prepared store is copied in blocks of cells; other inputs are written by anndata.
    """
    import anndata as ad
    import h5py

    from crlseq.data.files import is_cell_ranger, read_cell_ranger, zarr_store
    from crlseq.data.store import read_manifest  # which imports zarr

    path.unlink(missing_ok=True)
    with ad.settings.override(allow_write_nullable_strings=True):
        if not isinstance(source, ad.AnnData) and read_manifest(source) is not None:
            _copy_store(source, path)
        elif not isinstance(source, ad.AnnData) and h5py.is_hdf5(source) and not is_cell_ranger(Path(source)):
            _copy_file(source, path)
        else:
            if isinstance(source, ad.AnnData):
                adata = source.to_memory() if source.isbacked else source.copy()
            elif is_cell_ranger(Path(source)):
                adata = read_cell_ranger(Path(source))
                adata.var_names_make_unique()
            else:
                adata = ad.read_zarr(zarr_store(Path(source)))
            set_keys(adata, keys)
            write_h5ad(adata, path, "gzip")
            return
        try:
            with hdf5_target(path, "r+") as target, h5py.File(target, "r+") as handle:
                for slot, values in keys.items():
                    _add(handle, slot, values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # in a part that the fit did not read
            raise InputError(
                f"Results cannot be added to a copy of {source}: {error}.", "The file is damaged; write it again."
            ) from error


def _add(handle: h5py.File, slot: str, values: Mapping[str, Any]) -> None:
    """Add elements to a slot of an h5ad file; columns of a table beside those there, which are not touched."""
    import anndata as ad
    import h5py

    if handle.get(slot) is None:
        if slot in handle:  # a link that leads nowhere
            del handle[slot]
        ad.io.write_elem(handle, slot, {})
    elif isinstance(handle[slot], h5py.Dataset):  # anndata 0.6 wrote records where groups are now
        records = handle[slot][()]
        ad.io.write_elem(handle, slot, {name: records[name] for name in records.dtype.names})
    for name, value in values.items():
        ad.io.write_elem(handle[slot], name, value)
    if slot in ("obs", "var"):
        columns = [str(name) for name in handle[slot].attrs["column-order"]]
        order = [*columns, *(name for name in values if name not in columns)]
        handle[slot].attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())
