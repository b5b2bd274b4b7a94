"""Devices that are not there, too old, full, or lost: one sentence each, and the CPU where the choice was left open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crlseq.errors import InputError, UsageError
from crlseq.pipeline.fit import Progress
from crlseq.training import distributed
from crlseq.training.cell_source import CellSource
from crlseq.training.device import resolve_device
from crlseq.training.distributed import LostRankError, Ranks
from crlseq.training.learner import Sparsity
from crlseq.training.memory import ShortOfMemoryError, out_of_memory
from crlseq.training.objective import Objective
from tests.cuda.conftest import fit
from tests.cuda.device import CudaTensor, fake_cuda

FULL: list[Exception] = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
]
TOO_OLD = RuntimeError(
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading and "
    "installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
# What torch raises, as `--device cuda` is told of it.
BROKEN: list[tuple[Exception, str]] = [
    (AssertionError("Torch not compiled with CUDA enabled"), "torch finds no CUDA device, since it is a torch for CPUs"),
    (RuntimeError("No CUDA GPUs are available"), "torch finds no CUDA device"),
    (RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver "
     "from http://www.nvidia.com/Download/index.aspx"), "torch finds no CUDA device, since there is no NVIDIA driver"),
    (TOO_OLD, "the NVIDIA driver (for CUDA 11.4) is too old for this torch"),
    (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be reported later"),
     "CUDA says 'CUDA error: all CUDA-capable devices are busy or unavailable'"),
    (FULL[0], "cuda:0 has no free memory"),
]  # fmt: skip


def raising(error: Exception) -> Callable[..., Any]:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fails


@pytest.mark.parametrize(("error", "said"), BROKEN)
def test_a_device_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "init", raising(error))
    with pytest.raises(InputError) as refused:
        resolve_device("cuda")
    assert refused.value.message == f"--device cuda cannot be used: {said}."
    assert refused.value.hint.endswith(("or use --device cpu.", "cpu or auto."))
    notes: list[str] = []
    assert resolve_device("auto", note=notes.append) == torch.device("cpu")
    # A machine without a GPU is not told so in every fit.
    assert notes == ([] if "no CUDA device" in said else [f"CUDA is not used: {said}."])
    assert resolve_device("cpu") == torch.device("cpu")


def test_devices_by_number() -> None:
    with fake_cuda(devices=2):
        assert [str(resolve_device(asked)) for asked in ("auto", "cuda", "cuda:0", "cuda:1")] == [
            "cuda:0", "cuda:0", "cuda:0", "cuda:1",
        ]  # fmt: skip
        with pytest.raises(
            InputError, match=r"--device cuda:2 cannot be used: there are 2 CUDA devices, cuda:0 to cuda:1\."
        ):
            resolve_device("cuda:2")
    with fake_cuda(), pytest.raises(InputError, match=r"there is one CUDA device, cuda:0\."):
        resolve_device("cuda:1")


def test_a_slice_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB MIG 1g.5gb")
        assert str(resolve_device("cuda")) == "cuda:0"
        with pytest.raises(InputError, match=r"there is one CUDA device, cuda:0, a slice of a GPU\."):
            resolve_device("cuda:1")


def test_every_process_has_a_device_of_its_own_or_none() -> None:
    second = Ranks(rank=1, size=2, local=1, on_machine=2)
    with fake_cuda(devices=2):
        assert str(resolve_device("cuda", second)) == str(resolve_device("auto", second)) == "cuda:1"
        assert str(resolve_device("cpu", second)) == "cpu"
        with pytest.raises(UsageError, match=r"--device cuda:1 names one device for 2 processes\."):
            resolve_device("cuda:1", second)
    for rank in (0, 1):  # no process computes elsewhere than the others
        ranks = Ranks(rank=rank, size=2, local=rank, on_machine=2)
        with fake_cuda():
            assert str(resolve_device("auto", ranks)) == "cpu"
            with pytest.raises(InputError, match="2 processes share a machine with one CUDA device, cuda:0"):
                resolve_device("cuda", ranks)


def test_sums_of_matrices_are_added_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with fake_cuda():
        resolve_device("cuda")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


def test_products_are_exact_and_sums_have_an_order_whatever_is_set(screens: dict[str, Any]) -> None:
    def flags() -> tuple[str, bool, bool, bool]:
        return (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    seen: list[tuple[str, bool, bool, bool]] = []
    progress = Progress(epoch=lambda record, n: seen.append(flags()))
    torch.set_float32_matmul_precision("high")
    try:
        before = flags()
        with fake_cuda():
            fit(screens["dense"], "cuda", epochs=1, progress=progress)
        assert flags() == before
        fit(screens["dense"], "cpu", epochs=1, progress=progress)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", True, True, False), before]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:24])
def test_a_step_that_the_device_has_no_memory_for(
    screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    call, calls = Objective.__call__, []
    assert out_of_memory(error) and not out_of_memory(RuntimeError("CUDA error: an illegal memory access"))

    def failing(self: Objective, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return call(self, *args)

    monkeypatch.setattr(Objective, "__call__", failing)
    with fake_cuda():
        run = fit(screens["dense"], "cuda", epochs=2)
    assert run.info["training"]["parts_of_steps"] == 2 and run.info["device"] == "cuda:0"


# Memory that ends outside of a step's terms.
PLACES: dict[str, tuple[Any, str]] = {
    "the model is sent": (torch.nn.Module, "to"),
    "sparsity begins": (Sparsity, "begin"),
    "the optimiser starts": (torch.optim.Adam, "step"),
    "the screen is looked at": (Objective, "prepare"),
}


def full_on_the_device(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Raise there on the device, and not on the CPU."""
    inner = getattr(owner, name)

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = getattr(self, "model", None)
        tensors = [*(model.parameters() if model is not None else ()), *(args if name == "to" else ())]
        if isinstance(self, torch.optim.Optimizer):
            tensors = self.param_groups[0]["params"]
        if any(str(getattr(x, "device", x)).startswith("cuda") for x in tensors):
            raise FULL[0]
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("place", PLACES)
def test_memory_of_the_device_that_ends(
    place: str, screens: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fit(screens["dense"], "cpu", decoder="sparse", epochs=2)
    full_on_the_device(monkeypatch, *PLACES[place])
    notes: list[str] = []
    with fake_cuda():
        with pytest.raises(ShortOfMemoryError, match="memory"):
            fit(screens["dense"], "cuda", decoder="sparse", epochs=2)
        run = fit(screens["dense"], "auto", decoder="sparse", epochs=2, progress=Progress(note=notes.append))
    said = "The memory of cuda:0 does not suffice; the fit continues on the CPU."
    assert notes.count(said) == 1 and said in run.info["notes"]
    assert run.info["device"] == "cpu"
    assert run.weights is not None and expected.weights is not None
    assert all(torch.equal(value, run.weights[0][key]) for key, value in expected.weights[0].items())


def test_a_screen_that_the_device_has_no_memory_for_is_sent_step_by_step(
    screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CellSource, "_settle", raising(FULL[0]))
    with fake_cuda():
        run = fit(screens["dense"], "cuda", epochs=1)
    assert run.info["device"] == "cuda:0" and run.info["training"]["parts_of_steps"] == 1


# ---- ranks that are lost


class Work:
    """An operation of NCCL that is done after so many looks, and may then raise."""

    def __init__(self, looks: int, error: BaseException | None = None) -> None:
        self.looks, self.error = looks, error

    def is_completed(self) -> bool:
        self.looks -= 1
        if self.error is not None and self.looks == 0 and not isinstance(self.error, RuntimeError):
            raise self.error
        return self.looks <= 0

    def wait(self) -> None:
        if self.error is not None:
            raise self.error


class Group:
    aborted = False

    def abort(self) -> None:
        self.aborted = True


def summed(monkeypatch: pytest.MonkeyPatch, work: Work) -> Group:
    group = Group()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat, group, async_op: work)
    with fake_cuda():
        Ranks(0, 2, groups={"devices": group}).add_up([CudaTensor(torch.zeros(2))])  # type: ignore[dict-item]
    return group


def test_ranks_that_are_there_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not summed(monkeypatch, Work(3)).aborted


def test_a_lost_rank_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Group] = []
    monkeypatch.setattr(Group, "abort", lambda self: groups.append(self))
    with pytest.raises(LostRankError, match="Another rank was lost") as lost:
        summed(monkeypatch, Work(2, RuntimeError("NCCL communicator was aborted on rank 0.")))
    assert "--resume, on any number of ranks" in lost.value.hint
    with pytest.raises(KeyboardInterrupt):  # what torchrun's signal raises, from which `joined` makes the same sentence
        summed(monkeypatch, Work(2, KeyboardInterrupt()))
    monkeypatch.setattr(distributed, "STEP_TIMEOUT", distributed.timedelta(seconds=0.01))
    with pytest.raises(LostRankError, match="Another rank was lost"):
        summed(monkeypatch, Work(10**9))
    assert len(groups) == 3  # else what is under way would keep the process from ending
