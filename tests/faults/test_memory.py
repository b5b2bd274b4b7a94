"""Memory that runs out in a step: it is computed in parts, with the same result but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import crlseq
from crlseq.data.batches import BatchIndex
from crlseq.pipeline.progress import Progress
from crlseq.storage.checkpoint import load_checkpoint
from crlseq.training.memory import out_of_memory
from crlseq.training.objective import Objective, Step
from tests.support import check_refusal, invoke, succeeds

FIT: dict[str, Any] = {
    "method": "gradient", "n_latents": 2, "epochs": 3, "batch_size": 16, "dtype": "float64", "ensemble": 2,
}  # fmt: skip
WORDS = [word for name, value in FIT.items() for word in (f"--{name.replace('_', '-')}", value)]
SAID = "There is not enough memory for a step; from now on each is computed in {} parts"
ERRORS = [
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.fixture(scope="module")
def whole(screen_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a fit whose memory suffices."""
    path = crlseq.fit(screen_file, tmp_path_factory.mktemp("whole") / "RUN", **FIT).path
    assert path is not None
    return path


def short_of_memory(monkeypatch: pytest.MonkeyPatch, when: Callable[[Step], bool], error: Exception) -> None:
    """An objective that raises after its forward pass, which leaves its noise drawn."""
    call = Objective.__call__

    def failing(self: Objective, step: Step, generator: torch.Generator) -> dict[str, torch.Tensor]:
        terms = call(self, step, generator)
        if when(step):
            raise error
        return terms

    monkeypatch.setattr(Objective, "__call__", failing)


def check_same(folder: Path, whole: Path, rtol: float = 1e-8) -> None:
    """The weights and losses but for rounding."""
    found, expected = load_file(folder / "model.safetensors"), load_file(whole / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    here, there = crlseq.load(folder).history, crlseq.load(whole).history
    assert list(here) == list(there)
    np.testing.assert_allclose(here.to_numpy(), there.to_numpy(), rtol=rtol)


# In training, and in validation: of each epoch's passes of two models, 10 and 2.
@pytest.mark.parametrize(("error", "at"), [*((error, 7) for error in ERRORS), (MemoryError(), 23)])
def test_a_step_in_two_parts(
    screen_file: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, error: Exception
) -> None:
    calls: list[Step] = []
    short_of_memory(monkeypatch, lambda step: calls.append(step) or len(calls) == at, error)  # type: ignore[func-returns-value]
    answer = succeeds("fit", screen_file, "--output", tmp_path / "RUN", *WORDS)
    assert answer.err.count("not enough memory") == 1 and SAID.format(2) in answer.err
    check_same(tmp_path / "RUN", whole)
    info = crlseq.load(tmp_path / "RUN").info
    assert info["training"]["parts_of_steps"] == 2
    assert info["notes"][-1].startswith(SAID.format(2))
    assert crlseq.load(whole).info["training"]["parts_of_steps"] == 1


def test_as_many_parts_as_memory_asks_for(
    screen_file: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cells(step: Step) -> int:
        return len(step.conditions) * step.whole[1] if step.mask is None else int(step.mask.sum())

    short_of_memory(monkeypatch, lambda step: cells(step) > 2 * 16, MemoryError())  # 8 pieces of at most 16 are a step
    notes: list[str] = []
    run = crlseq.fit(screen_file, tmp_path / "RUN", progress=Progress(note=notes.append), **FIT)
    assert run.info["training"]["parts_of_steps"] == 4
    told = [note for note in notes if "memory" in note]
    assert all(note.startswith(SAID.format(n)) for n, note in zip((2, 4), told, strict=True))
    check_same(tmp_path / "RUN", whole)


def test_memory_runs_out_as_cells_are_read(
    screen_file: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Objective.prepare

    def failing(self: Objective, batch: BatchIndex, own: np.ndarray | None = None, padded: bool = False) -> Step:
        if own is None or batch.mask[own].sum() > 4 * 16:
            raise MemoryError
        return prepare(self, batch, own, padded)

    monkeypatch.setattr(Objective, "prepare", failing)
    run = crlseq.fit(screen_file, tmp_path / "RUN", **FIT)
    assert run.info["training"]["parts_of_steps"] == 2
    check_same(tmp_path / "RUN", whole)


def test_memory_for_nothing(screen_file: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second epoch on not even one perturbation can be computed; elsewhere the fit goes on."""
    passes: list[Step] = []
    with monkeypatch.context() as patch:
        short_of_memory(patch, lambda step: passes.append(step) or len(passes) > 12, MemoryError())  # type: ignore[func-returns-value]
        answer = invoke("fit", screen_file, "--output", tmp_path / "RUN", *WORDS, "--quiet")
    check_refusal(*answer, 3, "not enough memory for a step of one perturbation", "--resume")
    saved = load_checkpoint(tmp_path / "RUN.partial" / "resume.pt")
    assert saved["epoch"] == 0 and not (tmp_path / "RUN").exists()
    succeeds("fit", screen_file, "--output", tmp_path / "RUN", *WORDS, "--resume")
    check_same(tmp_path / "RUN", whole)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_memory_for_no_screen(
    screen_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("crlseq.pipeline.fit.principal_components", fails)
    answer = invoke("fit", screen_file, "--output", tmp_path / "RUN", *WORDS, "--quiet")
    check_refusal(*answer, 3, "There is not enough memory", "--n-top-genes")
    assert out_of_memory(error) and not out_of_memory(RuntimeError("shapes do not match"))
