"""What a training step asks of the device: launches, and copies and waits, which keep it idle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from crlseq.data.dataset import PerturbSeqData
from crlseq.model.losses import weighted_total
from crlseq.training.cell_source import CellSource
from crlseq.training.learner import Learner
from crlseq.training.objective import Objective
from tests.cuda.conftest import fit, with_escaped_cells
from tests.cuda.device import CUDA, GIB, Mode, Record, fake_cuda

Count = tuple[int, int, int]


def counted(owner: type, name: str, record: Record, into: list[Count]) -> Any:
    """A patch of ``owner.name`` that notes launches, copies and waits of every call."""
    inner: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        before = record.totals()
        answer = inner(*args, **kwargs)
        into.append(tuple(b - a for a, b in zip(before, record.totals(), strict=True)))  # type: ignore[arg-type]
        return answer

    return mock.patch.object(owner, name, call)


def steps_of(screen: Any, memory: int = 100 * GIB, **options: Any) -> tuple[list[Count], list[Count]]:
    """Of each step of a fit of two epochs: what preparing its cells takes, and what learning from them or judging does."""
    prepared: list[Count] = []
    learned: list[Count] = []
    judged: list[Count] = []
    with (
        fake_cuda(memory) as record,
        counted(Objective, "prepare", record, prepared),
        counted(Learner, "learn", record, learned),
        counted(Learner, "validate", record, judged),
    ):
        fit(screen, "cuda", **{"epochs": 2, **options})
    assert judged and all(copies == waits == 0 for _, copies, waits in judged), judged
    return prepared, learned


# Launches at most. A host makes one in some five microseconds, so that they, and not the arithmetic, take a step's time.
BUDGETS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "sparse": ("sparse", {}, 72, 465),
    "dense": ("dense", {}, 72, 465),
    "many conditions": ("sparse", {"perturbations_per_step": 64}, 72, 465),
    "linear start": ("sparse", {"method": None}, 72, 465),
    "paper": ("sparse", {"preset": "paper"}, 5, 310),
    "sparse decoder": ("sparse", {"decoder": "sparse"}, 72, 480),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_sends_one_copy_and_waits_for_nothing(name: str, screens: dict[str, Any]) -> None:
    screen, options, to_prepare, to_learn = BUDGETS[name]
    prepared, learned = steps_of(screens[screen], **options)
    assert len(prepared) > 1 and len(learned) > 1
    # The first one sends the screen as well.
    assert all((copies, waits) == (1, 0) for _, copies, waits in prepared[1:]), prepared
    assert all(copies == waits == 0 for _, copies, waits in learned), learned
    assert max(launches for launches, *_ in prepared[1:]) <= to_prepare
    # The first step of a fit also makes the optimiser's moments.
    assert max(launches for launches, *_ in learned[1:]) <= to_learn


@pytest.mark.parametrize("preset", [None, "paper"])
def test_a_screen_without_room_is_sent_without_a_wait(screens: dict[str, Any], preset: str | None) -> None:
    prepared, _ = steps_of(screens["sparse"], memory=1, preset=preset)
    # Genes, values and numbers of them by cell; twice where controls and perturbed cells are apart.
    assert all((copies, waits) == ((7, 0) if preset else (4, 0)) for _, copies, waits in prepared[1:]), prepared
    assert max(launches for launches, *_ in prepared) <= 80


def test_a_store_is_sent_once_where_its_non_zeros_have_room(screens: dict[str, Any]) -> None:
    prepared, _ = steps_of(screens["store"], memory=300_000, streamed=True, epochs=1)
    assert all((copies, waits) == (1, 0) for _, copies, waits in prepared[1:]), prepared


def test_a_screen_that_no_epoch_reads_is_not_sent(screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[CellSource] = []
    monkeypatch.setattr(CellSource, "_settle", lambda source: sent.append(source))
    with fake_cuda():
        fit(screens["sparse"], "cuda", method="linear", epochs=None)
        assert not sent
        fit(screens["sparse"], "cuda", epochs=1)
    assert len(sent) == 1


def test_a_step_of_cells_that_may_have_escaped_waits_for_nothing(read: dict[str, PerturbSeqData]) -> None:
    with fake_cuda() as record, Mode():
        objective, batch = with_escaped_cells(read["sparse"], CUDA)
        assert objective.mixed and objective.table.shape[1] == 2  # doubles, of which each part may hit a cell
        step, generator = objective.prepare(batch), torch.Generator(CUDA).manual_seed(0)
        before = record.totals()
        terms = objective(step, generator)
        weighted_total(terms, dict.fromkeys(terms, 1.0)).backward()  # type: ignore[no-untyped-call]
        assert record.totals()[1:] == before[1:]


def test_validation_cells_are_prepared_once(screens: dict[str, Any]) -> None:
    few, many = (steps_of(screens["sparse"], epochs=n) for n in (2, 4))
    training = len(many[1]) - len(few[1])
    assert len(many[0]) - len(few[0]) == training  # what two more epochs prepare: their own steps and no others
    sent = [steps_of(screens["sparse"], memory=1, epochs=n) for n in (2, 4)]
    assert len(sent[1][0]) - len(sent[0][0]) > training  # there is no room to keep them
