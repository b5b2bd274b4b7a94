"""A fit as tables, graph files and AnnData keys: the formats that pandas, Cytoscape and scanpy open."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import pandas as pd

from crlseq.errors import InputError
from crlseq.storage.files import by_hdf5

if TYPE_CHECKING:
    import anndata as ad
    import h5py

DETECTABLE_FDR = 0.05
LABEL_DRIVERS = 3
PROGRAM_NUMBERS = ("variance_explained", "effect_explained", "stability")  # where a run has them
SPLIT = pd.CategoricalDtype(["train", "validation", "test", "unused"])
# Columns of obs: the split; where a fit was asked for them, what guides were read as, and the probability that a cell
# responds to its perturbation.
CELL_COLUMNS = ("crlseq_split", "crlseq_perturbation", "crlseq_responder")
COPIED, COPIED_CELLS = 1 << 16, 8192  # values of a chunk, and cells of a block, of a copied store


def program_names(n: int) -> list[str]:
    """P0, P1, ... in topological order."""
    return [f"P{k}" for k in range(n)]


def program_table(
    genes: tuple[str, ...], loading: np.ndarray, total_effect: np.ndarray, sparse: bool = False
) -> pd.DataFrame:
    """``program, gene, loading, total_effect, rank``; loadings (p, G); rank 1 is the largest |loading|.

    Of a sparse decoder also ``anchor``: whether the gene is loaded on this program and on no other.
    """
    order = np.argsort(-np.abs(loading), axis=1, kind="stable")
    p, n = loading.shape
    rows = np.repeat(np.arange(p), n)
    columns = order.ravel()
    loaded = loading != 0
    anchor = {"anchor": (loaded & (loaded.sum(0) == 1))[rows, columns]} if sparse else {}
    return pd.DataFrame({
        "program": np.repeat(program_names(p), n),
        "gene": np.asarray(genes, dtype=object)[columns],
        "loading": loading[rows, columns],
        "total_effect": total_effect[rows, columns],
        "rank": np.tile(np.arange(1, n + 1), p),
        **anchor,
    })  # fmt: skip


def intervention_table(
    perturbations: tuple[str, ...],
    target: np.ndarray,
    weight: np.ndarray,
    shift: np.ndarray,
    retention: np.ndarray,
    noise_scale: np.ndarray,
    support: np.ndarray,
    tests: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    """One row a single perturbation; all arguments (K,) but ``weight`` (K, p)."""
    names = np.asarray([*program_names(weight.shape[1]), ""], dtype=object)  # the last: -1, no claim
    return pd.DataFrame({
        "perturbation": np.asarray(perturbations, dtype=object),
        "program": names[target],
        "weight": weight[np.arange(len(target)), target],
        "shift": shift,
        "retention": retention,
        "n_cells": tests["n_cells"],
        "p_value": tests["p_value"],
        "fdr": tests["fdr"],
        "energy_distance": tests["energy"],
        "noise_scale": noise_scale,
        "support": support,
    })  # fmt: skip


def program_labels(interventions: pd.DataFrame, n_programs: int) -> list[str]:
    """A readable name a program: its strongest perturbations with a detectable effect."""
    labels = []
    for name in program_names(n_programs):
        drivers = interventions[(interventions["program"] == name) & (interventions["fdr"] <= DETECTABLE_FDR)]
        order = drivers["shift"].abs().sort_values(ascending=False, kind="stable").index
        strongest = [str(value) for value in drivers.loc[order, "perturbation"][:LABEL_DRIVERS]]
        more = len(order) - len(strongest)
        labels.append(", ".join(strongest) + (f" +{more}" if more else "") if strongest else "no driver")
    return labels


def edge_table(weights: np.ndarray, declared: np.ndarray, support: np.ndarray, verdict: str) -> pd.DataFrame:
    """``source, target, weight, support, identified``: the declared edges; weights, declared and support (p, p)."""
    names = np.asarray(program_names(len(weights)), dtype=object)
    source, target = np.nonzero(declared)
    return pd.DataFrame({
        "source": names[source],
        "target": names[target],
        "weight": weights[source, target],
        "support": support[source, target],
        "identified": np.full(len(source), verdict, dtype=object),
    })  # fmt: skip


def dag_graph(
    programs: list[dict[str, Any]], edges: pd.DataFrame, identification: Mapping[str, str]
) -> nx.DiGraph[str]:
    """Programs as nodes, declared edges with weight (and support where there is one), the verdict on the graph."""
    graph: nx.DiGraph[str] = nx.DiGraph(identified=identification["verdict"], reason=identification["reason"])
    for program in programs:
        numbers = {name: program[name] for name in PROGRAM_NUMBERS if program.get(name) is not None}
        words = {name: program[name] for name in ("label", "drivers", "genes")}
        graph.add_node(program["name"], **words, **numbers)
    for row in edges.to_dict("records"):
        attributes = {"weight": float(row["weight"]), "identified": str(row["identified"])}
        if not np.isnan(row["support"]):
            attributes["support"] = float(row["support"])
        graph.add_edge(row["source"], row["target"], **attributes)
    return graph


def graphml(graph: nx.DiGraph[str]) -> bytes:
    """GraphML of a DAG; characters that XML cannot hold are replaced."""
    clean: nx.DiGraph[str] = nx.DiGraph(**{key: plain_text(value) for key, value in graph.graph.items()})
    for node, values in graph.nodes(data=True):
        clean.add_node(node, **{key: plain_text(value) for key, value in values.items()})
    clean.add_edges_from(graph.edges(data=True))
    buffer = io.BytesIO()
    nx.write_graphml(clean, buffer)
    return buffer.getvalue()


def plain_text(value: Any) -> Any:
    """A string with what XML cannot hold replaced; anything else as it is."""
    if not isinstance(value, str):
        return value
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", value)


def dag_json(graph: nx.DiGraph[str]) -> str:
    """The DAG in networkx's node-link form, with the verdict under ``graph``."""
    return json.dumps(nx.node_link_data(graph, edges="edges"), indent=1, ensure_ascii=False)


def run_json(info: Mapping[str, Any], indent: int | None = None) -> str:
    """What a run says of itself, as text: the path of the input need not be any, and reads as it was all the same."""
    text = json.dumps(info, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def anndata_keys(
    info: Mapping[str, Any],
    programs: pd.DataFrame,
    interventions: pd.DataFrame,
    edges_weights: np.ndarray,
    var_names: pd.Index,
    latents: np.ndarray,
    cells: pd.DataFrame,
) -> dict[str, dict[str, Any]]:
    """The keys that crlseq adds to an AnnData, by slot.

    Parameters
    ----------
    edges_weights
        (p, p) standardised adjacency, all of it.
    latents
        (cells, p) float32.
    cells
        What is kept of each cell; see `CELL_COLUMNS`.
    """
    names = [program["name"] for program in info["programs"]]
    p = len(names)
    wide = programs.pivot(index="gene", columns="program", values="loading")[names]
    loadings = wide.reindex(var_names)
    fitted = loadings.notna().all(axis=1).to_numpy()
    order = np.argsort(-wide.to_numpy(), axis=0, kind="stable")
    fields = {name: np.asarray(wide.index, dtype=str)[order[:, k]] for k, name in enumerate(names)}
    scores = {name: wide.to_numpy()[order[:, k], k].astype(np.float32) for k, name in enumerate(names)}
    # What scanpy's readers of `rank_genes_groups` take besides: log2 fold changes of one standard deviation of the
    # program, and p-values, which loadings have none of.
    is_log = info["preprocessing"]["values"] != "continuous"
    changes = {
        name: (column / np.log(2) if is_log else np.full_like(column, np.nan)) for name, column in scores.items()
    }
    untested = {name: np.full_like(column, np.nan) for name, column in scores.items()}
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
                "params": _flat(info["config"])
                | {"reference": info["control_label"], "groupby": info["perturbation_key"], "use_raw": False},
                "program_names": np.array(names, dtype=str),
                "program_labels": np.array([program["label"] for program in info["programs"]], dtype=str),
                "adjacency": edges_weights.reshape(p, p),
                "interventions": interventions.set_index("perturbation"),
                "identified": info["identification"]["verdict"],
                "identified_reason": info["identification"]["reason"],
                "names": _records(fields),
                "scores": _records(scores),
                "logfoldchanges": _records(changes),
                "pvals": _records(untested),
                "pvals_adj": _records(untested),
                "run_json": run_json(info),
            }
        },
    }


def _records(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    records = np.empty(len(next(iter(columns.values()))), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        records[name] = column
    return records.view(np.recarray)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """One level of numbers, strings and bools, all that every anndata writes; the rest is in ``run_json``."""
    flat: dict[str, Any] = {"preset": config["preset"]}
    for section in ("data", "model", "training"):
        flat |= {name: value for name, value in config[section].items() if isinstance(value, str | int | float | bool)}
    return flat


def set_keys(adata: ad.AnnData, keys: Mapping[str, Mapping[str, Any]]) -> None:
    """Put `anndata_keys` into an AnnData in memory."""
    for slot, values in keys.items():
        for name, value in values.items():
            getattr(adata, slot)[name] = value


def _copy(adata: ad.AnnData) -> ad.AnnData:
    return adata.to_memory() if adata.isbacked else adata.copy()


def _copy_store(source: str | Path, path: Path) -> None:
    """A prepared store as an h5ad file, in blocks of cells."""
    import anndata as ad
    import h5py
    import scipy.sparse as sp

    from crlseq.data.matrix import open_screen

    kinds = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "chunks": (COPIED,)}
    with open_screen(source) as screen, h5py.File(path, "w") as handle:
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

    from crlseq.data.matrix import EXPRESSION

    with h5py.File(source, "r") as handle:
        if handle.attrs.get("encoding-type") != "MuData":
            shutil.copyfile(source, path)
            return
        modality = handle["mod"][EXPRESSION]
        with h5py.File(path, "w") as new:
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

    from crlseq.data.store import read_manifest  # which imports zarr

    path.unlink(missing_ok=True)
    with ad.settings.override(allow_write_nullable_strings=True), by_hdf5():
        if isinstance(source, ad.AnnData) or not (h5py.is_hdf5(source) or read_manifest(source) is not None):
            adata = _copy(source) if isinstance(source, ad.AnnData) else ad.read_zarr(source)
            set_keys(adata, keys)
            adata.write_h5ad(path, compression="gzip")
            return
        if read_manifest(source) is not None:
            _copy_store(source, path)
        else:
            _copy_file(source, path)
        try:
            with h5py.File(path, "r+") as handle:
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
