"""Weights (safetensors) and checkpoints (tensors and primitives), written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from crlseq.errors import InputError
from crlseq.model.discrepancy_vae import DiscrepancyVAE


def save_weights(path: Path, state: dict[str, Tensor], architecture: dict[str, Any]) -> None:
    """Weights with the arguments that build their model, as JSON in the metadata (which holds strings alone).

    One key of metadata: safetensors writes several in an order that changes from run to run.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"architecture": json.dumps(architecture, sort_keys=True)})


def load_model(path: Path) -> DiscrepancyVAE:
    """The model from `save_weights`, in evaluation mode on the CPU.

    Raises
    ------
    InputError
        If the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            architecture = json.loads((handle.metadata() or {})["architecture"])
        state = load_file(path)
        with torch.device("meta"):  # before room is made for what the architecture claims
            expected = DiscrepancyVAE(**architecture).state_dict()
        if odd := [name for name in state if name not in expected or state[name].shape != expected[name].shape]:
            raise ValueError(f"{odd[0]} has not the shape that it should have")
        return build(state, architecture)
    except Exception as error:  # safetensors raises its own type, torch and JSON many
        detail = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"The weights {path} cannot be read: {detail}.", "Fit again, or restore the run folder."
        ) from error


def build(state: dict[str, Tensor], architecture: dict[str, Any]) -> DiscrepancyVAE:
    """A model with these weights, in evaluation mode."""
    model = DiscrepancyVAE(**architecture).to(state["scm.graph"].dtype)
    # Runs of earlier versions have not measured all of what the latents miss.
    model.load_state_dict({**{name: value for name, value in model.named_buffers() if "." not in name}, **state})
    return model.eval()


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
