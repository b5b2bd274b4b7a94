"""Runs with any number of programs and perturbations and any graph, made of numbers alone: no fit, no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from crlseq.data.names import GeneNames
from crlseq.discovery.effects import benjamini_hochberg
from crlseq.run.columns import PAIR_COLUMNS
from crlseq.run.run import Run
from crlseq.run.schema import ProgramRow
from crlseq.run.tables import edge_table, program_labels, program_table


def synthetic_run(
    n_programs: int,
    n_perturbations: int,
    edges: Sequence[tuple[int, int]] = (),
    n_genes: int = 60,
    epochs: int = 8,
    names: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    verdict: str = "identified",
) -> Run:
    """A run in memory; perturbation k targets program k modulo their number, every tenth none."""
    rng = np.random.default_rng(0)
    genes = tuple(genes or [f"GENE{i}" for i in range(n_genes)])
    names = tuple(names or [f"PERT{i}" for i in range(n_perturbations)])
    loading = rng.normal(size=(n_programs, len(genes)))
    adjacency = np.zeros((n_programs, n_programs))
    for i, (a, b) in enumerate(edges):
        adjacency[a, b] = 0.5 if i % 2 else -0.7
    silent = np.arange(len(names)) % 10 == 9
    program = np.array([f"P{k % n_programs}" for k in range(len(names))], dtype=object)

    def claim(values: np.ndarray) -> np.ndarray:
        return np.where(silent, np.nan, values)

    fdr = np.where(silent, 0.5, 0.002)
    interventions = pd.DataFrame({
        "perturbation": pd.Series(names, dtype=object), "program": np.where(silent, "", program),
        "weight": claim(np.ones(len(names))), "shift": claim(rng.normal(size=len(names)) * 3),
        "retention": claim(rng.random(len(names))), "n_cells": rng.integers(20, 200, len(names)), "p_value": fdr, "fdr": fdr,
        "energy_distance": rng.exponential(size=len(names)), "noise_scale": claim(np.ones(len(names))),
        "support": claim(rng.random(len(names))),
    })  # fmt: skip
    table = program_table(GeneNames(genes, {}), loading, loading)
    labels = program_labels(interventions, n_programs)
    info_programs = [
        {
            "name": f"P{k}", "label": labels[k], "drivers": "", "genes": "", "scale": 1.0, "center": 0.0,
            "variance_explained": float(rng.random() / n_programs), "effect_explained": float(rng.random() / n_programs),
            "stability": 0.9,
        }
        for k in range(n_programs)
    ]  # fmt: skip
    fall = np.exp(-np.arange(epochs) / 2)
    history = pd.DataFrame({"epoch": range(epochs), "mmd": fall, "total": fall, "validation_total": fall + 0.1})
    measured = pd.DataFrame({"condition": pd.Series(names, dtype=object), "split": "test", "n_cells": 30})
    for name, mean in (
        ("mmd2", 0.1),
        ("mmd2_no_change", 0.2),
        ("pearson_delta", 0.6),
        ("l2", 0.5),
        ("l2_no_change", 1.0),
    ):
        measured[name] = mean + 0.05 * rng.normal(size=len(names))
    for name in ("training", "mean"):
        measured[f"pearson_delta_{name}"] = measured["pearson_delta"] - 0.1
        measured[f"l2_{name}"] = measured["l2"] + 0.1
    info: dict[str, Any] = {
        "format": 1, "version": "0.1.0", "seed": 0, "device": "cpu", "threads": 1, "seconds": 1.0, "command": "crlseq fit",
        "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:00:01+00:00", "packages": {"python": "3"},
        "processes": 1, "machine": {"system": "Linux", "architecture": "x86_64", "cores": 2},
        "config": {
            "preset": "default", "training": {"ensemble": 1},
            "data": {"separator": None, "batch_key": None, "hold_out": [], "gene_sets": None},
        },
        "input": {"path": "screen.h5ad", "sha256": "", "n_cells": 100, "n_genes": len(genes)},
        "cells": {"train": 80, "validation": 10, "test": 10, "unused": 0}, "label_reason": "as asked", "control_label": "control",
        "perturbation_key": "perturbation", "n_latents": n_programs, "n_latents_reason": "as asked",
        "preprocessing": {
            "values": "counts", "reason": "whole numbers", "gene_choice": "all genes", "layer": None, "target_sum": 1e4,
            "genes": list(genes), "n_genes_in_file": len(genes), "n_silent_genes": 0,
        },
        "notes": [], "programs": info_programs, "adjacency": adjacency.tolist(), "embeddings": None,
        "guides": None, "gene_sets": None,
        "identification": {"verdict": verdict, "reason": "Because it is."},
        "discovery": None, "conditions": [{"name": name, "perturbations": [name], "cells": {"train": 30}} for name in names],
        "training": {
            "epochs_run": epochs, "best_epoch": epochs - 1, "stopped_early": False, "bandwidth": 1.0, "kept_seed": 0,
            "parts_of_steps": 1, "seed_losses": [],
        },
        "metrics": {"n_detected": int((~silent).sum()), "n_edges": len(edges), "evaluated_on": "test"},
    }  # fmt: skip
    edge_rows = edge_table(adjacency, adjacency != 0, np.abs(adjacency), verdict)
    z = rng.normal(size=(len(names), len(genes))) * 3
    effects = pd.concat([
        pd.DataFrame({
            "perturbation": name, "gene": np.asarray(genes, dtype=object), "change": own / 10, "se": 0.1,
            "log2_fold_change": own / 5, "log2_fold_change_se": 0.2, "p_value": 2 * norm.sf(np.abs(own)),
            "fdr": benjamini_hochberg(2 * norm.sf(np.abs(own))), "program_part": own / 10, "residual": 0.0,
        }).sort_values("p_value")
        for name, own in zip(names, z, strict=True)
    ], ignore_index=True)  # fmt: skip
    return Run(info, table, interventions, edge_rows, history, measured, effect_rows=effects)


def with_info(run: Run, **changes: Any) -> Run:
    """The run with other entries of ``run.json``; of one that is a mapping the keys that are given change."""
    for name, value in changes.items():
        changes[name] = {**(run.info[name] or {}), **value} if isinstance(value, dict) else value
    return replace(run, info={**run.info, **changes})


def program_row(k: int, label: str, genes: str = "", stability: float | None = None) -> ProgramRow:
    """A program of ``run.json`` by its number."""
    return ProgramRow(
        name=f"P{k}", label=label, drivers="", genes=genes, scale=1.0, center=0.0,
        variance_explained=None, effect_explained=None, stability=stability,
    )  # fmt: skip


def found_by_bootstrap(n_programs: int, assignment: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """``discovery`` of ``run.json``, whose bootstrap gave these perturbations to programs by these shares."""
    assignment, square = assignment or {}, np.zeros((n_programs, n_programs)).tolist()
    return {
        "intervention": "hard", "equations": "linear", "held_out": {}, "gain_of_edges": 0.0, "gain_error": 0.0,
        "dispersion": 1.0, "straightened": False, "n_latents_curve": None,
        "bootstrap": {
            "replicates": 20, "failed": 0, "edge": square, "ancestor": square, "program": [1.0] * n_programs,
            "perturbations": list(assignment), "assignment": list(assignment.values()),
            "shift_error": [None] * len(assignment),
        },
    }  # fmt: skip


def with_pairs(run: Run, known: Mapping[tuple[int, int], dict[str, Any]]) -> Run:
    """The run with ``pairs.csv``: 0 ± 0.05, excluded, but for what is ``known`` of pairs."""
    names = run.program_names
    rows = [
        {
            "source": k, "target": i, "change": 0.0, "se": 0.05, "z": 0.0, "z_reversed": 0.0, "fdr": 1.0, "status": "excluded",
            "guards": "", "detectable": 0.2, "robust": False,
        }
        | known.get((a, b), {})
        for a, k in enumerate(names) for b, i in enumerate(names) if a != b
    ]  # fmt: skip
    pairs = pd.DataFrame(rows, columns=list(PAIR_COLUMNS))
    summary = {"counts": pairs["status"].value_counts().to_dict(), "size": 0.3, "edges_misfit": 1.0}
    discovery = (run.info["discovery"] or found_by_bootstrap(len(names))) | {"pairs": summary}
    return replace(run, info={**run.info, "format": 2, "discovery": discovery}, pairs=pairs)
