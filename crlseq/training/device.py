"""Where to compute: the device that was asked for, or one sentence on why it cannot be used."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from crlseq.errors import InputError, UsageError
from crlseq.training.distributed import ALONE, Ranks
from crlseq.training.memory import ShortOfMemoryError, out_of_memory

Result = TypeVar("Result")

ABSENT = "torch finds no CUDA device"
CPU_INSTEAD = "or use --device cpu."
# Why CUDA cannot be used: torch's words in small letters, ours, and what to do.
REASONS = (
    ("not compiled with cuda", f"{ABSENT}, since it is a torch for CPUs", "Install a torch with CUDA, " + CPU_INSTEAD),
    ("found no nvidia driver", f"{ABSENT}, since there is no NVIDIA driver", "Install the driver, " + CPU_INSTEAD),
    ("no cuda gpus are available", ABSENT, "Use --device cpu or auto."),
    ("driver on your system is too old", "the NVIDIA driver{} is too old for this torch", "Update it, " + CPU_INSTEAD),
)
# Else cuBLAS, called by two threads, adds in another order every time.
CUBLAS_WORKSPACE = ":4096:8"


def resolve_device(asked: str, ranks: Ranks = ALONE, note: Callable[[str], None] = lambda text: None) -> torch.device:
    """The device that this process computes on, as ``--device`` asks for it; each of several processes has its own.

    ``auto`` is CUDA if it works and has a device for every process of this machine, else the CPU; `note` gets a sentence
    if there is a device and it cannot be used. InputError if CUDA is asked for and cannot be used; UsageError if one
    device is named for several processes.
    """
    if asked == "cpu":
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    named = asked.partition(":")[2]
    if named and ranks.size > 1:
        message = f"--device {asked} names one device for {ranks.size} processes."
        raise UsageError(message, "Use --device cuda: each process takes a device of its own.")
    index = int(named or ranks.local)
    why, hint = _why_not(index, ranks)
    if not why:
        return torch.device("cuda", index)
    if asked != "auto":
        raise InputError(f"--device {asked} cannot be used: {why}.", hint)
    if not why.startswith(ABSENT):
        note(f"CUDA is not used: {why}.")
    return torch.device("cpu")


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Compute on a CUDA device with products in full precision and one order of every sum, whatever else is set; on the CPU
    this changes nothing.

    TF32 keeps 10 bits of float32's 23. Distances lose digits as it is, and products with weights should gain little: by
    estimate, not measured on a GPU, a step's arithmetic (1.7 GFLOP at 5,000 genes) takes far less time than its launches. The order costs a sort where rows
    are laid out from non-zeros. An operation without an order is warned of, and the fit goes on.
    """
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_device(device)
    filling: Any = torch.utils.deterministic
    precision, filled = torch.get_float32_matmul_precision(), filling.fill_uninitialized_memory
    ordered, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = False  # every block would be written once more
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(ordered, warn_only=warns)
        filling.fill_uninitialized_memory = filled


def computed_on(
    device: torch.device, act: Callable[[torch.device], Result], may_move: bool, note: Callable[[str], None], what: str
) -> Result:
    """``act(device)``; where its memory does not suffice and `may_move`, ``act`` of the CPU, after a note that says `what`
    continues there. ShortOfMemoryError if it may not.
    """
    short = f"The memory of {device} does not suffice"
    try:
        with reproducible(device):
            return act(device)
    except Exception as error:  # which holds what lies on the device until the block ends
        if device.type == "cpu" or not (isinstance(error, ShortOfMemoryError) or out_of_memory(error)):
            raise
        if not may_move:
            hint = "Fit again with a lower --batch-size or --n-top-genes, or with --device cpu."
            raise ShortOfMemoryError(f"{short}.", hint) from error
    note(f"{short}; {what} continues on the CPU.")
    return act(torch.device("cpu"))


def _why_not(index: int, ranks: Ranks) -> tuple[str, str]:
    """Why a device cannot be used, and what to do; two empty strings if it can."""
    error = _error_of(torch.cuda.init)
    if error is None:
        n = torch.cuda.device_count()
        if n == 0:
            return ABSENT, "Use --device cpu or auto."
        if n < ranks.on_machine:
            hint = f"Start {n} process{'es' * (n > 1)} on each machine, {CPU_INSTEAD}"
            return f"{ranks.on_machine} processes share a machine with {_devices(n)}", hint
        if index >= n:
            return f"there {'is' if n == 1 else 'are'} {_devices(n)}{_slice(n)}", "Use --device cuda:0 or cpu."
        # Devices that are there may be full, busy, or not what torch was compiled for: one number shows it.
        error = _error_of(lambda: torch.zeros((), device=torch.device("cuda", index)).add_(1).item())
    if error is None:
        return "", ""
    if out_of_memory(error):
        return f"cuda:{index} has no free memory", "End what else computes on it, " + CPU_INSTEAD
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for words, why, hint in REASONS:
        if words in said.casefold():
            version = re.search(r"found version (\d+)", said)
            of = f" (for CUDA {int(version[1]) // 1000}.{int(version[1]) % 1000 // 10})" if version else ""
            return why.format(of), hint
    return f"CUDA says {said.rstrip('.')!r}", "Check the device with nvidia-smi, " + CPU_INSTEAD


def _devices(n: int) -> str:
    return "one CUDA device, cuda:0" if n == 1 else f"{n} CUDA devices, cuda:0 to cuda:{n - 1}"


def _slice(n: int) -> str:
    """Of a part of a GPU (MIG), of which a process sees one."""
    return ", a slice of a GPU" if n == 1 and "MIG" in torch.cuda.get_device_name(0) else ""


def _error_of(act: Callable[[], object]) -> Exception | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what is told here
            act()
    except Exception as error:  # torch raises AssertionError, RuntimeError and its own
        return error
    return None
