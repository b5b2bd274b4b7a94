"""Tables and record of a fit: what a `crlseq.run.run.Run` holds, from a fitted model."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from crlseq._version import __version__, package_versions
from crlseq.config import Config
from crlseq.data import splits
from crlseq.data.allocator import give_back
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.genesets import GeneSets
from crlseq.discovery.bootstrap import Stability
from crlseq.discovery.guide_agreement import weak_guides
from crlseq.discovery.negative_controls import Found
from crlseq.discovery.pairs import SIZE, STATUSES
from crlseq.discovery.result import Discovery
from crlseq.evaluation.held_out import evaluate_held_out
from crlseq.evaluation.recovery import closure
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.sparse_decoder import SparseDecoder
from crlseq.pipeline.contexts import with_contexts
from crlseq.pipeline.fitted import FittedRun
from crlseq.pipeline.pairs import pair_table
from crlseq.prediction.intervals import shift_errors
from crlseq.readout.agreement import effect_agreement
from crlseq.readout.covariates import covariate_table
from crlseq.readout.effects import effect_table
from crlseq.readout.ensemble import read_model, seed_agreement
from crlseq.readout.explained import effect_explained, variance_explained
from crlseq.readout.guides import guide_table
from crlseq.readout.interactions import interaction_table
from crlseq.readout.pathways import explained_by_sets, pathway_table
from crlseq.readout.programs import (
    Dag,
    find_dag,
    find_interventions,
    find_programs,
    intervention_table,
    posterior_variance,
)
from crlseq.run.columns import ENSEMBLE_COLUMNS, HIT
from crlseq.run.schema import DETECTABLE_FDR, FORMAT
from crlseq.run.tables import edge_table, program_labels, program_names, program_table, shown
from crlseq.training.combinations import fit_law
from crlseq.training.trainer import Fit
from crlseq.training.warm_start import WarmStart

TOP_GENES = 10  # of a program in run.json


def tables_of(
    fitted: Fit,
    data: PerturbSeqData,
    config: Config,
    tests: dict[str, np.ndarray],
    start: WarmStart | None,
    sets: GeneSets | None = None,
) -> FittedRun:
    """Tables of a fit; ``info`` lacks what only the whole job knows (input, times, command)."""
    discovery, model = None if start is None else start.discovery, fitted.model
    read = find_programs(model, data, discovery is not None)
    found = find_interventions(model, read, _with_claims(tests, config))
    dag = find_dag(model, read, config.model, discovery)
    penetrance = model.penetrance.double().numpy()
    effects, knock_down, arms = effect_table(data, read, found, penetrance)
    give_back()  # its rows lie scattered among much more that was freed
    agreed = effect_agreement(data, read, found, penetrance) | knock_down
    edge_support, target_support, program_support = _support(discovery, len(read.scale), len(found.target))
    sparse = model.decoder if isinstance(model.decoder, SparseDecoder) else None
    programs = program_table(data.preprocessing.gene_names, read.loading, read.total_effect, sparse is not None)
    later = _hit(discovery, len(found.target)) | agreed
    interventions = intervention_table(data.perturbation_names, found, target_support, later, tests)
    edges = edge_table(dag.weights, dag.declared, edge_support, dag.identification.verdict)
    combined, interactions = _combined(model, data, _by_equations(model, found.target, dag), config.training.seed)
    give_back()  # what threads freed: the cells that are compared next take as much again
    evaluation = evaluate_held_out(model, data, config.training.seed)
    pathways = None if sets is None else pathway_table(model, data, read, sets)
    numbers = {
        "scale": read.scale,
        "center": read.center,
        "variance_explained": variance_explained(model, data),
        "effect_explained": effect_explained(model, data, found.target),
        "stability": program_support,
    }
    info = _fit_rows(fitted, data, config) | {
        "n_latents": len(read.scale),
        "programs": _program_rows(programs, interventions, numbers),
        "adjacency": dag.weights.tolist(),
        "identification": dag.identification.model_dump(mode="json"),
        "discovery": None
        if discovery is None or not discovery.held_out
        else _discovery_row(discovery, data.perturbation_names),
        "sparsity": None if sparse is None else _sparsity_row(sparse, programs),
        "combinations": combined,
        "training": _training_row(fitted),
        "gene_sets": None if sets is None else _set_row(fitted, data, start, sets),
        "metrics": _metrics(evaluation, interventions, dag),
        "positions": _positions(data, arms),
        "contexts": None,
    }
    ordering = None if discovery is None else discovery.ordering
    pairs = None if ordering is None else pair_table(ordering.pairs, ordering.robust, np.sign(read.scale))
    history = pd.DataFrame(fitted.history, columns=None if fitted.history else ["epoch", "total"])
    weights = (dict(model.state_dict()), fitted.architecture)
    run = FittedRun(
        info, programs, interventions, edges, history.astype({"epoch": int, "total": float}), evaluation,
        weights=weights, law=model.law, effect_rows=effects, arms=arms, covariates=covariate_table(data, tests["beyond"]), interactions=interactions, ensemble=_seeds(fitted, data, config, interventions, edges), pathways=pathways, pairs=pairs,
        second_targets=None if discovery is None else _second_targets(discovery, data, np.sign(read.scale)),
    )  # fmt: skip
    return with_contexts(run, data, discovery, read.scale)


def with_shift_errors(run: FittedRun, data: PerturbSeqData) -> FittedRun:
    """The run with ``shift_se`` among its interventions, in the program's standard deviations."""
    places = pd.Index(run.program_names).get_indexer(pd.Index(run.interventions["program"]))
    scale = np.append([abs(program.scale) for program in run.facts.programs], np.nan)[places]
    errors = shift_errors(run, posterior_variance(run.model, data)) / scale
    return replace(run, interventions=run.interventions.assign(shift_se=errors))


def with_guides(run: FittedRun, data: PerturbSeqData, guides: pd.DataFrame, start: WarmStart | None) -> FittedRun:
    """The run with ``guides.csv``, of the screen with all of its guides; as it is where none were read."""
    if data.guides is None:
        return run
    table = guide_table(data, guides, None if start is None else start.discovery.hit)
    about = {"n_compared": len(table), "weak": weak_guides(table)}
    return replace(run, guides=table, info=run.info | {"guides": data.guides.record | about})


def negative_controls(undone: Found, warm: WarmStart | None) -> dict[str, int]:
    """What was found where there is nothing, for ``run.json``."""
    pairs = None if warm is None else warm.discovery.of_shifts
    row = {"perturbations": undone.of, "detected": undone.found}
    return row | {"pairs": 0 if pairs is None else pairs.of, "ordered": 0 if pairs is None else pairs.found}


def _positions(data: PerturbSeqData, arms: pd.DataFrame | None) -> dict[str, Any] | None:
    """From where positions of genes are known, and of how many perturbations arms were tested."""
    if data.positions is None or arms is None:
        return None
    return {"source": data.positions.source, "n_tested": int(arms["perturbation"].nunique())}


def _seeds(
    fitted: Fit, data: PerturbSeqData, config: Config, interventions: pd.DataFrame, edges: pd.DataFrame
) -> pd.DataFrame | None:
    """``ensemble.csv``; None for one seed."""
    if config.training.ensemble > 1 and not len(fitted.model.scm.graph):  # no seed claims anything
        return pd.DataFrame(columns=list(ENSEMBLE_COLUMNS))
    if not fitted.others:
        return None
    kept, *others = (read_model(each, data) for each in (fitted.model, *fitted.others))
    return seed_agreement(kept, others, interventions, edges)


def _combined(
    model: DiscrepancyVAE, data: PerturbSeqData, equations: np.ndarray, seed: int
) -> tuple[dict[str, Any] | None, pd.DataFrame | None]:
    """Gives the model its law of combination, and returns that in short and its interactions; None without the one or other."""
    if model.log_noise is None or not len(model.scm.graph):
        return None, None
    fitted = fit_law(model, data, equations, seed)
    model.law = fitted.law
    table = interaction_table(data, fitted, seed) if fitted.measured.parts else None
    return fitted.summary(), table


def _by_equations(model: DiscrepancyVAE, target: np.ndarray, dag: Dag) -> np.ndarray:
    """(q, 2) ascending pairs of perturbations whose combination the equations tell: one cuts its program, ``target`` (K,),
    off from that of the other, upstream of it in an identified graph.
    """
    none = np.zeros((0, 2), dtype=np.int64)
    if dag.identification.verdict != "identified" or model.scm.kind.retention == 1.0:
        return none
    known = np.flatnonzero(target >= 0)
    upstream = closure(dag.declared)[np.ix_(target[known], target[known])]
    first, second = np.nonzero(np.triu(upstream | upstream.T, 1))
    return np.stack([known[first], known[second]], 1)


def _with_claims(tests: dict[str, np.ndarray], config: Config) -> np.ndarray:
    """(K,) bool: perturbations that something is claimed of, all of them in the published model.

    Elsewhere there is no claim without a detectable effect, whatever a network learned, nor where there are cells and
    no controls to compare them with.
    """
    untested = np.isnan(tests["p_value"]) & (tests["n_cells"] > 0)
    claims: np.ndarray = ~((tests["fdr"] > DETECTABLE_FDR) | untested) | (config.model.method == "gradient")
    return claims


def _support(discovery: Discovery | None, n_latents: int, n_targets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bootstrap support of edges (p, p), of targets (K,) and of programs (p,); NaN where there is none."""
    targets, stability = np.full(n_targets, np.nan), None if discovery is None else discovery.stability
    if discovery is None or stability is None:
        return np.full((n_latents, n_latents), np.nan), targets, np.full(n_latents, np.nan)
    targets[discovery.environments] = stability.target.numpy()
    return _support_of_graph(discovery, stability)[0], targets, stability.program.numpy()


def _support_of_graph(discovery: Discovery, stability: Stability) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap support of edges and of ancestry (p, p): the likelihood's, or where the verdict is not on its graph, that
    of what interventions change.
    """
    if discovery.ordering is None or discovery.verdict.by_likelihood:
        return stability.edge.numpy(), stability.ancestor.numpy()
    return discovery.ordering.support, discovery.ordering.ancestor


def _hit(discovery: Discovery | None, n: int) -> dict[str, np.ndarray]:
    """`HIT`: shares (K,) of hit cells and of what perturbations leave in place, with errors, NaN where they cannot be told."""
    found = {name: np.full(n, np.nan) for name in HIT}
    if discovery is not None and discovery.ordering is not None:
        found["penetrance"], found["penetrance_error"] = discovery.penetrance
        for c, (share, error) in discovery.ordering.retained.items():
            found["retained"][discovery.acting[c]], found["retained_error"][discovery.acting[c]] = share, error
    return found


def _second_targets(discovery: Discovery, data: PerturbSeqData, sign: np.ndarray) -> pd.DataFrame | None:
    """``second_targets.csv``: `crlseq.run.columns.SECOND_COLUMNS` of those that are seen, the surest first; ``sign`` (p,) of
    the latents' programs. Shifts of hit cells: of all cells, over penetrance.
    """
    second, acting = discovery.second, discovery.acting
    if second is None:
        return None
    share = np.nan_to_num(discovery.penetrance[0][acting], nan=1.0)[:, None]
    p = second.fdr.shape[1]
    seen = (second.fdr <= DETECTABLE_FDR) & (np.arange(p) != discovery.target[acting][:, None])
    k, program = np.nonzero(seen)
    table = pd.DataFrame({
        "perturbation": np.asarray(data.perturbation_names, dtype=object)[acting][k],
        "program": np.asarray(program_names(p), dtype=object)[program], "shift": (second.shift * sign / share)[seen],
        "se": (second.error / share)[seen], "z": (second.z * sign)[seen], "fdr": second.fdr[seen],
    })  # fmt: skip
    return table.sort_values("fdr", kind="stable", ignore_index=True)


def _fit_rows(fitted: Fit, data: PerturbSeqData, config: Config) -> dict[str, Any]:
    """What was fitted, by which versions, and how cells, labels and genes were read."""
    return {
        "format": FORMAT,
        "version": __version__,
        "config": config.model_dump(mode="json"),
        "seed": config.training.seed,
        "device": fitted.device,
        "threads": torch.get_num_threads(),
        "packages": package_versions(),
        "var_names_sha256": hashlib.sha256("\n".join(data.genes).encode()).hexdigest(),
        "perturbation_key": data.labels.key,
        "control_label": data.labels.control_label,
        "control_labels": list(data.labels.control_labels),
        "label_reason": data.labels.reason,
        "guides": None if data.guides is None else data.guides.record,
        "preprocessing": asdict(data.preprocessing),
        "cells": {name: int((data.split == code).sum()) for code, name in enumerate(splits.SPLITS)},
        "conditions": _condition_rows(data),
        "notes": [*data.notes, *fitted.notes],
    }


def _training_row(fitted: Fit) -> dict[str, Any]:
    return {
        "epochs_run": len(fitted.history),
        "best_epoch": fitted.best_epoch,
        "stopped_early": fitted.stopped_early,
        "bandwidth": fitted.bandwidth,
        "kept_seed": fitted.seed,
        "parts_of_steps": fitted.parts_of_steps,
        "seed_losses": list(fitted.seed_losses),
    }


def _set_row(fitted: Fit, data: PerturbSeqData, start: WarmStart | None, sets: GeneSets) -> dict[str, Any]:
    """What ``run.json`` holds of the sets that the encoder reads."""
    row: dict[str, Any] = {
        "n_sets": len(sets.names),
        "n_small": sets.n_small,
        "n_same": len(sets.lines) - len(sets.names),
        "n_genes": int(sets.members.any(0).sum()),
    }
    if start is not None:
        shares = explained_by_sets(fitted.model, data, start)
        for name, values in zip(("explained", "explained_by_all_genes"), shares, strict=True):
            row[name] = [None if np.isnan(value) else float(value) for value in values]
    return row


def _condition_rows(data: PerturbSeqData) -> list[dict[str, Any]]:
    rows = []
    for c, (name, perturbations) in enumerate(zip(data.condition_names, data.conditions, strict=True)):
        counts = np.bincount(data.split[data.condition == c], minlength=len(splits.SPLITS))
        cells = {code_name: int(n) for code_name, n in zip(splits.SPLITS, counts, strict=True) if n}
        parts = [data.perturbation_names[k] for k in perturbations]
        rows.append({"name": name, "perturbations": parts, "cells": cells})
    return rows


def _program_rows(
    programs: pd.DataFrame, interventions: pd.DataFrame, numbers: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Name, label, drivers and genes of each program, and its `numbers` (p,) by name; None for NaN."""
    labels = program_labels(interventions, len(numbers["scale"]))
    top = programs[(programs["rank"] <= TOP_GENES) & (programs["loading"] != 0)]
    genes = shown(top).groupby(top["program"]).agg(", ".join)
    rows = []
    for k, label in enumerate(labels):
        drivers = interventions.loc[interventions["program"] == f"P{k}", "perturbation"]
        rows.append({
            "name": f"P{k}", "label": label, "drivers": ", ".join(map(str, drivers)), "genes": genes.get(f"P{k}", ""),
            **{name: None if np.isnan(values[k]) else float(values[k]) for name, values in numbers.items()},
        })  # fmt: skip
    return rows


def _metrics(evaluation: pd.DataFrame, interventions: pd.DataFrame, dag: Dag) -> dict[str, Any]:
    detected = int((interventions["fdr"] <= DETECTABLE_FDR).sum())
    metrics: dict[str, Any] = {"n_detected": detected, "n_edges": int(dag.declared.sum())}
    if len(evaluation):
        metrics["evaluated_on"] = str(evaluation["split"].iloc[0])
        for column in ("mmd2", "mmd2_no_change", "pearson_delta", "l2", "l2_no_change"):
            mean = evaluation[column].mean()
            metrics[column] = None if np.isnan(mean) else float(mean)
    return metrics


def _discovery_row(discovery: Discovery, perturbations: tuple[str, ...]) -> dict[str, Any]:
    """What ``run.json`` holds of a discovery."""
    stability, ordering, bootstrap = discovery.stability, discovery.ordering, None
    if stability is not None:
        edge, ancestor = _support_of_graph(discovery, stability)
        bootstrap = {
            "replicates": stability.n,
            "failed": stability.failed,
            "edge": edge.tolist(),
            "ancestor": ancestor.tolist(),
            "program": stability.program.tolist(),
            "perturbations": [perturbations[k] for k in discovery.environments],
            "assignment": stability.assignment.tolist(),
            "shift_error": [None if np.isnan(value) else value for value in stability.shift_error.tolist()],
        }
    return {
        "intervention": discovery.kind,
        "equations": discovery.equations,
        "held_out": discovery.held_out,
        "gain_of_edges": discovery.gain,
        "gain_error": discovery.gain_error,
        "dispersion": discovery.misfit,
        "straightened": discovery.straightened,
        "n_latents_curve": None if discovery.choice is None else discovery.choice.curve,
        "bootstrap": bootstrap,
        "pairs": None
        if ordering is None
        else {
            "counts": {name: int(ordering.pairs.have(name).sum()) for name in STATUSES},
            "size": SIZE,
            "edges_misfit": ordering.direct.misfit,
        },
    }


def _sparsity_row(decoder: SparseDecoder, programs: pd.DataFrame) -> dict[str, Any]:
    """Share of the slab, genes and anchors of each program, in order."""
    by_program = programs.groupby("program", sort=False)
    return {
        "share": decoder.output.share.tolist(),
        "genes": by_program["loading"].agg(lambda values: int((values != 0).sum())).tolist(),
        "anchors": by_program["anchor"].sum().tolist(),
    }
