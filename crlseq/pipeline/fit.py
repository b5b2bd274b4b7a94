"""From a file to a finished run folder: read, fit, analyse, write whole or not at all."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from crlseq._version import __version__
from crlseq.config import Config, make_config, to_toml
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.embeddings import Embeddings, read_embeddings
from crlseq.data.genesets import check_gmt, fitted_sets
from crlseq.data.projection import Projection, principal_components
from crlseq.data.responders import find_responders, left_out
from crlseq.data.source import content_of, digest_of, state_of
from crlseq.data.streamed import StreamedExpression
from crlseq.discovery.discover import discover
from crlseq.discovery.effects import effect_tests
from crlseq.errors import InputError, UsageError
from crlseq.pipeline.fitted import FittedRun, load
from crlseq.pipeline.tables import tables_of
from crlseq.report import write_report
from crlseq.run.schema import DETECTABLE_FDR, SPLIT
from crlseq.run.summary import sets_in_words
from crlseq.storage.checkpoint import mend_checkpoint, previous_of, save_weights
from crlseq.storage.files import by_hdf5
from crlseq.storage.runfolder import EMBEDDINGS, GENE_SETS, move_into_place, partial_of, refuse_output, working_folder
from crlseq.storage.stage_cache import Stages
from crlseq.threads import on_threads
from crlseq.training.distributed import ALONE, Ranks
from crlseq.training.extrapolation import Extrapolation, fit_extrapolation, refuse_strangers
from crlseq.training.memory import give_back, keep_blocks, return_blocks
from crlseq.training.trainer import Fit, fit_model, resolve_device, resolve_step
from crlseq.training.warm_start import WarmStart

N_COMPONENTS = 50
FEW_GENES = 2000  # below, the products of a training step are too small to share among threads


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
    ranks: Ranks = ALONE,
    **options: Any,
) -> FittedRun:
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
    ranks
        The processes that fit together; this is the first, and the others call `take_part`.
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
        If options contradict each other or are out of range, or steps are too small for so many processes.
    ConvergenceError
        If the loss is not finite.

    Examples
    --------
    >>> import crlseq
    >>> run = crlseq.fit("screen.h5ad", method="linear", n_latents=3, bootstrap=0)
    >>> run.program_names, run.path
    (['P0', 'P1', 'P2'], None)
    >>> list(run.interventions)[:4]
    ['perturbation', 'program', 'weight', 'shift']
    """
    progress = progress or Progress()
    if config is None:
        config = make_config(preset, **options)
    elif options or preset:
        raise UsageError("A configuration and single options were both given.", "Give one of them.")
    if resume and output is None:
        raise UsageError("There is nothing to resume without an output.", "Give the folder of the unfinished run.")
    if config.training.ensemble > 1 and config.model.method == "linear":
        raise UsageError(
            "The linear method trains no model whose seeds could be compared.",
            "Leave --ensemble or --method linear out.",
        )
    if config.model.decoder == "sparse" and (config.model.noise, config.model.output_activation) != (
        "gaussian", "identity",
    ):  # fmt: skip
        raise UsageError(
            "The sparse decoder needs noise = gaussian and output_activation = identity.",
            "Leave --decoder sparse or the preset paper out.",
        )
    resolve_device(config.training.device)  # fails before anything is read
    threads = config.training.threads or torch.get_num_threads()
    if output is None:
        with on_threads(threads):
            return _fit(source, None, config, progress, ranks)
    target = Path(output) if Path(output).name not in ("", "..") else Path(output).resolve()
    if resume and (target / "run.json").is_file():
        run = load(target)
        if run.info["config"] != config.model_dump(mode="json"):
            raise InputError(
                f"The run {target} is finished, but was fitted with other options.",
                "Choose another --output, or replace it with --force and without --resume.",
            )
        progress.note(f"{target} is finished already.")
        ranks.from_first(None)
        return run
    refuse_output(target, resume, force)
    with working_folder(partial_of(target), resume) as folder:
        if not force and os.path.lexists(target):  # another process has finished it in the meantime
            raise InputError(f"The output {target} exists.", "Choose another --output, or replace it with --force.")
        with on_threads(threads):
            _fit(source, folder, config, progress, ranks)
        move_into_place(folder, target)
    return load(target)


def take_part(source: str | Path, config: Config, ranks: Ranks) -> None:
    """What ranks behind the first do of `fit`: read the same screen, and train with the others.

    Raises
    ------
    InputError
        If the screen cannot be used, or is not the first rank's.
    UsageError
        If steps are too small for so many processes.
    ConvergenceError
        If the loss is not finite.
    """
    resolve_device(config.training.device)
    with on_threads(config.training.threads or torch.get_num_threads()):
        _take_part(source, config, ranks)


def _take_part(source: str | Path, config: Config, ranks: Ranks) -> None:
    data, digest = _read(source, config, ranks), digest_of(source)
    told = ranks.from_first(None)
    if told is None:  # there is nothing to fit
        return
    if told["input"] != digest:
        raise InputError(
            f"{source} is not the same file for rank {ranks.rank} as for rank 0.", "Give all machines the same file."
        )
    with on_threads(_threads(data, config)):
        fit_model(left_out(data, told["escaped"].numpy()), config, told["n_latents"], ranks=ranks)


def _read(source: str | Path | ad.AnnData, config: Config, ranks: Ranks) -> PerturbSeqData:
    threads = torch.get_num_threads()
    data = read_data(source, config.data, config.training.seed)
    if isinstance(data.x, StreamedExpression):
        if config.data.responders:
            raise UsageError(
                "--responders leaves out single cells, which a store that is read in runs cannot.",
                "Load the store whole with --in-memory, or leave --responders out.",
            )
        return_blocks()
    else:
        keep_blocks()
    torch.set_num_threads(threads)  # numba, which scanpy starts to choose genes, sets its own number
    in_step = resolve_step(config.training, data.cells_by_condition(splits.TRAIN))
    if ranks.size > in_step:
        raise UsageError(
            f"{ranks.size} processes cannot share steps of {in_step} perturbations.",
            "Start fewer, or set perturbations_per_step in the configuration file.",
        )
    return data


def _threads(data: PerturbSeqData, config: Config) -> int:
    """How many threads the training steps are computed on."""
    return 1 if config.training.threads is None and data.n_genes < FEW_GENES else torch.get_num_threads()


def _fit(
    source: str | Path | ad.AnnData, folder: Path | None, config: Config, progress: Progress, ranks: Ranks
) -> FittedRun:
    """Fit, and write all files of the run into the folder, if there is one."""
    started, clock = datetime.now(UTC), time.monotonic()  # the date may be set back meanwhile
    training = config.training
    table = None if config.data.embeddings is None else read_embeddings(config.data.embeddings)
    gmt = _gmt(config, folder)
    progress.stage("reading the screen")
    # A store is compared with its checksums before anything is made of it.
    state, digest = state_of(source), digest_of(source)
    data = _read(source, config, ranks)
    if table is not None:
        refuse_strangers(table, data.perturbation_names, str(config.data.embeddings))
    for note in data.notes:
        progress.note(note)
    sets = None if gmt is None else fitted_sets(gmt, data.genes)
    if sets is not None:
        progress.note(sets.in_words())
    give_back()
    progress.stage("testing which perturbations have an effect")
    projection = principal_components(data, N_COMPONENTS, training.seed)
    of_fit = f"{__version__}\n{digest or content_of(data)}\n{to_toml(config)}"
    stages = Stages(folder, hashlib.sha256(of_fit.encode()).hexdigest())
    tests = stages.result("effects", lambda: effect_tests(data, projection.scores, training.seed))
    responders, escaped = None, np.zeros(0, dtype=np.int64)
    if config.data.responders:
        responders = find_responders(data, projection.scores, tests["fdr"])
        escaped = responders.escaped
        data = left_out(data, escaped, responders.in_words())
        progress.note(responders.in_words())
    try:
        start, n_latents, reason = _start(data, config, projection, tests, progress, stages)
    except InputError:  # there is nothing to go on with
        stages.forget()
        raise
    give_back()
    of_sets = "" if sets is None else sets.digest()
    identity = hashlib.sha256(f"{of_fit}\n{n_latents}\n{of_sets}".encode()).hexdigest()
    progress.stage("fitting" if ranks.size == 1 else f"fitting on {ranks.size} processes")
    ranks.from_first({"input": digest, "n_latents": n_latents, "escaped": torch.from_numpy(escaped)})
    if sets is not None and folder is not None and not (folder / GENE_SETS).exists():
        sets.write(folder / GENE_SETS)
    with on_threads(_threads(data, config)):
        checkpoint = folder and folder / "resume.pt"
        if checkpoint is not None and mend_checkpoint(checkpoint):
            progress.note("The last checkpoint is damaged: going on from the one before.")
        members = None if sets is None else sets.members
        fitted = fit_model(
            data, config, n_latents, checkpoint, identity, progress.epoch, start, members, ranks, progress.note
        )
    give_back()
    progress.stage("reading off programs, interventions and the DAG")
    fitted.model.cpu()
    run = tables_of(fitted, data, config, tests, start, sets)
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
        "responders": None if responders is None else responders.record(),
        "n_latents_reason": reason,
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": ranks.size,
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()},
        "seconds": round(time.monotonic() - clock, 2),
    }  # fmt: skip
    split = pd.Categorical(np.array(splits.SPLITS)[data.split], dtype=SPLIT)
    cells = pd.DataFrame({"crlseq_split": split}, index=data.cell_names)
    if data.guides is not None:
        cells["crlseq_perturbation"] = data.guides.labels
    if responders is not None:
        cells["crlseq_responder"] = responders.posterior
    run = FittedRun(
        info, run.programs, run.interventions, run.edges, run.history, run.evaluation,
        weights=run.weights, cells=cells, map=found, ensemble=run.ensemble, pathways=run.pathways,
    )  # fmt: skip
    if words := sets_in_words(run.facts):
        progress.note(words)
    if folder is None:
        return run
    progress.stage("writing")
    run.write_tables(folder)
    assert run.weights is not None
    save_weights(folder / "model.safetensors", *run.weights)
    run.write_h5ad(source, folder / "crlseq.h5ad")
    if state_of(source) != state and digest_of(source) != digest:
        raise InputError(f"{source} was changed while it was fitted.", "Fit a file again that nobody writes to.")
    if found is not None:
        with by_hdf5():
            found.to_anndata().write_h5ad(folder / EMBEDDINGS, compression="gzip")
    write_report(run, folder / "report.html")
    previous_of(folder / "resume.pt").unlink(missing_ok=True)
    stages.forget()
    return run


def _gmt(config: Config, folder: Path | None) -> Path | None:
    """The file of gene sets, looked through; a fit that goes on does without it, by the copy in its folder."""
    if config.data.gene_sets is None:
        return None
    path = Path(config.data.gene_sets)
    if folder is not None and (folder / GENE_SETS).exists() and not path.exists():
        path = folder / GENE_SETS
    check_gmt(path)
    return path


def _extrapolation(fitted: Fit, data: PerturbSeqData, table: Embeddings, progress: Progress) -> Extrapolation:
    """The map from gene vectors to what the fitted perturbations do."""
    cells = data.cells_by_condition(splits.TRAIN)
    own = np.zeros(len(data.perturbation_names), dtype=bool)
    own[[parts[0] for c, parts in enumerate(data.conditions) if len(parts) == 1 and len(cells[c])]] = True
    control = data.dense(cells[0][np.linspace(0, len(cells[0]) - 1, min(500, len(cells[0]))).astype(int)])
    found = fit_extrapolation(fitted.model, table, data.perturbation_names, own, control)
    progress.note(found.in_words())
    return found


def _start(
    data: PerturbSeqData,
    config: Config,
    projection: Projection,
    tests: dict[str, np.ndarray],
    progress: Progress,
    stages: Stages,
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
    discovery = discover(data, effect, config.model, config.training.seed, progress.stage, progress.note, stages.result)
    reason = "as asked" if discovery.choice is None else discovery.choice.reason
    return WarmStart(discovery, ~np.isnan(tests["p_value"]), projection), len(discovery.adjacency), reason
