"""Discovery on a device: what is large is computed there, with the numbers of the CPU, and what is small is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from crlseq.discovery import device, factor_model
from crlseq.discovery.components import count_components
from crlseq.discovery.device import CPU, SECOND, device_for
from crlseq.pipeline import fit as pipeline
from crlseq.pipeline.fit import Progress
from crlseq.threads import on_threads
from crlseq.training.memory import ShortOfMemoryError
from tests.cuda.conftest import fit
from tests.cuda.device import CUDA, Mode, _in_mode, fake_cuda
from tests.cuda.test_trouble import FULL, raising
from tests.discovery.test_factor_model import counts_of

LINEAR: dict[str, Any] = {"method": "linear", "epochs": None, "n_latents": 3}


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "SECOND", 0.0)
    # Not in all tests of the device: inside a mode torch rounds some numbers of the CPU otherwise.
    monkeypatch.setattr(pipeline, "find_programs", _in_mode(pipeline.find_programs))


def components_on(place: torch.device, chunk: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Of 1,200 cells, of which every second one gave the loadings."""
    rows = sp.csr_matrix(counts_of()[0].numpy())
    monkeypatch.setattr(factor_model, "CHUNK", chunk)
    with on_threads(1):
        return count_components(lambda index: rows[index], np.arange(0, 1200, 2), np.arange(1200), 8, device=place)


def test_large_computations_are_those_of_a_second_on_a_cpu() -> None:
    assert device_for(SECOND, CUDA) == CUDA
    assert device_for(0.99 * SECOND, CUDA) == CPU
    assert device_for(SECOND, CPU) == CPU


@pytest.mark.usefixtures("everything_is_large")
def test_components_of_counts_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = components_on(CPU, 256, monkeypatch)
    with fake_cuda() as record, Mode():
        found = components_on(CUDA, 256, monkeypatch)
    assert record.launches.total() > 2000
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_few_counts_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda() as record, Mode():
        components_on(CUDA, 256, monkeypatch)
    assert record.totals() == (0, 0, 0)


@pytest.mark.usefixtures("everything_is_large")
def test_counts_are_sent_once_and_waits_do_not_grow_with_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = counts_of()
    axes = np.linalg.svd(np.log1p(x.numpy()), full_matrices=False)[2][:8].T
    found = []
    for rounds in (4, 5):
        monkeypatch.setattr(factor_model, "MAX_ROUNDS", rounds)
        monkeypatch.setattr(factor_model, "SETTLED", 0.0)  # no round is the last before
        for chunk in (600, 300):
            monkeypatch.setattr(factor_model, "CHUNK", chunk)
            with fake_cuda() as record, Mode():
                factor_model.fit_factors(x.to(CUDA), axes, 0.3, 1, 1)
            found.append(np.array(record.totals()[1:]))
    of_round, of_chunks = found[2] - found[0], (found[3] - found[1]) - (found[2] - found[0])
    assert (of_round <= [3, 12]).all(), of_round  # copies and waits of two chunks
    assert of_chunks[0] == 0 and of_chunks[1] <= 2 * 4, of_chunks  # two more chunks send and fetch nothing


@pytest.mark.usefixtures("everything_is_large")
def test_a_fit_finds_the_programs_of_the_cpu(screens: dict[str, Any]) -> None:
    expected = fit(screens["sparse"], "cpu", **LINEAR)
    with fake_cuda() as record:
        found = fit(screens["sparse"], "cuda", **LINEAR)
    assert record.launches["linalg_cholesky_ex"] > 10
    for name in ("programs", "interventions"):
        one, other = getattr(found, name), getattr(expected, name)
        assert [*one.columns] == [*other.columns] and len(one) == len(other)
        for column in one.select_dtypes("number"):
            np.testing.assert_allclose(one[column], other[column], rtol=1e-9, atol=1e-12, err_msg=column)


@pytest.mark.usefixtures("everything_is_large")
def test_memory_that_ends_while_programs_are_sought(screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fit(screens["sparse"], "cpu", **LINEAR)
    inner = factor_model.FactorModel.working

    def full(self: factor_model.FactorModel, x: torch.Tensor, *args: torch.Tensor) -> Any:
        return raising(FULL[0])() if x.is_cuda else inner(self, x, *args)

    monkeypatch.setattr(factor_model.FactorModel, "working", full)
    notes: list[str] = []
    with fake_cuda():
        with pytest.raises(ShortOfMemoryError, match=r"The memory of cuda:0 does not suffice\."):
            fit(screens["sparse"], "cuda", **LINEAR)
        found = fit(screens["sparse"], "auto", **LINEAR, progress=Progress(note=notes.append))
    said = "The memory of cuda:0 does not suffice; the search for programs continues on the CPU."
    assert notes.count(said) == 1
    np.testing.assert_array_equal(found.interventions["shift"], expected.interventions["shift"])


@pytest.mark.usefixtures("everything_is_large")
def test_programs_are_sought_in_full_precision_and_one_order(
    screens: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the caller has set: what is found starts the training."""
    seen = list[tuple[str, bool]]()
    inner = factor_model.fit_factors

    def looking(*args: Any) -> Any:
        seen.append((torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()))
        return inner(*args)

    monkeypatch.setattr("crlseq.discovery.components.fit_factors", looking)
    torch.set_float32_matmul_precision("high")
    try:
        with fake_cuda():
            fit(screens["sparse"], "cuda", **LINEAR)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", True)]
