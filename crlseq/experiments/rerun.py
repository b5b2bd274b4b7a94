"""Repeat a run from its ``run.json``, and report where the repetition first differs, and what was otherwise.

Compared are what a fit computes: losses, weights, tables, graph, latents, and what ``run.json`` says of them. Not
compared are what cannot be equal: times, paths, versions, the machine, the report (which shows them) and checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError

from crlseq.config import Config
from crlseq.data.files import open_store, readable
from crlseq.data.source import digest_of
from crlseq.errors import InputError
from crlseq.pipeline.fit import fit
from crlseq.pipeline.fitted import load
from crlseq.pipeline.progress import shown
from crlseq.run.schema import Input, RunInfo
from crlseq.storage.runfolder import COMBINATIONS, EFFECTS, EMBEDDINGS, OPTIONAL_TABLES
from crlseq.training.device import resolve_device

# Entries of run.json that tell of the circumstances.
CIRCUMSTANCES = frozenset({
    "version", "command", "started", "finished", "seconds", "packages", "machine", "threads", "device", "processes",
    "input", "notes",
})  # fmt: skip
# In the order in which a fit makes them: what comes later follows from what comes first.
ORDER = (
    "history.csv", "model.safetensors", COMBINATIONS, EMBEDDINGS, "programs.csv", "interventions.csv", "dag.csv",
    *(f"{name}.csv" for name in OPTIONAL_TABLES), EFFECTS, "evaluation.csv", "dag.graphml", "dag.json", "run.json",
    "crlseq.h5ad",
)  # fmt: skip
THERE = ("missing", "there")
LONGEST = 80  # characters of a value that are shown


@dataclass(frozen=True)
class Difference:
    """The first place of a file that differs."""

    file: str
    place: str  # in words
    first: str  # what the run has there
    again: str
    largest: float | None  # absolute difference of numbers of the same table column or tensor

    def __str__(self) -> str:
        size = "" if self.largest is None else f" (differences up to {self.largest:.3g})"
        return f"{self.file}, {self.place}: {self.first} became {self.again}{size}"


def rerun(
    path: Path, output: Path, data: Path | None = None, progress: bool = False, force: bool = False
) -> tuple[list[Difference], list[str]]:
    """Fit a run again as ``run.json`` says, into `output`: the first difference of every file, and what may be why.

    `data` is the run's input, where it has moved; `force` replaces a run that lies at `output`. Refused, by `InputError`, is
    a run or input that cannot be read, and another input.
    """
    run = load(path)
    try:
        training = run.info["config"]["training"] | {"device": run.facts.device}  # where `auto` led
        config = Config.model_validate(run.info["config"] | {"training": training})
    except ValidationError as error:
        message = f"This version cannot read the configuration in {path / 'run.json'}."
        raise InputError(message, "Fit again with its options.") from error
    source = _input(path, run.facts.input, data)
    if output.resolve() == path.resolve():
        raise InputError(f"{output} is the run itself.", "Choose another --output.")
    # Sums over threads are rounded in another order with another number of them.
    if 1 <= run.facts.threads <= (os.cpu_count() or 1):
        torch.set_num_threads(run.facts.threads)
    with shown(config, quiet=not progress, written=True) as told:
        again = fit(source, output, config=_here(config, told.note), progress=told, force=force)
    found = list(differences(path, output))
    return found, list(causes(run.facts, again.facts)) if found else []


def _here(config: Config, note: Callable[[str], None]) -> Config:
    """The configuration, on the CPU if its device cannot be used here."""
    try:
        resolve_device(config.training.device)
    except InputError as error:
        note(f"The run was fitted on {config.training.device}, and is repeated on the CPU. {error.message}")
        return config.model_copy(update={"training": config.training.model_copy(update={"device": "cpu"})})
    return config


def _input(path: Path, recorded: Input, data: Path | None) -> Path:
    """The file that a run was fitted to, or `data` where that is the same."""
    if data is None and not recorded.sha256:
        message = f"{path} was fitted to data in memory, so that no file can be read."
        raise InputError(message, "Give the cells with --data.")
    if data is None and not os.path.lexists(recorded.path):
        raise InputError(f"The input {recorded.path} does not exist.", "Give its present path with --data.")
    given = Path(recorded.path) if data is None else data
    if recorded.sha256 and digest_of(given) != recorded.sha256:
        message = f"{given} is not the file that {path} was fitted to: its SHA-256 differs."
        raise InputError(message, "Give the original file with --data.")
    return given


def differences(first: Path, again: Path) -> Iterator[Difference]:
    """The first difference of every file of two run folders, in the order in which a fit computes them."""
    for name in ORDER:
        paths = (first / name, again / name)
        there = [path.is_file() for path in paths]
        if not any(there):
            continue
        if not all(there):
            yield Difference(name, "the whole file", THERE[there[0]], THERE[there[1]], None)
        elif paths[0].read_bytes() != paths[1].read_bytes():
            found = _COMPARE.get(Path(name).suffix if name != "run.json" else name, _text_difference)(name, *paths)
            if found is not None:
                yield found


def causes(first: RunInfo, again: RunInfo) -> Iterator[str]:
    """What was otherwise when the first was fitted, in words."""
    pairs: dict[str, tuple[object, object]] = {"crlseq": (first.version, again.version)}
    pairs |= {name: (first.packages.get(name, "not recorded"), now) for name, now in again.packages.items()}
    pairs["the device"] = first.device, again.device
    pairs["the number of threads"] = first.threads, again.threads
    pairs["the number of processes"] = first.processes, again.processes
    for key, machine in again.machine or ():
        pairs[f"the machine's {key}"] = getattr(first.machine, key, "not recorded"), machine
    yield from (f"{what} was {before} and is {now}" for what, (before, now) in pairs.items() if before != now)
    parts = (first.training.parts_of_steps, again.training.parts_of_steps)
    if parts[0] != parts[1]:
        yield f"steps were computed in {parts[0]} parts and are now in {parts[1]}, as memory had run out"


def _table_difference(name: str, first: Path, again: Path) -> Difference:
    """Row and column; rows by their first field."""
    a, b = (pd.read_csv(path.absolute(), dtype=str, keep_default_na=False) for path in (first, again))
    if list(a) != list(b):
        return Difference(name, "the columns", ", ".join(map(str, a)), ", ".join(map(str, b)), None)
    if len(a) != len(b):
        return Difference(name, "the number of rows", str(len(a)), str(len(b)), None)
    fields = [table.to_numpy(dtype=object) for table in (a, b)]
    other = np.argwhere(fields[0] != fields[1])
    if not len(other):  # the same fields, quoted or ended in another way
        return _text_difference(name, first, again)
    row, column = map(int, other[0])
    values = [cells[:, column] for cells in fields]
    numbers = [pd.to_numeric(pd.Series(value), errors="coerce").to_numpy(float) for value in values]
    place = f"row {row + 1} ({a.columns[0]} {fields[0][row, 0]}), column {a.columns[column]}"
    return Difference(name, place, str(values[0][row]), str(values[1][row]), _largest(numbers[0], numbers[1]))


def _weights_difference(name: str, first: Path, again: Path) -> Difference:
    from safetensors.torch import load_file

    sides = [{f"tensor {key}": value.numpy() for key, value in load_file(path).items()} for path in (first, again)]
    return _first_of_arrays(name, *sides) or Difference(name, "the architecture", "one", "another", None)


def _h5ad_difference(name: str, first: Path, again: Path) -> Difference | None:
    """Of what a fit adds to the cells, or of the vectors of an extrapolation, wherever they are arrays."""
    with open_store(first) as one, open_store(again) as other, readable(str(first), "what the fit added"):
        return _first_of_arrays(name, _arrays(one), _arrays(other))


def _first_of_arrays(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference | None:
    """By place in the file; an array is read when it is compared."""
    for place in [*a, *(b.keys() - a.keys())]:
        if place not in a or place not in b:
            return Difference(name, place, THERE[place in a], THERE[place in b], None)
        one: np.ndarray = a[place][()]
        two: np.ndarray = b[place][()]
        if one.shape != two.shape or one.dtype != two.dtype:
            return Difference(name, place, f"{one.dtype} {one.shape}", f"{two.dtype} {two.shape}", None)
        other = np.argwhere((one != two) & ~((one != one) & (two != two)))  # NaN is NaN again
        if len(other):
            at = tuple(int(i) for i in other[0])
            where = f"{place} at {list(at)}" if at else place
            largest = _largest(one, two) if one.dtype.kind in "iuf" else None
            return Difference(name, where, str(one[at]), str(two[at]), largest)
    return None


def _arrays(handle: h5py.File) -> dict[str, h5py.Dataset]:
    """What a fit writes into an h5ad of its own: X_crlseq, crlseq_programs; all of one that has no cells of the input."""
    found: dict[str, h5py.Dataset] = {}
    whole = "crlseq_programs" not in handle.get("varm", {})

    def visit(place: str, item: Any) -> None:
        own = place.startswith(("obsm/X_crlseq", "varm/crlseq_programs"))
        if isinstance(item, h5py.Dataset) and (own or whole) and item.dtype.kind in "iuf":
            found[place] = item

    handle.visititems(visit)
    return found


def _info_difference(name: str, first: Path, again: Path) -> Difference | None:
    infos = [json.loads(path.read_text(encoding="utf-8")) for path in (first, again)]
    for info in infos:
        info["config"]["training"].pop("device", None)  # as it was asked for; what it was is among the circumstances
    return _value_difference("", *({key: info[key] for key in info if key not in CIRCUMSTANCES} for info in infos))


def _value_difference(place: str, a: Any, b: Any) -> Difference | None:
    """Of two values of JSON, entry by entry."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(f"{place}.{key}".lstrip("."), a.get(key), b.get(key)) for key in [*a, *(b.keys() - a.keys())]]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(f"{place}[{i}]", one, other) for i, (one, other) in enumerate(zip(a, b, strict=True))]
    elif a == b:
        return None
    else:
        numbers = all(isinstance(value, int | float) for value in (a, b))
        return Difference("run.json", place, _short(a), _short(b), abs(a - b) if numbers else None)
    return next((found for pair in pairs if (found := _value_difference(*pair)) is not None), None)


def _text_difference(name: str, first: Path, again: Path) -> Difference:
    a, b = (path.read_text(encoding="utf-8", errors="replace").splitlines() for path in (first, again))
    at = next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
    lines = [text[at].strip() if at < len(text) else "the end" for text in (a, b)]
    return Difference(name, f"line {at + 1}", _short(lines[0]), _short(lines[1]), None)


def _largest(a: np.ndarray, b: np.ndarray) -> float | None:
    apart = np.abs(a.astype(float) - b.astype(float))
    return float(np.nanmax(apart)) if np.isfinite(apart).any() else None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


_COMPARE: dict[str, Callable[[str, Path, Path], Difference | None]] = {
    ".csv": _table_difference,
    ".safetensors": _weights_difference,
    ".h5ad": _h5ad_difference,
    "run.json": _info_difference,
}
