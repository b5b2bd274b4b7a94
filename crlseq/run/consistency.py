"""Do the files of a run folder belong together? Checked when it is loaded, so that nothing follows a name into nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd

from crlseq.errors import InputError
from crlseq.run.columns import CONTEXT, EFFECT_COLUMNS
from crlseq.run.schema import Bootstrap, RunInfo
from crlseq.storage.csv import read_csv

# Columns of programs, by table.
NAMED = {"dag": ("source", "target"), "pairs": ("source", "target"), "pathways": ("program",), "contexts": ("program",), "second_targets": ("program",)}  # fmt: skip


def check_consistency(facts: RunInfo, genes: Sequence[str], tables: Mapping[str, pd.DataFrame]) -> None:
    """ValueError that names the first thing in which ``run.json`` and the tables, by name, contradict one another."""
    programs, p = [row.name for row in facts.programs], facts.n_latents
    _check(len({*programs}) == len(programs) == p, f"run.json has n_latents {p} and {len(programs)} programs")
    _check_matrix("adjacency", facts.adjacency, (p, p))
    _check(all(np.isfinite([row.scale, row.center]).all() for row in facts.programs), "a program's scale is no number")
    if facts.bootstrap is not None:
        _check_bootstrap(facts.bootstrap, p)
    loadings, perturbations = tables["programs"], tables["interventions"]
    expected = {(program, gene) for program in programs for gene in genes}
    own = [*zip(loadings["program"], loadings["gene"], strict=True)]
    _check(len(own) == len({*own}) and {*own} == expected, "programs.csv has other programs or genes than run.json")
    known = {*perturbations["perturbation"]}
    _check(len(known) == len(perturbations), "interventions.csv has a perturbation twice")
    _check_names("interventions.csv", perturbations["program"], {*programs, ""})
    _check_names("run.json", (name for one in facts.conditions for name in one.perturbations), known)
    for name, columns in NAMED.items():
        if (table := tables.get(name)) is not None:
            for column in columns:
                _check_names(f"{name}.csv", table[column], {*programs})
    for name in ("second_targets", "arms"):
        if (table := tables.get(name)) is not None:
            _check_names(f"{name}.csv", table["perturbation"], known)
    if (table := tables.get("covariates")) is not None:
        _check_names("covariates.csv", table["perturbation"], {one.name for one in facts.conditions})
    _check_pairs(tables["dag"], tables.get("pairs"), programs)


def read_effects(path: Path, perturbations: Sequence[str], genes: Sequence[str]) -> pd.DataFrame:
    """``effects.csv`` of a run with these perturbations and genes; InputError if it is damaged or of another run."""
    try:
        table = read_csv(path, EFFECT_COLUMNS, {"symbol": str} | CONTEXT)
        _check_names(path.name, table["perturbation"].unique(), {*perturbations})
        _check_names(path.name, table["gene"].unique(), {*genes})
        _check(not table.duplicated(["perturbation", "gene"]).any(), f"{path.name} has a perturbation and gene twice")
    except (OSError, ValueError) as error:
        what = f"The run folder {path.parent} is damaged: {str(error).rstrip('.')}."
        raise InputError(what, "Restore it, or fit again.") from error
    return table


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _check_matrix(name: str, rows: Sequence[Sequence[float]], shape: tuple[int, int]) -> None:
    right = len(rows) == shape[0] and all(len(row) == shape[1] for row in rows)
    _check(right, f"{name} in run.json is not {shape[0]} x {shape[1]}")
    _check(all(np.isfinite(row).all() for row in rows), f"{name} in run.json has a value that is no number")


def _check_bootstrap(found: Bootstrap, p: int) -> None:
    for name in ("edge", "ancestor"):
        _check_matrix(f"bootstrap.{name}", getattr(found, name), (p, p))
    _check_matrix("bootstrap.assignment", found.assignment, (len(found.perturbations), p))
    _check(len(found.program) == p, "bootstrap.program in run.json has another length")
    _check(len(found.shift_error) == len(found.perturbations), "bootstrap.shift_error in run.json has another length")


def _check_names(where: str, names: Iterable[str], known: set[str]) -> None:
    unknown = sorted({*names} - known)
    _check(not unknown, f"{where} names {unknown[0] if unknown else ''!r}, which is not in the run")


def _check_pairs(edges: pd.DataFrame, pairs: pd.DataFrame | None, programs: Sequence[str]) -> None:
    by = ["source", "target", *(["context"] if "context" in edges else [])]
    _check(not edges.duplicated(by).any(), "dag.csv has an edge twice")
    contexts = {"", *edges.get("context", ())}
    for context in sorted(contexts):  # each with what all share
        own = edges[edges["context"].isin(["", context])] if "context" in edges else edges
        graph: nx.DiGraph[str] = nx.DiGraph([*zip(own["source"], own["target"], strict=True)])
        _check(nx.is_directed_acyclic_graph(graph), "dag.csv has a cycle")
    if pairs is not None:
        of = {*zip(pairs["source"], pairs["target"], strict=True)}
        every = {(a, b) for a in programs for b in programs if a != b}
        twice = pairs.duplicated(["source", "target", *(["context"] if "context" in pairs else [])]).any()
        _check(not twice and of == every, "pairs.csv does not have every pair of programs once")
