"""Weights (safetensors) and checkpoints (tensors and primitives), written whole or not at all."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from crlseq.errors import CrlseqError, InputError, in_a_line
from crlseq.model.combination_law import CombinationLaw
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.storage.files import written_beside

CHECKSUM = 32  # bytes at the end of a checkpoint
RESTORE = "Fit again, or restore the run folder."


def save_weights(path: Path, state: dict[str, Tensor], architecture: dict[str, Any]) -> None:
    """Weights with the arguments that build their model, as JSON in the metadata (which holds strings alone).

    One key of metadata: safetensors writes several in an order that changes from run to run.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    path.write_bytes(save(tensors, metadata={"architecture": json.dumps(architecture, sort_keys=True)}))


class _NoDraws(TorchFunctionMode):
    """Random starts are left out: torch loads its compiler, which takes seconds, to draw numbers that nothing holds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (Tensor.uniform_, Tensor.normal_) else func(*args, **(kwargs or {}))


def load_model(path: Path, sizes: tuple[int, int, int] | None = None, later: tuple[str, ...] = ()) -> DiscrepancyVAE:
    """The model from `save_weights`, in evaluation mode on the CPU; InputError if the file is missing or damaged.

    ``sizes`` are the numbers of genes, latents and perturbations that it must have, ``later`` the tensors that it may
    lack, since the version that wrote it did not know them.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            architecture = json.loads((handle.metadata() or {})["architecture"])
        state = load_file(path)
        with torch.device("meta"), _NoDraws():  # before room is made for what the architecture claims
            expected = DiscrepancyVAE(**architecture).state_dict()
        if odd := [name for name in state if name not in expected or state[name].shape != expected[name].shape]:
            raise ValueError(f"{odd[0]} does not have the expected shape")
        if missing := [name for name in expected if name not in state and name not in later]:
            raise ValueError(f"{missing[0]} is missing")
        _refuse_no_numbers(state)
        if sizes not in (None, tuple(architecture[name] for name in ("n_genes", "n_latents", "n_perturbations"))):
            raise ValueError("it is the model of another run")
        return build(state, architecture)
    except Exception as error:  # safetensors raises its own type, torch and JSON many
        raise InputError(f"The weights {path} cannot be read: {in_a_line(error)}.", RESTORE) from error


def _refuse_no_numbers(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has a value that is no number")


def save_law(path: Path, law: CombinationLaw) -> None:
    """The law of combination, as its tensors."""
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in law.tensors().items()}))


def load_law(path: Path, n_genes: int, n_perturbations: int) -> CombinationLaw:
    """The law from `save_law`; InputError if the file is missing or damaged, or is of another run."""
    try:
        law = CombinationLaw(**load_file(path))
        _refuse_no_numbers(law.tensors())
        indices = torch.cat([law.measured.flatten(), law.equations.flatten(), law.term_of])
        if len(law.common) != n_genes or not bool((indices < n_perturbations).all()):
            raise ValueError("it is the law of another run")
        return law
    except Exception as error:  # as in `load_model`
        raise InputError(f"{path} cannot be read: {in_a_line(error)}.", RESTORE) from error


def build(state: dict[str, Tensor], architecture: dict[str, Any]) -> DiscrepancyVAE:
    """A model with these weights, in evaluation mode; of earlier versions, which lack some of them, too."""
    model = DiscrepancyVAE(**architecture).to(state["scm.graph"].dtype)
    model.load_state_dict({"penetrance": model.penetrance, "control_error": model.control_error, **state})
    return model.eval()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Everything that is needed to go on: tensors, numbers, strings, lists and dicts of them; SHA-256 at the end.

    The checkpoint that was there stays beside as `previous_of`.
    """
    buffer = io.BytesIO()  # torch reports a full disk in an error of its own
    torch.save(state, buffer)
    content = buffer.getvalue()
    with written_beside(path) as beside:
        beside.write_bytes(content + hashlib.sha256(content).digest())
        if path.exists():
            os.replace(path, previous_of(path))


def previous_of(path: Path) -> Path:
    """Where the checkpoint before the last one lies."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, executing nothing; InputError if it is damaged or holds more than tensors and primitives."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[:-CHECKSUM]).digest() != content[-CHECKSUM:]:
            raise ValueError("its checksum is another")
        state = torch.load(io.BytesIO(content[:-CHECKSUM]), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "identity" not in state:
            raise ValueError("it holds no checkpoint")
        return state
    except Exception as error:  # torch raises pickle, zip and runtime errors
        raise InputError(f"The checkpoint {path} cannot be read.", "Start over with --force.") from error


def mend_checkpoint(path: Path) -> bool:
    """Put the previous checkpoint in the place of one that is damaged or missing; whether that was done."""
    previous = previous_of(path)
    if not previous.exists():
        return False
    try:
        load_checkpoint(path)
    except InputError:
        load_checkpoint(previous)
        os.replace(previous, path)
        return True
    return False


class Checkpoints:
    """What a fit goes on from after the last whole epoch: in memory always, on disk now and then and when it ends early.

    Without a path nothing is written. The identity is what is fitted (input and configuration): states of another fit are
    refused.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self.state, self.written = dict[str, Any](), True

    def last(self) -> dict[str, Any] | None:
        """The state on disk, if there is one; InputError if it is damaged or of another fit."""
        if self.path is None or not self.path.exists():
            return None
        saved = load_checkpoint(self.path)
        if saved["identity"] != self.identity:
            what = "The unfinished run was started with another input or other options."
            raise InputError(what, "Resume it with the same options, or start over with --force.")
        return saved

    def take(self, state: dict[str, Any], write: bool) -> None:
        """Hold a copy of the state, and write it."""
        self.state, self.written = copy.deepcopy(state), False
        if write:
            self.write()

    def write(self) -> None:
        """Write the state that is held, unless it is written or there is no place for it."""
        if self.path is not None and not self.written:
            save_checkpoint(self.path, {"identity": self.identity, **self.state})
        self.written = True

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt | CrlseqError | MemoryError):
            self.write()
