"""From a file to a finished run folder in six steps: read, test, discover, train, read out, write whole or not at all."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from crlseq.config import Config, make_config
from crlseq.data import splits
from crlseq.data.allocator import give_back
from crlseq.data.cluster import on_cluster
from crlseq.data.dataset import PerturbSeqData
from crlseq.data.embeddings import Embeddings
from crlseq.data.projection import Projection, principal_components
from crlseq.data.source import State, content_of, digest_of, refuse_changed
from crlseq.discovery.beyond_covariates import effects_and_beyond
from crlseq.discovery.guide_agreement import guide_agreement, guides_in_words, weak_guides, without_guides
from crlseq.discovery.methods import Programs, find_programs
from crlseq.discovery.negative_controls import Found, Sensitivity, sensitivity, undone_effects
from crlseq.discovery.task import Task
from crlseq.errors import InputError, UsageError
from crlseq.pipeline.fitted import FittedRun, load
from crlseq.pipeline.identity import Identity, digests_of_tables, settle
from crlseq.pipeline.progress import EFFECTS, READING_OFF, TESTING, TRAINING, WRITING, Progress, shown
from crlseq.pipeline.read import Job, Screen, read_cells, read_screen, refuse_unprepared
from crlseq.pipeline.tables import negative_controls, tables_of, with_guides, with_shift_errors
from crlseq.report import write_report
from crlseq.run.columns import SPLIT
from crlseq.run.schema import DETECTABLE_FDR
from crlseq.run.summary import combinations_in_words, sets_in_words
from crlseq.run.writable import refuse_unwritable
from crlseq.storage.checkpoint import mend_checkpoint, previous_of, save_law, save_weights
from crlseq.storage.files import refuse_existing
from crlseq.storage.hdf5 import write_h5ad
from crlseq.storage.runfolder import COMBINATIONS, EMBEDDINGS, GENE_SETS, move_into_place, refuse_output, working_folder
from crlseq.storage.stage_cache import StageCache
from crlseq.threads import in_parallel, on_threads, one_blas_thread, reporting
from crlseq.training.device import computed_on, resolve_device
from crlseq.training.distributed import ALONE, Ranks
from crlseq.training.extrapolation import Extrapolation, fit_extrapolation
from crlseq.training.trainer import Fit, fit_model
from crlseq.training.warm_start import WarmStart

N_COMPONENTS = 50
FEW_GENES = 2000  # below, the products of a training step are too small to share among threads


def fit(
    source: str | Path | ad.AnnData,
    output: str | Path | None = None,
    *,
    preset: str | None = None,
    config: Config | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | bool = False,
    ranks: Ranks = ALONE,
    cluster: str | None = None,
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
        Go on with an unfinished fit of the same input, options and version; a finished one is left as it is.
    force
        Replace a run, finished or not, that lies at `output`; together with `resume` one that is of another fit.
    progress
        True shows the stages on stderr, in a notebook too; or what is to be called while the fit runs.
    ranks
        The processes that fit together; this is the first, and the others call `take_part`.
    cluster
        Address of a Dask scheduler (``tcp://HOST:8786``), or a number of processes to start on this machine: passes over
        the cells of a prepared store are made there, and change no result. All of its machines need the store's path.
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
    if config is None:
        config = make_config(preset, **options)
    elif options or preset:
        raise UsageError("A configuration and single options were both given.", "Give one of them.")
    if resume and output is None:
        raise UsageError("--resume needs an output.", "Give the folder of the unfinished run.")
    if not isinstance(progress, Progress):
        with shown(config, quiet=not progress, written=output is not None) as told:
            return fit(source, output, config=config, resume=resume, force=force, progress=told, ranks=ranks,
                       cluster=cluster)  # fmt: skip
    refuse_unprepared(source, config, cluster)
    with on_cluster(cluster), reporting(progress.within), one_blas_thread():
        return _fit_to(source, output, config, resume, force, progress, ranks)


def _fit_to(
    source: str | Path | ad.AnnData,
    output: str | Path | None,
    config: Config,
    resume: bool,
    force: bool,
    progress: Progress,
    ranks: Ranks,
) -> FittedRun:
    """The fit, and its folder's way to where it belongs."""
    resolve_device(config.training.device, ranks, progress.note)  # fails before anything is read
    if output is None:
        return _fit(Job(source, config, progress, ranks))
    if isinstance(source, ad.AnnData):
        refuse_unwritable(source)
    target = Path(output) if Path(output).name not in ("", "..") else Path(output).resolve()
    job = Job(source, config, progress, ranks, force=force and resume)
    if resume and (target / "run.json").is_file() and (run := _finished(target, job)) is not None:
        return run
    refuse_output(target, resume, force)
    with working_folder(target, resume) as folder:
        refuse_existing(target, force)  # another process may have finished it in the meantime
        _fit(replace(job, folder=folder))
        move_into_place(folder, target)
    return load(target)


def _finished(target: Path, job: Job) -> FittedRun | None:
    """The finished run that was to be resumed; None if it is of another fit and may be replaced, else InputError."""
    run, source, config = load(target), job.source, job.config
    content = digest_of(source) or content_of(read_cells(source, config, job.ranks))
    asked = Identity.of(content, digests_of_tables(config, target), config)
    differences = "; ".join(Identity.of_run(run).differences(asked))
    if not differences:
        job.progress.note(f"{target} is finished already.")
        job.ranks.from_first(None)
        return run
    if not job.force:
        what = f"The run {target} is finished, but was fitted with other options or to another input: {differences}."
        raise InputError(what, "Choose another --output, or replace it with --force.")
    job.progress.note(f"{target} is a finished run of another fit, and is replaced: {differences}.")
    return None


def take_part(source: str | Path, config: Config, ranks: Ranks) -> None:
    """What ranks behind the first do of `fit`: read the same screen, and train with the others.

    Raises what `fit` does, and InputError if the screen is not the first rank's.
    """
    resolve_device(config.training.device, ranks)
    with on_threads(_threads(config)):
        digest, first = digest_of(source), ranks.from_first(None)
        if first is None:  # there is nothing to fit
            return
        if first["input"] != digest:
            what = f"Rank {ranks.rank} and rank 0 read different files as {source}."
            raise InputError(what, "Give every machine the same file.")
        data = read_cells(source, config, ranks)
        first = ranks.from_first(first)
        with on_threads(_threads(config, data)):
            fit_model(without_guides(data, first["dropped_guides"]), config, first["n_latents"], ranks=ranks)


@dataclass(frozen=True)
class Tested:
    """Which perturbations have an effect."""

    data: PerturbSeqData
    projection: Projection
    tests: dict[str, np.ndarray]
    guides: pd.DataFrame  # beside the others of their gene; empty where none were read
    undone: Found  # pseudo-perturbations of control cells with an effect
    stages: StageCache


@dataclass(frozen=True)
class Start:
    """What training starts from (None: random weights), the number of programs, and why that many; without any, what would
    have been found.
    """

    warm: WarmStart | None
    n_latents: int
    reason: str
    sensitivity: Sensitivity | None


def _fit(job: Job) -> FittedRun:
    """The six steps; memory that a step has freed is given back before the next one."""
    with on_threads(_threads(job.config)):
        screen = read_screen(job)
        if job.folder is not None:
            screen = replace(screen, identity=settle(job.folder, screen.identity, job.force, job.progress.note))
        give_back()
        tested = _test(job, screen)
        give_back()
        start = _discover(job, tested, screen.targets)
        if not start.n_latents:
            screen = replace(screen, sets=None, vectors=None)  # there are no programs to read from them
        give_back()
        fitted = _train(job, screen, tested, start)
        give_back()
        run = _read_out(job, screen, tested, start, fitted)
        if job.folder is None:
            return replace(run, source=job.source)
        read, stages = (screen.state, screen.digest), tested.stages
        del screen, tested, start, fitted  # the cells are not written: the file is copied
        give_back()
        _write(job, read, run, job.folder)
        stages.clear()
        return run


def _threads(config: Config, data: PerturbSeqData | None = None) -> int:
    """How many threads to compute on: as many as asked for or there are; on few genes one for training steps."""
    if config.training.threads is None and data is not None and data.n_genes < FEW_GENES:
        return 1
    return config.training.threads or torch.get_num_threads()


def _test(job: Job, screen: Screen) -> Tested:
    """Step 2: which perturbations have an effect."""
    data, seed = screen.data, job.config.training.seed
    job.progress.stage(TESTING)
    projection = principal_components(data, N_COMPONENTS, seed)
    stages = StageCache(job.folder, hashlib.sha256(screen.identity.to_json().encode()).hexdigest())
    guides = guide_agreement(data, projection.adjusted)
    dropped = weak_guides(guides) if job.config.data.drop_outlier_guides else []
    if words := guides_in_words(guides, bool(dropped)):
        job.progress.note(words)
    data = without_guides(data, dropped)
    tests = stages.get("effects", lambda: effects_and_beyond(data, projection, seed))
    undone = stages.get("negative controls", lambda: undone_effects(data, projection.adjusted, seed))
    return Tested(data, projection, tests, guides, undone, stages)


def _discover(job: Job, tested: Tested, targets: dict[str, str] | None) -> Start:
    """Step 3: programs, targets and graph by likelihood, unless they are to be learned by gradient."""
    tests, stages, progress, seed = tested.tests, tested.stages, job.progress, job.config.training.seed
    effect = np.where(tests["fdr"] <= DETECTABLE_FDR, np.maximum(tests["energy"], 1e-12), 0.0)  # NaN counts as none

    def find_on(device: torch.device) -> Programs:
        task = Task(
            tested.data, effect, job.config.model, seed, progress.stage, progress.note, stages, targets=targets, device=device,
        )  # fmt: skip
        try:
            return find_programs(task)
        except InputError:  # there is nothing to go on with
            stages.clear()
            raise

    device, auto = resolve_device(job.config.training.device, job.ranks), job.config.training.device == "auto"
    programs = computed_on(device, find_on, auto, progress.note, "the search for programs")
    found = programs.discovery
    warm = None if found is None else WarmStart(found, ~np.isnan(tests["p_value"]), tested.projection)
    seen = None
    if not programs.n:
        progress.stage("testing detectable effects")
        seen = stages.get("sensitivity", lambda: sensitivity(tested.data, tested.projection.adjusted, seed))
    return Start(warm, programs.n, programs.reason, seen)


def _train(job: Job, screen: Screen, tested: Tested, start: Start) -> Fit:
    """Step 4: the network, on all ranks; goes on from the folder's checkpoint if one is there."""
    folder, progress, ranks, sets = job.folder, job.progress, job.ranks, screen.sets
    if start.n_latents:
        progress.stage(TRAINING if job.config.model.trains else EFFECTS)
        if ranks.size > 1:
            progress.note(f"{ranks.size} processes train together.")
    dropped = weak_guides(tested.guides) if job.config.data.drop_outlier_guides else []
    ranks.from_first({"n_latents": start.n_latents, "dropped_guides": dropped})
    if sets is not None and folder is not None and not (folder / GENE_SETS).exists():
        sets.write(folder / GENE_SETS)
    identity = f"{screen.identity.to_json()}\n{start.n_latents}\n{'' if sets is None else sets.digest()}"
    checkpoint = folder and folder / "resume.pt"
    if checkpoint is not None and mend_checkpoint(checkpoint):
        progress.note("The last checkpoint is damaged; the fit continues from the one before.")
    with on_threads(_threads(job.config, tested.data)):
        return fit_model(
            tested.data, job.config, start.n_latents, checkpoint, hashlib.sha256(identity.encode()).hexdigest(),
            progress.epoch, start.warm, None if sets is None else sets.members, ranks, progress.note,
        )  # fmt: skip


def _read_out(job: Job, screen: Screen, tested: Tested, start: Start, fitted: Fit) -> FittedRun:
    """Step 5: tables, and the record of the whole job."""
    progress, data = job.progress, tested.data
    progress.stage(READING_OFF)
    run = tables_of(fitted, data, job.config, tested.tests, start.warm, screen.sets)
    run = with_guides(run, screen.data, tested.guides, start.warm)
    found = None if screen.vectors is None else _extrapolation(fitted, data, screen.vectors)
    if found is not None:
        progress.note(found.in_words())
    info = run.info | {
        "command": _command(),
        "input": {
            "path": "in memory" if isinstance(job.source, ad.AnnData) else str(Path(job.source).resolve()),
            "sha256": screen.digest,
            "cells_sha256": None if screen.digest else screen.identity.content,
            "tables": screen.identity.tables,
            "n_cells": int(data.x.shape[0]),
            "n_genes": data.preprocessing.n_genes_in_file,
        },
        "embeddings": None if found is None else found.summary(),
        "negative_controls": negative_controls(tested.undone, start.warm),
        "n_latents_reason": start.reason,
        "sensitivity": start.sensitivity and asdict(start.sensitivity),
        "started": job.started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": job.ranks.size,
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()},
        "seconds": round(time.monotonic() - job.clock, 2),
    }
    split = pd.Categorical(np.array(splits.SPLITS)[data.split], dtype=SPLIT)
    cells = pd.DataFrame({"crlseq_split": split}, index=data.cell_names)
    if data.own_labels is not None:
        cells["crlseq_perturbation"] = data.own_labels
    if start.warm is not None and start.warm.discovery.hit is not None:
        cells["crlseq_hit"] = start.warm.discovery.hit
    run = with_shift_errors(replace(run, info=info, cells=cells, map=found), data)
    law = run.facts.combinations
    combined = combinations_in_words(run.facts) if law is not None and law.fitted else ""
    for words in filter(None, (sets_in_words(run.facts), combined)):
        progress.note(words)
    return run


def _command() -> str:
    """The command line, or ``crlseq.fit`` where a program of someone else's called it."""
    if Path(sys.argv[0]).name.startswith(("crlseq", "scanpy-crlseq", "__main__")):
        return shlex.join(["crlseq", *sys.argv[1:]])
    return "crlseq.fit"


def _extrapolation(fitted: Fit, data: PerturbSeqData, table: Embeddings) -> Extrapolation:
    """The map from gene vectors to what the fitted perturbations do."""
    cells = data.cells_by_condition(splits.TRAIN)
    own = np.zeros(len(data.perturbation_names), dtype=bool)
    own[[p[0] for c, p in enumerate(data.conditions) if len(p) == 1 and len(cells[c])]] = True
    control = data.dense(cells[0][np.linspace(0, len(cells[0]) - 1, min(500, len(cells[0]))).astype(int)])
    return fit_extrapolation(fitted.model, table, data.perturbation_names, own, control)


def _write(job: Job, read: tuple[State, str], run: FittedRun, folder: Path) -> None:
    """Step 6: all files of the run, whose input was `read` in that state; the folder takes its place after that."""
    job.progress.stage(WRITING)
    # Numbers become text on one thread, while another computes what the cells get.
    writers = (
        partial(run.write_tables, folder),
        partial(run.write_h5ad, job.source, folder / "crlseq.h5ad"),
        partial(write_report, run, folder / "report.html"),
    )
    list(in_parallel(lambda write: write(), writers, torch.get_num_threads()))
    assert run.weights is not None
    save_weights(folder / "model.safetensors", *run.weights)
    if run.law is not None:
        save_law(folder / COMBINATIONS, run.law)
    refuse_changed(job.source, *read)
    if run.map is not None:
        write_h5ad(run.map.to_anndata(), folder / EMBEDDINGS, "gzip")
    previous_of(folder / "resume.pt").unlink(missing_ok=True)
