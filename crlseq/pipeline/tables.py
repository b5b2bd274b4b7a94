"""Tables and record of a fit: what a `crlseq.run.run.Run` holds, from a fitted model."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd
import torch

from crlseq._version import __version__
from crlseq.config import Config
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.genesets import GeneSets
from crlseq.discovery.result import Discovery
from crlseq.evaluation.held_out import evaluate_held_out
from crlseq.model.sparse_decoder import SparseDecoder
from crlseq.readout.dag import Dag, find_dag
from crlseq.readout.ensemble import read_model, seed_agreement
from crlseq.readout.explained import effect_explained, variance_explained
from crlseq.readout.interventions import find_interventions
from crlseq.readout.pathways import explained_by_sets, pathway_table
from crlseq.readout.programs import find_programs
from crlseq.run.run import Run
from crlseq.run.schema import DETECTABLE_FDR, FORMAT
from crlseq.run.tables import edge_table, intervention_table, program_labels, program_table
from crlseq.training.trainer import Fit, resolve_device
from crlseq.training.warm_start import WarmStart

PACKAGES = ("torch", "numpy", "scipy", "pandas", "anndata", "scanpy", "scikit-learn")


def tables_of(
    fitted: Fit,
    data: PerturbSeqData,
    config: Config,
    tests: dict[str, np.ndarray],
    start: WarmStart | None,
    sets: GeneSets | None = None,
) -> Run:
    """Tables of a fit; ``info`` lacks what only the whole job knows (input, times, command)."""
    discovery = None if start is None else start.discovery
    programs = find_programs(fitted.model, data)
    # Without a detectable effect there is no claim, whatever a network learned, nor where there are cells and no
    # controls to compare them with; the published model claims all.
    untold = np.isnan(tests["p_value"]) & (tests["n_cells"] > 0)
    silent = ((tests["fdr"] > DETECTABLE_FDR) | untold) & (config.model.method != "gradient")
    found = find_interventions(fitted.model, programs, ~silent)
    dag = find_dag(fitted.model, programs, config.model, discovery)
    decoder = fitted.model.decoder
    program_rows = program_table(
        data.genes, programs.loading, programs.total_effect, isinstance(decoder, SparseDecoder)
    )
    support = np.full(dag.weights.shape, np.nan)
    target_support = np.full(len(found.target), np.nan)
    stability = None if discovery is None else discovery.stability
    if discovery is not None and stability is not None:
        support = stability.edge.numpy()
        target_support[discovery.environments] = stability.target.numpy()
    intervention_rows = intervention_table(
        data.perturbation_names,
        found.target,
        found.weight,
        found.shift,
        found.retention,
        found.noise_scale,
        target_support,
        tests,
    )
    edges = edge_table(dag.weights, dag.declared, support, dag.identification.verdict)
    evaluation = evaluate_held_out(fitted.model, data, config.training.seed)
    pathways = None if sets is None else pathway_table(fitted.model, data, programs, sets)
    info = {
        "format": FORMAT,
        "version": __version__,
        "config": config.model_dump(mode="json"),
        "seed": config.training.seed,
        "device": str(resolve_device(config.training.device)),
        "threads": torch.get_num_threads(),
        "packages": _packages(),
        "var_names_sha256": hashlib.sha256("\n".join(data.genes).encode()).hexdigest(),
        "perturbation_key": data.labels.key,
        "control_label": data.labels.control_label,
        "label_reason": data.labels.reason,
        "guides": None if data.guides is None else data.guides.record,
        "preprocessing": asdict(data.preprocessing),
        "cells": {name: int((data.split == code).sum()) for code, name in enumerate(splits.SPLITS)},
        "conditions": _condition_rows(data),
        "notes": [*data.notes, *fitted.notes],
        "n_latents": len(programs.scale),
        "programs": _program_rows(
            program_rows,
            intervention_rows,
            {
                "scale": programs.scale,
                "center": programs.center,
                "variance_explained": variance_explained(fitted.model, data),
                "effect_explained": effect_explained(fitted.model, data, found.target),
                "stability": np.full(len(programs.scale), np.nan) if stability is None else stability.program.numpy(),
            },
        ),
        "adjacency": dag.weights.tolist(),
        "identification": dag.identification.model_dump(),
        "discovery": None if discovery is None else _discovery_row(discovery, data.perturbation_names),
        "sparsity": _sparsity_row(decoder, program_rows) if isinstance(decoder, SparseDecoder) else None,
        "training": {
            "epochs_run": len(fitted.history),
            "best_epoch": fitted.best_epoch,
            "stopped_early": fitted.stopped_early,
            "bandwidth": fitted.bandwidth,
            "kept_seed": fitted.seed,
            "parts_of_steps": fitted.parts,
            "seed_losses": list(fitted.seed_losses),
        },
        "gene_sets": None if sets is None else _set_row(fitted, data, start, sets),
        "metrics": _metrics(evaluation, intervention_rows, dag),
    }
    agreement = None
    if fitted.others:
        kept, *others = (read_model(model.cpu(), data) for model in (fitted.model, *fitted.others))
        agreement = seed_agreement(kept, others, intervention_rows, edges)
    history = pd.DataFrame(fitted.history, columns=None if fitted.history else ["epoch", "total"]).astype(
        {"epoch": int, "total": float}
    )
    weights = ({name: value.cpu() for name, value in fitted.model.state_dict().items()}, fitted.architecture)
    return Run(
        info, program_rows, intervention_rows, edges, history, evaluation,
        weights=weights, ensemble=agreement, pathways=pathways,
    )  # fmt: skip


def _set_row(fitted: Fit, data: PerturbSeqData, start: WarmStart | None, sets: GeneSets) -> dict[str, Any]:
    """What ``run.json`` says of the sets that the encoder reads."""
    row: dict[str, Any] = {
        "n_sets": len(sets.names),
        "n_small": sets.n_small,
        "n_same": len(sets.lines) - len(sets.names),
    }
    row["n_genes"] = int(sets.members.any(0).sum())
    if start is not None:
        shares = explained_by_sets(fitted.model, data, start)
        for name, values in zip(("explained", "explained_by_all_genes"), shares, strict=True):
            row[name] = [None if np.isnan(value) else float(value) for value in values]
    return row


def _condition_rows(data: PerturbSeqData) -> list[dict[str, Any]]:
    rows = []
    for c, (name, parts) in enumerate(zip(data.condition_names, data.conditions, strict=True)):
        counts = np.bincount(data.split[data.condition == c], minlength=len(splits.SPLITS))
        cells = {code_name: int(n) for code_name, n in zip(splits.SPLITS, counts, strict=True) if n}
        rows.append({"name": name, "perturbations": [data.perturbation_names[k] for k in parts], "cells": cells})
    return rows


def _program_rows(
    programs: pd.DataFrame, interventions: pd.DataFrame, numbers: dict[str, np.ndarray], top: int = 10
) -> list[dict[str, Any]]:
    """Name, label, drivers and genes of each program, and its `numbers` (p,) by name; None for NaN."""
    labels = program_labels(interventions, len(numbers["scale"]))
    genes = programs[(programs["rank"] <= top) & (programs["loading"] != 0)].groupby("program")["gene"].agg(", ".join)
    rows = []
    for k, label in enumerate(labels):
        drivers = interventions.loc[interventions["program"] == f"P{k}", "perturbation"]
        rows.append({
            "name": f"P{k}", "label": label, "drivers": ", ".join(map(str, drivers)), "genes": genes.get(f"P{k}", ""),
            **{name: None if np.isnan(values[k]) else float(values[k]) for name, values in numbers.items()},
        })  # fmt: skip
    return rows


def _metrics(evaluation: pd.DataFrame, interventions: pd.DataFrame, dag: Dag) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "n_detected": int((interventions["fdr"] <= 0.05).sum()),
        "n_edges": int(dag.declared.sum()),
    }
    if len(evaluation):
        metrics["evaluated_on"] = str(evaluation["split"].iloc[0])
        for column in ("mmd2", "mmd2_no_change", "pearson_delta", "l2", "l2_no_change"):
            mean = evaluation[column].mean()
            metrics[column] = None if np.isnan(mean) else float(mean)
    return metrics


def _discovery_row(discovery: Discovery, perturbations: tuple[str, ...]) -> dict[str, Any]:
    """What ``run.json`` says of a discovery."""
    row: dict[str, Any] = {
        "intervention": discovery.kind,
        "equations": discovery.equations,
        "held_out": discovery.held_out,
        "gain_of_edges": discovery.gain,
        "gain_error": discovery.gain_error,
        "dispersion": discovery.dispersion,
        "straightened": discovery.straightened,
        "n_latents_curve": None if discovery.choice is None else discovery.choice.curve,
        "bootstrap": None,
    }
    if discovery.stability is not None:
        stability = discovery.stability
        row["bootstrap"] = {
            "replicates": stability.n,
            "failed": stability.failed,
            "edge": stability.edge.tolist(),
            "ancestor": stability.ancestor.tolist(),
            "program": stability.program.tolist(),
            "perturbations": [perturbations[k] for k in discovery.environments],
            "assignment": stability.assignment.tolist(),
            "shift_error": [None if np.isnan(value) else value for value in stability.shift_error.tolist()],
        }
    return row


def _sparsity_row(decoder: SparseDecoder, programs: pd.DataFrame) -> dict[str, Any]:
    """Share of the slab, genes and anchors of each program, in order."""
    by_program = programs.groupby("program", sort=False)
    return {
        "share": decoder.output.share.tolist(),
        "genes": by_program["loading"].agg(lambda values: int((values != 0).sum())).tolist(),
        "anchors": by_program["anchor"].sum().tolist(),
    }


def _packages() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a vendored or renamed build: the fit does not depend on the number
            found[name] = "unknown"
    return found
