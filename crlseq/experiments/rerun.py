"""Repeat a run from its ``run.json``, and report where the repetition first differs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from crlseq.config import Config
from crlseq.data.source import digest_of
from crlseq.errors import InputError
from crlseq.experiments.compare_runs import Difference, causes, differences
from crlseq.pipeline.fit import fit
from crlseq.pipeline.fitted import load
from crlseq.run.schema import Input


@dataclass(frozen=True)
class Rerun:
    """What came of a repetition: the first difference of every file that differs, and what may be why."""

    differences: tuple[Difference, ...]
    causes: tuple[str, ...]


def rerun(path: Path, output: Path, data: Path | None = None, progress: Any = None, force: bool = False) -> Rerun:
    """Fit again as ``run.json`` says, into `output`, and compare.

    Parameters
    ----------
    path
        A run folder.
    data
        The run's input, where it has moved.
    progress
        A `crlseq.pipeline.fit.Progress`.
    force
        Replace a run that lies at `output`.

    Raises
    ------
    InputError
        If the run or its input cannot be read, or the input is another.
    """
    run = load(path)
    try:
        config = Config.model_validate(run.info["config"])
    except ValidationError as error:
        raise InputError(
            f"This version cannot read the configuration in {path / 'run.json'}.", "Fit again with its options."
        ) from error
    source = _input(path, run.facts.input, data)
    if output.resolve() == path.resolve():
        raise InputError(f"{output} is the run itself.", "Choose another --output.")
    # Sums over threads are rounded in another order with another number of them.
    if 1 <= run.facts.threads <= (os.cpu_count() or 1):
        torch.set_num_threads(run.facts.threads)
    again = fit(source, output, config=config, progress=progress, force=force)
    found = tuple(differences(path, output))
    return Rerun(found, tuple(causes(run.facts, again.facts)) if found else ())


def _input(path: Path, recorded: Input, data: Path | None) -> Path:
    """The file that a run was fitted to, or `data` where that is the same."""
    if data is None and not recorded.sha256:
        raise InputError(
            f"{path} was fitted to data in memory, so that no file can be read.", "Give the cells with --data."
        )
    if data is None and not os.path.lexists(recorded.path):
        raise InputError(f"The input {recorded.path} does not exist.", "Give its present path with --data.")
    given = Path(recorded.path) if data is None else data
    if recorded.sha256 and digest_of(given) != recorded.sha256:
        raise InputError(
            f"{given} is not the file that {path} was fitted to: its SHA-256 differs.",
            "Give the original file with --data.",
        )
    return given
