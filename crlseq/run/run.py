"""Run: a finished fit, read from and written to its folder; what Python users hold. Needs no torch to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import pandas as pd

from crlseq._version import __version__
from crlseq.errors import InputError
from crlseq.run.export import (
    CELL_COLUMNS,
    SPLIT,
    anndata_keys,
    dag_graph,
    dag_json,
    graphml,
    run_json,
    set_keys,
    write_annotated,
)
from crlseq.storage.csv import read_csv, to_csv
from crlseq.storage.files import refuse_links_outside

if TYPE_CHECKING:
    import anndata as ad

    from crlseq.model.discrepancy_vae import DiscrepancyVAE
    from crlseq.prediction.extrapolation import Extrapolation
    from crlseq.run.summary import Program

# Tables and the columns that each has at least; more may follow in later versions.
COLUMNS: dict[str, dict[str, type]] = {
    "programs": {"program": str, "gene": str, "loading": float, "total_effect": float, "rank": int},
    "interventions": {
        "perturbation": str, "program": str, "weight": float, "shift": float, "retention": float,
        "n_cells": int, "p_value": float, "fdr": float, "energy_distance": float, "noise_scale": float, "support": float,
    },
    "dag": {"source": str, "target": str, "weight": float, "support": float, "identified": str},
    "history": {"epoch": int, "total": float},
    "evaluation": {
        "condition": str, "split": str, "n_cells": int, "mmd2": float, "mmd2_no_change": float,
        "pearson_delta": float, "l2": float, "l2_no_change": float,
    },
}  # fmt: skip
TABLES = tuple(COLUMNS)
ENSEMBLE = "ensemble.csv"  # of fits with several seeds alone
PATHWAYS, GENE_SETS = "pathways.csv", "gene_sets.gmt"  # of fits with gene sets alone
PATHWAY_COLUMNS = {
    "program": str, "gene_set": str, "description": str, "weight": float, "rank": int, "n_genes": int, "same_genes": str,
}  # fmt: skip
ENSEMBLE_COLUMNS = {"kind": str, "source": str, "target": str, "agreement": float, "mean": float, "sd": float}
# Columns that runs of earlier versions, and some others, lack.
LATER: dict[str, dict[str, type]] = {
    "programs": {"anchor": bool},
    "evaluation": {f"{metric}_{name}": float for metric in ("pearson_delta", "l2") for name in ("training", "mean")},
}
INFO = {
    "config",
    "input",
    "cells",
    "conditions",
    "programs",
    "adjacency",
    "preprocessing",
    "identification",
    "discovery",
    "metrics",
    "training",
}
FORMAT = 1
MAX_JSON = 256 << 20  # bytes; that of a genome-wide screen has some 10 MiB
MIN_SUPPORT = 0.1  # ancestry below it is not listed


@dataclass(frozen=True)
class Run:
    """A fitted screen.

    Attributes
    ----------
    info
        Contents of ``run.json``.
    programs
        ``program, gene, loading, total_effect, rank``; of a sparse decoder also ``anchor``.
    interventions
        ``perturbation, program, weight, shift, retention, n_cells, p_value, fdr, ...``; one row a perturbation.
    edges
        ``source, target, weight, support, identified``: the declared edges.
    history
        Loss terms by epoch.
    evaluation
        Virtual against held-out cells by condition.
    path
        The folder, None for a run that was not written.
    weights
        State and architecture of the model; None: read from the folder when first needed.
    cells
        `crlseq.run.export.CELL_COLUMNS` by the name of the cell; None: likewise.
    ensemble
        ``kind, source, target, agreement, mean, sd``: what models of other seeds agree on; None for one seed.
    pathways
        ``program, gene_set, weight, ...``: what the encoder reads each program from; None where it reads all genes.
    map
        From gene vectors to perturbations never seen, where the fit was given embeddings; None: likewise.
    """

    info: dict[str, Any]
    programs: pd.DataFrame
    interventions: pd.DataFrame
    edges: pd.DataFrame
    history: pd.DataFrame
    evaluation: pd.DataFrame
    path: Path | None = None
    weights: tuple[dict[str, Any], dict[str, Any]] | None = field(default=None, repr=False)
    cells: pd.DataFrame | None = field(default=None, repr=False)
    map: Extrapolation | None = field(default=None, repr=False)
    ensemble: pd.DataFrame | None = field(default=None, repr=False)
    pathways: pd.DataFrame | None = field(default=None, repr=False)

    @cached_property
    def dag(self) -> nx.DiGraph[str]:
        """The declared DAG; ``dag.graph["identified"]`` says whether the data determine it."""
        return dag_graph(self.info["programs"], self.edges, self.info["identification"])

    @property
    def program_names(self) -> list[str]:
        """P0, P1, ... in topological order."""
        return [program["name"] for program in self.info["programs"]]

    @cached_property
    def model(self) -> DiscrepancyVAE:
        """The fitted model, in evaluation mode on the CPU."""
        from crlseq.storage.checkpoint import build, load_model

        return load_model(self._folder() / "model.safetensors") if self.weights is None else build(*self.weights)

    @cached_property
    def extrapolation(self) -> Extrapolation | None:
        """The map from gene vectors to perturbations never seen; None without embeddings."""
        from crlseq.prediction.extrapolation import FILE, load_extrapolation

        if self.map is not None or self.info.get("embeddings") is None:
            return self.map
        return load_extrapolation(self._folder() / FILE)

    def with_unseen(self, names: Sequence[str]) -> tuple[DiscrepancyVAE, dict[str, tuple[int, ...]]]:
        """The model with perturbations never seen; see `crlseq.prediction.extrapolation.with_unseen`."""
        from crlseq.prediction.extrapolation import with_unseen

        return with_unseen(self, names)

    @property
    def adjacency(self) -> np.ndarray:
        """(p, p) standardised weights of all edges, declared or not; row -> column."""
        return np.asarray(self.info["adjacency"], dtype=float)

    @property
    def ancestry(self) -> pd.DataFrame:
        """``ancestor, descendant, declared, support``: pairs that the DAG declares or that have support of 0.1."""
        names, bootstrap = self.program_names, (self.info["discovery"] or {}).get("bootstrap")
        support = np.full((len(names), len(names)), np.nan)
        if bootstrap:
            support = np.asarray(bootstrap["ancestor"], dtype=float)
        reach = nx.transitive_closure_dag(self.dag)
        rows = [
            {"ancestor": a, "descendant": b, "declared": reach.has_edge(a, b), "support": support[i, j]}
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if reach.has_edge(a, b) or support[i, j] >= MIN_SUPPORT
        ]
        return pd.DataFrame(rows, columns=["ancestor", "descendant", "declared", "support"])

    @cached_property
    def described(self) -> dict[str, Program]:
        """Every program by its name: drivers, genes, what lies up- and downstream; see `crlseq.run.summary.Program`."""
        from crlseq.run.summary import describe_programs

        return {program.name: program for program in describe_programs(self)}

    @property
    def summary(self) -> pd.DataFrame:
        """One row a program: ``program, title, n_drivers, up, down, upstream, downstream`` and what it explains."""
        from crlseq.run.summary import summary_table

        return summary_table(list(self.described.values()))

    def latents(self, source: str | Path | ad.AnnData) -> np.ndarray:
        """(cells, p) float32 latents, unit variance over the fitted control cells, of any cells with these genes.

        Raises
        ------
        InputError
            If a fitted gene is missing, or values are not of the kind that was fitted.
        """
        import torch

        from crlseq.data.matrix import open_screen
        from crlseq.data.preprocess import Preprocessing

        record = Preprocessing.from_json(self.info["preprocessing"])
        scale = np.array([program["scale"] for program in self.info["programs"]])
        center = np.array([program["center"] for program in self.info["programs"]])
        dtype = self.model.scm.graph.dtype
        parts = []
        with open_screen(source, record.layer) as screen, torch.no_grad():
            columns = record.columns(screen.genes, screen.source)
            for _, block in screen.blocks():
                record.check(block, screen.source)
                x = torch.from_numpy(record.apply(block)[:, columns].astype(np.float32).toarray()).to(dtype)
                values = (self.model.latents(x).double().numpy() - center) / scale
                parts.append(values.astype(np.float32))  # of a million cells these are few, in float64 they are not
        return np.concatenate(parts)

    def predict(self, perturbations: str | Sequence[str], **options: Any) -> ad.AnnData:
        """Virtual cells under fitted perturbations and combinations of them; see `crlseq.prediction.predict.predict`.

        Examples
        --------
        >>> import crlseq
        >>> virtual = crlseq.load("RUN").predict(["g0", "g0+g1"], n_cells=50)
        >>> virtual.shape, virtual.varm["crlseq_effect"].shape
        ((100, 40), (40, 2))
        """
        from crlseq.prediction.predict import predict

        return predict(self, perturbations, **options)

    def annotate(self, adata: ad.AnnData) -> ad.AnnData:
        """Add crlseq's keys to an AnnData in place, and return it: the fitted one, or other cells with its genes.

        Examples
        --------
        >>> import anndata, crlseq
        >>> adata = crlseq.load("RUN").annotate(anndata.read_h5ad("screen.h5ad"))
        >>> adata.obsm["X_crlseq"].shape, adata.varm["crlseq_programs"].shape
        ((740, 3), (40, 3))
        """
        set_keys(adata, self._keys(adata, adata.obs_names, adata.var_names))
        return adata

    def write_h5ad(self, source: str | Path | ad.AnnData, path: Path) -> None:
        """Write the annotated input; see `crlseq.run.export.write_annotated`."""
        from crlseq.data.matrix import open_screen

        with open_screen(source, self.info["preprocessing"]["layer"]) as screen:
            cells, genes = screen.obs.index, screen.genes
        write_annotated(source, path, self._keys(source, cells, genes))

    def _keys(self, source: str | Path | ad.AnnData, cells: pd.Index, genes: pd.Index) -> dict[str, dict[str, Any]]:
        known = self._cells().reindex(cells.astype(str))
        known["crlseq_split"] = known["crlseq_split"].astype(object).fillna("unused").astype(SPLIT)
        return anndata_keys(
            self.info, self.programs, self.interventions, self.adjacency, genes, self.latents(source), known
        )

    def _cells(self) -> pd.DataFrame:
        if self.cells is not None:
            return self.cells
        import anndata as ad

        from crlseq.data.matrix import open_store

        path = self._folder() / "crlseq.h5ad"
        try:
            with open_store(path) as store:
                obs: pd.DataFrame = ad.io.read_elem(store["obs"])
            return obs[["crlseq_split", *(name for name in CELL_COLUMNS[1:] if name in obs)]].copy()
        except (OSError, KeyError, InputError) as error:
            raise InputError(
                f"{path} cannot be read, so the split of cells is unknown.", "Restore it, or fit again."
            ) from error

    def _folder(self) -> Path:
        if self.path is None:
            raise InputError("This run was never written to a folder.", "Give crlseq.fit an output.")
        return self.path

    def write_tables(self, folder: Path) -> None:
        """CSV tables, graph files and ``run.json``."""
        for name, table in self.tables().items():
            (folder / f"{name}.csv").write_bytes(to_csv(table))
        if self.ensemble is not None:
            (folder / ENSEMBLE).write_bytes(to_csv(self.ensemble))
        if self.pathways is not None:
            (folder / PATHWAYS).write_bytes(to_csv(self.pathways))
        (folder / "dag.graphml").write_bytes(graphml(self.dag))
        (folder / "dag.json").write_text(dag_json(self.dag), encoding="utf-8")
        (folder / "run.json").write_text(run_json(self.info, 1), encoding="utf-8", newline="\n")

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by the names of their files."""
        return dict(
            zip(TABLES, (self.programs, self.interventions, self.edges, self.history, self.evaluation), strict=True)
        )


def load(path: str | Path) -> Run:
    """Read a run folder.

    Raises
    ------
    InputError
        If it is not one, is unfinished, damaged, written by a newer crlseq or by one whose runs are no longer read, or
        has a link that leads out of it.

    Examples
    --------
    >>> import crlseq
    >>> run = crlseq.load("RUN")
    >>> sorted(run.dag.nodes), sorted(run.described)
    (['P0', 'P1', 'P2'], ['P0', 'P1', 'P2'])
    """
    folder = Path(path)
    if not (folder / "run.json").is_file():
        unfinished = folder.with_name(folder.name + ".partial")
        if unfinished.exists():
            raise InputError(f"The fit {folder} is not finished.", "Finish it with `crlseq fit ... --resume`.")
        raise InputError(
            f"{folder} is not a run folder: it has no run.json.", "Give the folder that `crlseq fit --output` wrote."
        )
    refuse_links_outside(folder)
    writer = __version__
    try:
        if (folder / "run.json").stat().st_size > MAX_JSON:
            raise ValueError(f"run.json has more than {MAX_JSON >> 20} MiB")
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if info["format"] > FORMAT:
            raise InputError(f"{folder} was written by crlseq {info['version']}, which is newer.", "Update crlseq.")
        writer = str(info["version"])
        if info["format"] < FORMAT:
            raise ValueError(f"its format is {info['format']}, and {FORMAT} is read")
        if missing := INFO - info.keys():
            raise ValueError(f"run.json lacks {min(missing)!r}")
        tables = {
            name: read_csv(folder / f"{name}.csv", columns, LATER.get(name, {})) for name, columns in COLUMNS.items()
        }
        several = info["config"]["training"].get("ensemble", 1) > 1
        ensemble = read_csv(folder / ENSEMBLE, ENSEMBLE_COLUMNS) if several else None
        pathways = read_csv(folder / PATHWAYS, PATHWAY_COLUMNS) if info.get("gene_sets") else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        if writer != __version__:
            raise InputError(
                f"{folder} was written by crlseq {writer[:20]}, whose runs {__version__} does not read: {detail}.",
                "Fit again with the command in its run.json, or read it with that version.",
            ) from error
        raise InputError(f"The run folder {folder} is damaged: {detail}.", "Restore it, or fit again.") from error
    return Run(
        info,
        tables["programs"],
        tables["interventions"],
        tables["dag"],
        tables["history"],
        tables["evaluation"],
        folder,
        ensemble=ensemble,
        pathways=pathways,
    )
