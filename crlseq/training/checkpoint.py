"""Weights (safetensors) and checkpoints (tensors and primitives), written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crlseq.errors import InputError


def save_weights(path: Path, state: dict[str, Tensor], architecture: dict[str, Any]) -> None:
    """Weights with the arguments that build their model, as JSON in the metadata (which holds strings alone).

    One key of metadata: safetensors writes several in an order that changes from run to run.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"architecture": json.dumps(architecture, sort_keys=True)})


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and architecture from `save_weights`.

    Raises
    ------
    InputError
        If the file is missing or damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            architecture = json.loads((handle.metadata() or {})["architecture"])
        return load_file(path), architecture
    except Exception as error:  # safetensors raises its own type, OSError or KeyError
        raise InputError(
            f"The weights {path} cannot be read: {error}.", "Fit again, or restore the run folder."
        ) from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Everything that is needed to go on: tensors, numbers, strings, lists and dicts of them."""
    beside = path.with_name(path.name + ".tmp")
    torch.save(state, beside)
    with beside.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(beside, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises
    ------
    InputError
        If the file is damaged or holds anything but tensors and primitives.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "identity" not in state:
            raise ValueError("it holds no checkpoint")
        return state
    except Exception as error:  # torch raises pickle, zip and runtime errors
        raise InputError(f"The checkpoint {path} cannot be read.", "Start over with --force.") from error
