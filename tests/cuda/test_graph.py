"""Steps by graphs are the steps: on a device that repeats what was written down, and refuses what a graph cannot hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crlseq.run.run import Run
from crlseq.training import graph
from crlseq.training.learner import Learner
from tests.cuda.conftest import fit
from tests.cuda.device import fake_cuda
from tests.cuda.rules import DeviceError
from tests.cuda.test_budget import Count, counted
from tests.cuda.test_faults import Fault, plant
from tests.cuda.test_fits import check_same

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sparse": ("sparse", {}),
    "paper": ("sparse", {"preset": "paper"}),
    "sparse decoder": ("sparse", {"decoder": "sparse"}),
    "linear start, ensemble": ("dense", {"method": None, "ensemble": 2}),
}
SMALL = {"epochs": 2, "batch_size": 12, "perturbations_per_step": 4}
FAULTS = {
    "stale weights": Fault(Learner, "begin", "self.graphs.forget()", "pass"),
    "a wait": Fault(Learner, "_descended", "value.double() / n_steps", "value.double() / value.item() / n_steps"),
    "noise of its own": Fault(Learner, "_by_shape", "(*inputs)", "(inputs[0], self.objective.draws(inputs[0], self.noise))"),
}  # fmt: skip


def by_graphs(screen: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Run, list[Count]]:
    learned: list[Count] = []
    monkeypatch.setattr(graph, "ON", True)
    with fake_cuda() as record, counted(Learner, "learn", record, learned):
        return fit(screen, "cuda", **{**SMALL, **options}), learned


@pytest.mark.parametrize("name", CASES)
def test_a_fit_is_that_of_the_cpu(name: str, screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    screen, options = CASES[name]
    expected = fit(screens[screen], "cpu", **{**SMALL, **options})
    found, learned = by_graphs(screens[screen], monkeypatch, **options)
    check_same(found, expected)
    np.testing.assert_allclose(found.history, expected.history, rtol=1e-9)
    assert found.info["notes"] == expected.info["notes"]
    launches = [each for each, *_ in learned]
    assert all(copies == waits == 0 for _, copies, waits in learned)
    assert sum(each < 20 for each in launches) > len(launches) / 3  # the others are those that shapes come first in


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_graph_cannot_hold_is_caught(
    name: str, screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, FAULTS[name])
    with pytest.raises(DeviceError):
        by_graphs(screens["sparse"], monkeypatch, epochs=4)


def test_without_graphs_a_fit_goes_on_and_says_so_once(
    screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(act: Any, pool: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    expected = fit(screens["sparse"], "cpu", **SMALL)
    monkeypatch.setattr(graph, "ON", True)
    with fake_cuda():
        monkeypatch.setattr(graph, "captured", refuse)
        found = fit(screens["sparse"], "cuda", **SMALL)
    check_same(found, expected)
    said = "Steps are computed without CUDA graphs: CUDA says 'CUDA error: operation not permitted when stream is capturing'."
    assert [note for note in found.info["notes"] if "graphs" in note] == [said]
