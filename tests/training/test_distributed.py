"""Several processes train what one does: how a step is divided, and jobs of two started by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import crlseq
from crlseq.config import make_config, read_toml
from crlseq.data import splits
from crlseq.data.batches import ControlPartners, epoch_batches
from crlseq.data.dataset import PerturbSeqData, read_data
from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import weighted_total
from crlseq.pipeline.progress import Progress
from crlseq.training import trainer
from crlseq.training.distributed import deal
from crlseq.training.objective import Objective
from crlseq.training.trainer import architecture_of
from crlseq.training.warm_start import Anchor
from tests.support import environment, invoke

# Steps of all perturbations are epochs of one step, so that the history tells every step.
ONE_STEP = "[training]\nepochs = 100\nperturbations_per_step = 32\npatience = 1.0\ndtype = 'float64'\nthreads = 1\n"
# Pieces of up to 25 cells in steps of five, which four ranks cannot share evenly, and a last step of fewer.
UNEVEN = "[training]\nepochs = 8\nbatch_size = 25\nperturbations_per_step = 5\ndtype = 'float64'\nthreads = 1\n"
LINEAR, GRADIENT = "[model]\nn_latents = 3\nbootstrap = 0\n", "[model]\nn_latents = 3\nmethod = 'gradient'\n"


@given(st.lists(st.integers(2, 64), min_size=1, max_size=40), st.integers(1, 8))
def test_every_piece_is_dealt_once_and_evenly(sizes: list[int], n_ranks: int) -> None:
    hands = deal(np.array(sizes), n_ranks)
    assert sorted(np.concatenate(hands)) == list(range(len(sizes)))
    assert all((np.diff(hand) > 0).all() for hand in hands)
    loads = [sum(sizes[i] for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes)


@pytest.fixture(scope="module")
def data(screen) -> PerturbSeqData:
    return read_data(screen.copy(), make_config().data, 0)


@pytest.mark.parametrize("penetrance", [1.0, 0.6])
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("n_ranks", [2, 3, 6])
def test_the_parts_of_a_step_add_up_to_it(data, preset, n_ranks, penetrance) -> None:
    config = make_config(preset).model
    torch.manual_seed(0)
    n_perturbations = len(data.perturbation_names)
    model = DiscrepancyVAE(**architecture_of(config, data.n_genes, 3, n_perturbations)).double()
    model.penetrance[::2] = penetrance
    anchor = (
        Anchor(np.zeros((len(data.split), 3)), np.full(3, 0.5), np.full(len(data.split), np.nan))
        if preset == "default"
        else None
    )
    objective = Objective(model, data, config, 30.0, anchor)
    cells = [own[: 200 if c == 0 else 6 + 3 * c] for c, own in enumerate(data.cells_by_condition(splits.TRAIN))]
    rng = np.random.default_rng(1)
    batch = epoch_batches(cells, ControlPartners(cells[0], data.batch), 20, 5, rng)[0]
    assert not batch.mask.all() and len(batch.mask) == 5  # of six ranks one has nothing to do

    def value_and_gradient(own: np.ndarray | None) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        model.zero_grad()
        terms = objective(objective.prepare(batch, own), torch.Generator().manual_seed(2))
        weighted_total(terms, dict.fromkeys(terms, 1.0)).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {name: term.item() for name, term in terms.items()}, gradients

    terms, gradients = value_and_gradient(None)
    parts = [value_and_gradient(own) for own in deal(batch.mask.sum(1), n_ranks)]
    for name, value in terms.items():
        assert sum(part[0][name] for part in parts) == pytest.approx(value, rel=1e-12)
    for _, part in parts:
        assert part.keys() == gradients.keys()  # so that all ranks add up the same
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(part[1][name] for part in parts), gradient, rtol=1e-9, atol=1e-12)


def torchrun(*words: object, n: int = 2) -> subprocess.Popen[str]:
    """``crlseq WORDS`` on so many processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m", "crlseq"]
    return subprocess.Popen(
        [*launch, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def rank_process(launcher: int, rank: int) -> int:
    """Process of a rank among the children of torchrun."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise LookupError(rank)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def history(folder: Path) -> np.ndarray:
    return pd.read_csv(folder / "history.csv").to_numpy()


def said(errors: str) -> list[str]:
    """What crlseq said, and not torchrun; without epochs."""
    return [line for line in errors.splitlines() if line.startswith(("crlseq:", "•"))]


NO_CHILDREN = not Path(f"/proc/self/task/{os.getpid()}/children").exists()
in_proc = pytest.mark.skipif(NO_CHILDREN, reason="processes are found in /proc")


@in_proc
def test_a_killed_rank_ends_the_job_and_one_process_goes_on(screen_file, tmp_path) -> None:
    config = tmp_path / "fit.toml"
    config.write_text(ONE_STEP + LINEAR)
    words = ["fit", screen_file, "--config", config, "--output"]
    job = torchrun(*words, tmp_path / "three", n=3)
    checkpoint = tmp_path / "three.partial" / "resume.pt"
    wait_for(lambda: checkpoint.exists() or job.poll() is not None)
    os.kill(rank_process(job.pid, 1), signal.SIGKILL)
    out, err = job.communicate(timeout=400)
    assert job.returncode == 1 and out == ""
    assert said(err)[-2].startswith("• stage 6 of 8: training the network (after ")
    assert err.count("• stage 6 of 8") == 1 and "3 processes train together." in err
    assert said(err)[-1].startswith("crlseq: Another rank was lost") and err.count("crlseq: Another") == 1
    assert "--resume, on any number of ranks." in err
    assert "exitcode  : 130" in err  # as torchrun tells of the survivors
    assert 0 <= torch.load(checkpoint, weights_only=True)["epoch"] < 99

    assert invoke(*words, tmp_path / "one").code == 0
    assert invoke(*words, tmp_path / "three", "--resume").code == 0
    np.testing.assert_allclose(history(tmp_path / "three"), history(tmp_path / "one"), rtol=0, atol=1e-5)


class StopError(Exception):
    pass


def test_four_processes_go_on_where_one_stopped(screen, tmp_path, monkeypatch) -> None:
    label = screen.obs["perturbation"].astype(str)
    most = {"g0": 12, "g1": 15, "g2": 20, "g3": 30}  # of 60
    uneven = tmp_path / "screen.h5ad"
    screen[label.groupby(label).cumcount() < label.map(most).fillna(1000)].copy().write_h5ad(uneven)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    file = tmp_path / "fit.toml"
    file.write_text(UNEVEN + GRADIENT)
    config = make_config(None, read_toml(file))

    def stop(record: dict[str, float], n_epochs: int) -> None:
        if record["epoch"] == 2:  # before this epoch's checkpoint
            raise StopError

    with pytest.raises(StopError):
        crlseq.fit(uneven, tmp_path / "four", config=config, progress=Progress(epoch=stop))
    whole = crlseq.fit(uneven, tmp_path / "one", config=config)
    job = torchrun("fit", uneven, "--config", file, "--output", tmp_path / "four", "--resume", n=4)
    out, err = job.communicate(timeout=400)
    assert job.returncode == 0 and out == "", err
    stages = [line for line in said(err) if line.startswith("• stage")]
    assert len(stages) == len(set(stages)) == 5  # once each, whatever the number of processes
    np.testing.assert_allclose(history(tmp_path / "four"), whole.history.to_numpy(), rtol=0, atol=1e-5)
    again = crlseq.load(tmp_path / "four")
    assert again.info["processes"] == 4
    np.testing.assert_allclose(again.interventions["shift"], whole.interventions["shift"], atol=1e-6)


def test_an_error_is_told_once_and_all_processes_end_with_its_code(run_folder, screen_file) -> None:
    job = torchrun("fit", screen_file, "--output", run_folder)
    out, err = job.communicate(timeout=400)
    assert job.returncode == 1 and out == ""
    assert said(err) == ["• stage 1 of 8: reading the screen", f"crlseq: The output {run_folder} exists."]
    assert err.count("exitcode  : 3") == 2
