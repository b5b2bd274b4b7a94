"""What finished stages of a fit found, on disk until the run is finished: an interrupt costs one stage, not all of them.

A file a stage, written as checkpoints are: tensors and primitives, with a checksum, nothing executable. A result that is
damaged, or of another input, configuration or version, is computed again. Random numbers are drawn from the seed by every
stage for itself, so that what follows is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from crlseq.discovery.bootstrap import Stability
from crlseq.discovery.edges import Edges
from crlseq.discovery.likelihood import LinearModel, Solution
from crlseq.discovery.misfit import Misfit
from crlseq.discovery.moments import Moments
from crlseq.discovery.n_latents import LatentChoice
from crlseq.discovery.nonlinear import NonlinearSolution
from crlseq.discovery.nonlinear_test import Preference
from crlseq.discovery.verdict import KindComparison
from crlseq.errors import InputError
from crlseq.storage.checkpoint import load_checkpoint, save_checkpoint

STAGES = (
    "effects", "components", "more components", "number", "likelihood", "kinds", "equations", "straightened", "bootstrap",
)  # fmt: skip

Found = TypeVar("Found")
Kept = TypeVar("Kept", bound=type)

# The classes that a file may name, by their names.
CLASSES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Edges,
        KindComparison,
        LatentChoice,
        Misfit,
        Moments,
        NonlinearSolution,
        Preference,
        Solution,
        Stability,
    )
}


def kept(kind: Kept) -> Kept:
    """Class decorator: results of stages may hold such dataclasses."""
    CLASSES[kind.__name__] = kind
    return kind


def file_of(stage: str) -> str:
    """Name of a stage's file."""
    return f"stage-{stage.replace(' ', '-')}.pt"


class Stages:
    """Results by stage: read where they are on disk, else computed and written.

    Parameters
    ----------
    folder
        Where to keep them; None for nowhere.
    identity
        What they must have been found for.
    """

    def __init__(self, folder: Path | None, identity: str = "") -> None:
        self.folder, self.identity = folder, identity

    def result(self, stage: str, make: Callable[[], Found]) -> Found:
        """What `make` gives: dataclasses of `CLASSES`, tensors, arrays, primitives, and tuples, lists and dicts of them.

        Raises
        ------
        KeyError
            For a stage that is not one of `STAGES`.
        """
        if self.folder is None:
            return make()
        path = self.folder / file_of(STAGES[STAGES.index(stage)])
        try:
            saved = load_checkpoint(path)
            if saved["identity"] == self.identity:
                found: Found = unpacked(saved["found"])
                return found
        except (InputError, KeyError, TypeError, ValueError):  # not there, damaged, or of another version
            pass
        path.unlink(missing_ok=True)
        result = make()
        save_checkpoint(path, {"identity": self.identity, "found": packed(result)})
        return result

    def forget(self) -> None:
        """Remove the files."""
        for stage in STAGES if self.folder is not None else ():
            (self.folder / file_of(stage)).unlink(missing_ok=True)  # type: ignore[operator]


def packed(value: Any) -> Any:
    """The value as tensors and primitives that `unpacked` takes back.

    Raises
    ------
    TypeError
        For anything else in it.
    """
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, np.ndarray):
        return {"kind": "array", "value": torch.from_numpy(value)}
    if isinstance(value, list | tuple):
        return {"kind": type(value).__name__, "value": [packed(item) for item in value]}
    if isinstance(value, dict):
        return {"kind": "dict", "value": [[packed(key), packed(item)] for key, item in value.items()]}
    if isinstance(value, LinearModel):
        arguments = (value.moments, value.p, value.kind, value.floor, value.fit_noise)
        return {"kind": "LinearModel", "value": [packed(item) for item in arguments]}
    if is_dataclass(value) and CLASSES.get(type(value).__name__) is type(value):
        content = {field.name: packed(getattr(value, field.name)) for field in fields(value)}
        return {"kind": type(value).__name__, "value": content}
    raise TypeError(f"{type(value).__name__} is nothing that a stage keeps")


def unpacked(value: Any) -> Any:
    """What `packed` was given.

    Raises
    ------
    KeyError, TypeError, ValueError
        If it is not what `packed` gives.
    """
    if not isinstance(value, dict):
        return value
    kind, content = value["kind"], value["value"]
    if kind == "array":
        return content.numpy()
    if kind == "dict":
        return {unpacked(key): unpacked(item) for key, item in content}
    if kind in ("list", "tuple"):
        items = [unpacked(item) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "LinearModel":
        return LinearModel(*(unpacked(item) for item in content))
    return CLASSES[kind](**{name: unpacked(item) for name, item in content.items()})
