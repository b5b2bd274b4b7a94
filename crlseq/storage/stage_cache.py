"""Results of finished stages of a fit, on disk until the run is finished: an interrupt costs one stage, not all.

One file per stage, written as checkpoints are: tensors and primitives, with a checksum, nothing executable. A result
that is damaged, or of another input, configuration or version, is computed again. Every stage draws its random numbers
from the seed by itself, so that what follows is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from crlseq.errors import InputError
from crlseq.storage.checkpoint import load_checkpoint, save_checkpoint
from crlseq.storage.runfolder import STAGE

FORMAT = 2

Result = TypeVar("Result")
Class = TypeVar("Class", bound=type)

# By name: the classes that a file may hold, and the attributes that make one again.
CLASSES: dict[str, tuple[type, tuple[str, ...]]] = {}


def cached_on_disk(*attributes: str) -> Callable[[Class], Class]:
    """Class decorator: results of stages may hold instances.

    ``attributes`` hold what the constructor takes, in its order; by default they are a dataclass's fields.
    """

    def register(kind: Class) -> Class:
        CLASSES[kind.__name__] = kind, attributes or tuple(field.name for field in fields(kind))
        return kind

    return register


class StageCache:
    """Results by stage, for one identity: read from disk, else computed and written; without a folder always computed."""

    def __init__(self, folder: Path | None = None, identity: str = "") -> None:
        self.folder, self.identity = folder, identity

    def get(self, stage: str, compute: Callable[[], Result]) -> Result:
        """What `compute` gives: registered classes, tensors, arrays, primitives, and tuples, lists and dicts of them."""
        if self.folder is None:
            return compute()
        path = self.folder / STAGE.format(stage.replace(" ", "-"))
        with suppress(InputError, KeyError, TypeError, ValueError):  # not there, damaged, or of another version
            saved = load_checkpoint(path)
            if (saved["format"], saved["identity"]) == (FORMAT, self.identity):
                cached: Result = unpacked(saved["result"])
                return cached
        path.unlink(missing_ok=True)
        result = compute()
        save_checkpoint(path, {"format": FORMAT, "identity": self.identity, "result": packed(result)})
        return result

    def clear(self) -> None:
        """Remove the files."""
        for path in [] if self.folder is None else self.folder.glob(STAGE.format("*")):
            path.unlink(missing_ok=True)


def packed(value: Any) -> Any:
    """The value as tensors and primitives that `unpacked` takes back; a `TypeError` for anything else in it."""
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, np.ndarray):
        return {"kind": "array", "value": torch.from_numpy(value)}
    if isinstance(value, list | tuple):
        return {"kind": type(value).__name__, "value": [packed(item) for item in value]}
    if isinstance(value, dict):
        return {"kind": "dict", "value": [[packed(key), packed(item)] for key, item in value.items()]}
    kind, attributes = CLASSES.get(type(value).__name__, (None, ()))
    if kind is type(value):
        return {"kind": kind.__name__, "value": {name: packed(getattr(value, name)) for name in attributes}}
    raise TypeError(f"{type(value).__name__} cannot be stored in a stage file")


def unpacked(value: Any) -> Any:
    """What `packed` was given; a `KeyError`, `TypeError` or `ValueError` if the value is not what it gives."""
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
    made, attributes = CLASSES[kind]
    return made(*(unpacked(content[name]) for name in attributes))
