"""What a fit reads: the screen and the tables beside it, and by what a change of them is noticed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from torch import Tensor

from crlseq.config import Config
from crlseq.data import splits
from crlseq.data.allocator import suit_allocator
from crlseq.data.coexpression import coexpression
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.data.embeddings import COEXPRESSION, Embeddings, named_as_labels, read_embeddings
from crlseq.data.genesets import GeneSets, check_gmt, fitted_sets
from crlseq.data.guide_targets import read_targets
from crlseq.data.source import State, content_of, digest_of, state_of
from crlseq.data.store import read_manifest
from crlseq.data.streamed import StreamedExpression
from crlseq.data.values import Scan
from crlseq.errors import InputError, UsageError
from crlseq.pipeline.identity import Identity, digests_of_tables
from crlseq.pipeline.progress import READING, Progress
from crlseq.storage.runfolder import GENE_SETS
from crlseq.training.distributed import Ranks
from crlseq.training.extrapolation import refuse_strangers
from crlseq.training.schedules import resolve_step


@dataclass(frozen=True)
class Job:
    """What is fitted, how, and where to; without a folder the run stays in memory."""

    source: str | Path | ad.AnnData
    config: Config
    progress: Progress
    ranks: Ranks
    folder: Path | None = None
    force: bool = False  # whether what another fit left in the folder may be removed
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.monotonic)  # the date may be set back meanwhile


@dataclass(frozen=True)
class Screen:
    """A screen as read, with the tables beside it; `state` and `digest` are its file's, `identity` that of the fit."""

    data: PerturbSeqData
    state: State
    digest: str
    identity: Identity
    sets: GeneSets | None
    vectors: Embeddings | None
    targets: dict[str, str] | None  # programs of perturbations, where they are known


def refuse_unprepared(source: str | Path | ad.AnnData, config: Config, cluster: str | None) -> None:
    """Refuse a cluster for what its workers cannot read piece by piece."""
    if cluster is None:
        return
    if config.data.streamed is False:
        raise UsageError("A cluster reads a store piece by piece.", "Drop --in-memory or --cluster.")
    if config.data.layer is not None or read_manifest(source) is None:
        raise InputError("A cluster needs a prepared store.", "Make one: crlseq prepare FILES --output STORE.")


def read_screen(job: Job) -> Screen:
    """Step 1: the screen, gene sets and gene vectors, of which the small ones are looked through before the screen is read."""
    source, config, folder, note = job.source, job.config, job.folder, job.progress.note
    table = config.data.embeddings
    vectors = None if table in (None, COEXPRESSION) else read_embeddings(str(table))
    targets = None if config.data.targets is None else read_targets(config.data.targets)
    gmt = None if config.data.gene_sets is None else Path(config.data.gene_sets)
    if gmt is not None:
        if folder is not None and (folder / GENE_SETS).exists() and not gmt.exists():
            gmt = folder / GENE_SETS  # a fit that goes on does without the file, by this copy
        check_gmt(gmt)
    job.progress.stage(READING)
    # A store is compared with its checksums before anything is made of it.
    state, digest = state_of(source), digest_of(source)
    job.ranks.from_first({"input": digest})
    data = read_cells(source, config, job.ranks)
    if table == COEXPRESSION:
        vectors = coexpression(data)
    if vectors is not None:
        targets = dict(zip(data.labels.names, data.labels.targets, strict=True))
        vectors = named_as_labels(vectors, data.measured, {name: targets[name] for name in data.perturbation_names})
        refuse_strangers(vectors, data.perturbation_names, str(table))
    sets = None if gmt is None else fitted_sets(gmt, data.preprocessing.gene_names)
    for text in data.notes if sets is None else (*data.notes, sets.in_words()):
        note(text)
    identity = Identity.of(digest or content_of(data), digests_of_tables(config, folder), config)
    return Screen(data, state, digest, identity, sets, vectors, targets)


def read_cells(source: str | Path | ad.AnnData, config: Config, ranks: Ranks) -> PerturbSeqData:
    """The cells, as every rank reads them."""
    threads = torch.get_num_threads()
    data = read_data(source, config.data, config.training.seed, partial(_scanned_once, ranks))
    suit_allocator(isinstance(data.x, StreamedExpression))
    torch.set_num_threads(threads)  # numba, which scanpy starts to choose genes, sets its own number
    in_step = resolve_step(config.training, data.cells_by_condition(splits.TRAIN))
    if ranks.size > in_step:
        what = f"{ranks.size} processes cannot share steps of {in_step} perturbations."
        raise UsageError(what, "Start fewer processes, or raise perturbations_per_step in the configuration file.")
    return data


def _scanned_once(ranks: Ranks, make: Callable[[], Scan]) -> Scan:
    """The pass over all values, which the first rank makes for all."""
    if ranks.size == 1:
        return make()
    if ranks.rank > 0:
        told: dict[str, Any] = ranks.from_first({})
        values: dict[str, Any] = {
            name: value.numpy() if isinstance(value, Tensor) else value for name, value in told.items()
        }
        return Scan(**values)
    found = make()
    ranks.from_first({name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in vars(found).items()})
    return found
