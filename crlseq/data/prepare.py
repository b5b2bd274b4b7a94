"""Screens larger than memory: one pass over each file into a store that training reads in contiguous runs.

1. *Labels.* The tables of cells are read and joined, the place of every cell drawn.
2. *Distribution.* Each matrix is read once in blocks, whose cells are appended to buckets, one for a stretch of the store.
3. *Shards.* Bucket after bucket is put in order and written as shards of a zarr store (`crlseq.data.store`); on a cluster
   each worker does so for some of the shards.

Memory holds the tables of cells, a block, a bucket and a shard. What is done is noted after every block and shard, so
that an interrupted preparation goes on from there and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crlseq._version import __version__
from crlseq.config import DataConfig
from crlseq.data.cluster import mapped, on_cluster
from crlseq.data.contexts import in_contexts
from crlseq.data.guide_targets import ID_KEY, targets_in_uns
from crlseq.data.guides import GUIDE_LABELS, labels_of
from crlseq.data.matrix import Rows, open_screen
from crlseq.data.names import GeneNames
from crlseq.data.perturbations import Perturbations
from crlseq.data.store import MANIFEST, Manifest, files_of, read_manifest, sha256_of
from crlseq.data.storewriter import Buckets, Packing, write_matrix, write_tables
from crlseq.data.values import Part, Scan, kind_of_values, scan_block
from crlseq.errors import InputError
from crlseq.storage.files import final_name, refuse_existing, refuse_special, written_beside
from crlseq.storage.runfolder import locked, move_into_place, partial_of, working_folder
from crlseq.threads import counted

INPUT_KEY = "crlseq_input"  # column of obs: which of several files a cell is of
PARTS = frozenset({"lock", "progress.json", "buckets", "store"})


@dataclass(frozen=True)
class _Plan:
    """The cells of all files, one after the other: their table, labels, and places in the store."""

    paths: list[Path]
    options: DataConfig
    seed: int
    obs: pd.DataFrame
    var: pd.DataFrame
    labels: Perturbations
    first: np.ndarray  # of each file's cells, and behind the last
    place: np.ndarray
    dtype: np.dtype[Any]  # that holds the values of all files
    notes: tuple[str, ...]  # on how they were read


def prepare(
    sources: Sequence[str | Path],
    output: str | Path,
    config: DataConfig | None = None,
    seed: int = 0,
    *,
    resume: bool = False,
    force: bool = False,
    cluster: str | None = None,
    stage: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Write screens as one store of cells sorted by perturbation and shuffled within each.

    Parameters
    ----------
    sources
        ``.h5ad`` files or zarr stores with the same genes (in any order) and the same kind of values.
    output
        The store to write.
    config
        How labels and values are read; what else it says is for a fit.
    seed
        Of the shuffle.
    resume
        Go on with an unfinished preparation of the same files and options; one that is finished is left as it is.
    force
        Replace a store, finished or not, that lies at `output`.
    cluster
        Address of a Dask scheduler, or a number of processes to start on this machine, which read the files and write the
        store; all of its machines need both under the same path. The store has the same bytes.

    Returns
    -------
    The manifest of the store, which holds ``X`` (values as in the files), ``obs`` (columns of all files, and
    ``crlseq_input`` for several) and ``var`` (of the first file).

    Raises
    ------
    InputError
        If a file cannot be used, files do not match, or the output cannot be written.

    Examples
    --------
    >>> import crlseq
    >>> done = crlseq.prepare(["screen.h5ad"], "STORE")
    >>> done.n_cells, done.n_genes, done.values
    (740, 40, 'counts')
    """
    options = config or DataConfig()
    target, paths = Path(output), [Path(source) for source in sources]
    partial, identity = partial_of(target), _identity(paths, options, seed)
    done = read_manifest(target) if resume and not force else None
    if done is not None:
        if done.identity != identity:
            raise InputError(
                f"The store {target} is finished, but was made from other files or with other options.",
                "Choose another --output, or replace it with --force.",
            )
        note(f"{target} is already finished.")
        if partial.is_dir():  # stopped after the store was moved into place
            with suppress(OSError):
                with locked(partial):
                    _empty(partial)
                partial.rmdir()
        return done
    _refuse_output(target, resume, force)
    with on_cluster(cluster):
        stage("reading the tables of cells")
        plan = _plan(paths, options, seed)
        for text in (*plan.notes, plan.labels.reason):
            note(text)
        with working_folder(target, resume=True):
            if not resume:
                _empty(partial)
            if (partial / "store" / MANIFEST).exists():  # whole, or after a kill the one that it replaced
                shutil.rmtree(partial / "store")
            progress = _Progress(partial / "progress.json", identity)
            buckets = Buckets(partial / "buckets", len(plan.obs), len(plan.var), plan.dtype, progress.buckets)
            kind = _distribute(plan, buckets, progress, stage)
            stage("writing the store")
            manifest = _write_store(plan, partial / "store", buckets, progress, kind)
            move_into_place(partial / "store", target)
            _empty(partial)
    return manifest


def _refuse_output(target: Path, resume: bool, force: bool) -> None:
    partial = partial_of(target)
    refuse_special(target)
    refuse_existing(target, force)
    empty = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not (target / MANIFEST).is_file() and not empty:
        raise InputError(f"{target} exists, is not a crlseq store and is left alone.", "Choose another --output.")
    foreign = partial.is_dir() and any(final_name(file.name) not in PARTS for file in partial.iterdir())
    if foreign or (partial.exists() and not partial.is_dir()):
        raise InputError(f"{partial} is not an unfinished crlseq store and is left alone.", "Choose another --output.")
    if partial.exists() and not (resume or force):
        raise InputError(f"{partial} is an unfinished store.", "Continue with --resume, or start over with --force.")


def _empty(partial: Path) -> None:
    for name in ("buckets", "store"):
        shutil.rmtree(partial / name, ignore_errors=True)
    (partial / "progress.json").unlink(missing_ok=True)


def _identity(paths: Sequence[Path], options: DataConfig, seed: int) -> str:
    """Of what is prepared; files by name, size and time of change, since reading them all again would take a pass."""
    if missing := [path for path in paths if not path.exists()]:
        raise InputError(f"There is no file {missing[0]}.", "Check the path.")
    stats = [
        [(str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(path)]
        for path in paths
    ]
    return hashlib.sha256(repr((__version__, stats, options.model_dump(mode="json"), seed)).encode()).hexdigest()


def _plan(paths: list[Path], options: DataConfig, seed: int) -> _Plan:
    tables, dtypes, first, var = [], [], [0], pd.DataFrame()
    measured, targets, notes = frozenset[str](), dict[str, str](), list[str]()
    for path in paths:
        with open_screen(path, options.layer) as screen:
            tables.append(screen.obs)
            notes += [f"{path.name}: {text}" for text in screen.notes]
            dtype = np.dtype(screen.matrix.dtype)
            dtypes.append(dtype if dtype.kind in "iuf" else np.dtype(np.float32))
            first.append(first[-1] + screen.n_cells)
            measured |= GeneNames.of(screen.var).known
            targets |= targets_in_uns(path) if ID_KEY in screen.obs else {}
            if len(tables) == 1:
                var = screen.var.set_axis(screen.genes, axis=0)
            elif missing := sorted({*var.index} ^ {*screen.genes}):
                there, lacking = (path, paths[0]) if missing[0] in screen.genes else (paths[0], path)
                raise InputError(
                    f"The files do not have the same genes: {len(missing)} are in only one, first {missing[0]!r}, which"
                    f" {there} has and {lacking} lacks.",
                    "Keep only the genes that all files have.",
                )
    obs = _joined(tables, paths)
    labels, guides = labels_of(obs, options, measured, targets)
    if guides is not None:
        obs = obs.assign(**{GUIDE_LABELS: guides.labels})
    # Cells that carry no perturbation come last.
    sorted_by = in_contexts(labels, obs, options)
    condition = np.where(sorted_by.condition < 0, len(sorted_by.conditions), sorted_by.condition)
    order = np.lexsort((np.random.default_rng(seed).random(len(obs)), condition))
    place = np.empty(len(obs), dtype=np.int64)
    place[order] = np.arange(len(obs))
    return _Plan(paths, options, seed, obs, var, labels, np.array(first), place, np.result_type(*dtypes), tuple(notes))


def _joined(tables: list[pd.DataFrame], paths: Sequence[Path]) -> pd.DataFrame:
    """All columns of all tables, categories kept; names of cells are told apart by the number of their file."""
    if len(tables) == 1:
        return tables[0]
    names = np.concatenate([table.index.astype(str) for table in tables])
    files = np.repeat(np.arange(len(tables)), list(map(len, tables)))
    if len(pd.unique(names)) < len(names):
        names = np.array([f"{name}-{i}" for name, i in zip(names, files, strict=True)], dtype=object)
    columns: dict[str, Any] = {}
    rows = [pd.RangeIndex(int(a), int(b)) for a, b in pairwise(np.cumsum([0, *map(len, tables)]))]
    for key in dict.fromkeys(str(column) for table in tables for column in table.columns):
        parts = [table[key].set_axis(own) for table, own in zip(tables, rows, strict=True) if key in table]
        joined = pd.concat(parts).reindex(range(len(names)))
        if joined.dtype == object:  # texts, categories that differ, or truth values of some cells alone
            joined = joined.map(str, na_action="ignore").astype("category")
        columns[key] = joined.to_numpy() if isinstance(joined.dtype, np.dtype) else joined.array
    inputs = [path.name for path in paths]
    columns.setdefault(INPUT_KEY, pd.Categorical(np.array(inputs)[files], categories=list(dict.fromkeys(inputs))))
    return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


class _Progress:
    """What is done, on disk: blocks of each file with what they held, sizes of buckets, digests of shards."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.done: dict[str, Any] = {"identity": identity, "files": {}, "buckets": {}, "shards": {}}
        if path.exists():
            try:
                self.done = json.loads(path.read_text(encoding="utf-8"))
                same = self.done["identity"] == identity
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged.", "Start over with --force.") from error
            if not same:
                what = "The unfinished store was started from other files or with other options."
                raise InputError(what, "Repeat its options to resume it, or start over with --force.")
        self.files, self.buckets, self.shards = (self.done[name] for name in ("files", "buckets", "shards"))

    def save(self) -> None:
        with written_beside(self.path) as beside:
            beside.write_text(json.dumps(self.done), encoding="utf-8")


def _distribute(plan: _Plan, buckets: Buckets, progress: _Progress, stage: Callable[[str], None]) -> str:
    """Every file's cells into buckets; the kind of values that all hold."""
    kinds: list[str] = []
    for number, path in enumerate(plan.paths):
        stage(f"reading {path.name}")
        with open_screen(path, plan.options.layer) as screen:
            done = progress.files.setdefault(str(number), {"cells": 0})
            found = Scan.of(screen)
            vars(found).update(done.get("scan", {}))
            position = plan.var.index.get_indexer(screen.genes).astype(np.int32)
            stretches = screen.stretches(done["cells"])
            places = [plan.place[plan.first[number] + np.arange(rows.start, rows.stop)] for rows in stretches]
            make = partial(_packed_block, screen.reader, position, buckets.packing)
            made = mapped(make, zip(stretches, places, strict=True))
            for rows, (part, records) in zip(counted(stretches, len(stretches)), made, strict=True):
                found.add(screen, rows, part)
                buckets.add(records)
                done["cells"] = rows.stop
                done["scan"] = {k: v for k, v in vars(found).items() if not isinstance(v, np.ndarray)}
                progress.save()
            kinds.append(kind_of_values(screen, found, plan.options.values).kind)
            if kinds[-1] != kinds[0]:
                last, first = (kind.removesuffix("s") for kind in (kinds[-1], kinds[0]))
                what = f"{path} has {last} values, but {plan.paths[0]} has {first} values."
                raise InputError(what, "Prepare files of one kind together, or name a layer with --layer.")
    return kinds[0]


def _packed_block(
    reader: Rows, position: np.ndarray, packing: Packing, stretch: tuple[slice, np.ndarray]
) -> tuple[Part, dict[int, bytes]]:
    """What a stretch of cells, which have places, holds, and its records for the buckets."""
    rows, place = stretch
    block = reader[rows]
    part = scan_block(block)
    block.indices = position[block.indices]
    block.sort_indices()
    return part, packing.records(block, place)


def _write_store(plan: _Plan, store: Path, buckets: Buckets, progress: _Progress, kind: str) -> Manifest:
    """Buckets in order into shards, then tables and the manifest."""
    start = np.concatenate([[0], buckets.counts().cumsum()])
    for digests in write_matrix(store, buckets, start, len(plan.var), progress.shards):
        progress.shards.update(digests)
        progress.save()
    write_tables(store, plan.obs.iloc[np.argsort(plan.place)], plan.var)
    files = {str(file.relative_to(store)): file for file in files_of(store) if file.name != MANIFEST}
    manifest = Manifest(
        version=__version__,
        perturbation_key=plan.labels.key,
        control_label=plan.labels.control_label,
        control_labels=plan.labels.control_labels,
        separator=plan.labels.separator or "",
        seed=plan.seed,
        values=kind,
        n_cells=len(plan.obs),
        n_genes=len(plan.var),
        n_nonzero=int(start[-1]),
        inputs=tuple(path.name for path in plan.paths),
        files={name: progress.shards.get(name) or sha256_of(file) for name, file in files.items()},
        identity=progress.done["identity"],
        context_key=plan.options.context_key,
    )
    (store / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
