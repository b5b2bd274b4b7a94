"""Fits on a device that is not there are those on the CPU, in every form that a screen and a model can have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from crlseq.config import make_config
from crlseq.data.dataset import PerturbSeqData
from crlseq.run.run import Run
from crlseq.threads import on_threads
from crlseq.training import trainer
from crlseq.training.distributed import Ranks
from tests.cuda.conftest import FIT, fit
from tests.cuda.device import GIB, fake_cuda

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sparse": ("sparse", {}),
    "dense": ("dense", {}),
    "sparse, sent step by step": ("sparse", {"memory": 1}),
    "dense, sent step by step": ("dense", {"memory": 1}),
    "a store": ("store", {"streamed": True}),
    "a store, sent step by step": ("store", {"streamed": True, "memory": 1}),
    "a store, by its non-zeros": ("store", {"streamed": True, "memory": 300_000}),
    "uneven steps": ("sparse", {"batch_size": 25, "perturbations_per_step": 3}),
    "no combinations": ("sparse", {"combinations": False}),
    "ensemble": ("sparse", {"ensemble": 2}),
    "gene sets": ("sparse", {"gene_sets": "sets", "gene_set_leak": 0.1}),
    "sparse decoder": ("sparse", {"decoder": "sparse"}),
    "nonlinear": ("dense", {"equations": "nonlinear", "intervention": "shift"}),
    "hard": ("sparse", {"intervention": "hard"}),
    "paper": ("sparse", {"preset": "paper"}),
    "paper, sent step by step": ("sparse", {"preset": "paper", "memory": 1}),
    "biased": ("dense", {"output_activation": "leaky_relu", "mmd_estimator": "biased"}),
    "linear start": ("sparse", {"method": None}),
    "linear start, sparse decoder, ensemble": ("dense", {"method": None, "decoder": "sparse", "ensemble": 2}),
    "no epoch": ("sparse", {"method": "linear", "epochs": None}),
}  # fmt: skip


def check_same(found: Run, expected: Run, exact: bool = False) -> None:
    """The weights; products of dense rows are those of sparse ones but for rounding."""
    assert found.weights is not None and expected.weights is not None
    for name, value in expected.weights[0].items():
        assert type(found.weights[0][name]) is torch.Tensor, name
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-7, "atol": 1e-9}
        torch.testing.assert_close(
            found.weights[0][name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_equal(found: trainer.Fit, expected: trainer.Fit) -> None:
    """To the bit."""
    ours, theirs = found.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert found.history == expected.history


@pytest.mark.parametrize("name", CASES)
def test_a_fit_is_that_of_the_cpu(name: str, screens: dict[str, Any]) -> None:
    screen, options = CASES[name]
    options = {key: str(screens[value]) if key == "gene_sets" else value for key, value in options.items()}
    memory = options.pop("memory", 100 * GIB)
    expected = fit(screens[screen], "cpu", **options)
    with fake_cuda(memory) as record:
        found = fit(screens[screen], "cuda", **options)
    assert (expected.info["device"], found.info["device"]) == ("cpu", "cuda:0")
    launches, copies, _ = record.totals()
    assert launches > (500 if options.get("epochs", 1) else 0) and copies > 10  # and not on the CPU after all
    check_same(found, expected, exact=screen == "dense")
    np.testing.assert_allclose(found.history, expected.history, rtol=1e-9)


def test_a_stopped_fit_goes_on_on_either_device(
    read: dict[str, PerturbSeqData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    options = {**FIT, "epochs": 4}
    data, config = read["dense"], make_config(**options, device="cuda")
    whole = trainer.fit_model(data, make_config(**options, device="cpu"), 3)

    def stop(record: dict[str, float], n: int) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with fake_cuda():
        with pytest.raises(KeyboardInterrupt):
            trainer.fit_model(data, config, 3, tmp_path / "resume.pt", "id", stop)
        (tmp_path / "other.pt").write_bytes((tmp_path / "resume.pt").read_bytes())
        found = trainer.fit_model(data, config, 3, tmp_path / "resume.pt", "id")
    moved = trainer.fit_model(data, make_config(**options, device="cpu"), 3, tmp_path / "other.pt", "id")
    check_equal(found, whole)
    check_equal(moved, whole)


def test_a_rank_computes_its_part_and_exchanges_tensors_of_the_device(
    read: dict[str, PerturbSeqData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two ranks, alone in its group: sums over ranks are its own part."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchrun does
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    new_group, backends = dist.new_group, list[str]()

    def gloo(backend: str, **options: Any) -> Any:
        backends.append(backend)
        return new_group(**options)

    try:
        monkeypatch.setattr(dist, "new_group", gloo)
        data = read["dense"]
        ranks, options = Ranks(0, 2, 0, 1, {"waiting": new_group()}), {**FIT, "epochs": 2, "decoder": "sparse"}
        expected = trainer.fit_model(data, make_config(**options, device="cpu"), 3, ranks=ranks)
        assert backends == []
        with fake_cuda():
            found = trainer.fit_model(data, make_config(**options, device="cuda"), 3, ranks=ranks)
    finally:
        dist.destroy_process_group()
    assert backends == ["nccl"]
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"  # else NCCL ends the process once a rank is lost
    assert os.environ["NCCL_ALGO"] == "^NVLS"
    check_equal(found, expected)


def test_the_next_step_is_prepared_in_another_thread(read: dict[str, PerturbSeqData]) -> None:
    data, options = read["sparse"], {**FIT, "epochs": 1}
    expected = trainer.fit_model(data, make_config(**options, device="cpu"), 3)
    with fake_cuda(), on_threads(2):
        found = trainer.fit_model(data, make_config(**options, device="cuda"), 3)
    assert found.history[0] == pytest.approx(expected.history[0], rel=1e-9)
