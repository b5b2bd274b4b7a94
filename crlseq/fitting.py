"""From a file to a finished run folder: read, fit, analyse, write whole or not at all."""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from crlseq import __version__
from crlseq.analysis.dag import Dag, find_dag
from crlseq.analysis.effects import effect_tests
from crlseq.analysis.interventions import find_interventions
from crlseq.analysis.prediction import evaluate_held_out
from crlseq.analysis.programs import find_programs
from crlseq.config import Config, make_config, to_toml
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.embeddings import Embeddings, read_embeddings
from crlseq.data.projection import Projection, principal_components
from crlseq.errors import InputError, UsageError
from crlseq.export import DETECTABLE_FDR, edge_table, intervention_table, program_labels, program_table
from crlseq.extrapolation import FILE as EMBEDDINGS
from crlseq.extrapolation import Extrapolation, fit_extrapolation, refuse_strangers
from crlseq.report import write_report
from crlseq.run import FORMAT, Run, load
from crlseq.runfolder import move_into_place, partial_of, refuse_output, working_folder
from crlseq.training.checkpoint import save_weights
from crlseq.training.discovery import Discovery, discover
from crlseq.training.threads import on_threads
from crlseq.training.trainer import Fit, fit_model, resolve_device
from crlseq.training.warm_start import WarmStart

N_COMPONENTS = 50
FEW_GENES = 2000  # below, the products of a training step are too small to share among threads
PACKAGES = ("torch", "numpy", "scipy", "pandas", "anndata", "scanpy", "scikit-learn")


@dataclass(frozen=True)
class Progress:
    """What a fit tells while it runs; by default it says nothing."""

    stage: Callable[[str], None] = lambda text: None
    note: Callable[[str], None] = lambda text: None
    epoch: Callable[[dict[str, float], int], None] = lambda record, n_epochs: None


def fit(
    source: str | Path | ad.AnnData,
    output: str | Path | None = None,
    *,
    preset: str | None = None,
    config: Config | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Run:
    """Fit a Discrepancy-VAE to a Perturb-seq screen.

    Parameters
    ----------
    source
        A ``.h5ad`` file, a zarr store, or an AnnData in memory.
    output
        Run folder to write; None keeps the run in memory.
    preset
        ``default`` or ``paper``.
    config
        A whole configuration, in place of `preset` and `options`.
    resume
        Go on with an unfinished fit of the same input and options.
    force
        Replace a run, finished or not, that lies at `output`.
    options
        Fields of `crlseq.config.DataConfig`, `ModelConfig` and `TrainingConfig` by name, such as
        ``n_latents=8``, ``perturbation_key="condition"``, ``epochs=50``, ``seed=1``.

    Returns
    -------
    The finished run.

    Raises
    ------
    InputError
        If the screen cannot be used or the output cannot be written.
    UsageError
        If options contradict each other or are out of range.
    ConvergenceError
        If the loss is not finite.
    """
    progress = progress or Progress()
    if config is None:
        config = make_config(preset, **options)
    elif options or preset:
        raise UsageError("A configuration and single options were both given.", "Give one of them.")
    if resume and output is None:
        raise UsageError("There is nothing to resume without an output.", "Give the folder of the unfinished run.")
    resolve_device(config.training.device)  # fails before anything is read
    if output is None:
        return _fit(source, None, None, config, progress)
    target = Path(output) if Path(output).name not in ("", "..") else Path(output).resolve()
    if resume and (target / "run.json").is_file():
        run = load(target)
        if run.info["config"] != config.model_dump(mode="json"):
            raise InputError(
                f"The run {target} is finished, but was fitted with other options.",
                "Choose another --output, or replace it with --force and without --resume.",
            )
        progress.note(f"{target} is finished already.")
        return run
    refuse_output(target, resume, force)
    return _fit(source, target, partial_of(target), config, progress, resume)


def _fit(
    source: str | Path | ad.AnnData,
    target: Path | None,
    partial: Path | None,
    config: Config,
    progress: Progress,
    resume: bool = False,
) -> Run:
    started = datetime.now(UTC)
    training = config.training
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    table = None if config.data.embeddings is None else read_embeddings(config.data.embeddings)
    progress.stage("reading the screen")
    threads = torch.get_num_threads()
    data = read_data(source, config.data, training.seed)
    torch.set_num_threads(threads)  # numba, which scanpy starts to choose genes, sets its own number
    if table is not None:
        refuse_strangers(table, data.perturbation_names, str(config.data.embeddings))
    digest = _sha256(source)
    for note in data.notes:
        progress.note(note)
    progress.stage("testing which perturbations have an effect")
    projection = principal_components(data, N_COMPONENTS, training.seed)
    tests = effect_tests(data, projection.scores, training.seed)
    start, n_latents, reason = _start(data, config, projection, tests, progress)
    identity = hashlib.sha256(f"{__version__}\n{digest}\n{n_latents}\n{to_toml(config)}".encode()).hexdigest()
    with working_folder(partial, resume) as folder:
        progress.stage("fitting")
        with on_threads(1 if training.threads is None and data.n_genes < FEW_GENES else torch.get_num_threads()):
            checkpoint = folder and folder / "resume.pt"
            fitted = fit_model(data, config, n_latents, checkpoint, identity, progress.epoch, start)
        progress.stage("reading off programs, interventions and the DAG")
        fitted.model.cpu()
        run = _analyse(fitted, data, config, tests, start)
        found = None if table is None else _extrapolation(fitted, data, table, progress)
        info = run.info | {
            "command": shlex.join(["crlseq", *sys.argv[1:]]) if Path(sys.argv[0]).name.startswith(("crlseq", "scanpy-crlseq", "__main__")) else "crlseq.fit",
            "input": {
                "path": "in memory" if isinstance(source, ad.AnnData) else str(Path(source).resolve()),
                "sha256": digest,
                "n_cells": int(data.x.shape[0]),
                "n_genes": data.preprocessing.n_genes_in_file,
            },
            "embeddings": None if found is None else found.summary(),
            "n_latents_reason": reason,
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - started).total_seconds(), 2),
        }  # fmt: skip
        run = Run(
            info, run.programs, run.interventions, run.edges, run.history, run.evaluation,
            weights=run.weights, splits=pd.Series(np.array(splits.SPLITS)[data.split], index=data.cell_names),
            map=found,
        )  # fmt: skip
        if folder is None or target is None:
            return run
        progress.stage("writing")
        run.write_tables(folder)
        assert run.weights is not None
        save_weights(folder / "model.safetensors", *run.weights)
        run.write_h5ad(source, folder / "crlseq.h5ad")
        if found is not None:
            found.to_anndata().write_h5ad(folder / EMBEDDINGS, compression="gzip")
        write_report(run, folder / "report.html")
    assert partial is not None
    move_into_place(partial, target)
    return load(target)


def _analyse(
    fitted: Fit, data: PerturbSeqData, config: Config, tests: dict[str, np.ndarray], start: WarmStart | None
) -> Run:
    """Tables of a fit; ``info`` lacks what only the whole job knows (input, times, command)."""
    discovery = None if start is None else start.discovery
    programs = find_programs(fitted.model, data)
    # Without a detectable effect there is no claim, whatever a network learned; the published model claims all.
    silent = (tests["fdr"] > DETECTABLE_FDR) & (config.model.method != "gradient")
    found = find_interventions(fitted.model, programs, ~silent)
    dag = find_dag(fitted.model, programs, config.model, discovery)
    program_rows = program_table(data.genes, programs.loading, programs.total_effect)
    support = np.full(dag.weights.shape, np.nan)
    target_support = np.full(len(found.target), np.nan)
    if discovery is not None and discovery.stability is not None:
        support = discovery.stability.edge.numpy()
        target_support[discovery.environments] = discovery.stability.target.numpy()
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
        "preprocessing": asdict(data.preprocessing),
        "cells": {name: int((data.split == code).sum()) for code, name in enumerate(splits.SPLITS)},
        "conditions": _condition_rows(data),
        "notes": list(data.notes),
        "n_latents": len(programs.scale),
        "programs": _program_rows(program_rows, intervention_rows, programs.scale, programs.center),
        "adjacency": dag.weights.tolist(),
        "identification": asdict(dag.identification),
        "discovery": None if discovery is None else _discovery_row(discovery, data.perturbation_names),
        "training": {
            "epochs_run": len(fitted.history),
            "best_epoch": fitted.best_epoch,
            "stopped_early": fitted.stopped_early,
            "bandwidth": fitted.bandwidth,
        },
        "metrics": _metrics(evaluation, intervention_rows, dag),
    }
    history = pd.DataFrame(fitted.history, columns=None if fitted.history else ["epoch", "total"]).astype(
        {"epoch": int, "total": float}
    )
    weights = ({name: value.cpu() for name, value in fitted.model.state_dict().items()}, fitted.architecture)
    return Run(info, program_rows, intervention_rows, edges, history, evaluation, weights=weights)


def _extrapolation(fitted: Fit, data: PerturbSeqData, table: Embeddings, progress: Progress) -> Extrapolation:
    """The map from gene vectors to what the fitted perturbations do."""
    cells = data.cells_by_condition(splits.TRAIN)
    own = np.zeros(len(data.perturbation_names), dtype=bool)
    own[[parts[0] for c, parts in enumerate(data.conditions) if len(parts) == 1 and len(cells[c])]] = True
    control = data.dense(cells[0][np.linspace(0, len(cells[0]) - 1, min(500, len(cells[0]))).astype(int)])
    found = fit_extrapolation(fitted.model, table, data.perturbation_names, own, control)
    progress.note(found.in_words())
    return found


def _condition_rows(data: PerturbSeqData) -> list[dict[str, Any]]:
    rows = []
    for c, (name, parts) in enumerate(zip(data.condition_names, data.conditions, strict=True)):
        counts = np.bincount(data.split[data.condition == c], minlength=len(splits.SPLITS))
        cells = {code_name: int(n) for code_name, n in zip(splits.SPLITS, counts, strict=True) if n}
        rows.append({"name": name, "perturbations": [data.perturbation_names[k] for k in parts], "cells": cells})
    return rows


def _program_rows(
    programs: pd.DataFrame, interventions: pd.DataFrame, scale: np.ndarray, center: np.ndarray, top: int = 10
) -> list[dict[str, Any]]:
    labels = program_labels(interventions, len(scale))
    genes = programs[programs["rank"] <= top].groupby("program")["gene"].agg(", ".join)
    rows = []
    for k, label in enumerate(labels):
        drivers = interventions.loc[interventions["program"] == f"P{k}", "perturbation"]
        rows.append({
            "name": f"P{k}", "label": label, "drivers": ", ".join(map(str, drivers)), "genes": genes[f"P{k}"],
            "scale": float(scale[k]), "center": float(center[k]),
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


def _start(
    data: PerturbSeqData, config: Config, projection: Projection, tests: dict[str, np.ndarray], progress: Progress
) -> tuple[WarmStart | None, int, str]:
    """What the fit starts from (None: random weights), the number of programs, and why that many."""
    asked, k = config.model.n_latents, len(data.perturbation_names)
    effect = np.where(tests["fdr"] <= DETECTABLE_FDR, np.maximum(tests["energy"], 1e-12), 0.0)  # NaN counts as none
    # The ablation without structural equations has no graph that a likelihood could find.
    gradient = config.model.method == "gradient" or not config.model.causal_layer
    if not gradient and not effect.any():
        progress.note(
            "No single perturbation has a detectable effect: targets are learned by gradient, without claims."
        )
        gradient = True
    if gradient:
        if asked == "auto":
            return None, k, "one a perturbation, as published"
        if asked > k:
            raise InputError(
                f"{asked} programs were asked for, but only {k} perturbations are fitted.",
                "Each program needs a perturbation of its own: ask for fewer programs.",
            )
        return None, asked, "as asked"
    discovery = discover(data, effect, config.model, config.training.seed, progress.stage, progress.note)
    reason = "as asked" if discovery.choice is None else discovery.choice.reason
    return WarmStart(discovery, ~np.isnan(tests["p_value"]), projection), len(discovery.adjacency), reason


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


def _sha256(source: str | Path | ad.AnnData) -> str:
    """Digest of the input's bytes; of all files of a zarr store by path; empty for an AnnData in memory."""
    if isinstance(source, ad.AnnData):
        return ""
    path = Path(source)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        try:
            with file.open("rb") as handle:
                while piece := handle.read(1 << 22):
                    digest.update(piece)
        except FileNotFoundError:
            raise InputError(f"There is no file {path}.", "Check the path.") from None
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}.", "Check its permissions.") from None
    return digest.hexdigest()


def _packages() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a vendored or renamed build: the fit does not depend on the number
            found[name] = "unknown"
    return found
