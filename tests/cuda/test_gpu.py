"""On a real GPU: fits are those of the CPU, one seed is one model to the byte, and no step waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from crlseq.run.run import Run
from crlseq.training import graph
from crlseq.training.cell_source import CellSource
from crlseq.training.learner import Learner
from crlseq.training.objective import Objective
from tests.cuda.conftest import fit
from tests.cuda.test_fits import CASES, check_same

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine, or without -m cuda"),
]
# A share of the memory is of no meaning here, and noise of hits is drawn apart from the rest.
OF_A_GPU = {name: case for name, case in CASES.items() if "memory" not in case[1] and "linear start" not in name}


def of(screens: dict[str, Any], name: str, device: str, **changes: Any) -> Run:
    screen, options = OF_A_GPU[name]
    options = {key: str(screens[value]) if key == "gene_sets" else value for key, value in options.items()}
    return fit(screens[screen], device, **{**options, **changes})


@pytest.mark.parametrize("name", OF_A_GPU)
def test_a_fit_is_that_of_the_cpu(name: str, screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is drawn on the CPU for both: generators of devices differ."""
    seeds: list[int] = []

    def draws(self: Objective, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        seeds.append(len(seeds))
        return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seeds[-1]), dtype=self.dtype).to(
            self.device
        )

    monkeypatch.setattr(Objective, "_draws", draws)
    expected = of(screens, name, "cpu")
    seeds.clear()
    found = of(screens, name, "cuda")
    assert found.info["device"] == "cuda:0"
    check_same(found, expected)


@pytest.mark.parametrize("name", ["sparse", "dense", "sparse decoder", "paper"])
def test_one_seed_is_one_model(name: str, screens: dict[str, Any]) -> None:
    one, other = (of(screens, name, "cuda", dtype="float32", epochs=10) for _ in range(2))
    assert one.weights is not None and other.weights is not None
    assert all(torch.equal(value, other.weights[0][key]) for key, value in one.weights[0].items())


@pytest.mark.parametrize("name", ["sparse", "paper"])
def test_no_step_waits(name: str, screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def strictly(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return inner(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    settle = CellSource._settle
    made: list[CellSource] = []
    monkeypatch.setattr(CellSource, "_settle", lambda source: (made.append(source), settle(source)))
    strict, plain = strictly(Objective.prepare), Objective.prepare
    # The first one sends the screen.
    monkeypatch.setattr(Objective, "prepare", lambda *a, **k: (strict if made else plain)(*a, **k))
    monkeypatch.setattr(Learner, "learn", strictly(Learner.learn))
    of(screens, name, "cuda", epochs=1)


@pytest.mark.parametrize("name", ["sparse", "paper", "sparse decoder", "ensemble"])
def test_steps_by_graphs_are_the_steps(name: str, screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = of(screens, name, "cuda", batch_size=12, perturbations_per_step=4)
    monkeypatch.setattr(graph, "ON", True)
    found = of(screens, name, "cuda", batch_size=12, perturbations_per_step=4)
    assert not [note for note in found.info["notes"] if "graphs" in note]
    check_same(found, expected)


@pytest.mark.parametrize("set_before", ["highest", "high"])
def test_a_caller_with_tf32_gets_the_same_model(set_before: str, screens: dict[str, Any]) -> None:
    expected = of(screens, "dense", "cuda", dtype="float32")
    torch.set_float32_matmul_precision(set_before)
    try:
        found = of(screens, "dense", "cuda", dtype="float32")
    finally:
        torch.set_float32_matmul_precision("highest")
    check_same(found, expected, exact=True)
